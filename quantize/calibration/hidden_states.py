"""Hidden states between two decoder blocks: in memory, or in files once they outgrow a budget.

In: batches of states [sequences, length, hidden]. Out: the same batches, block after block; files to go on from, where
a stopped pass is to.
Left to others: computing them (activations). States are float32 in both places, so spilling changes no bit.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from quantize.errors import BuildError, disk_errors
from quantize.system.cache import hash_file
from quantize.system.files import write_all

PIECE_BYTES = 8 << 20


@dataclass(frozen=True)
class Batch:
    """Sequences of one length that run together: rows [start, start + sequences * length) of all states."""

    members: tuple[int, ...]
    length: int
    start: int

    @property
    def rows(self) -> int:
        """Tokens in the batch."""
        return len(self.members) * self.length


def make_batches(lengths: list[int], tokens_per_batch: int) -> list[Batch]:
    """Group sequences of equal length, so that nothing is padded, up to `tokens_per_batch` tokens (or one sequence)."""
    by_length: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        by_length.setdefault(length, []).append(index)
    batches: list[Batch] = []
    start = 0
    for length, members in by_length.items():
        size = max(1, tokens_per_batch // length)
        for first in range(0, len(members), size):
            batches.append(Batch(tuple(members[first : first + size]), length, start))
            start += batches[-1].rows
    return batches


@dataclass(frozen=True)
class SavedStates:
    """States on disk: the input of `block`. file: its name in the folder of the pass. sha256: of its bytes."""

    block: int
    file: str
    sha256: str


class States(Protocol):
    """Reads the input of the current block, writes that of the next."""

    def read(self, batch: Batch) -> Tensor:
        """The current block's input, [sequences, length, hidden] float32."""

    def write(self, batch: Batch, states: Tensor) -> None:
        """Keep the current block's output for `batch`, after `read` of the same batch; batches come in order."""

    def advance(self) -> None:
        """All batches are written: from here on, read() gives the input of the next block."""


class HiddenStates(States, Protocol):
    """States that an interrupted pass goes on from."""

    def save(self) -> SavedStates:
        """Have the current block's input on disk. Raises BuildError."""

    def load(self, saved: SavedStates) -> bool:
        """Go on with states that were saved; False if they are not there, or damaged."""


class MemoryStates:
    """States in one tensor, overwritten batch by batch; `folder` is for saving them.

    held: where the tensor is: the CPU's memory (pinned if a GPU reads from it), or the GPU's own. A GPU copies to and
    from the CPU's in the order of its work, which nobody waits for before the CPU itself reads.
    """

    def __init__(
        self, tokens: int, hidden: int, device: torch.device, folder: Path | None, *, held: torch.device | str = "cpu"
    ) -> None:
        states = torch.empty(tokens, hidden, device=held)
        self._states = states.pin_memory() if device.type != states.device.type else states
        self._device, self._folder, self._block = device, folder, -1

    def read(self, batch: Batch) -> Tensor:
        """The current block's input, [sequences, length, hidden] float32."""
        rows = self._states[batch.start : batch.start + batch.rows].to(self._device, non_blocking=True)
        return rows.view(len(batch.members), batch.length, -1)

    def write(self, batch: Batch, states: Tensor) -> None:
        """Overwrite the batch's input with its output."""
        rows = self._states[batch.start : batch.start + batch.rows]
        rows.copy_(states.reshape(batch.rows, -1), non_blocking=True)

    def advance(self) -> None:
        """Input and output share memory; only the count goes on."""
        self._block += 1

    def save(self) -> SavedStates:
        """Write the tensor to a file, piece by piece."""
        assert self._folder is not None
        path, digest = self._folder / file_name(self._block), hashlib.sha256()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        with disk_errors(self._folder), path.open("wb", buffering=0) as file:
            for rows in self._pieces():
                data = rows.cpu().numpy().data
                digest.update(data)
                write_all(file, data)
            os.fsync(file.fileno())
        return SavedStates(self._block, path.name, digest.hexdigest())

    def load(self, saved: SavedStates) -> bool:
        """Fill the tensor from a file of `save`."""
        assert self._folder is not None
        path, digest = self._folder / saved.file, hashlib.sha256()
        if not path.is_file() or path.stat().st_size != 4 * self._states.numel():
            return False
        with disk_errors(self._folder), path.open("rb") as file:
            for rows in self._pieces():
                data = file.read(4 * rows.numel())
                digest.update(data)
                rows.copy_(torch.frombuffer(bytearray(data), dtype=torch.float32).view_as(rows))
        self._block = saved.block
        return digest.hexdigest() == saved.sha256

    def _pieces(self) -> Iterator[Tensor]:
        rows = max(1, PIECE_BYTES // (4 * self._states.shape[1]))
        return iter(torch.split(self._states, rows))


class FileStates:
    """States in two files, one read while the other is written."""

    def __init__(self, tokens: int, hidden: int, device: torch.device, folder: Path) -> None:
        self._tokens, self._hidden, self._device, self._folder = tokens, hidden, device, folder
        self._block = -1
        self._out: FileIO | None = None
        self._digest = hashlib.sha256()
        self._sha256 = ""

    def read(self, batch: Batch) -> Tensor:
        """The current block's input, [sequences, length, hidden] float32."""
        count = batch.rows * self._hidden
        path = self._folder / file_name(self._block)
        with disk_errors(self._folder):
            flat = np.fromfile(path, np.float32, count, offset=4 * batch.start * self._hidden)
        if flat.size != count:
            raise BuildError(f"hidden states in {path} are cut short", hint="run the same build again")
        return _on_device(torch.from_numpy(flat), self._device).view(len(batch.members), batch.length, self._hidden)

    def write(self, batch: Batch, states: Tensor) -> None:
        """Append the batch's output to the next block's file."""
        data = states.reshape(batch.rows, -1).float().cpu().contiguous().numpy().data
        with disk_errors(self._folder):
            if self._out is None:
                path = self._folder / file_name(self._block + 1)
                self._out, self._digest = path.open("wb", buffering=0), hashlib.sha256()
            write_all(self._out, data)
        self._digest.update(data)

    def advance(self) -> None:
        """Make the file just written the one to read."""
        assert self._out is not None
        with disk_errors(self._folder):
            os.fsync(self._out.fileno())
            self._out.close()
        self._out, self._sha256 = None, self._digest.hexdigest()
        self._block += 1

    def save(self) -> SavedStates:
        """They are on disk already."""
        return SavedStates(self._block, file_name(self._block), self._sha256)

    def load(self, saved: SavedStates) -> bool:
        """Check the file, and read from it."""
        path = self._folder / saved.file
        if not path.is_file() or path.stat().st_size != 4 * self._tokens * self._hidden:
            return False
        self._block, self._sha256 = saved.block, saved.sha256
        return saved.file == file_name(saved.block) and hash_file(path) == saved.sha256


class ScratchStates:
    """States in one file without a name, overwritten batch by batch: for a pass that nothing goes on from.

    The file is gone when the process is, however it ends.
    """

    def __init__(self, tokens: int, hidden: int, device: torch.device, folder: Path) -> None:
        self._hidden, self._device, self._folder = hidden, device, folder
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - closed by close()
            if hasattr(os, "posix_fallocate"):  # not on macOS
                os.posix_fallocate(self._file.fileno(), 0, 4 * tokens * hidden)

    def read(self, batch: Batch) -> Tensor:
        """The current block's input, [sequences, length, hidden] float32."""
        size, data = 4 * batch.rows * self._hidden, bytearray()
        while len(data) < size:
            piece = os.pread(self._file.fileno(), size - len(data), 4 * batch.start * self._hidden + len(data))
            if not piece:
                raise BuildError(f"hidden states in {self._folder} are cut short", hint="run the same again")
            data += piece
        flat = torch.frombuffer(data, dtype=torch.float32)
        return _on_device(flat, self._device).view(len(batch.members), batch.length, self._hidden)

    def write(self, batch: Batch, states: Tensor) -> None:
        """Overwrite the batch's input with its output."""
        left = states.reshape(batch.rows, -1).float().cpu().contiguous().numpy().data.cast("B")
        at = 4 * batch.start * self._hidden
        with disk_errors(self._folder):
            while left:
                written = os.pwrite(self._file.fileno(), left, at)
                left, at = left[written:], at + written

    def advance(self) -> None:
        """Input and output share the file."""

    def close(self) -> None:
        """Give the disk back."""
        self._file.close()


def _on_device(read: Tensor, device: torch.device) -> Tensor:
    """What was read from a file; a GPU copies it from pinned memory, while the CPU reads on."""
    return read.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else read.to(device)


def file_name(block: int) -> str:
    """Name of the file with a block's input."""
    return f"hidden.{block:05d}.f32"


def remove_before(folder: Path, block: int) -> None:
    """Delete the files of blocks before `block`: nothing goes on from them any more."""
    for path in folder.glob("hidden.[0-9][0-9][0-9][0-9][0-9].f32"):
        if int(path.name.split(".")[1]) < block:
            path.unlink(missing_ok=True)
