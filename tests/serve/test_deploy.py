"""What runs elsewhere: the Dockerfile and compose files by their linters, their steps by hand, and --print."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import urllib.request
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from quantize.serve.handover import VLLM_IMAGE
from quantize.system.gpus import LocalGpu
from tests.conftest import Built, Run

ROOT = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent
DOCKERFILE = ROOT / "deploy" / "Dockerfile"


def test_the_dockerfile_passes_hadolint() -> None:
    done = subprocess.run([BIN / "hadolint", DOCKERFILE], capture_output=True, text=True, check=False)
    assert done.stdout == ""
    assert done.returncode == 0


def check_compose(path: Path) -> None:
    command = [BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_compose_file_fits_its_schema_and_names_stages_that_there_are() -> None:
    check_compose(ROOT / "deploy" / "compose.yaml")
    stages = set(re.findall(r"^FROM \S+ AS (\S+)$", DOCKERFILE.read_text(), re.MULTILINE))
    services = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())["services"]
    assert {item["build"]["target"] for item in services.values()} <= stages


def instructions(stage: str) -> list[str]:
    """The instructions of one stage, continued lines joined."""
    text = DOCKERFILE.read_text().replace("\\\n", " ")
    part = text.split(f" AS {stage}\n")[1].split("\nFROM ")[0]
    return [line for line in part.splitlines() if line and not line.startswith("#")]


@pytest.mark.demo
def test_the_steps_of_the_image_in_a_fresh_environment(built: Built, tmp_path: Path) -> None:
    """The same set-up, entry point and health check as in the image; slow, because everything is installed."""
    (install,) = [line for line in instructions("cpu-build") if "pip install" in line]
    steps = install.removeprefix("RUN ").replace("/opt/quantize", str(tmp_path / "opt"))
    steps = steps.replace("python -m", f"{shlex.quote(sys.executable)} -m").replace("--no-cache-dir", "--quiet")
    subprocess.run(["sh", "-ec", steps], check=True, cwd=ROOT)
    (entry,) = [json.loads(line.removeprefix("ENTRYPOINT ")) for line in instructions("cpu") if "ENTRYPOINT" in line]
    (check,) = [line.partition("CMD ")[2] for line in instructions("cpu") if line.startswith("HEALTHCHECK")]
    (weights,) = built.store.root.glob("*/q8_0/current/*.gguf")
    environment = {**os.environ, "PATH": f"{tmp_path}/opt/bin:/usr/bin:/bin"}
    command = [*entry, f"tiny={weights}", "--port", "0", "--device", "cpu"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env=environment, text=True, cwd=tmp_path)
    try:
        assert process.stderr is not None
        url = next(json.loads(line)["url"] for line in process.stderr if '"listening"' in line)
        next(line for line in process.stderr if '"engine_ready"' in line)
        healthy = [word.replace("http://127.0.0.1:8000", url) for word in json.loads(check)]
        subprocess.run(healthy, check=True, env=environment)
        with urllib.request.urlopen(f"{url}/ready") as answer:
            assert json.load(answer)["models"]["tiny"]["runtime"].startswith("llama.cpp")
    finally:
        process.terminate()
        process.communicate(timeout=20)
    assert process.returncode == 0


@pytest.fixture
def q8(built: Built, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("QUANTIZE_STORE", str(built.store.root))
    return "tiny/q8_0"


def test_print_llama_server(run: Run, q8: str, built: Built) -> None:
    done = run("serve", q8, "--print", "llama-server", "--context", 256, "--concurrency", 2)
    words = shlex.split(done.stdout, comments=True)
    assert words[:2] == ["CUDA_VISIBLE_DEVICES=0", "llama-server"]
    options = dict(pairwise(words))
    assert Path(options["--model"]).is_file()
    assert options["--ctx-size"] == "512"
    assert options["--api-key"].startswith("${QUANTIZE_API_KEY:?")  # the shell puts the key in, this text has none
    assert "CUDA" not in run("serve", q8, "--print", "llama-server", "--device", "cpu").stdout


def test_the_file_that_reads_images_is_handed_over_too(run: Run, built: Built, tmp_path: Path) -> None:
    store = built.copy(tmp_path / "own")
    towers = store.find("tiny/q8_0").folder / "mmproj-tiny-F16.gguf"
    towers.write_bytes(b"GGUF")
    text = run("serve", "tiny/q8_0", "--store", store.root, "--print", "llama-server").stdout
    assert dict(pairwise(shlex.split(text, comments=True)))["--mmproj"] == str(towers.resolve())
    said = run("serve", "tiny/q8_0", "--store", store.root, "--print", "ollama").stdout
    assert f"# It reads text only: {towers.name} is not in it." in said


def test_print_ollama(run: Run, q8: str) -> None:
    lines = [line for line in run("serve", q8, "--print", "ollama").stdout.splitlines() if not line.startswith("#")]
    assert lines[0].startswith("FROM /")
    assert Path(lines[0].removeprefix("FROM ")).is_file()
    assert lines[1] == "PARAMETER num_ctx 512"


def test_a_small_kv_cache_elsewhere(run: Run, q8: str, tiny: Path, tmp_path: Path) -> None:
    words = shlex.split(run("serve", q8, "--print", "llama-server", "--kv-bits", 8).stdout, comments=True)
    options = dict(pairwise(words[words.index("llama-server") + 1 :]))
    assert [options[f"--{name}"] for name in ("flash-attn", "cache-type-k", "cache-type-v")] == ["on", "q8_0", "q8_0"]
    service = yaml.safe_load(run("serve", q8, "--print", "compose", "--kv-bits", 4).stdout)["services"]["model"]
    assert service["command"][-2:] == ["--kv-bits", "4"]
    packed = f"m={folder_with(tmp_path, tiny, {'quant_method': 'awq'})}"
    for text, runtime in ((q8, "ollama"), (packed, "vllm"), (packed, "docker"), (packed, "compose")):
        done = run("serve", text, "--print", runtime, "--kv-bits", 8)
        assert (done.exit_code, done.stdout) == (2, "")
        assert "--kv-bits 8: " in done.stderr


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_print_compose(run: Run, q8: str, tmp_path: Path, device: str) -> None:
    path = tmp_path / "compose.yaml"
    path.write_text(run("serve", q8, "--print", "compose", "--device", device).stdout)
    check_compose(path)
    service = yaml.safe_load(path.read_text())["services"]["model"]
    assert service["ports"] == ["127.0.0.1:8000:8000"]
    assert Path(service["volumes"][0]["source"]).is_dir()
    devices = [item["device_ids"] for item in service.get("deploy", {}).get("resources", {}).get("reservations", {})
               .get("devices", [])]  # fmt: skip
    assert devices == ([] if device == "cpu" else [["1"]])


def folder_with(tmp_path: Path, tiny: Path, quantization: dict[str, object] | None) -> Path:
    config = json.loads((tiny / "config.json").read_text())
    folder = tmp_path / "packed"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes((tiny / "model.safetensors").read_bytes())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    return folder


def test_print_vllm(run: Run, tiny: Path, tmp_path: Path) -> None:
    folder = folder_with(tmp_path, tiny, {"quant_method": "awq"})
    words = shlex.split(run("serve", f"m={folder}", "--print", "vllm").stdout, comments=True)
    assert words[:4] == ["CUDA_VISIBLE_DEVICES=0", "vllm", "serve", str(folder)]
    options = dict(pairwise(words[4:]))
    assert options["--gpu-memory-utilization"] == "0.9"
    assert options["--max-model-len"] == "512"
    assert options["--served-model-name"] == "m"


@pytest.mark.parametrize(
    ("card", "wanted", "share"),
    [
        (LocalGpu("an empty one", 24 << 30, 0), [], "0.9"),
        (LocalGpu("a laptop's, with a display", 8 << 30, 2 << 30), [], "0.74"),  # three quarters are free
        (LocalGpu("a laptop's, with a display", 8 << 30, 2 << 30), ["--set", "gpu-memory-utilization=0.85"], "0.85"),
        (LocalGpu("a full one", 8 << 30, 8 << 30), [], "0.01"),
        (LocalGpu("one that does not tell", 0, 0), [], "0.9"),
    ],
)
def test_vllm_gets_what_is_free_of_the_card(
    run: Run, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, card: LocalGpu, wanted: list[str], share: str
) -> None:
    monkeypatch.setattr("quantize.serve.handover.nvidia_gpus", lambda: (LocalGpu("another", 8 << 30, 7 << 30), card))
    command = ["serve", f"m={folder_with(tmp_path, tiny, {'quant_method': 'awq'})}", "--device", "cuda:1", *wanted]
    text = run(*command, "--print", "vllm").stdout
    words = shlex.split(text, comments=True)
    options = dict(pairwise(words[4:]))
    assert options["--gpu-memory-utilization"] == share
    assert "# 2 answers at once: --concurrency is how many" in text
    assert ("which is what is free on it now" in text) == (share in ("0.74", "0.01"))
    assert "# 2 answers at once" in run(*command, "--print", "compose").stdout


def docker_words(text: str, **environment: str) -> list[str]:
    """What docker would be called with, by a shell."""
    done = subprocess.run(
        ["sh", "-c", f"docker() {{ printf '%s\\n' \"$@\"; }}\n{text}"], env={"PATH": "/usr/bin:/bin", **environment},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.splitlines()


def test_print_docker(run: Run, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole line, as a shell hands it to docker: by its defaults, and with each part set."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    folder = folder_with(tmp_path, tiny, {"quant_method": "awq"})
    words = docker_words(run("serve", f"m={folder}", "--print", "docker").stdout, QUANTIZE_API_KEY="a key")
    assert words == [
        "run", "--rm", "--runtime", "nvidia", "--gpus", "device=0", "--ipc", "host", "--publish", "127.0.0.1:8000:8000",
        "--mount", f"type=bind,source={tmp_path / 'hf'},target=/root/.cache/huggingface",
        "--mount", f"type=bind,source={folder},target=/model,readonly", VLLM_IMAGE, "--model", "/model",
        "--served-model-name", "m", "--host", "0.0.0.0", "--port", "8000", "--gpu-memory-utilization", "0.9",
        "--max-model-len", "512", "--max-num-seqs", "2", "--api-key", "a key",
    ]  # fmt: skip
    assert re.fullmatch(r"vllm/vllm-openai:v\d+\.\d+\.\d+", VLLM_IMAGE)
    odd = folder.rename(tmp_path / 'a, "b" c')
    settings = ("image=registry.local/vllm:v9", "runtime=crun", "ipc=private", f"hf-cache={tmp_path}/c",
                "gpu-memory-utilization=0.5")  # fmt: skip
    chosen = ("--device", "cuda:3", "--port", 9000, "--host", "0.0.0.0", "--context", 128, "--concurrency", 7)
    command = [
        "serve",
        f"m={odd}",
        "--print",
        "docker",
        *chosen,
        *(word for item in settings for word in ("--set", item)),
    ]
    words = docker_words(run(*command).stdout, QUANTIZE_API_KEY="k")
    assert words[1:8] == ["--rm", "--runtime", "crun", "--gpus", "device=3", "--ipc", "private"]
    assert words[9:14:2] == ["0.0.0.0:9000:8000", f"type=bind,source={tmp_path}/c,target=/root/.cache/huggingface",
                             f'type=bind,"source={tmp_path}/a, ""b"" c",target=/model,readonly']  # fmt: skip
    assert words[14] == "registry.local/vllm:v9"
    options = dict(pairwise(words[15:]))
    assert (options["--gpu-memory-utilization"], options["--max-model-len"], options["--max-num-seqs"]) == (
        "0.5", "128", "7",
    )  # fmt: skip


@pytest.mark.parametrize("setting", ["image", "image=", "colour=red", "gpu-memory-utilization=2", "ipc"])
def test_a_setting_that_is_none(run: Run, tiny: Path, tmp_path: Path, setting: str) -> None:
    folder = folder_with(tmp_path, tiny, {"quant_method": "awq"})
    done = run("serve", f"m={folder}", "--print", "docker", "--set", setting)
    assert (done.exit_code, done.stdout) == (2, "")
    assert f"--set {setting}" in done.stderr.replace("'", "")


@pytest.mark.parametrize(
    ("runtime", "quantization", "message"),
    [
        ("vllm", {"quant_method": "bitsandbytes", "load_in_8bit": True}, "does not take pre-quantized bitsandbytes"),
        ("docker", {"quant_method": "bitsandbytes", "load_in_8bit": True}, "does not take pre-quantized bitsandbytes"),
        ("ollama", {"quant_method": "gptq"}, "Ollama takes GGUF files, this is gptq"),
        ("llama-server", None, "llama-server takes GGUF files"),
    ],
)
def test_what_a_runtime_does_not_take_is_refused(
    run: Run, tiny: Path, tmp_path: Path, runtime: str, quantization: dict[str, object] | None, message: str
) -> None:
    done = run("serve", folder_with(tmp_path, tiny, quantization), "--print", runtime)
    assert done.exit_code == 3
    assert message in done.stderr
    assert done.stdout == ""


def test_compose_on_a_cpu_takes_the_image_that_has_the_runtime(run: Run, tiny: Path, tmp_path: Path) -> None:
    folder = folder_with(tmp_path, tiny, {"quant_method": "awq"})
    path = tmp_path / "compose.yaml"
    path.write_text(run("serve", f"m={folder}", "--print", "compose", "--device", "cpu").stdout)
    check_compose(path)
    service = yaml.safe_load(path.read_text())["services"]["model"]
    assert service["image"] == "quantize-gateway:cuda"  # the only one with torch
    assert "deploy" not in service
    (install,) = [line for line in instructions("cuda-build") if "gptqmodel" in line]
    assert "serve" in install


def test_compose_of_several_is_one_file(run: Run, q8: str, tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "compose.yaml"
    words = (q8, f"other={tiny}", f"third={tiny}", "--host", "::1", "--port", 9000)
    path.write_text(run("serve", *words, "--print", "compose", "--device", "cpu").stdout)
    check_compose(path)
    services = yaml.safe_load(path.read_text())["services"]
    assert list(services) == ["tiny-q8-0", "other", "third"]
    assert [item["ports"] for item in services.values()] == [[f"[::1]:{9000 + n}:8000"] for n in range(3)]


@pytest.mark.parametrize(("key", "code"), [(None, 2), ("", 2), ("a-key", 0)])
def test_what_is_printed_stops_without_a_key(run: Run, q8: str, tmp_path: Path, key: str | None, code: int) -> None:
    program = tmp_path / "llama-server"
    program.write_text('#!/bin/sh\necho "$@"\n')
    program.chmod(0o755)
    text = run("serve", q8, "--print", "llama-server").stdout
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", **({} if key is None else {"QUANTIZE_API_KEY": key})}
    done = subprocess.run(["sh", "-c", text], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert ("QUANTIZE_API_KEY: set it" in done.stderr) == (code != 0)
    assert done.stdout.rstrip().endswith("--api-key a-key" if code == 0 else "")


def test_vllm_does_not_take_gguf(run: Run, q8: str) -> None:
    assert run("serve", q8, "--print", "vllm").exit_code == 3
