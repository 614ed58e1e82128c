"""llama.cpp's log: where it goes, and that the function which takes it is never freed."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import pytest

from quantize.runtimes.llama_cpp.log import keep_log, log_text, telling_line

llama_cpp = pytest.importorskip("llama_cpp")
ROOT = Path(__file__).resolve().parents[1]


def taker() -> int | None:
    """The address that llama.cpp calls with its log."""
    function, data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(function), ctypes.byref(data))
    return ctypes.cast(function, ctypes.c_void_p).value


def fail_to_open(path: Path) -> None:
    assert not llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())


def test_the_function_that_takes_the_log_outlives_whoever_asked_for_it() -> None:
    keep_log(llama_cpp)
    first = taker()
    gc.collect()
    keep_log(llama_cpp)
    assert first is not None
    assert taker() == first


def test_nobody_else_gives_llama_cpp_a_function_that_may_be_freed() -> None:
    code = [path for folder in ("quantize", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    users = [str(path.relative_to(ROOT)) for path in code if "llama_log_set" in path.read_text()]
    assert users == ["quantize/runtimes/llama_cpp/log.py"]


def test_each_reader_has_the_log_from_its_own_start(tmp_path: Path) -> None:
    first = keep_log(llama_cpp)
    fail_to_open(tmp_path / "one.gguf")
    second = keep_log(llama_cpp)
    fail_to_open(tmp_path / "two.gguf")
    assert "one.gguf" in "".join(first)
    assert "two.gguf" not in "".join(first)
    assert "one.gguf" not in "".join(second)
    assert "two.gguf" in "".join(second)
    assert "".join(second) == log_text()


def test_a_long_log_loses_its_beginning(tmp_path: Path) -> None:
    lines = keep_log(llama_cpp, 2)
    for _ in range(3):
        fail_to_open(tmp_path / "none.gguf")
    assert len(lines) == 2


@pytest.mark.parametrize(
    ("log", "wanted"),
    [
        ([], ""),
        (["a\n", "b\n", "\n"], "b"),
        (["error: no file\n", "bye\n"], "error: no file"),
        (["failed to allocate: out of memory\n", "error: no context\n"], "failed to allocate: out of memory"),
        (["error: unknown architecture: 'x'\n", "f: failed to load model\n"], "error: unknown architecture: 'x'"),
        (["...data: tensor 'a' has invalid data\n", "error: bad\n", "failed to load model\n"],
         "data: tensor 'a' has invalid data / error: bad"),
        (["failed to load model\n"], "failed to load model"),
    ],
)  # fmt: skip
def test_the_line_that_tells_most(log: list[str], wanted: str) -> None:
    assert telling_line(log) == wanted
