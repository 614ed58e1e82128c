"""Writing files so that they are whole or not there: scratch name, sync, one rename.

In: a path and what it is to hold. Out: the file, or the system's error and nothing left behind; where it would be made.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from io import RawIOBase
from pathlib import Path


def write_durable(path: Path, text: str) -> None:
    """Write a file whole or not at all, and have it on disk."""
    scratch = path.with_name(f".{path.name}.tmp")
    with removed_on_failure(scratch):
        with scratch.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    sync(path.parent)


@contextlib.contextmanager
def removed_on_failure(path: Path) -> Iterator[None]:
    """Remove a file that could not be written to its end: it would only take up the space that lacks."""
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def write_all(file: RawIOBase, data: bytes | memoryview) -> None:
    """Write to an unbuffered file: what could not be written is not written later, when the file is closed."""
    left = memoryview(data).cast("B")
    while left:
        left = left[file.write(left) or 0 :]


def sync(path: Path) -> None:
    """Have a file or folder on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def existing_parent(path: Path) -> Path:
    """The folder itself, or the nearest one above it that is there: where it would be made, and on which disk."""
    folder = path.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def write_text(path: Path, text: str) -> None:
    """Write a file through a scratch name and one rename."""
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    with removed_on_failure(scratch):
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(path)
