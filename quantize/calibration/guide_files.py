"""What finding the tokens' weights leaves on disk: states between blocks, gradients between blocks, weights, a record.

In: a folder, the identity of the pass, batches of states. Out: the same batches; what a stopped build goes on from.
Left to others: computing them (guide). States that are not the last ones are needed again on the way back, so each
block's has a file of its own.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantize.calibration.hidden_states import Batch
from quantize.errors import BuildError, disk_errors
from quantize.events import Reporter, warn
from quantize.store.staging import differences, read_json
from quantize.system.cache import hash_file
from quantize.system.files import write_all, write_durable

RECORD = "guide.json"
INPUTS, GRADIENTS, TABLES = "inputs", "gradients", "tables"


class StateFile:
    """States of all tokens, float32, as they are written: batch by batch in order. A Writer of hidden_states' form."""

    def __init__(self, path: Path) -> None:
        self._path, self._digest = path, hashlib.sha256()
        with disk_errors(path.parent):
            self._file: FileIO = path.open("wb", buffering=0)

    def write(self, _batch: Batch, states: Tensor) -> None:
        """Append a batch [sequences, length, hidden]."""
        data = states.reshape(-1, states.shape[-1]).float().cpu().contiguous().numpy().data
        with disk_errors(self._path.parent):
            write_all(self._file, data)
        self._digest.update(data)

    def read(self, batch: Batch) -> Tensor:
        """Never called: it is only written."""
        raise NotImplementedError

    def advance(self) -> None:
        """It is whole; not waited for until it is on disk: who goes on from it looks at its hash."""
        self._file.close()

    @property
    def sha256(self) -> str:
        """Of all that was written, hex."""
        return self._digest.hexdigest()


class GuideFiles:
    """The files of one pass, and the record of those that are whole. hidden: width of a token's states."""

    def __init__(self, folder: Path, identity: Mapping[str, Any], reporter: Reporter) -> None:
        self.folder, self._identity = folder, dict(identity)
        found = read_json(folder / RECORD)
        changed = differences(found.get("pass", {}), self._identity) if found else ()
        if changed:
            warn(reporter, "", f"the tokens' weights of the stopped build are of no use: {'; '.join(changed)}")
            shutil.rmtree(folder, ignore_errors=True)
            found = {}
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._known = {kind: _hashes(found.get(kind)) for kind in (INPUTS, GRADIENTS, TABLES)}
        self._trusted: set[tuple[str, int]] = set()

    def path(self, kind: str, block: int) -> Path:
        """Where something of a block is, or will be: its input, the gradient in it, or its weights."""
        from quantize.calibration.token_weights import table_name

        return self.folder / (table_name(block) if kind == TABLES else f"{kind}.{block:05d}.f32")

    def open(self, kind: str, block: int) -> StateFile:
        """A file to be written. Raises BuildError, DiskFullError."""
        return StateFile(self.path(kind, block))

    def has(self, kind: str, block: int) -> bool:
        """Whether something of a block is there, as it was written."""
        expected = self._known[kind].get(block)
        if expected is None or (kind, block) in self._trusted:
            return expected is not None
        path = self.path(kind, block)
        if path.is_file() and hash_file(path) == expected:
            self._trusted.add((kind, block))
            return True
        del self._known[kind][block]
        return False

    def blocks(self, kind: str) -> list[int]:
        """Those that have something of a kind on record."""
        return sorted(self._known[kind])

    def took(self, kind: str, block: int, sha256: str) -> None:
        """Something is whole; on record with the next `commit`."""
        self._known[kind][block] = sha256
        self._trusted.add((kind, block))

    def commit(self, *drop: tuple[str, int]) -> None:
        """Write the record, without what is of no more use; then remove that."""
        gone = [(kind, block) for kind, block in drop if self._known[kind].pop(block, None) is not None]
        data = {kind: {str(block): sha256 for block, sha256 in known.items()} for kind, known in self._known.items()}
        with disk_errors(self.folder):
            write_durable(self.folder / RECORD, json.dumps({"pass": self._identity, **data}, sort_keys=True) + "\n")
            for kind, block in gone:
                self.path(kind, block).unlink(missing_ok=True)

    def hashes(self, kind: str) -> dict[int, str]:
        """sha256 by block."""
        return dict(self._known[kind])

    def read(self, kind: str, block: int, batch: Batch, hidden: int, device: torch.device) -> Tensor:
        """A batch [sequences, length, hidden] of states. Raises BuildError: the file is cut short."""
        path, count = self.path(kind, block), batch.rows * hidden
        with disk_errors(self.folder):
            flat = np.fromfile(path, np.float32, count, offset=4 * batch.start * hidden)
        if flat.size != count:
            raise BuildError(f"states in {path} are cut short", hint="run the same build again")
        return torch.from_numpy(flat).to(device).view(len(batch.members), batch.length, hidden)


def _hashes(found: Any) -> dict[int, str]:
    if not isinstance(found, dict):
        return {}
    return {int(block): str(sha256) for block, sha256 in found.items() if str(block).isdecimal()}
