"""The CUDA stage of the image, which is built where there is no GPU and runs where there is one."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.serve.test_deploy import DOCKERFILE, ROOT, instructions

COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())
CACHES = ("XDG_CACHE_HOME", "GPTQMODEL_TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH")
CAPABILITIES = {75: "T4, RTX 20", 80: "A100", 86: "RTX 30", 89: "RTX 40", 90: "H100, H200", 100: "B200", 120: "RTX 50"}
DRIVERS = {
    12: 525,
    13: 580,
}  # the oldest of Linux for each major version, by NVIDIA's table of minor version compatibility


def base(stage: str) -> tuple[int, str]:
    """The major version of CUDA that a stage starts from, and which of the images it is."""
    found = re.search(rf"^FROM nvidia/cuda:(\d+)[.\d]+-(\w+)-\S+ AS {stage}$", DOCKERFILE.read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]), found[2]


def run_lines(stage: str) -> list[str]:
    return [line.removeprefix("RUN ") for line in instructions(stage) if line.startswith("RUN ")]


def installed(stage: str) -> set[str]:
    (line,) = [line for line in run_lines(stage) if "apt-get install" in line]
    return set(line.split("apt-get install")[1].split("&&")[0].split())


def environment() -> dict[str, str]:
    """What ENV sets in the stage that runs."""
    words = [word for line in instructions("cuda") if line.startswith("ENV ") for word in shlex.split(line)[1:]]
    return dict(word.split("=", 1) for word in words)


@pytest.fixture
def flags(tmp_path: Path) -> dict[str, str]:
    """What llama.cpp's CMake is given: the stage's line is run, with a Python that writes it down."""
    (line,) = [line for line in run_lines("cuda-build") if "install-llama-cpp" in line]
    fake = tmp_path / "bin" / "python"
    fake.parent.mkdir()
    fake.write_text(
        '#!/bin/sh\ncase "$*" in *"cache dir"*) exit 1;; *install*) printenv CMAKE_ARGS > "$NOTES";; esac\n'
    )
    (fake.parent / "pip").write_text("#!/bin/sh\n")
    for program in fake.parent.iterdir():
        program.chmod(0o755)
    steps = line.replace("python3 -m venv /opt/quantize", "true").replace("/opt/quantize", str(tmp_path))
    notes = tmp_path / "notes"
    given = {"PATH": os.environ["PATH"], "NOTES": str(notes)}
    subprocess.run(["sh", "-ec", steps], check=True, cwd=ROOT, env=given)
    words = [word.removeprefix("-D").partition("=") for word in shlex.split(notes.read_text())]
    return {name: value for name, _, value in words}  # of two, CMake takes the last


def test_llama_cpp_is_compiled_for_no_machine_in_particular(flags: dict[str, str]) -> None:
    assert flags["GGML_CUDA"].lower() == "on"
    assert flags["GGML_NATIVE"].lower() == "off"


@pytest.mark.parametrize("capability", CAPABILITIES, ids=CAPABILITIES.get)
def test_each_generation_of_cards_has_code(flags: dict[str, str], capability: int) -> None:
    """Its own, or of the same major version and older, or text of any older one, which the driver compiles."""
    found = re.findall(r"(\d+)(a?)(-real|-virtual)?(?:;|$)", flags["CMAKE_CUDA_ARCHITECTURES"])
    assert ";".join("".join(item) for item in found) == flags["CMAKE_CUDA_ARCHITECTURES"]
    runs = [
        int(number)
        for number, only, kind in found
        if int(number) == capability
        or (not only and kind != "-virtual" and int(number) // 10 == capability // 10 and int(number) <= capability)
        or (not only and kind != "-real" and int(number) <= capability)
    ]
    assert runs


def test_kernels_can_be_compiled_where_a_model_is_loaded() -> None:
    """gptqmodel asks for nvcc, g++ and Python's headers; Triton for a C compiler and the same headers."""
    assert base("cuda")[1] == "devel"
    assert {"build-essential", "python3-dev"} <= installed("cuda")
    assert environment()["CUDA_HOME"] == "/usr/local/cuda"


def test_one_cuda_compiles_and_runs_and_its_driver_is_stated() -> None:
    (major, _), (other, _) = base("cuda-build"), base("cuda")
    assert major == other
    told = [DOCKERFILE.read_text(), (ROOT / "deploy" / "compose.yaml").read_text(),
            (ROOT / "docs" / "gateway.md").read_text()]  # fmt: skip
    assert [re.findall(r"driver(?: is|:) (\d{3}) or later", re.sub(r"\n(?:# )?", " ", text)) for text in told] == [
        [str(DRIVERS[major])]
    ] * 3


def check_of_torch() -> str:
    """The last command of the line that installs, which no other CUDA passes."""
    (line,) = [line for line in run_lines("cuda-build") if "install-llama-cpp" in line]
    words = shlex.split(line.rpartition("&&")[2])
    assert words[:2] == ["/opt/quantize/bin/python", "-c"]
    return words[2]


@pytest.mark.parametrize(
    ("torch", "image", "passes"),
    [("13.0", "13.0.2", True), ("12.8", "13.0.2", False), ("13.0", "12.8.1", False), (None, "13.0.2", False),
     ("13.0", "13.01.1", False)],
)  # fmt: skip
def test_the_image_is_not_built_with_a_torch_of_another_cuda(
    tmp_path: Path, torch: str | None, image: str, passes: bool
) -> None:
    """torch compiles extensions with an nvcc of its own major version only."""
    (tmp_path / "torch.py").write_text(f"class version:\n    cuda = {torch!r}\n")
    given = {"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path), "CUDA_VERSION": image}
    done = subprocess.run(["python3", "-c", check_of_torch()], env=given, capture_output=True, check=False)
    assert (done.returncode == 0) is passes


def test_every_cache_is_in_a_folder_that_may_be_written_and_run_from() -> None:
    """The root of the file system is read-only there, and Docker mounts a tmpfs noexec."""
    service = COMPOSE["services"]["gateway-cuda"]
    assert service["read_only"] is True
    name, target = service["volumes"][-1].split(":")
    assert name in COMPOSE["volumes"]
    assert not any(target == item or target.startswith(f"{item}/") for item in service["tmpfs"])
    set_there = environment()
    assert [set_there[cache].startswith(target) for cache in CACHES] == [True] * len(CACHES)
    assert f"VOLUME {target}" in instructions("cuda")  # written to without compose, too
    user = next(line.split()[1] for line in instructions("cuda") if line.startswith("USER "))
    (line,) = [line for line in run_lines("cuda") if "useradd" in line]
    assert f"useradd --create-home --uid {user} quantize" in line
    assert f"install -d -o quantize -g quantize {target}" in line


def test_the_artifacts_are_there_as_for_the_other_service() -> None:
    first, *_ = COMPOSE["services"]["gateway-cuda"]["volumes"]
    assert [first] == COMPOSE["services"]["gateway-cpu"]["volumes"]


def test_gptqmodel_keeps_its_kernels_where_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable of the image is the one that the installed release reads."""
    cpp = pytest.importorskip("gptqmodel.utils.cpp")
    monkeypatch.setenv(CACHES[1], str(tmp_path))
    assert cpp.default_torch_ops_build_root("marlin") == tmp_path / "marlin"
