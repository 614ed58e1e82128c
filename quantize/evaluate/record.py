"""What measurements.json keeps of an evaluation, under `evaluation`: typed, written once, read by everyone else.

In: plain data of measurements.json. Out: an EvaluationRecord, frozen; or None, for one that is damaged or of another
shape. What quantization cost is in `quality` and `golden`, and metrics.py says how each figure is called and shown.
What a newer version added to a record stays in it when it is decided on again and written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, ClassVar

from pydantic import Field, ValidationError, model_validator

from quantize.evaluate.decision import Decision, Finding, GateThresholds, RecordModel, Verdict
from quantize.evaluate.numbers import Count as Count
from quantize.evaluate.numbers import Interval as Interval
from quantize.evaluate.numbers import Number as Number
from quantize.evaluate.numbers import plain as plain
from quantize.evaluate.task_record import TasksRecord

NAME = "evaluation"
Asked = Annotated[int, Field(ge=0, le=100_000)]  # golden prompts


class Change(StrEnum):
    """What became of a golden prompt: who passes it."""

    KEPT = "kept"
    LOST = "lost"
    GAINED = "gained"
    FAILED = "failed"


class TextFigures(RecordModel):
    """What quantization cost on some text.

    KL divergences are in nats. top_token_agreement: share of the predictions whose likeliest token is the source's.
    Intervals are None where there were too few windows for one.
    """

    ADDED: ClassVar[frozenset[str]] = frozenset({"perplexity_ratio_interval", "mean_kl_interval"})
    perplexity: Number
    source_perplexity: Number
    perplexity_ratio: Number
    perplexity_ratio_interval: Interval | None = None
    mean_kl: Number
    mean_kl_interval: Interval | None = None
    p99_kl: Number
    max_kl: Number | None = None
    top_token_agreement: Number
    predictions: Count
    windows: Count


class KindFigures(TextFigures):
    """The same on one kind of text: prose, code, chat, another language."""

    kind: str


class WindowFigures(RecordModel):
    """Sums over the predictions of each window, in order, by which two artifacts are compared: see intervals.Sums."""

    kinds: Annotated[tuple[str, ...], Field(strict=False)]
    predictions: Annotated[tuple[Count, ...], Field(strict=False)]
    kl: Annotated[tuple[Number, ...], Field(strict=False)]
    log_loss: Annotated[tuple[Number, ...], Field(strict=False)]
    source_log_loss: Annotated[tuple[Number, ...], Field(strict=False)]

    @model_validator(mode="after")
    def _one_each(self) -> WindowFigures:
        columns = (self.kinds, self.predictions, self.kl, self.log_loss, self.source_log_loss)
        if len({len(column) for column in columns}) > 1:
            raise ValueError("every window has one of each sum")
        return self


class Quality(TextFigures):
    """What quantization cost on all held-out text, and on what it was measured.

    kl_is_exact is False where KL divergences are lower bounds. kinds: by the kind of text, where there are several.
    source_runtime: what the source ran in; of a GGUF file it is llama.cpp, with the source in 16 bits.
    """

    ADDED: ClassVar[frozenset[str]] = TextFigures.ADDED | {"runtime_device", "source_device", "kinds", "per_window"}
    window_tokens: Count
    kl_is_exact: bool
    text_name: str
    text_hash: str
    windows_hash: str
    runtime: str
    runtime_version: str
    runtime_device: str = ""
    source_runtime: str
    source_runtime_version: str
    source_device: str = ""
    kinds: Annotated[tuple[KindFigures, ...], Field(strict=False)] = ()
    per_window: WindowFigures | None = None


class Conversion(TextFigures):
    """What converting cost before anything was quantized: the source in 16 bits in the runtime of the artifact, against
    the source in transformers. kinds: as in Quality.
    """

    runtime: str
    source_runtime: str
    kinds: Annotated[tuple[KindFigures, ...], Field(strict=False)] = ()


class GradedAnswer(RecordModel):
    """One model's answer; reason says why it did not pass."""

    text: str
    passed: bool
    reason: str


class PromptResult(RecordModel):
    """One golden prompt, both answers."""

    key: str
    category: str
    language: str
    kind: str
    prompt: str
    change: Annotated[Change, Field(strict=False)]
    source: GradedAnswer
    artifact: GradedAnswer

    @property
    def is_compared(self) -> bool:
        """Whether it has no right answer: the artifact's is only compared with the source's, which always passes."""
        return self.kind == "same"

    @property
    def is_changed(self) -> bool:
        """Whether one of the two passes and the other does not."""
        return self.change in (Change.LOST, Change.GAINED)


@dataclass(frozen=True)
class GoldenCount:
    """Golden prompts passed by an artifact and by its source, of all that have a right answer; as text, "16 of 23"."""

    passed: int
    source_passed: int
    prompts: int

    def __str__(self) -> str:
        return f"{self.passed} of {self.prompts}"

    @property
    def source(self) -> str:
        """What the source passes, in the same words."""
        return f"{self.source_passed} of {self.prompts}"


class GoldenRecord(RecordModel):
    """Golden prompts: all results, and counts of those that have a right answer.

    json_source_passed, json_lost: of the prompts that ask for JSON. same_rate: share of the prompts without a right
    answer that the artifact answers nearly as the source does; None where there is none.
    """

    hash: str
    context: Count
    prompts: Asked
    source_passed: Asked
    artifact_passed: Asked
    lost: Asked
    json_source_passed: Asked | None = None
    json_lost: Asked | None = None
    same_rate: Number | None = None
    results: Annotated[tuple[PromptResult, ...], Field(strict=False)]

    @classmethod
    def of(cls, results: Iterable[PromptResult], golden_hash: str, context: int) -> GoldenRecord:
        """Count the results. context: tokens of a prompt and its answer."""
        results = tuple(results)
        judged = [item for item in results if not item.is_compared]
        asked_json = [item for item in results if item.kind == "json"]
        same = [item.artifact.passed for item in results if item.is_compared]
        return cls(
            hash=golden_hash,
            context=context,
            prompts=len(judged),
            source_passed=sum(item.source.passed for item in judged),
            artifact_passed=sum(item.artifact.passed for item in judged),
            lost=sum(item.change is Change.LOST for item in judged),
            json_source_passed=sum(item.source.passed for item in asked_json),
            json_lost=sum(item.change is Change.LOST for item in asked_json),
            same_rate=sum(same) / len(same) if same else None,
            results=results,
        )

    @property
    def count(self) -> GoldenCount:
        """What tables show."""
        return GoldenCount(self.artifact_passed, self.source_passed, self.prompts)


class Figures(RecordModel):
    """What the gates look at beside quality and answers; None where it was not measured.

    checks: what must simply hold, by name, with what is wrong; "" where it holds. latency, errors and memory: of a load
    test, which whoever decides about serving adds.
    """

    size_bytes: Count | None = None
    source_bytes: Count | None = None
    latency_p95_seconds: Number | None = None
    error_rate: Number | None = None
    peak_memory_bytes: Count | None = None
    checks: Mapping[str, str] = {}


class Evidence(RecordModel):
    """All that was measured of one artifact: what metrics are read from, and what the gates decide by."""

    ADDED: ClassVar[frozenset[str]] = frozenset({"conversion", "tasks"})
    quality: Quality | None = None
    conversion: Conversion | None = None
    tasks: TasksRecord | None = None
    golden: GoldenRecord | None = None
    figures: Figures = Figures()


class ArtifactName(RecordModel):
    """The artifact, as it was called when it was measured."""

    name: str
    format: str = ""


class SourceName(RecordModel):
    """What it was measured against."""

    name: str
    uri: str = ""
    revision: str | None = None
    digest: str = ""


class MeasuredOn(RecordModel):
    """The machine that the figures were measured on."""

    system: str = ""
    processor: str
    cores: Count
    ram_bytes: Count = 0
    gpus: Annotated[tuple[str, ...], Field(strict=False)]


class EvaluationRecord(Evidence):
    """An evaluation and the decision on it.

    key: names text, prompts and protocol. seconds: that it took. held_out: how it is known that the text was not
    calibrated on.
    """

    quality: Quality | None
    golden: GoldenRecord | None
    figures: Figures
    verdict: Annotated[Verdict, Field(strict=False)]
    findings: Annotated[tuple[Finding, ...], Field(strict=False)]
    limits: GateThresholds
    held_out: str | None
    artifact: ArtifactName
    source: SourceName
    machine: MeasuredOn
    evaluated_at: str = ""
    seconds: Number | None = None
    key: str = ""

    @property
    def decision(self) -> Decision:
        """What the gates said, by the limits in the record."""
        return Decision(self.findings)

    def decided(self, decision: Decision, limits: GateThresholds) -> EvaluationRecord:
        """The same figures with another decision, and the limits that it was taken by."""
        found = {"verdict": decision.verdict, "findings": decision.findings, "limits": limits}
        return self.model_copy(update=found)

    def is_same(self, other: EvaluationRecord) -> bool:
        """Whether all figures and the decision are equal; a figure that is no number is equal to itself."""
        return self.to_data() == other.to_data()

    def to_data(self) -> dict[str, Any]:
        """Plain data, as measurements.json keeps it."""
        return self.model_dump(mode="json")


def read_record(measurements: Mapping[str, Any]) -> EvaluationRecord | None:
    """The record in an artifact's measurements.json; None if there is none that can be read."""
    try:
        return EvaluationRecord.model_validate(measurements.get(NAME))
    except ValidationError:
        return None


def source_lines(counts: Iterable[tuple[str, GoldenCount | None]]) -> list[str]:
    """What must be known beside a column of GoldenCounts: one line for each source, or set of prompts it was asked.

    counts: (name of the recipe, count) of each row. The names are only shown where there are several.
    """
    asked = list(dict.fromkeys((name, count.source) for name, count in counts if count is not None))
    several = len({name for name, _ in asked}) > 1
    return [f"the source{f' of {name}' if several else ''} passes {text} golden prompts" for name, text in asked]
