"""Hidden states between two decoder blocks: in memory, or in files once they outgrow a budget.

In: batches of states [sequences, length, hidden]. Out: the same batches, block after block, and the place to resume at.
Left to others: computing them (activations). States are float32 in both places, so spilling changes no bit.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from quantize.errors import BuildError


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


class HiddenStates(Protocol):
    """Reads the input of the current block, writes that of the next."""

    def read(self, batch: Batch) -> Tensor:
        """The current block's input, [sequences, length, hidden] float32."""

    def write(self, batch: Batch, states: Tensor) -> None:
        """Keep the current block's output for `batch`, after `read` of the same batch."""

    def advance(self, block: int) -> None:
        """All batches are written: from here on, read() gives the input of `block`."""


class MemoryStates:
    """States in one tensor, overwritten batch by batch."""

    def __init__(self, tokens: int, hidden: int, device: torch.device | str) -> None:
        self._states = torch.empty(tokens, hidden, device=device)

    def read(self, batch: Batch) -> Tensor:
        """The current block's input, [sequences, length, hidden] float32."""
        rows = self._states[batch.start : batch.start + batch.rows]
        return rows.view(len(batch.members), batch.length, -1)

    def write(self, batch: Batch, states: Tensor) -> None:
        """Overwrite the batch's input with its output."""
        self._states[batch.start : batch.start + batch.rows] = states.reshape(batch.rows, -1)

    def advance(self, block: int) -> None:
        """Nothing to do: input and output share memory."""


class FileStates:
    """States in two files, one read while the other is written, so that a killed run resumes at its block."""

    def __init__(self, folder: Path, key: str, hidden: int, device: torch.device | str) -> None:
        self._folder, self._key, self._hidden, self._device = folder, key, hidden, device
        self._side = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise BuildError(f"can't create {folder} for hidden states: {exc.strerror}") from exc

    def resume(self, at_most: int) -> int | None:
        """The latest saved block not after `at_most` whose input is on disk for the same key, or None."""
        try:
            saved = json.loads((self._folder / "state.json").read_text())
            block, side = int(saved["block"]), int(saved["side"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if saved.get("key") != self._key or block > at_most or not self._path(side).is_file():
            return None
        self._side = side
        return block

    def read(self, batch: Batch) -> Tensor:
        """The current block's input, [sequences, length, hidden] float32."""
        count = batch.rows * self._hidden
        try:
            flat = np.fromfile(self._path(self._side), np.float32, count, offset=4 * batch.start * self._hidden)
        except OSError as exc:
            raise BuildError(f"can't read hidden states: {exc}") from exc
        if flat.size != count:
            raise BuildError(f"hidden states in {self._folder} are cut short", hint="delete that folder and run again")
        return torch.from_numpy(flat).to(self._device).view(len(batch.members), batch.length, self._hidden)

    def write(self, batch: Batch, states: Tensor) -> None:
        """Write the batch's output to the other file."""
        path = self._path(1 - self._side)
        array = states.reshape(batch.rows, -1).float().cpu().numpy()
        try:
            with open(path, "r+b" if path.exists() else "w+b") as file:
                file.seek(4 * batch.start * self._hidden)
                array.tofile(file)
        except OSError as exc:
            raise BuildError(
                f"can't write hidden states to {path}: {exc.strerror}",
                hint="free disk space or raise the memory budget",
            ) from exc

    def advance(self, block: int) -> None:
        """Make the file just written the one to read, and say so on disk."""
        self._side = 1 - self._side
        temporary = self._folder / "state.json.tmp"
        temporary.write_text(json.dumps({"block": block, "side": self._side, "key": self._key}))
        os.replace(temporary, self._folder / "state.json")

    def remove(self) -> None:
        """Delete the files; nothing is left to resume."""
        for path in (self._folder / "state.json", self._path(0), self._path(1)):
            path.unlink(missing_ok=True)

    def _path(self, side: int) -> Path:
        return self._folder / f"hidden.{side}.f32"
