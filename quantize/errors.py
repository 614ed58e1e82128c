"""Every error that a user can meet, and the exit code that each one ends a command with.

    QuantizeError                    1  a build or a run failed
    ├── UsageError                   2  the command line or an option is wrong
    │   ├── RecipeError              2  a recipe, calibration spec or golden file is wrong (file:line:column)
    │   └── MissingExtraError        2  an optional dependency is needed and is not installed
    ├── RefusedError                 3  a check or a gate said no, before or after the work
    │   ├── CheckpointError          3  the source checkpoint is damaged, unsafe or not supported
    │   ├── PlanError                3  the recipe is valid, but this can't be built here
    │   ├── SignatureError           3  an artifact is not signed, or is not what was signed
    │   ├── LicenceError             3  the licence of a source is not known, or asks for what is not there
    │   ├── VerifyError              3  an artifact is not what its manifest says, or does not run
    │   │   ├── NotFiniteError       3  what it computes is not finite
    │   │   └── NewerSchemaError     3  its manifest is of a schema that a later version of this program writes
    │   ├── GateError                3  an artifact breaks a limit of its recipe
    │   └── LockError                3  something is not as the recipe's lock says
    ├── BuildError                   1  a step failed half-way
    │   ├── ReferenceNotFiniteError  1  the source runs past a type's range in the runtime that it is measured in
    │   ├── WorkerDied               1  the process that ran a step was killed or crashed
    │   ├── DiskFullError            1  the disk, or the user's quota, is full
    │   └── OutOfMemory              1  a step asked for more memory than it may have
    ├── Stopped                    130  the user asked a step to end, and it did, with its work saved
    ├── BenchError                   1  a server can't be measured: not there, or not what it should be
    ├── StoreError                   1  the store can't be read, written or locked
    └── TransferError                1  a registry, hub or share can't be reached, says no, or broke off half-way

An error says what is wrong, where, and what to do. Foreign exceptions are translated where they enter.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from quantize import DISTRIBUTION

COMPILED_EXTRA = "gguf"  # brings llama.cpp, which is compiled where it is installed
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
LOWER_MEMORY = "lower --memory-budget or --threads, build fewer variants at once with --only, or close other programs"
_DISK_WORDS = re.compile(
    r"No space left on device|disk is full|quota exceeded|os error (28|122)\b|requested and \d+ written"
)
_MEMORY_WORDS = re.compile(
    r"out of memory|\bMemoryError\b|not enough memory|can.?t allocate memory|cannot allocate memory|bad_alloc"
    r"|failed to map segment|can't start new thread|Resource temporarily unavailable|unable to (mmap|allocate)"
    r"|failed to allocate|CU(BLAS|SOLVER|DNN|SPARSE)_STATUS_ALLOC_FAILED|ErrorOutOfDeviceMemory",
    re.IGNORECASE,
)
MAX_CHARACTERS = 4_000
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class QuantizeError(Exception):
    """Base of all errors shown to users; `hint` says what to do about it."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        self.message = _shown(message)
        self.hint = None if hint is None else _shown(hint)
        super().__init__(self.message)

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n  {self.hint}"

    def __reduce__(self) -> tuple[object, ...]:  # errors cross process borders; keyword arguments don't by default
        return (_rebuild, (type(self), self.__dict__))


def first_line(exc: BaseException, limit: int = 200) -> str:
    """What a foreign exception says, cut to one line of at most `limit` characters; its kind where it says nothing."""
    return (str(exc).splitlines() or [type(exc).__name__])[0][:limit]


def some_of(names: Sequence[str], most: int) -> str:
    """The first names of many, and how many more there are: "a, b and 4 more"."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _shown(text: str) -> str:
    """Safe on a terminal and in a log: what a hostile file put in is escaped, and cut to what fits a screen."""
    if len(text) > MAX_CHARACTERS:
        text = f"{text[:MAX_CHARACTERS]}…"
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def _rebuild(kind: type[QuantizeError], state: dict[str, object]) -> QuantizeError:
    error = kind.__new__(kind)
    Exception.__init__(error, state["message"])
    error.__dict__.update(state)
    return error


class UsageError(QuantizeError):
    """The command line, or an option, is wrong."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe, calibration spec or golden file is wrong; the message starts with file:line:column."""


def install_line(*extras: str) -> str:
    """The pip line for extras of this program.

    llama.cpp is compiled for any processor of its kind, and a wheel in pip's cache may be compiled otherwise.
    """
    compiled = COMPILED_EXTRA in extras
    command = "CMAKE_ARGS=-DGGML_NATIVE=OFF pip install --no-cache-dir" if compiled else "pip install"
    return f"{command} '{DISTRIBUTION}[{','.join(extras)}]'"


class MissingExtraError(UsageError):
    """A feature needs an optional dependency that is not installed."""

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(
            f"{feature} needs an extra that is not installed",
            hint=f"install it with: {install_line(extra)}",
        )


class RefusedError(QuantizeError):
    """A check or a gate said no."""

    exit_code = 3


class CheckpointError(RefusedError):
    """The source checkpoint is damaged, unsafe or not supported."""


class PlanError(RefusedError):
    """The recipe is valid, but what it asks for can't be built here."""


class SignatureError(RefusedError):
    """An artifact is not signed by the key that is trusted, or is not what was signed."""


class LicenceError(RefusedError):
    """The licence of a source is not known, or asks for what an artifact does not have."""


class VerifyError(RefusedError):
    """An artifact is not what its manifest says, or does not run."""


class NotReadWholeError(VerifyError):
    """The library that runs a format here does not read this kind of model, which says nothing of the files."""


class NotFiniteError(VerifyError):
    """What a model computes is not finite: a tensor is damaged, or a number passes the range of its type."""


class NewerSchemaError(VerifyError):
    """A manifest is of a schema that a later version of this program writes: not damaged, and not to be removed."""

    def __init__(self, message: str) -> None:
        super().__init__(message, hint="upgrade quantize: the artifact itself is not damaged")


class GateError(RefusedError):
    """An artifact breaks a limit of its recipe."""


class LockError(RefusedError):
    """Something is not as the recipe's lock says."""


class BuildError(QuantizeError):
    """A step of a build failed."""


class ReferenceNotFiniteError(BuildError):
    """What an artifact is to be measured against runs past the range of the type that it has in that runtime."""


class WorkerDied(BuildError):
    """The process that ran a step was killed or crashed. reason: why, without the step: the same for all it hits."""

    def __init__(self, message: str, *, hint: str | None = None, reason: str | None = None) -> None:
        self.reason = _shown(reason or message)
        super().__init__(message, hint=hint)


class DiskFullError(BuildError):
    """The disk, or the user's quota, is full."""


class OutOfMemory(BuildError):
    """A step asked for more memory than there is, or than it may have."""


class Stopped(QuantizeError):
    """The user asked a step to end, and it ended with its work saved."""

    exit_code = 130


class BenchError(QuantizeError):
    """A server can't be measured: it is not there, or does not answer as it should."""


class StoreError(QuantizeError):
    """The store can't be read, written or locked."""


class TransferError(QuantizeError):
    """A registry, hub or share can't be reached, does not let us in, or broke off half-way."""


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn what the system, or a library, raises on writing below `folder` into DiskFullError, or BuildError."""
    try:
        yield
    except QuantizeError:
        raise
    except Exception as exc:
        if is_disk_full(exc):
            raise disk_full(exc, folder) from exc
        if isinstance(exc, OSError):
            raise BuildError(f"{exc.filename or folder}: {exc.strerror or first_line(exc)}") from exc
        raise


def disk_full(exc: BaseException, where: object) -> DiskFullError:
    """The error for what was raised because a disk is full. where: a folder or step, for what names no file itself."""
    named = exc.filename if isinstance(exc, OSError) and exc.filename else where
    reason = exc.strerror if isinstance(exc, OSError) and exc.strerror else "No space left on device"
    return DiskFullError(f"{named}: {reason}", hint="free some space and run the same build again")


def is_disk_full(exc: BaseException | None) -> bool:
    """Whether an exception, or what it came from, is a disk or quota that is full; libraries say it in many ways."""
    while exc is not None:
        if isinstance(exc, DiskFullError) or (isinstance(exc, OSError) and exc.errno in DISK_FULL):
            return True
        if not isinstance(exc, QuantizeError) and _DISK_WORDS.search(first_line(exc, 1000)):
            return True
        exc = exc.__cause__
    return False


def says_out_of_memory(text: str) -> bool:
    """Whether what a library wrote says that memory has run out."""
    return bool(_MEMORY_WORDS.search(text))


def is_out_of_memory(exc: BaseException | None) -> bool:
    """Whether an exception, or what it came from, says that memory has run out; libraries say it in words.

    A runtime that can't load an artifact for want of memory says nothing against the artifact.
    """
    while exc is not None:
        if isinstance(exc, MemoryError) or (isinstance(exc, OSError) and exc.errno == errno.ENOMEM):
            return True
        speaks = not isinstance(exc, QuantizeError) or isinstance(exc, (VerifyError, BuildError))
        if speaks and says_out_of_memory(str(exc)[:MAX_CHARACTERS]):
            return True
        exc = exc.__cause__
    return False
