"""The source's forward over the held-out text beside a calibration pass, so that its weights are read once for both.

In: a Ride, and each block's weights as the pass reads them. Out: the states after the last block, in the cache, from
where streamed.py goes on with the output head. It is streamed.py's code that runs, in float32 and in its batches,
whatever the pass computes in: the same bits. States are in files, so memory holds what two batches take, and a pass
that is stopped goes on with them. What goes wrong here ends no build: then the source is read once more.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from quantize.calibration.block_reader import TensorSource, read_blocks
from quantize.calibration.block_runner import BlockRunner
from quantize.calibration.hidden_states import FileStates, SavedStates, remove_before
from quantize.calibration.stream import embed_all
from quantize.errors import QuantizeError, disk_errors, first_line
from quantize.evaluate.job import Ride
from quantize.evaluate.source_side import RIDDEN_KIND
from quantize.evaluate.streamed import RIDDEN, in_batches, read_saved, run_block
from quantize.events import Reporter, warn
from quantize.model.architecture import block_layouts
from quantize.model.layout import BlockLayout
from quantize.runtimes.devices import CPU
from quantize.system.cache import Cache
from quantize.system.files import write_durable
from quantize.system.memory import give_back_freed


class Rider:
    """See Passenger. folder: of the pass, where what a stopped one goes on from is kept."""

    def __init__(self, ride: Ride, source: TensorSource, folder: Path, reporter: Reporter) -> None:
        self._ride, self._source, self._reporter = ride, source, reporter
        self._folder = folder / "evaluation"
        self._next: int | None = None  # block; None once the ride is over

    def begin(self, block: int) -> None:
        """See Passenger: go on from what is on disk, and run the blocks before this one that it lacks."""
        self._guarded(partial(self._begin, block))

    def take(self, layout: BlockLayout, weights: dict[str, Tensor]) -> None:
        """See Passenger; a block that a stopped pass has taken is left out."""
        if self._next == layout.index:
            self._guarded(partial(self._run, layout, weights))

    def _begin(self, block: int) -> None:
        device = torch.device(CPU)
        self._runner = runner = BlockRunner(self._source.config, CPU, "float32")
        self._batches, ordered = in_batches(self._ride.token_ids, device)
        with disk_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        saved = read_saved(self._folder / RIDDEN, self._ride.key)
        self._states = FileStates(sum(batch.rows for batch in self._batches), runner.hidden_size, device, self._folder)
        goes_on = saved is not None and self._states.load(saved)
        embed_all(self._source, runner, ordered, None if goes_on else self._states)
        self._next = saved.block if saved is not None and goes_on else 0
        layouts = list(block_layouts(self._source.config))
        for layout, weights in read_blocks(self._source, layouts[self._next : block], device):
            self._run(layout, weights)
            del weights
        if self._next == runner.blocks:
            self._arrive(self._states.save())

    def _run(self, layout: BlockLayout, weights: dict[str, Tensor]) -> None:
        self._runner.load(layout, weights)
        run_block(self._runner, layout.index, self._batches, self._states)
        give_back_freed()
        saved, self._next = self._states.save(), layout.index + 1
        with disk_errors(self._folder):
            write_durable(self._folder / RIDDEN, self._record(saved))
            remove_before(self._folder, saved.block)
        if self._next == self._runner.blocks:
            self._arrive(saved)

    def _arrive(self, saved: SavedStates) -> None:
        """Leave the states after the last block in the cache."""

        def fill(entry: Path) -> None:
            shutil.move(self._folder / saved.file, entry / saved.file)
            (entry / RIDDEN).write_text(self._record(saved), encoding="utf-8")

        Cache(self._ride.cache).make(RIDDEN_KIND, self._ride.key, fill)
        self._end()

    def _record(self, saved: SavedStates) -> str:
        return json.dumps({"key": self._ride.key, "states": asdict(saved)}, sort_keys=True) + "\n"

    def _guarded(self, step: Callable[[], None]) -> None:
        try:
            step()
        except (QuantizeError, RuntimeError, ValueError, OSError) as exc:
            why = exc.message if isinstance(exc, QuantizeError) else first_line(exc)
            warn(self._reporter, "", f"the held-out text leaves the calibration pass, and is read after it: {why}")
            self._end()

    def _end(self) -> None:
        self._next = None
        shutil.rmtree(self._folder, ignore_errors=True)
