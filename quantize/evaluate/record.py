"""What measurements.json keeps of an evaluation, under `evaluation`: plain data, written once, read by everyone else.

In: an Evaluation, its Figures and Decision. Out: a dict; and from a dict the figures again, so that other limits can be
held without measuring anew, and a Summary for tables. A record that is damaged, or of another shape, is none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from quantize.evaluate.gates import Decision, Figures, GateThresholds

if TYPE_CHECKING:
    from quantize.evaluate.answers import GoldenResult
    from quantize.evaluate.session import Evaluation

NAME = "evaluation"
NOT_EVALUATED = "not evaluated"


Number = Annotated[float, Field(allow_inf_nan=False)] | Literal["inf", "-inf", "nan"]  # JSON has no words for those
Count = Annotated[int, Field(ge=0, le=1 << 62)]
Asked = Annotated[int, Field(ge=0, le=100_000)]  # golden prompts


class _RecordModel(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class _Quality(_RecordModel):
    perplexity: Number
    source_perplexity: Number
    perplexity_ratio: Number
    mean_kl: Number
    p99_kl: Number
    top_token_agreement: Number
    predictions: Count
    windows: Count
    window_tokens: Count
    kl_is_exact: bool
    text_name: str
    text_hash: str
    windows_hash: str
    runtime: str
    runtime_version: str
    source_runtime: str
    source_runtime_version: str


class _AnswerModel(_RecordModel):
    text: str
    passed: bool
    reason: str


class _Result(_RecordModel):
    key: str
    category: str
    language: str
    kind: str
    prompt: str
    change: Literal["kept", "lost", "gained", "failed"]
    source: _AnswerModel
    artifact: _AnswerModel


class _GoldenRecord(_RecordModel):
    hash: str
    context: Count
    prompts: Asked
    source_passed: Asked
    artifact_passed: Asked
    lost: Asked
    results: list[_Result]


class _Figures(_RecordModel):
    mean_kl: Number | None = None
    perplexity_ratio: Number | None = None
    golden_source_passed: Asked | None = None
    golden_artifact_passed: Asked | None = None
    golden_prompts: Asked | None = None
    golden_lost: Asked | None = None
    json_source_passed: Asked | None = None
    json_lost: Asked | None = None
    size_bytes: Count | None = None
    source_bytes: Count | None = None
    latency_p95_seconds: Number | None = None
    error_rate: Number | None = None
    peak_memory_bytes: Count | None = None
    checks: dict[str, str] = {}


class _Limits(_RecordModel):
    max_kl: float = 0
    max_perplexity_ratio: float = 0
    min_golden_pass_rate: float = 0
    max_json_loss: float = 0
    max_size_ratio: float = 0
    max_gain: float = 0
    max_latency_p95_seconds: float | None = None
    max_error_rate: float | None = None
    max_memory_bytes: Count | None = None
    golden_beyond_chance: bool = True


class _Finding(_RecordModel):
    gate: str
    outcome: str
    reason: str


class _NamedModel(_RecordModel):
    name: str
    format: str = ""
    uri: str = ""


class _Machine(_RecordModel):
    processor: str
    cores: Count
    gpus: list[str]


class _Record(_RecordModel):
    """What readers of a record take for granted; there may be more in it."""

    verdict: str
    findings: list[_Finding]
    figures: _Figures
    limits: _Limits
    quality: _Quality | None
    golden: _GoldenRecord | None
    held_out: str | None
    artifact: _NamedModel
    source: _NamedModel
    machine: _Machine
    evaluated_at: str = ""


def read_record(measurements: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record in an artifact's measurements.json; None if there is none that can be read."""
    record = measurements.get(NAME)
    try:
        _Record.model_validate(record)
    except ValidationError:
        return None
    return record if isinstance(record, dict) else None


@dataclass(frozen=True)
class GoldenCount:
    """Golden prompts passed by an artifact and by its source, of all that have a right answer; as text, "16 of 23"."""

    passed: int
    source_passed: int
    prompts: int

    @classmethod
    def of(cls, golden: Mapping[str, Any] | None) -> GoldenCount | None:
        """The counts in a record's `golden`; None where no prompts were asked."""
        if not golden:
            return None
        return cls(golden["artifact_passed"], golden["source_passed"], golden["prompts"])

    def __str__(self) -> str:
        return f"{self.passed} of {self.prompts}"

    @property
    def source(self) -> str:
        """What the source passes, in the same words."""
        return f"{self.source_passed} of {self.prompts}"


def source_lines(counts: Iterable[tuple[str, GoldenCount | None]]) -> list[str]:
    """What must be known beside a column of GoldenCounts: one line for each source, or set of prompts it was asked.

    counts: (name of the recipe, count) of each row. The names are only shown where there are several.
    """
    asked = list(dict.fromkeys((name, count.source) for name, count in counts if count is not None))
    several = len({name for name, _ in asked}) > 1
    return [f"the source{f' of {name}' if several else ''} passes {text} golden prompts" for name, text in asked]


@dataclass(frozen=True)
class Summary:
    """One line of a table; None where something was not measured."""

    verdict: str
    perplexity_ratio: float | None = None
    mean_kl: float | None = None
    p99_kl: float | None = None
    top_token_agreement: float | None = None
    golden: GoldenCount | None = None

    @classmethod
    def of(cls, measurements: Mapping[str, Any]) -> Summary:
        """The summary of what is in an artifact's measurements.json."""
        record = read_record(measurements)
        if record is None:
            return cls(NOT_EVALUATED)
        quality = record.get("quality") or {}
        return cls(
            verdict=str(record["verdict"]),
            perplexity_ratio=_number(quality.get("perplexity_ratio")),
            mean_kl=_number(quality.get("mean_kl")),
            p99_kl=_number(quality.get("p99_kl")),
            top_token_agreement=_number(quality.get("top_token_agreement")),
            golden=GoldenCount.of(record.get("golden")),
        )

    def as_json(self) -> dict[str, Any]:
        """The same as plain data."""
        return _plain(asdict(self))

    def cells(self) -> list[str]:
        """Perplexity ratio, mean KL, golden prompts and verdict, as tables show them."""
        return [
            "" if self.perplexity_ratio is None else f"{self.perplexity_ratio:.4f}",
            "" if self.mean_kl is None else f"{self.mean_kl:.4f}",
            "" if self.golden is None else str(self.golden),
            self.verdict,
        ]


COLUMNS = [("PPL RATIO", "right"), ("KL", "right"), ("GOLDEN", "right"), ("GATES", "left")]


def to_record(evaluation: Evaluation, figures: Figures, about: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that was measured, and what it was measured with; the decision is added by `decided`."""
    return {
        **about,
        "quality": _plain(asdict(evaluation.quality)),
        "golden": _golden(evaluation.golden) if evaluation.golden else None,
        "held_out": evaluation.held_out,
        "figures": _plain(asdict(figures)),
    }


def failed_record(figures: Figures, about: Mapping[str, Any]) -> dict[str, Any]:
    """The record of an artifact that did not get as far as figures: its checks say why."""
    return {**about, "quality": None, "golden": None, "held_out": None, "figures": _plain(asdict(figures))}


def decided(record: Mapping[str, Any], decision: Decision, limits: GateThresholds) -> dict[str, Any]:
    """The record with a decision, and the limits that it was taken by, in the place of any earlier one."""
    findings = [asdict(finding) for finding in decision.findings]
    return {**record, "verdict": decision.verdict, "limits": asdict(limits), "findings": findings}


def figures_of(record: Mapping[str, Any]) -> Figures:
    """The figures in a record; what this version does not know of is left out."""
    known = {item.name for item in fields(Figures)}
    return Figures(**{name: _number(value) for name, value in record["figures"].items() if name in known})


def _plain(data: Mapping[str, Any]) -> dict[str, Any]:
    """Without the floats that JSON has no words for: they become "inf" and "nan"."""
    return {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in data.items()
    }


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, str) else value


def _golden(golden: GoldenResult) -> dict[str, Any]:
    return {
        "hash": golden.golden_hash,
        "context": golden.context,
        "prompts": len(golden.judged),
        "source_passed": golden.source_passed,
        "artifact_passed": golden.artifact_passed,
        "lost": golden.lost,
        "json_source_passed": golden.json_source_passed,
        "json_lost": golden.json_lost,
        "same_rate": golden.same_rate,
        "results": [{**asdict(item), "change": item.change} for item in golden.results],
    }
