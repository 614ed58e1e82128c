"""The comparison that a card shows: an artifact beside the other variants of its recipe, as the store has them.

In: an artifact and its store. Out: a Comparison in its measurements.json, from which card and chart are made, so that
they are the same wherever the artifact goes, whether or not the others are there. It is a picture of one moment: it
stays as it is when the artifact goes out again, unless its own figures changed or whoever publishes asks for a new one.
Otherwise building one more variant would change the publications of all the others.
"""

from __future__ import annotations

from quantize.evaluate.comparison import NAME, Comparison, Contender, Entrant, compare, read_comparison
from quantize.evaluate.decision import Verdict
from quantize.evaluate.metrics import Summary
from quantize.store.artifact import Artifact, is_inside, write_measurements
from quantize.store.store import Store


def compare_siblings(artifact: Artifact, store: Store) -> Comparison:
    """An artifact and the current ones of the other variants, of the same source."""
    found = sorted([artifact, *_siblings(artifact, store)], key=lambda item: item.manifest.digest)
    record = Summary.of(artifact.measurements()).record
    return compare([_entrant(item) for item in found], None if record is None else record.limits)


def keep_comparison(artifact: Artifact, store: Store, *, anew: bool) -> None:
    """Put the comparison into measurements.json, whose lock the caller has, where it is time for one. Raises OSError.

    With fewer than two artifacts measured there is none, and that stays so, too.

    anew: also where there is one. One that names variants which the store does not have stays all the same, as long as
    the artifact's own figures are what it says: it was made where there was more to see. So does what was pulled.
    """
    measurements = artifact.measurements()
    is_decided, known = NAME in measurements, read_comparison(measurements)
    fresh = compare_siblings(artifact, store)
    is_true = known is None or _own(known, artifact) == _own(fresh, artifact)
    if is_true and not anew and (is_decided or artifact.is_pulled):
        return
    if is_true and known is not None and _variants(known) - _variants(fresh):
        return
    data = fresh.model_dump(mode="json") if len(fresh.measured) > 1 else None
    if not is_decided or data != measurements[NAME]:
        write_measurements(artifact.folder, {**measurements, NAME: data})


def _siblings(artifact: Artifact, store: Store) -> list[Artifact]:
    if not is_inside(store.root, artifact):
        return []
    mine = artifact.manifest
    return [
        item
        for item in store.current_artifacts(mine.name)
        if item.manifest.variant != mine.variant and item.manifest.source.files == mine.source.files
    ]


def _entrant(item: Artifact) -> Entrant:
    manifest, summary = item.manifest, Summary.of(item.measurements())
    risk = manifest.accepted_risk is not None
    verdict = Verdict.RISK_ACCEPTED if risk else summary.verdict
    return Entrant.of(manifest, verdict, summary.record.quality if summary.record else None)


def _own(found: Comparison, artifact: Artifact) -> object:
    """The artifact's own figures in a comparison; where it stands among the others is theirs, too."""
    mine: Contender | None = found.one(artifact.manifest.digest)
    return mine and (mine.verdict, mine.mean_kl, mine.mean_kl_interval, mine.kinds)


def _variants(found: Comparison) -> set[str]:
    return {item.variant for item in found.artifacts}
