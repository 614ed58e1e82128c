"""quantize doctor: what is said to be missing is what is missing, what is said to work has run, and nothing heavy is
loaded into the command itself.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from importlib.metadata import version
from pathlib import Path

import pytest

import quantize.cli.diagnosis
import quantize.cli.requirements
from quantize.cli import trials
from quantize.cli.gpu_advice import advise_on_gpus
from quantize.cli.requirements import required, unknown, unmet
from quantize.cli.trials import Trial
from quantize.errors import VerifyError
from quantize.formats import formats, runtime_kind
from quantize.runtimes.llama_cpp.devices import build_line
from quantize.runtimes.llama_cpp.probe import try_llama_cpp
from quantize.runtimes.probe import Probe, check_alike
from quantize.runtimes.transformers.probe import _check_architectures
from quantize.system.gpus import LocalGpu
from quantize.system.machine import Machine
from tests.conftest import Run

ROOT = Path(__file__).parent.parent


REINSTALL = "reinstall it with: pip install --force-reinstall --no-cache-dir --no-deps torch=="


def die_of_a_signal() -> str:
    """With a file in its temporary folder."""
    tempfile.mkdtemp()
    os.kill(os.getpid(), signal.SIGSEGV)
    return "never"


def raise_an_import_error() -> str:
    raise ImportError("libcudart.so.12: cannot open shared object file")


def compute_nonsense() -> str:
    check_alike([1.0, 2.0, 3.0], [3.0, -2.0, 1.0], "a product")
    return "never"


def compute_no_numbers() -> str:
    check_alike([1.0, float("nan")], [1.0, 2.0], "a product")
    return "never"


def hang() -> str:
    time.sleep(120)
    return "never"


def without(monkeypatch: pytest.MonkeyPatch, *missing: str, **old: str) -> None:
    """Have some distributions not installed, or in an old version."""
    real = metadata.version

    def version(name: str) -> str:
        if name in missing:
            raise metadata.PackageNotFoundError(name)
        return old.get(name) or real(name)

    monkeypatch.setattr(quantize.cli.requirements.metadata, "version", version)


def abilities(run: Run) -> dict[str, dict[str, object]]:
    result = run("doctor", "--quick", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    return {item["format"]: item for item in json.loads(result.stdout)["abilities"]}


def test_what_is_here(run: Run, tmp_path: Path) -> None:
    data = json.loads(run("doctor", "--quick", "--json", "--store", tmp_path / "new" / "store").stdout)
    for name in ("torch", "transformers", "gguf"):
        assert data["versions"][name] == metadata.version(name)
    store, cache, scratch = data["folders"]
    assert store["path"] == str(tmp_path / "new" / "store")
    assert cache["path"] == os.environ["QUANTIZE_CACHE"]
    assert abs(store["free_bytes"] - shutil.disk_usage(tmp_path).free) < 1 << 30
    assert store["writable"] is cache["writable"] is scratch["writable"] is True
    assert not (tmp_path / "new").exists()
    for item in data["abilities"]:
        assert (item["build_lacks"], item["serve_lacks"], item["install"]) == ([], [], None)


def test_every_engine_that_is_installed_runs(run: Run) -> None:
    """And is told as JSON; the exit code is that of a command that could look."""
    result = run("doctor", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    data = json.loads(result.stdout)
    trials = {item["engine"]: item for item in data["trials"]}
    names = ["torch", "transformers", "gptqmodel", "bitsandbytes", "compressed-tensors", "llama.cpp", "mlx"]
    assert list(trials) == names
    assert {name: (item["state"], item["problem"]) for name, item in trials.items()} == dict.fromkeys(
        trials, ("works", None)
    )
    for item in trials.values():
        assert item["version"] == metadata.version(item["package"])
        assert item["seconds"] > 0
    for kind in ("F16", "Q4_0", "Q8_0", "Q4_K_M", "48 tokens"):
        assert kind in trials["llama.cpp"]["ran"]
    assert all(item["build_broken"] == item["serve_broken"] == [] for item in data["abilities"])


def test_quick_starts_no_engine(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize.cli.diagnosis, "try_engines", lambda _: pytest.fail("an engine was started"))
    result = run("doctor", "--quick")
    assert result.exit_code == 0
    assert "engines were not started" in result.stdout
    assert json.loads(run("doctor", "--quick", "--json").stdout)["trials"] is None


def broken(package: str, function: Callable[[], str]) -> Trial:
    """What becomes of an engine whose probe does this."""
    (trial,) = trials.try_engines([Probe(package, package, function)])
    return trial


@pytest.mark.parametrize(
    ("function", "state", "problem", "repair"),
    [
        (die_of_a_signal, "died", "the process was ended by SIGSEGV: ", "run it again; if it dies again, report it"),
        (try_llama_cpp, "works", None, None),
        (raise_an_import_error, "fails", "ImportError: libcudart.so.12: cannot open", REINSTALL),
        (compute_nonsense, "fails", "a product: one computation in two ways gives two results", REINSTALL),
        (compute_no_numbers, "fails", "a product: the results are not finite numbers", REINSTALL),
    ],
    ids=lambda item: getattr(item, "__name__", None),
)
def test_what_does_not_work_is_told_with_one_line_that_repairs_it(
    function: Callable[[], str], state: str, problem: str | None, repair: str | None
) -> None:
    trial = broken("torch", function)
    assert trial.state == state
    assert str(trial.problem).startswith(str(problem))
    assert str(trial.repair).startswith(str(repair))
    assert "\n" not in str(trial.repair)


def test_what_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "MOST_SECONDS", 1)
    trial = broken("torch", hang)
    assert (trial.state, trial.problem) == ("died", "the process did not end within 1 s and was ended")


def test_what_is_not_installed_is_not_tried() -> None:
    assert trials.try_engines([Probe("none", "no-such-package", hang)]) == ()


def test_people_read_what_died_and_what_to_do(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = Probe("bitsandbytes", "bitsandbytes", die_of_a_signal)
    monkeypatch.setattr(quantize.cli.diagnosis, "try_engines", lambda _: trials.try_engines([probe]))
    result = run("doctor")
    assert result.exit_code == 0
    assert re.search(r"bitsandbytes +died +[\d.]+ +see below", result.stdout)
    assert re.search(r"bitsandbytes +NO: bitsandbytes +NO: bitsandbytes", result.stdout)
    assert re.search(r"gguf +yes +yes", result.stdout)
    assert re.search(r"^bitsandbytes [\d.]+ died: the process was ended by SIGSEGV: .*\n  run it", result.stdout, re.M)


def test_nothing_is_left_of_a_trial_that_died(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    broken("torch", die_of_a_signal)
    assert [path.name for path in tmp_path.glob("quantize-doctor-*")] == []


def test_a_missing_engine_is_named_with_its_pip_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "bitsandbytes")
    found = abilities(run)
    item = found.pop("bitsandbytes")
    assert [text.partition(">")[0] for text in item["build_lacks"]] == ["bitsandbytes"]  # type: ignore[attr-defined]
    assert item["build_lacks"] == item["serve_lacks"]
    assert item["install"] == "pip install 'quantize-models[bnb]'"
    assert all(other["install"] is None for other in found.values())


def test_torch_is_what_all_formats_are_built_with(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GGUF artifact is served without it all the same."""
    without(monkeypatch, "torch", "fastapi")
    found = abilities(run)
    assert all(any("torch" in text for text in item["build_lacks"]) for item in found.values())  # type: ignore[attr-defined]
    assert not any("torch" in text for text in found["gguf"]["serve_lacks"])  # type: ignore[attr-defined]
    assert (
        found["gguf"]["install"]
        == "CMAKE_ARGS=-DGGML_NATIVE=OFF pip install --no-cache-dir 'quantize-models[gguf,serve]'"
    )


def test_an_old_version_is_as_good_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, transformers="4.1")
    assert unmet(required(["torch"])) == ("transformers>=5",)
    assert unmet(required(["gguf"]), ["llama-cpp-python"]) == ()


def test_an_extra_that_the_installation_does_not_know_is_not_met() -> None:
    """As after an update of an editable installation: its metadata is still that of before."""
    assert unknown(["torch", "new"]) == ("quantize-models[new], which this installation does not know",)


def test_the_table_is_for_people(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "llama-cpp-python")
    text = run("doctor", "--quick").stdout
    assert re.search(r"llama-cpp-python +not installed", text)
    assert "lacks llama-cpp-python>=" in text
    assert "CMAKE_ARGS=-DGGML_NATIVE=OFF pip install --no-cache-dir 'quantize-models[gguf]'" in text


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_store_that_can_not_be_written(run: Run, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    store = json.loads(run("doctor", "--quick", "--json", "--store", tmp_path / "store").stdout)["folders"][0]
    tmp_path.chmod(0o700)
    assert store["writable"] is False


def test_a_store_below_a_file(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = json.loads(run("doctor", "--quick", "--json", "--store", tmp_path / "file" / "store").stdout)["folders"][0]
    assert store["writable"] is False


def test_nothing_heavy_is_loaded() -> None:
    code = (
        "import sys\nfrom quantize.cli import diagnosis\nfrom quantize.cli import main\n"
        "diagnosis.try_engines = lambda _: ()\n"
        "try:\n  main(['doctor', '--json'])\nexcept SystemExit:\n  pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'gguf', 'llama_cpp', 'fastapi', 'gptqmodel'}\n"
        "print('HEAVY', *sorted({name.partition('.')[0] for name in sys.modules} & heavy))"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, check=True)
    assert result.stdout.rpartition("HEAVY")[2] == "\n"


BESIDE = Machine((LocalGpu("RTX 4060", 8 * 2**30, 2**30),), 2**34, 2**33, 4)


def test_a_card_that_nothing_here_is_built_for_is_told_with_the_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantize.runtimes.transformers.kind.version", lambda _: "2.13.0+cpu")
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/g++" if name == "g++" else None)
    runtimes = [kind.runtime for kind in formats().values() if kind.runtime is not None]
    assert advise_on_gpus(replace(BESIDE, gpus=()), runtimes, quick=False) == ()
    text = "\n".join(advise_on_gpus(BESIDE, runtimes, quick=False))
    assert "llama.cpp can't use the RTX 4060 (CPU only, by its build)" in text
    line = "pip install --force-reinstall --no-deps --no-cache-dir --no-binary llama-cpp-python llama-cpp-python=="
    assert f'CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_CUDA=on" {line}{version("llama-cpp-python")}' in text
    assert "-DGGML_VULKAN=on" in text
    assert "transformers can't use the RTX 4060 (CPU only, by its build). A build that can: pip install" in text
    assert "nvcc, ninja not found" in text


def test_a_driver_that_torch_does_not_work_with_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch is built for CUDA, the driver knows a card, and torch in a process of its own sees none."""
    monkeypatch.setattr("quantize.runtimes.transformers.kind.version", lambda _: "2.13.0")
    monkeypatch.setattr("quantize.runtimes.transformers.kind.nvidia_gpus", lambda: BESIDE.gpus)
    monkeypatch.setattr("quantize.cli.gpu_advice.driver_version", lambda: "535.104")
    text = "\n".join(advise_on_gpus(BESIDE, [runtime_kind("safetensors")], quick=False))
    assert "transformers sees no GPU, though it is built for some and the driver (535.104) knows the RTX 4060" in text


@pytest.mark.parametrize(
    ("capability", "fails"), [((8, 9), False), ((7, 5), False), ((6, 1), True), ((12, 0), False), ((13, 0), False)]
)
def test_a_card_that_torch_has_no_code_for_is_told(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], fails: bool
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90", "sm_120"])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "GTX 1080")
    if fails:
        with pytest.raises(VerifyError, match=r"no code for the GTX 1080 \(compute capability 6\.1"):
            _check_architectures(torch)
    else:
        _check_architectures(torch)


@pytest.mark.parametrize("library", ["CUDA", "VULKAN"])
def test_the_page_on_gpus_has_the_lines_that_doctor_prints(library: str) -> None:
    line = build_line(library).rpartition("==")[0]
    assert line in (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
