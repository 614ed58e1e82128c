"""The production decision in words: what is decided, under which conditions it holds, and how to go back.

In: a PageSubject and its Choice. Out: DecisionText, for production_decision.md and the page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quantize.evaluate.decision import GateThresholds, Verdict
from quantize.evaluate.gates import MeasuredBy, error_rate_limit, gates
from quantize.report.collect import MeasuredArtifact, PageSubject
from quantize.report.operation import load_table, quality_table, runbook, serving_rows
from quantize.report.production import Choice, ServingVerdict
from quantize.report.table import Table


@dataclass(frozen=True)
class DecisionText:
    """headline: one sentence. word: of the headline, for its colour. serving, limits: name and value.

    quality, load: of each artifact, in a row. runbook: what has happened, and what to do then, in order.
    """

    word: Verdict
    headline: str
    why: str
    context: tuple[str, ...]
    serving: tuple[tuple[str, str], ...]
    quality: Table
    load: Table
    runbook: tuple[tuple[str, tuple[str, ...]], ...]
    limits: tuple[tuple[str, str], ...]
    conditions: tuple[str, ...]
    rollback: tuple[str, ...]


def decision_text(subject: PageSubject, choice: Choice) -> DecisionText:
    """Put a choice into words."""
    word, title, why = headline(choice)
    limits = (choice.serve or choice.verdicts[0]).limits
    return DecisionText(
        word=word,
        headline=title,
        why=why,
        context=_context(subject),
        serving=serving_rows(subject, choice),
        quality=quality_table(choice),
        load=load_table(choice),
        runbook=runbook(choice),
        limits=_limits(limits),
        conditions=tuple(_conditions(choice.serve, subject)) if choice.serve else (),
        rollback=_rollback(choice, subject),
    )


def headline(choice: Choice) -> tuple[Verdict, str, str]:
    """A word for the decision, the decision, and why."""
    if choice.serve is not None:
        return choice.serve.word, f"Serve {choice.serve.entry.variant}.", _why(choice, choice.serve)
    refused = [item.entry.variant for item in choice.verdicts if item.word is Verdict.REFUSED]
    unknown = [item for item in choice.verdicts if item.word is Verdict.INSUFFICIENT]
    if not unknown:
        return Verdict.REFUSED, "Serve none of these.", f"Every artifact breaks a limit: {', '.join(refused)}."
    missing = dict.fromkeys(finding.gate for item in unknown for finding in item.decision.missing)
    why = f"No artifact is refused by what was measured of {', '.join(item.entry.variant for item in unknown)}, but "
    why += f"there is no evidence of: {', '.join(missing)}."
    why += f" Refused: {', '.join(refused)}." if refused else ""
    return Verdict.INSUFFICIENT, "Insufficient evidence.", f"{why} To measure it: {_measure(unknown[0])}."


def _why(choice: Choice, serve: ServingVerdict) -> str:
    """Why this one of those that are accepted, and what is not known of it."""
    because = choice.comparison.because
    return f"{because[:1].upper()}{because[1:]}. {_not_measured(serve)}".strip()


def _not_measured(verdict: ServingVerdict) -> str:
    """What the decision was taken without; "" if every figure is there."""
    names = listed(verdict.not_measured)
    if not names:
        return ""
    were, them = ("were", "them") if len(verdict.not_measured) > 1 else ("was", "it")
    command = f"`quantize bench {verdict.entry.called}`"
    return f"{names.capitalize()} {were} not measured ({command}); the recipe sets no limit on {them}."


def _measure(verdict: ServingVerdict) -> str:
    """What gives the evidence that a verdict lacks."""
    missing, called = {finding.gate for finding in verdict.decision.missing}, verdict.entry.called
    needs = {gate.measured_by for gate in gates() if gate.name in missing}
    steps = []
    if MeasuredBy.EVALUATION in needs:
        steps.append(f"`quantize eval {called}`")
    elif MeasuredBy.PROMPTS in needs:
        steps.append("golden prompts in the recipe (`evaluation.golden`) that its source can answer, and a build")
    if MeasuredBy.LOAD in needs:
        steps.append(f"`quantize bench {called}`")
    return listed(steps)


def listed(names: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join(part for part in (", ".join(names[:-1]), *names[-1:]) if part)


def _context(subject: PageSubject) -> tuple[str, ...]:
    source = subject.source
    lines = [f"{source.name} ({source.uri}), {source.parameters:,} parameters, recipe `{subject.name}`."]
    if subject.description:
        lines.append(subject.description)
    if source.quantized_before:
        lines.append(f"The source was {source.quantized_before} once: it is what all of these are compared with.")
    return tuple(lines)


def _limits(limits: GateThresholds) -> tuple[tuple[str, str], ...]:
    return tuple((gate.title, gate.bound(limits)) for gate in gates())


def _conditions(chosen: ServingVerdict, subject: PageSubject) -> list[str]:
    """What the figures hold for; nothing else was measured."""
    entry, quality = chosen.entry, chosen.entry.quality
    lines = [f"The artifact is `{entry.artifact.ref}`: another digest is another decision."]
    if quality is not None:
        lines.append(f"Quality was measured in {quality.runtime} ({quality.runtime_version}).")
    lines += _load_conditions(entry)
    lines += [f"A person looks at: {item.gate} ({item.reason})." for item in chosen.decision.flags]
    if chosen.not_measured:
        names = listed(chosen.not_measured)
        lines.append(f"Nothing is known of {names}: run `quantize bench {entry.called}` before it takes load.")
    for gate in gates():
        if (
            gate.measured_by is MeasuredBy.LOAD
            and gate.name not in chosen.not_measured
            and not gate.is_set(chosen.limits)
        ):
            will_do = "decide whether the figure will do"
            lines.append(f"No limit on {gate.name} was given: {will_do}, or set `gates.{gate.key}`.")
    if subject.source.license:
        lines.append(f"The licence of the base model applies: {subject.source.license}.")
    return lines


def _load_conditions(entry: MeasuredArtifact) -> list[str]:
    bench = entry.bench
    if bench is None:
        return []
    used = bench.measured_with
    context = f", context {used.context:,} tokens" if used.context else ""
    lines = [f"Latency, errors and memory were measured with {used.server} on {used.machine}{context}."]
    most = max((cell.concurrency or 0 for cell in bench.cells), default=0)
    if most:
        lines.append(f"At most {most} requests at a time; beyond that nothing is known.")
    rates = [cell.rate for cell in bench.cells if cell.rate is not None]
    if rates:
        lines.append(f"At most {max(rates):g} requests a second; beyond that nothing is known.")
    return lines


def _rollback(choice: Choice, subject: PageSubject) -> tuple[str, ...]:
    if choice.serve is None:
        return ("Nothing new is served: what serves now goes on.",)
    source = subject.source
    if choice.fallback is not None:
        ref = choice.fallback.entry.artifact.ref
        back = f"Go back to `{ref}`, the next larger artifact that keeps every limit and diverges no more."
    else:
        size = f"{source.weights_bytes:,} bytes"
        back = f"Go back to the source itself, {source.uri} ({size}): no larger artifact is accepted and diverges less."
    kept = "Name both digests" if choice.fallback else "Name its digest"
    limits = choice.serve.limits
    when = [f"more than {error_rate_limit(limits):g} of the requests fail"]
    if limits.max_latency_p95_seconds is not None:
        when.append(f"the 95th percentile of latency passes {limits.max_latency_p95_seconds:g} s")
    when.append("`quantize eval` no longer gives these figures after a change of runtime")
    return (
        back,
        f"When: {', or '.join(when)}.",
        f"{kept} in `artifacts.lock`, so that `quantize gc` leaves what is served and what is gone back to.",
    )
