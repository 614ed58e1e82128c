"""What to evaluate, and on what: data alone, which goes to a worker process and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from quantize.evaluate.held_out import CalibratedOn
from quantize.evaluate.kinds import NamedText
from quantize.evaluate.record import Conversion, GoldenRecord, Quality
from quantize.evaluate.structure import Intended
from quantize.evaluate.task_files import PinnedTask
from quantize.evaluate.task_record import TasksRecord
from quantize.recipe.evaluation import EXTENTS, Effort, Engine, Extent
from quantize.runtimes.base import ModelRef
from quantize.runtimes.devices import AUTO


@dataclass(frozen=True)
class Reference:
    """The source in the runtime of the artifact, in 16 bits: what the artifact is measured against, so that the figures
    tell what quantization cost, and not what another engine does.

    digest: names its content. model: None where it is only to be made if what is in the cache does not do.
    """

    digest: str
    model: ModelRef | None


@dataclass(frozen=True)
class EvaluationJob:
    """What to evaluate, and on what.

    source_digest: names the source's content, for the cache. text: the held-out texts, which are called `text_name`.
    extent: how much of them. golden: files or folders; none asks nothing. context: tokens of a golden prompt and its
    answer, 0 for the smaller of 2,048 and the model's own. calibrated_on: the text that the artifact has seen, which
    the held-out text must not share. intended: what its weights must be; None looks at none. device: auto, or the name
    of what to run on where a runtime has it and a model fits; else it is the CPU. reference: None compares with the
    source in transformers. artifact_engine: of the artifact, where it is not that of all models. tasks: of
    lm-evaluation-harness.
    """

    source: ModelRef
    source_digest: str
    artifact: ModelRef
    cache: Path
    text: tuple[NamedText, ...]
    text_name: str
    column: str = "text"
    extent: Extent = EXTENTS[Effort.FULL]
    golden: tuple[Path, ...] = ()
    context: int = 0
    threads: int = 0
    device: str = AUTO
    engine: Engine = "auto"
    artifact_engine: Engine | None = None
    calibrated_on: CalibratedOn | None = None
    intended: Intended | None = None
    reference: Reference | None = None
    tasks: tuple[PinnedTask, ...] = ()


@dataclass(frozen=True)
class Ride:
    """The source's held-out text, to go through its blocks beside a calibration pass.

    token_ids: of each window. key: names the Baseline that it is for. cache: where the states after the last block go.
    """

    token_ids: tuple[tuple[int, ...], ...]
    key: str
    cache: Path


@dataclass(frozen=True)
class Evaluation:
    """What was measured of one artifact. quality: None where a check says that figures would mean nothing.

    golden is None where no prompts were given; conversion where the artifact was compared with the source in
    transformers; tasks where none are asked for. checks: see Figures. held_out: how it is known that the text was not
    calibrated on.
    """

    quality: Quality | None
    golden: GoldenRecord | None
    checks: Mapping[str, str]
    held_out: str
    conversion: Conversion | None = None
    tasks: TasksRecord | None = None
