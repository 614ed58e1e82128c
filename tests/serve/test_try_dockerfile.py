"""tools/try_dockerfile.py without a Debian to try it in: what it would run, and what it does in another way."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.serve.test_deploy import DOCKERFILE
from tools import try_dockerfile
from tools.try_dockerfile import Roots, stages, stood_in

STAGES = {stage.name: stage for stage in stages(DOCKERFILE.read_text(encoding="utf-8"))}


@pytest.fixture
def done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[tuple[str, str, str]]]:
    """Each stage's commands, as (command, folder, user); roots are empty folders."""
    found: dict[str, list[tuple[str, str, str]]] = {name: [] for name in STAGES}

    def inside(root: Path, command: str, environment: Mapping[str, str], there: str = "/", user: str = "0") -> None:
        found[root.name].append((command, there, user))
        if "venv /opt/quantize" in command:
            assert (root / "src/quantize/__init__.py").is_file()
            assert (root / "src/deploy/install-llama-cpp").is_file()
            assert (root / "src/pyproject.toml").is_file()
            (root / "opt/quantize/bin").mkdir(parents=True)
        if command.startswith("quantize"):
            assert (root / "opt/quantize/bin").is_dir()
            assert environment["PATH"].startswith("/opt/quantize/bin:/")

    monkeypatch.setattr(try_dockerfile, "inside", inside)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "done").touch()
    for stage in STAGES.values():
        assert [*Roots(tmp_path).follow(stage)]
    return found


def test_every_run_line_runs_in_its_stage_and_the_entry_point_as_its_user(
    done: dict[str, list[tuple[str, str, str]]],
) -> None:
    assert set(STAGES) == {"cpu-build", "cpu", "cuda-build", "cuda"}
    for name, stage in STAGES.items():
        lines = [line for line in stage.lines if line.startswith(("RUN ", "ENTRYPOINT "))]
        own = [item for item in done[name] if item[0] != try_dockerfile.PYTHON_IMAGE]
        assert len(own) == len(lines)
    for name in ("cpu", "cuda"):
        assert done[name][-1] == ("quantize serve --help", "/home/quantize", "10001")
    assert done["cpu-build"][0][0] == try_dockerfile.PYTHON_IMAGE
    assert done["cuda-build"][0][0].startswith("apt-get update")


def test_without_cuda_llama_cpp_is_compiled_for_the_cpu_and_what_is_not_tried_is_said() -> None:
    (line,) = [line for line in STAGES["cuda-build"].lines if line.startswith("RUN ") and "install-llama-cpp" in line]
    command, otherwise = stood_in(line.removeprefix("RUN "))
    assert 'CMAKE_ARGS="-DGGML_CUDA=off ${CMAKE_ARGS:-}"' in command
    assert command.rstrip().endswith("llama-cpp-python")
    assert "torch" not in command
    assert otherwise[0] == "llama.cpp is compiled without CUDA"
    assert otherwise[1].startswith("not tried: /opt/quantize/bin/python -c")
    (plain,) = [line for line in STAGES["cpu-build"].lines if line.startswith("RUN ") and "install-llama-cpp" in line]
    assert stood_in(plain)[1] == ()
