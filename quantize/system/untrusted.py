"""Files that someone else wrote, read within limits: no content waits, fills the memory or leads out of its folder.

In: paths, and the most that is worth reading. Out: bytes, or plain JSON data. OSError and ValueError say what is wrong;
the reader that asked turns them into an error of its own. docs/hostile-input.md has the limits.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import signal
import stat
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

MAX_VALUES = 10_000_000  # of a JSON document; one takes at most 90 bytes of memory
MAX_DEPTH = 100
MAX_PATTERN = 1000
AGAIN_SECONDS = 0.5  # what a signal raises is lost where it meets a destructor or a collector's callback


class _OutOfTime(BaseException):
    """Not an Exception: no library may take it for one of its own."""


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file, or a link to one, for reading.

    Raises OSError: not there, no permission, not a file name; a folder, pipe or device, without waiting for it.
    """
    flags = os.O_RDONLY
    for name in ("O_NONBLOCK", "O_NOCTTY", "O_BINARY"):
        flags |= getattr(os, name, 0)
    try:
        handle = os.open(path, flags)
    except ValueError as exc:  # a NUL, or half of a surrogate pair
        raise OSError(errno.EINVAL, "not a file name", str(path)) from exc
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "not a file", str(path))
    return os.fdopen(handle, "rb")


def read_limited(path: Path, max_bytes: int) -> bytes:
    """The bytes of a regular file. Raises OSError as open_regular does, or where it has more than `max_bytes`."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise OSError(errno.EFBIG, f"{size:,} bytes is too large, at most {max_bytes:,} are read", str(path))
        return file.read(size)


def parse_json(raw: bytes) -> Any:
    """JSON data in which every name of an object is there once.

    Raises ValueError: not UTF-8, not JSON, a name twice, half of a surrogate pair, over MAX_VALUES or MAX_DEPTH.
    """
    if sum(raw.count(mark) for mark in (b",", b"[", b"{")) > MAX_VALUES:
        raise ValueError(f"more than {MAX_VALUES:,} values")
    try:
        data = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_unique_names)
    except RecursionError as exc:
        raise ValueError("nested too deeply") from exc
    _check_depth(data)
    if b"\\ud" in raw or b"\\uD" in raw:
        json.dumps(data, ensure_ascii=False).encode()
    return data


def check_pattern(pattern: str) -> None:
    """Raise ValueError unless Python takes it for a regular expression of at most MAX_PATTERN characters."""
    if len(pattern) > MAX_PATTERN:
        raise ValueError(f"more than {MAX_PATTERN:,} characters")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as exc:
        raise ValueError(str(exc)) from exc


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block after so many seconds of processor time.

    For regular expressions, which can take for ever. Works in the main thread, where there are POSIX signals; elsewhere
    nothing is limited.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(_number: int, _frame: object) -> None:
        raise _OutOfTime

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, AGAIN_SECONDS)
    try:
        yield
    except _OutOfTime:
        raise TimeoutError(f"more than {seconds:g} seconds") from None
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is there twice")
    return found


def _check_depth(data: Any) -> None:
    level = [data]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for item in level
            for inner in (item.values() if isinstance(item, dict) else item if isinstance(item, list) else ())
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise ValueError("nested too deeply")
