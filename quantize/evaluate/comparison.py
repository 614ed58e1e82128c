"""The artifacts of a recipe beside each other: size, loss with its interval, the front, and which one to take.

In: Entrants. Out: a Comparison, plain data that measurements.json can keep and that says the same in sentences and in
a table wherever it is shown: on a report's page and in a model card. The rule is front.py's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, ValidationError

from quantize.evaluate.decision import GateThresholds, RecordModel, Verdict
from quantize.evaluate.front import beaten_by, because, front, next_step, pick
from quantize.evaluate.metrics import metric
from quantize.evaluate.record import Count, Interval, Number, Quality
from quantize.store.manifest import Manifest
from quantize.system.sizes import size_text

NAME = "comparison"
"""Its key in measurements.json."""
MAX_READ = 200
"""Artifacts that a comparison from elsewhere may have."""
FIGURE = "mean_kl"
"""The metric that artifacts are compared by."""
ON_FRONT, NOT_MEASURED = "on it", "not measured"


@dataclass(frozen=True)
class Entrant:
    """One artifact to compare. verdict: what its gates say. quality: None where it was not measured."""

    variant: str
    format: str
    digest: str
    size_bytes: int
    bits_per_weight: float
    verdict: Verdict
    quality: Quality | None

    @classmethod
    def of(cls, manifest: Manifest, verdict: Verdict, quality: Quality | None) -> Entrant:
        """The artifact of a manifest."""
        size, bits = manifest.size_bytes, manifest.bits_per_weight
        return cls(manifest.variant, manifest.format, manifest.digest, size, bits, verdict, quality)


class KindLoss(RecordModel):
    """The loss on one kind of text."""

    kind: str
    mean_kl: Number
    mean_kl_interval: Interval | None


class Contender(RecordModel):
    """One artifact among the others. beaten_by: the variant that is no larger and better; None for none, or unknown."""

    variant: str
    format: str
    digest: str
    size_bytes: Count
    bits_per_weight: Number
    verdict: Annotated[Verdict, Field(strict=False)]
    mean_kl: Number | None
    mean_kl_interval: Interval | None
    kinds: Annotated[tuple[KindLoss, ...], Field(strict=False)]
    is_on_front: bool
    beaten_by: str | None

    @property
    def worst(self) -> KindLoss | None:
        """The kind of text with the greatest loss; None where there are no several."""
        return max(self.kinds, key=lambda item: item.mean_kl, default=None)


class Comparison(RecordModel):
    """Artifacts by size. taken: digest of the one to take; None where none keeps every limit. because, next_step: in
    figures, "" where there is nothing to say. limit: of the loss on the worst kind of text, in nats. text: that all
    were measured on; "" where it was not the same. predictions: tokens of it.
    """

    taken: str | None
    because: str
    next_step: str
    limit: Number | None
    text: str
    predictions: Count
    artifacts: Annotated[tuple[Contender, ...], Field(strict=False)]

    @property
    def chosen(self) -> Contender | None:
        """The one to take."""
        return self.one(self.taken)

    def one(self, digest: str | None) -> Contender | None:
        """The artifact with a digest."""
        return next((item for item in self.artifacts if item.digest == digest), None)

    @property
    def measured(self) -> tuple[Contender, ...]:
        """Those that have a figure."""
        return tuple(item for item in self.artifacts if item.mean_kl is not None)


def compare(entrants: Sequence[Entrant], limits: GateThresholds | None) -> Comparison:
    """Compare the artifacts of one recipe. limits: that they were held to.

    The front is that of the artifacts that keep every limit; where there are none, of those that are not refused.
    """
    entrants = sorted(entrants, key=lambda item: (item.size_bytes, item.variant))
    accepted = [item for item in entrants if item.verdict.is_accepted]
    rivals = accepted or [item for item in entrants if item.verdict is not Verdict.REFUSED]
    taken, on = pick(accepted), front(rivals)
    qualities = [item.quality for item in entrants if item.quality is not None]
    same = len({item.windows_hash for item in qualities}) == 1
    return Comparison(
        taken=taken.digest if taken is not None else None,
        because=because(taken, accepted) if taken is not None else "",
        next_step=next_step(taken, accepted) if taken is not None else "",
        limit=limits.max_kl if limits is not None else None,
        text=qualities[0].text_name if same else "",
        predictions=qualities[0].predictions if same else 0,
        artifacts=tuple(_compared(item, rivals, on) for item in entrants),
    )


def _compared(item: Entrant, rivals: Sequence[Entrant], on: Sequence[Entrant]) -> Contender:
    quality, other = item.quality, beaten_by(item, rivals)
    kinds = () if quality is None else quality.kinds
    return Contender(
        variant=item.variant,
        format=item.format,
        digest=item.digest,
        size_bytes=item.size_bytes,
        bits_per_weight=item.bits_per_weight,
        verdict=item.verdict,
        mean_kl=None if quality is None else quality.mean_kl,
        mean_kl_interval=None if quality is None else quality.mean_kl_interval,
        kinds=tuple(
            KindLoss(kind=kind.kind, mean_kl=kind.mean_kl, mean_kl_interval=kind.mean_kl_interval) for kind in kinds
        ),
        is_on_front=item in on,
        beaten_by=None if other is None else other.variant,
    )


def read_comparison(measurements: Mapping[str, Any]) -> Comparison | None:
    """The comparison in an artifact's measurements.json; None if there is none that can be read."""
    try:
        found = Comparison.model_validate(measurements.get(NAME))
    except ValidationError:
        return None
    return found if len(found.artifacts) <= MAX_READ else None


# --- in words ---------------------------------------------------------------------------------------------------------


def answer(found: Comparison) -> str:
    """Which one to take, and why: "Take …, because …."; what more size buys."""
    chosen = found.chosen
    if chosen is None:
        return "Take none of these: no artifact keeps every limit." if found.measured else "Nothing was measured."
    return " ".join(part for part in (f"Take {chosen.variant}, because {found.because}.", found.next_step) if part)


def front_text(found: Comparison) -> str:
    """Who is on the front, by name; "" where nothing was measured."""
    names = [item.variant for item in found.artifacts if item.is_on_front]
    if not names:
        return ""
    return f"On the Pareto front, where nothing that is no larger is better beyond the noise: {', '.join(names)}."


@dataclass(frozen=True)
class ComparisonTable:
    """A table of text. worst: (row, column) of each cell that has a row's worst kind of text."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    worst: frozenset[tuple[int, int]]


def comparison_table(found: Comparison) -> ComparisonTable:
    """Everything that is compared, a row an artifact, a column a kind of text."""
    kinds = tuple(dict.fromkeys(kind.kind for item in found.artifacts for kind in item.kinds))
    first = ("variant", "size", metric(FIGURE).short)
    rows, marked = [], set()
    for row, item in enumerate(found.artifacts):
        known = {kind.kind: kind for kind in item.kinds}
        cells = [_figure(item.mean_kl, item.mean_kl_interval)]
        cells += [
            _figure(known[kind].mean_kl, known[kind].mean_kl_interval) if kind in known else NOT_MEASURED
            for kind in kinds
        ]
        if item.worst is not None:
            marked.add((row, len(first) + kinds.index(item.worst.kind)))
        rows.append((item.variant, size_text(item.size_bytes), *cells, _place(item), item.verdict.value))
    return ComparisonTable((*first, *kinds, "front", "gates"), tuple(rows), frozenset(marked))


def comparison_note(found: Comparison) -> str:
    """How the table is to be read, of what it has."""
    note = f"Mean KL divergence from the source in nats{f', on {found.text}' if found.text else ''}."
    if not found.text and found.measured:
        note += " Not all were measured on the same text: compare only those that were."
    if any(item.mean_kl_interval is not None for item in found.measured):
        note += " ± is half the width of the interval that a figure lies in with 95 % confidence."
    if any(item.kinds for item in found.measured):
        note += " In bold: the worst kind of text, which the limit is held against."
    return note


def _figure(value: float | None, interval: Interval | None) -> str:
    return NOT_MEASURED if value is None else metric(FIGURE).with_interval(value, interval)


def _place(item: Contender) -> str:
    if item.is_on_front:
        return ON_FRONT
    return f"beaten by {item.beaten_by}" if item.beaten_by is not None else "–"
