"""What a calibration pass leaves on disk after each block, so that a build that is stopped goes on from there.

In: the folder of the pass, the identity of what it computes, its parts (one a variant). Out: the block to go on at.
A part's own progress is in its scratch folder; the hidden states, which all share, are in the folder of the pass.
After a block the parts are written first and the hidden states' record last: whatever moment a build is killed at, a
part is never behind the hidden states by more than that block, and what was begun after it is cut off.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from quantize.errors import disk_errors
from quantize.events import Reporter, warn
from quantize.store.staging import RESUME_NAME, differences, read_json
from quantize.system.files import write_durable

if TYPE_CHECKING:
    from quantize.calibration.hidden_states import HiddenStates, SavedStates


class Resumable(Protocol):
    """What a part of the pass can do beside its work."""

    def state(self) -> dict[str, Any]:
        """JSON data from which `resume` goes on; the files that it speaks of are on disk when it returns."""

    def resume(self, state: Mapping[str, Any]) -> bool:
        """Go on from a state; False, and nothing changed, if the files are not what they were then."""


class PassJournal:
    """The record of one pass. `saved` are the hidden states to go on from, if there are any; `saved_shares` those of a
    pass that was spread over a cluster, share by share. `identity`: all that its statistics depend on.

    seconds: hidden states are kept no more often than that. A pass that goes on from older ones runs the blocks between
    again: on a GPU that takes less time than writing the states of each block. A context manager: enter it for the time
    in which blocks are kept.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], reporter: Reporter, *, seconds: float = 0.0) -> None:
        from quantize.calibration.hidden_states import SavedStates

        self.saved: SavedStates | None = None
        self.saved_shares: tuple[SavedStates, ...] = ()
        self._folder, self.identity = folder, identity
        self._seconds, self._kept_at = seconds, time.monotonic()
        self._saver = ThreadPoolExecutor(1)
        self._saving: Future[SavedStates] | None = None
        self._removing: Future[None] | None = None
        found = read_json(folder / RESUME_NAME)
        changed = differences(found.get("pass", {}), identity) if found else ()
        if changed:
            warn(reporter, "", f"the stopped calibration pass is of no use, it starts over: {'; '.join(changed)}")
        elif found:
            states = found.get("states")
            self.saved = SavedStates(**states) if isinstance(states, dict) else None
            self.saved_shares = tuple(SavedStates(**item) for item in found.get("shares", ()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Wait for what is written or removed beside the pass: whoever comes after finds the folder at rest."""
        self._saver.shutdown()

    def resume(self, scratch: Path, part: Resumable) -> int:
        """Have a part go on from its record in `scratch`; the number of blocks that it has done, 0 for none."""
        found = read_json(scratch / RESUME_NAME)
        blocks, state = found.get("blocks"), found.get("state")
        if found.get("pass") != self.identity or not isinstance(blocks, int) or not isinstance(state, dict):
            return 0
        return blocks if part.resume(state) else 0

    def keep(self, states: HiddenStates) -> None:
        """Begin to write the states that go into the next block; they must not change until `commit`."""
        if time.monotonic() - self._kept_at < self._seconds:
            return
        self._kept_at = time.monotonic()
        self._saving = self._saver.submit(states.save)

    def commit(self, blocks: int, parts: Mapping[Path, Resumable]) -> None:
        """Record that `blocks` blocks are done, for each part (scratch folder -> part) and for the hidden states.

        States that are of no more use are removed beside what the pass does next. Raises BuildError, DiskFullError.
        """
        from quantize.calibration.hidden_states import remove_before

        self._removed()
        for scratch, part in parts.items():
            self._write(scratch, {"pass": self.identity, "blocks": blocks, "state": part.state()})
        if self._saving is not None:
            saved, self._saving = self._saving.result(), None
            self._write(self._folder, {"pass": self.identity, "states": asdict(saved)})
            self.saved = saved
            self._removing = self._saver.submit(remove_before, self._folder, saved.block)

    def commit_shares(self, shares: Sequence[SavedStates]) -> None:
        """Record the hidden states of a spread pass, one file a share, after `commit` of the block that made them."""
        self._write(self._folder, {"pass": self.identity, "shares": [asdict(item) for item in shares]})

    def finish(self) -> None:
        """The last block is done: the hidden states are of no more use."""
        from quantize.calibration.hidden_states import remove_before

        self._removed()
        remove_before(self._folder, sys.maxsize)

    def _removed(self) -> None:
        """Wait for the last removal. Raises BuildError if it failed."""
        if self._removing is not None:
            with disk_errors(self._folder):
                self._removing.result()
            self._removing = None

    def _write(self, folder: Path, data: Mapping[str, Any]) -> None:
        with disk_errors(folder):
            write_durable(folder / RESUME_NAME, json.dumps(data, sort_keys=True) + "\n")
