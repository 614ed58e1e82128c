"""What is said of a process that a signal ended: real deaths, in the words of the one table."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from quantize.system import deaths
from quantize.system.deaths import (
    LIBRARIES,
    LLAMA_CPP,
    SIGNALS,
    TORCH,
    cmake_arguments,
    culprit,
    evidence,
    explain,
    last_words,
    oom_kills,
    reinstall_line,
)

ROOT = Path(__file__).parent.parent
KINDS = ("SIGILL", "SIGSEGV", "SIGBUS", "SIGFPE", "SIGABRT")  # that Python leaves a traceback of


def die(code: str, *, folder: Path = ROOT) -> tuple[int, str]:
    """Run Python code that ends its process: the exit code, and what it wrote."""
    lines = f"import faulthandler, os, signal\nfaulthandler.enable()\n{code}\n"
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, timeout=120, cwd=folder)
    return done.returncode, done.stderr


def die_in(package: str, name: str, folder: Path) -> tuple[int, str]:
    """Die of a signal inside a package that is installed in a folder."""
    module = folder / "site-packages" / package / "__init__.py"
    module.parent.mkdir(parents=True)
    module.write_text(f"import os, signal\ndef call():\n    os.kill(os.getpid(), signal.{name})\n", encoding="utf-8")
    return die(f"import sys; sys.path.insert(0, {str(folder / 'site-packages')!r})\nimport {package}\n{package}.call()")


def test_an_illegal_instruction_in_llama_cpp_names_it_and_the_line_that_repairs_it(tmp_path: Path) -> None:
    death = explain(*die_in("llama_cpp", "SIGILL", tmp_path), None)
    assert death.reason == (
        "ended by SIGILL: llama.cpp here was compiled for instructions that this processor does not have"
    )
    version = deaths._version("llama-cpp-python")
    assert death.remedy == (
        f'reinstall it with: CMAKE_ARGS="{cmake_arguments()}" pip install --force-reinstall --no-cache-dir --no-deps '
        f"llama-cpp-python=={version}"
    )


@pytest.mark.parametrize("library", LIBRARIES[1:], ids=lambda library: library.name)
def test_another_library_is_named_by_its_own_name(library: deaths.Library, tmp_path: Path) -> None:
    code, wrote = die_in(library.module, "SIGILL", tmp_path)
    death = explain(code, wrote, None)
    assert f"{library.name} here was compiled" in death.reason
    assert death.remedy == f"reinstall it with: {reinstall_line(library)}"
    assert "CMAKE_ARGS" not in death.remedy
    assert "+cpu" not in death.remedy, "a local version is in no registry"


@pytest.mark.parametrize("name", KINDS)
def test_each_crash_has_its_words_and_a_remedy(name: str, tmp_path: Path) -> None:
    death = explain(*die_in("bitsandbytes", name, tmp_path), None)
    assert death.signal == name
    assert death.is_crash
    assert death.reason.startswith(f"ended by {name}: ")
    assert "bitsandbytes" in death.reason
    assert death.remedy
    if name == "SIGSEGV":
        assert "bitsandbytes-foundation/bitsandbytes/issues with: bitsandbytes 0." in death.remedy


@pytest.mark.parametrize("name", sorted({*SIGNALS, "SIGKILL", "SIGUSR1"}))
def test_no_signal_is_without_words_whatever_was_written(name: str) -> None:
    death = explain(-getattr(signal, name), "", None)
    assert death.reason.startswith(f"ended by {name}: ")
    assert death.remedy
    assert "{" not in death.reason + death.remedy
    assert len({explain(-getattr(signal, each), "", None).reason for each in (*KINDS, "SIGTERM", "SIGXCPU")}) == 7


def test_a_signal_without_a_name() -> None:
    assert explain(-40, "", None).reason.startswith("ended by signal 40: ")


def test_torch_in_our_own_code_is_torch() -> None:
    """A matrix product leaves no frame of its own; that torch is loaded does."""
    source = "def multiply():\n    os.kill(os.getpid(), signal.SIGILL)\n"
    ours, theirs = (
        f"import torch\nexec(compile({source!r}, {path!r}, 'exec'))\nmultiply()"
        for path in ("/x/quantize/numerics/gram.py", "/x/somebody/else.py")
    )
    code, wrote = die(ours)
    assert code == -signal.SIGILL
    assert culprit(wrote) == TORCH
    assert culprit(die(theirs)[1]) is None, "every step has torch loaded"


def test_our_calls_into_llama_cpp_are_its() -> None:
    source = "def decode():\n    os.kill(os.getpid(), signal.SIGSEGV)\n"
    code = f"exec(compile({source!r}, '/x/quantize/runtimes/llama_cpp/model.py', 'exec'))\nimport torch\ndecode()"
    assert culprit(die(code)[1]) == LLAMA_CPP


def test_a_thread_that_python_does_not_know_is_looked_for_in_the_main_one(tmp_path: Path) -> None:
    """As OpenMP's are: the main thread waits in the library for them."""
    wrote = (
        "Fatal Python error: Illegal instruction\n\n"
        "Thread 0x00007f01 (most recent call first):\n"
        '  File "/v/site-packages/numpy/x.py", line 1 in wait\n\n'
        "Thread 0x00007f02 (most recent call first):\n"
        '  File "/v/site-packages/llama_cpp/llama_cpp.py", line 1 in call\n\n'
        "Extension modules: numpy._core._multiarray_umath (total: 1)\n"
    )
    assert culprit(wrote) == LLAMA_CPP


def test_what_merely_looks_like_a_crash_tells_nothing() -> None:
    assert culprit('  File "/v/site-packages/llama_cpp/x.py", line 1 in f\n') is None
    assert culprit("") is None


def test_last_words_are_the_library_s_and_never_a_prompt() -> None:
    words = b"a line with a prompt\nggml.c:1: GGML_ASSERT(all is well) failed\nanother prompt\n"
    code, wrote = die(f"os.write(2, {words!r})\nos.abort()")
    assert last_words(wrote) == "ggml.c:1: GGML_ASSERT(all is well) failed"
    assert explain(code, wrote, None).reason.endswith(" (ggml.c:1: GGML_ASSERT(all is well) failed)")
    assert "prompt" not in explain(code, wrote, None).reason
    assert "in <module>" in evidence(wrote)


def count(root: Path, name: str, kills: int, group: str) -> Path:
    """A file system with a kernel's count."""
    (root / "proc/self").mkdir(parents=True, exist_ok=True)
    (root / "proc/self/cgroup").write_text(group)
    file = root / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"low 0\noom_kill {kills}\n")
    return root


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("sys/fs/cgroup/job/7/memory.events", "0::/job/7\n"),
        ("sys/fs/cgroup/memory.events", "0::/not/visible/here\n"),
        ("sys/fs/cgroup/memory/job/memory.oom_control", "5:cpu:/x\n4:memory:/job\n0::/\n"),
        ("sys/fs/cgroup/memory/memory.oom_control", "4:cpu,memory:/docker/1\n"),
        ("proc/vmstat", "0::/\n"),
    ],
)
def test_the_kernel_s_count(name: str, group: str, tmp_path: Path) -> None:
    assert oom_kills(count(tmp_path, name, 3, group)) == 3


def test_the_cgroup_s_own_count_goes_before_the_machine_s(tmp_path: Path) -> None:
    count(tmp_path, "proc/vmstat", 9, "0::/job\n")
    assert oom_kills(count(tmp_path, "sys/fs/cgroup/job/memory.events", 1, "0::/job\n")) == 1


def test_no_count_is_none(tmp_path: Path) -> None:
    assert oom_kills(tmp_path) is None


@pytest.mark.parametrize(
    ("before", "now", "words", "remedy"),
    [
        (0, 1, "the kernel ended it because memory ran out", "less, please"),
        (4, 4, "a person or a program did that", "see who ends processes here"),
        (None, 4, "either the kernel did that because memory ran out, or a person", "if it was memory: less, please"),
        (4, None, "either the kernel did that because memory ran out, or a person", "if it was memory: less, please"),
    ],
)
def test_who_sent_sigkill(
    before: int | None, now: int | None, words: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deaths, "oom_kills", lambda: now)
    death = explain(-9, "", before, lower="less, please")
    assert words in death.reason
    assert death.remedy.startswith(remedy)


def test_a_processor_without_avx2_gets_a_line_that_does_without(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("model name\t: old\nflags\t\t: fpu sse4_2 avx f16c\n")
    assert cmake_arguments(cpuinfo) == "-DGGML_NATIVE=OFF -DGGML_AVX2=OFF -DGGML_BMI2=OFF -DGGML_FMA=OFF"
    cpuinfo.write_text("flags\t: fpu sse4_2 avx avx2 bmi2 fma f16c amx_tile\n")
    assert cmake_arguments(cpuinfo) == "-DGGML_NATIVE=OFF"
    cpuinfo.write_text("Features\t: fp asimd\n")
    assert cmake_arguments(cpuinfo) == "-DGGML_NATIVE=OFF", "aarch64"


def test_python_itself_says_it_so() -> None:
    """The traceback that is read is CPython's own: another version may word it otherwise."""
    for name in KINDS:
        _, wrote = die(f"os.kill(os.getpid(), signal.{name})")
        assert deaths.CRASH.search(wrote), (name, wrote[:200], os.uname())
