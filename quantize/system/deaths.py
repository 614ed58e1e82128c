"""What a signal that ended a process says, in words, with the one line that repairs it.

In: how a process ended, what it wrote last (Python's own traceback of a crash too), and the kernel's count of processes
that it ended for want of memory. Out: a Death. The one table of signals: the steps of a build, checks, evaluation, the
gateway and `quantize doctor` all speak from it.
"""

from __future__ import annotations

import platform
import re
import shlex
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from quantize.errors import LOWER_MEMORY
from quantize.system.processor import cpu_field

TAIL_BYTES = 1 << 16  # of what a process wrote: Python's traceback of all its threads fits
TOLD_CHARACTERS = 2000
WORDS_CHARACTERS = 200
OURS = re.compile(r"/quantize/")
OUR_LLAMA_CPP = re.compile(r"/quantize/runtimes/llama_cpp")
# What libraries print when they give up; no prompt is ever in such a line, and no other line is looked at.
DYING = re.compile(r"GGML_ASSERT|terminate called|what\(\):|Fatal Python error|CUDA error")
CRASH = re.compile(
    r"^Fatal Python error: (?:Illegal instruction|Segmentation fault|Bus error|Floating.point exception|Aborted)$",
    re.MULTILINE,
)
THREAD = re.compile(r"^(?:Current thread|Thread) 0x\w+.*:$", re.MULTILINE)
FRAME = re.compile(r'^  File "(.+?)", line ', re.MULTILINE)
INSTALLED = re.compile(r"/(?:site|dist)-packages/(\w+)")
# What llama.cpp is compiled for unless it is told otherwise, and the switch for each.
BASE_INSTRUCTIONS = {
    "sse4_2": "SSE42", "avx": "AVX", "avx2": "AVX2", "bmi2": "BMI2", "fma": "FMA", "f16c": "F16C",
}  # fmt: skip


@dataclass(frozen=True)
class Library:
    """A library whose machine code a step runs: name, package, the module it is imported as, where to report it."""

    name: str
    package: str
    module: str
    issues: str


LLAMA_CPP = Library("llama.cpp", "llama-cpp-python", "llama_cpp", "github.com/abetlen/llama-cpp-python/issues")
TORCH = Library("torch", "torch", "torch", "github.com/pytorch/pytorch/issues")
LIBRARIES = (
    LLAMA_CPP,
    TORCH,
    Library("bitsandbytes", "bitsandbytes", "bitsandbytes", "github.com/bitsandbytes-foundation/bitsandbytes/issues"),
    Library("gptqmodel", "gptqmodel", "gptqmodel", "github.com/ModelCloud/GPTQModel/issues"),
    Library("tokenizers", "tokenizers", "tokenizers", "github.com/huggingface/tokenizers/issues"),
    Library("safetensors", "safetensors", "safetensors", "github.com/huggingface/safetensors/issues"),
    Library("numpy", "numpy", "numpy", "github.com/numpy/numpy/issues"),
)


@dataclass(frozen=True)
class Death:
    """reason: which signal, and what it means here, in one line. remedy: the one line that says what to do."""

    signal: str
    reason: str
    remedy: str

    @property
    def is_crash(self) -> bool:
        """Whether a library did something wrong, so that where it was is worth a look."""
        return self.signal in CRASHES


MEMORY_RAN_OUT = "the kernel ended it because memory ran out"
SOMEBODY_DID = "a person or a program did that: the kernel has ended nothing for want of memory meanwhile"
NOBODY_KNOWS = "either the kernel did that because memory ran out, or a person or a program did"
LOOK_WHO = "see who ends processes here: a job scheduler's limit, a container's, systemd-oomd, earlyoom, a user"

# Signal -> (what it means, what to do). SIGKILL is told by who sent it: see _killed.
SIGNALS: dict[str, tuple[str, str]] = {
    "SIGILL": (
        "{library} here was compiled for instructions that this processor does not have",
        "reinstall it with: {reinstall}",
    ),
    "SIGBUS": (
        "a file that {library} had mapped into memory became shorter under it, or its disk is full or failing",
        "free space on the disks of the model, the store, the cache and /dev/shm, keep other programs from writing "
        "into these files, and run it again",
    ),
    "SIGSEGV": (
        "{library} crashed: it used memory that is not its own",
        "run it again; if it dies again, {report}",
    ),
    "SIGABRT": (
        "{library} gave up",
        "if what it said names nothing that you can change, {report}",
    ),
    "SIGFPE": (
        "{library} divided an integer by zero",
        "run it again; if it dies again, {report}",
    ),
    "SIGTERM": (
        "it was asked to end by a person, a job scheduler or a system that shuts down",
        "if it was not you, look at the time limit of the job or service that this runs in, and run it again",
    ),
    "SIGXCPU": (
        "it reached its limit of processor time",
        "raise the limit (ulimit -t, or the job scheduler's) and run it again",
    ),
    "SIGXFSZ": (
        "it wrote a file larger than its limit",
        "raise the limit (ulimit -f) and run it again",
    ),
    "SIGHUP": (
        "the terminal that it was started from was closed",
        "run it again under nohup, tmux or screen",
    ),
    "SIGSYS": (
        "{library} made a system call that is forbidden here",
        "look at the container's seccomp profile, or run it outside",
    ),
}  # fmt: skip
SIGNALS["SIGTRAP"] = SIGNALS["SIGABRT"]
OTHER = ("nothing is known of why", "run it again")
CRASHES = ("SIGILL", "SIGSEGV", "SIGBUS", "SIGFPE", "SIGABRT", "SIGTRAP")  # a library did something wrong


def explain(code: int, wrote: str, kills_before: int | None, *, lower: str = LOWER_MEMORY) -> Death:
    """Why a process ended. code: minus the signal's number, as Python has it.

    wrote: the end of what it wrote. kills_before: `oom_kills()` as it began. lower: what to do if memory ran out.
    """
    number = -code
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    if name == "SIGKILL":
        meaning, remedy = _killed(kills_before, lower)
    else:
        library = culprit(wrote)
        meaning, remedy = (text.format(**_names(library)) for text in SIGNALS.get(name, OTHER))
    said = last_words(wrote)
    return Death(name, f"ended by {name}: {meaning}" + (f" ({said})" if said else ""), remedy)


def _killed(before: int | None, lower: str) -> tuple[str, str]:
    now = oom_kills()
    if before is None or now is None:
        return NOBODY_KNOWS, f"if it was memory: {lower}; else {LOOK_WHO}"
    return (MEMORY_RAN_OUT, lower) if now > before else (SOMEBODY_DID, LOOK_WHO)


def oom_kills(root: Path = Path("/")) -> int | None:
    """How many processes of this one's cgroup the kernel has ended for want of memory so far; of the whole machine
    where the cgroup does not tell; None where nothing does.
    """
    for path in (*_counters(root), root / "proc/vmstat"):
        try:
            found = re.search(r"^oom_kill (\d+)$", path.read_text("ascii"), re.MULTILINE)
        except (OSError, ValueError):
            continue
        if found:
            return int(found[1])
    return None


def _counters(root: Path) -> Iterator[Path]:
    """Where the kernel counts for this process's cgroup, versions 1 and 2; in a container its path may not be there."""
    try:
        lines = (root / "proc/self/cgroup").read_text("utf-8").splitlines()
    except (OSError, ValueError):
        return
    groups = root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if "memory" in controllers.split(","):
            yield groups / "memory" / path.strip("/") / "memory.oom_control"
            yield groups / "memory" / "memory.oom_control"
        elif not controllers:
            yield groups / path.strip("/") / "memory.events"
            yield groups / "memory.events"


def culprit(wrote: str) -> Library | None:
    """The library that a process was in when it crashed, by the traceback that it left; None if that does not tell."""
    text = _crash(wrote)
    frames = FRAME.findall(_thread(text))
    for path in frames:
        if OUR_LLAMA_CPP.search(path):
            return LLAMA_CPP
        found = INSTALLED.findall(path)
        for library in LIBRARIES:
            if found and found[-1] == library.module:
                return library
    if frames and not OURS.search(frames[0]):
        return None
    return TORCH if re.search(r"^Extension modules: .*\btorch\._C\b", text, re.MULTILINE) else None  # leaves no frame


def last_words(wrote: str) -> str:
    """The last line in which a library says why it gave up; "" if there is none."""
    before = wrote[: len(wrote) - len(_crash(wrote))]
    lines = [line for line in before.splitlines() if DYING.search(line)]
    return lines[-1].strip()[:WORDS_CHARACTERS] if lines else ""


def evidence(wrote: str) -> str:
    """What is worth showing of it: what came before the crash, and where the crashing thread was."""
    crash = _crash(wrote)
    before = wrote[: len(wrote) - len(crash)][-TOLD_CHARACTERS:]
    return before + crash.partition("\n")[0] + _thread(crash)[:TOLD_CHARACTERS]


def reinstall_line(library: Library) -> str:
    """The command that puts the same version there again, compiled for any processor."""
    version = _version(library.package).partition("+")[0]
    what = f"{library.package}=={version}" if version else library.package
    pip = f"pip install --force-reinstall --no-cache-dir --no-deps {shlex.quote(what)}"
    return f'CMAKE_ARGS="{cmake_arguments()}" {pip}' if library is LLAMA_CPP else pip


def cmake_arguments(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """How to compile llama.cpp for this processor and all later ones; an old one lacks what is usual by now."""
    has = set(cpu_field("flags", cpuinfo).split()) or set(BASE_INSTRUCTIONS)
    lacks = [f"-DGGML_{switch}=OFF" for name, switch in BASE_INSTRUCTIONS.items() if name not in has]
    return " ".join(["-DGGML_NATIVE=OFF", *lacks])


def _names(library: Library | None) -> dict[str, str]:
    """What the texts of the table say of a library, known or not."""
    if library is None:
        reinstall = "pip install --force-reinstall --no-cache-dir, and the library's name"
        return {"library": "a library", "reinstall": reinstall, "report": "report it with where it was"}
    where = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    report = f"report it at {library.issues} with: {library.package} {_version(library.package)}, {where}"
    return {"library": library.name, "reinstall": reinstall_line(library), "report": report}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _crash(wrote: str) -> str:
    """Python's own traceback of a crash, from its first line; "" if there is none."""
    found = [match.start() for match in CRASH.finditer(wrote)]
    return wrote[found[-1] :] if found else ""


def _thread(crash: str) -> str:
    """The frames of the thread that crashed; of the main one, which is the last, where Python knows no such thread."""
    parts = [(found[0], found.end()) for found in THREAD.finditer(crash)]
    current = [end for head, end in parts if head.startswith("Current")]
    if not parts:
        return ""
    start = current[0] if current else parts[-1][1]
    return crash[start:].split("\n\n")[0]
