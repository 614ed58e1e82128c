"""What a builder is: the protocol between the build and one output format.

A builder decides what is written and with which numerics. It gets a checkpoint, options and a staging folder, and
never prints, never touches the store, and never falls back silently: what stays in high precision is reported.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from quantize.calibration.budget import BlockMemory
from quantize.calibration.journal import Resumable
from quantize.calibration.spread import PassSpread
from quantize.errors import BuildError, QuantizeError, UsageError
from quantize.events import Reporter
from quantize.model.checkpoint import Checkpoint
from quantize.model.source import PinnedSource
from quantize.recipe.model import FormatOptions
from quantize.runtimes.devices import ON_CPU, DevicePlace
from quantize.store.manifest import CalibrationEntry
from quantize.system.cache import Cache

if TYPE_CHECKING:
    from quantize.calibration.stream import Block
    from quantize.model.layout import BlockLayout

OptionsT = TypeVar("OptionsT", bound=FormatOptions)


@dataclass(frozen=True)
class KeptTensor:
    """A tensor that is stored with more bits than the variant asks for, and why."""

    tensor: str
    type: str
    reason: str


@dataclass(frozen=True)
class LeftOut:
    """A tensor of the source that an artifact does not hold, and why."""

    tensor: str
    reason: str


@dataclass(frozen=True)
class StoredIn:
    """The type that an artifact's unquantized tensors have where another one would be expected, and why."""

    type: str
    reason: str


@dataclass(frozen=True)
class SizePlan:
    """What a build would write, from headers alone.

    file_bytes: all weight files. pass_bytes: of them, what the calibration pass writes. intermediate_bytes: what the
    cache needs beside them (shared by variants of a key). passing_bytes: what the store needs beside them while the
    variant is built, and no longer. scratch_bytes: what it keeps there from the pass on, until all variants are built.
    at_most: the sizes are not exact but the most that there may be. notes: what more there is to say, line by line.
    """

    file_bytes: int
    weights_bytes: int
    tensors: int
    bits_per_weight: float
    kept: tuple[KeptTensor, ...]
    intermediate_bytes: int = 0
    intermediate_key: str = ""
    pass_bytes: int = 0
    passing_bytes: int = 0
    scratch_bytes: int = 0
    at_most: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunLimits:
    """How a build runs; none of it may change a byte of what is written. spread: the calibration pass, on a cluster.

    place: where a finished artifact is verified, as far as it is not wholly on `device`.
    """

    threads: int = 1
    device: str = "cpu"
    memory_budget_bytes: int | None = None
    spread: PassSpread | None = None
    place: DevicePlace = ON_CPU

    @property
    def on_gpu(self) -> bool:
        """Whether tensor work runs on a GPU, of whatever machine."""
        return self.device != "cpu"

    @property
    def on_own_gpu(self) -> bool:
        """Whether it runs on a GPU of this machine: one that can be asked, and whose memory it takes."""
        return self.on_gpu and self.spread is None

    @property
    def takes_passengers(self) -> bool:
        """Whether the blocks of a pass are there for other text too: on this machine's CPU."""
        return not self.on_gpu and self.spread is None

    @property
    def own_device(self) -> str:
        """The device of this machine that a step computes on: the GPU that is meant, if it is one, else the CPU."""
        return self.device if self.on_own_gpu else "cpu"

    @property
    def tasks_at_once(self) -> int:
        """How many pieces of tensor work may run at once: one for each thread, and one after the other on a GPU, where
        more of them take more memory and no less time, and the first use of a library is not safe on two threads.
        """
        return 1 if self.on_gpu else self.threads

    @classmethod
    def of(
        cls, threads: int | None = None, device: str = "cpu", memory_budget: int | str | None = None, *,
        here: bool = True,
    ) -> RunLimits:  # fmt: skip
        """Limits as people give them. threads: None takes every core. memory_budget: bytes, or such as "6GiB".

        here: they are for this machine. Raises UsageError: a size that can't be read, a device that is not there.
        """
        from quantize.system.machine import usable_cores
        from quantize.system.sizes import parse_size

        if device != "cpu" and here:
            _check_device(device)
        budget = parse_size(memory_budget) if isinstance(memory_budget, str) else memory_budget
        return cls(threads or usable_cores(), device, budget)


def _check_device(device: str) -> None:
    found = re.fullmatch(r"cuda(?::(\d+))?", device)
    if found is None:
        raise UsageError(f"device {device!r} is none", hint="use --device cpu, --device cuda or --device cuda:N")
    import torch

    count = torch.cuda.device_count()
    if int(found[1] or 0) >= count:
        have = f"torch sees {count} CUDA device{'s' * (count != 1)}"
        raise UsageError(f"device {device!r} is not there: {have}", hint="use --device cpu, or install torch for CUDA")


@dataclass(frozen=True)
class Context:
    """All that a builder is given. Picklable: steps run in processes of their own.

    staging: the artifact to be; everything in it is published. scratch: a folder of this build, removed afterwards.
    calibration: what the pass saw; None before it, and for variants that need none. device: the kind of processor or
    GPU that the pass ran on.
    """

    variant: str
    options: Any
    source: PinnedSource
    checkpoint: Checkpoint
    cache: Cache
    staging: Path
    scratch: Path
    limits: RunLimits = field(default_factory=RunLimits)
    calibration: CalibrationEntry | None = None
    device: str | None = None

    @property
    def calibrated_on(self) -> CalibrationEntry:
        """What the pass saw, for a variant that needs one. Raises BuildError: there was none."""
        if self.calibration is None:
            raise BuildError(f"{self.variant}: there was no calibration pass", hint="give the recipe a `calibration`")
        return self.calibration


@dataclass(frozen=True)
class BuildResult:
    """What a builder wrote into staging. `measurements` goes to measurements.json, the rest to the manifest.

    device: the kind of processor or GPU (system.processor.device_name) that numbers were computed on outside of the
    calibration pass, where another kind might give other bits. left_out: of the source's tensors, by their names.
    stored: None where what is not quantized has the type that the format stores by itself.
    """

    files: tuple[str, ...]
    weights_bytes: int
    bits: int | None
    group_size: int | None
    bits_per_weight: float
    kept: tuple[KeptTensor, ...]
    measurements: Mapping[str, Any] = field(default_factory=dict)
    device: str | None = None
    left_out: tuple[LeftOut, ...] = ()
    stored: StoredIn | None = None


class Collector(Resumable, Protocol):
    """A variant's part in the calibration pass: solves each decoder block, and takes the results in order.

    After each block its state is recorded: a build that is stopped goes on there, with a collector that `resume`s.
    """

    def pieces(self, layout: BlockLayout) -> Sequence[BlockLayout]:
        """A block in parts that can be solved apart, by several machines at once."""

    def solve(self, block: Block) -> Any:
        """What the variant needs of a block, or of one of its pieces, picklable and small; changes nothing, in here or
        on disk: on a cluster another collector of the same context does it, in another process, in any order.
        """

    def add(self, index: int, solved: Sequence[Any]) -> None:
        """Take what `solve` gave for all pieces of a block; one block after the other, where the pass runs."""

    def finish(self) -> None:
        """The pass is over: write what the build needs into staging or scratch."""


class SolveCost(Protocol):
    """What solving a block takes, in operations of matrix products: of either solver, and of the clip search."""

    @property
    def gptq_products(self) -> float: ...
    @property
    def awq_products(self) -> float: ...
    @property
    def clip_products(self) -> float: ...


class Builder(Protocol[OptionsT]):
    """How artifacts of one format are made and checked.

    source_copies: copies of the source's weights, in 16 bits, that a build has on disk beside source and artifact.
    computes_in_half: whether artifacts are computed in the 16 bits that what is not quantized is stored in, so that a
    build must know first how far the source's activations reach.
    """

    @property
    def name(self) -> str: ...
    @property
    def Options(self) -> type[OptionsT]: ...  # noqa: N802 - a class, named as one
    @property
    def source_copies(self) -> int: ...
    @property
    def computes_in_half(self) -> bool: ...

    def tools(self, options: OptionsT) -> Sequence[str]:
        """Distributions whose versions can change the bytes; they enter the build key and the manifest."""

    def needs_calibration(self, options: OptionsT) -> bool:
        """Whether the variant takes part in the calibration pass."""

    def check(self, checkpoint: Checkpoint, options: OptionsT) -> None:
        """Raise PlanError for what can be known to fail from headers."""

    def sizes(
        self, context: Context, options: Sequence[OptionsT], reporter: Reporter
    ) -> Sequence[SizePlan | QuantizeError]:
        """Exact sizes of several variants of one checkpoint, from headers; writes only into context.scratch.

        Gives, not raises, the error of one variant that can't be; raises what stops all of them.
        """

    def collector(self, context: Context, reporter: Reporter) -> Collector:
        """The variant's part in the calibration pass; only called if needs_calibration."""

    def solver_bytes(self, block: BlockMemory, options: OptionsT, threads: int) -> int:
        """Memory that the collector takes at a block beside its weights and statistics; 0 for next to nothing."""

    def solve_operations(self, cost: SolveCost) -> float:
        """Of one block, for the time that a pass on a cluster has left; 0 for next to nothing."""

    def build(self, context: Context, reporter: Reporter) -> BuildResult:
        """Write the artifact's files into context.staging, after the pass if there is one."""

    def intermediates(self, context: Context) -> Sequence[tuple[str, str]]:
        """Cache entries (kind, key) that builds of this checkpoint make for one another, and nothing needs later."""

    def verify(self, folder: Path, checkpoint: Checkpoint, limits: RunLimits, reporter: Reporter) -> Mapping[str, Any]:
        """Open the artifact in its real runtime and compare it with its source. Raises VerifyError.

        Returns facts for measurements.json.
        """


class UncalibratedBuilder:
    """What a builder says that takes no part in a calibration pass and makes nothing on the way."""

    source_copies = 0
    computes_in_half = False

    def needs_calibration(self, options: Any) -> bool:
        """Never."""
        return False

    def collector(self, context: Context, reporter: Reporter) -> Collector:
        """Never called: needs_calibration is False."""
        raise NotImplementedError

    def solver_bytes(self, block: BlockMemory, options: Any, threads: int) -> int:
        """Nothing: no block is solved."""
        return 0

    def solve_operations(self, cost: SolveCost) -> float:
        """None: no block is solved."""
        return 0.0

    def intermediates(self, context: Context) -> Sequence[tuple[str, str]]:
        """None."""
        return ()
