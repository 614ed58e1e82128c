"""The production decision in words: what is decided, under which conditions it holds, and how to go back.

In: a PageSubject and its Choice. Out: DecisionText, for production_decision.md and the page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quantize.evaluate.gates import GateThresholds
from quantize.report.collect import MeasuredArtifact, PageSubject
from quantize.report.production import MAX_ERROR_RATE, SERVING, Choice, ServingVerdict

PROMPTED = {"golden prompts", "JSON answers"}
"""Gates that an evaluation leaves open if the recipe has no prompts for them."""


@dataclass(frozen=True)
class DecisionText:
    """headline: one sentence. word: of the headline, for its colour. limits: name and value."""

    word: str
    headline: str
    why: str
    context: tuple[str, ...]
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
        limits=_limits(limits),
        conditions=tuple(_conditions(choice.serve, subject)) if choice.serve else (),
        rollback=_rollback(choice, subject),
    )


def headline(choice: Choice) -> tuple[str, str, str]:
    """A word for the decision, the decision, and why."""
    if choice.serve is not None:
        return choice.serve.word, f"Serve {choice.serve.entry.variant}.", _why(choice, choice.serve)
    refused = [item.entry.variant for item in choice.verdicts if item.word == "refused"]
    unknown = [item for item in choice.verdicts if item.word == "insufficient evidence"]
    if not unknown:
        return "refused", "Serve none of these.", f"Every artifact breaks a limit: {', '.join(refused)}."
    gates = dict.fromkeys(finding.gate for item in unknown for finding in item.decision.missing)
    why = f"No artifact is refused by what was measured of {', '.join(item.entry.variant for item in unknown)}, but "
    why += f"there is no evidence of: {', '.join(gates)}."
    why += f" Refused: {', '.join(refused)}." if refused else ""
    return "insufficient evidence", "Insufficient evidence.", f"{why} To measure it: {_measure(unknown[0])}."


def _why(choice: Choice, serve: ServingVerdict) -> str:
    """Why this one of those that are accepted, and what is not known of it."""
    smallest, number = choice.usable[0], len(choice.usable)
    if number == 1:
        why = "It is the only artifact that keeps every limit."
    elif serve is smallest:
        why = f"It is the smallest of the {number} artifacts that keep every limit."
    else:
        larger = serve.size_bytes / smallest.size_bytes - 1
        why = (
            f"Of the {number} artifacts that keep every limit, {smallest.entry.variant} is the smallest; "
            f"{serve.entry.variant} is only {larger:.1%} larger, and its KL divergence is {serve.divergence:.4f} nats, "
            f"not {smallest.divergence:.4f}."
        )
    return f"{why} {_not_measured(serve)}".strip()


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
    steps = []
    if missing - {*SERVING, *PROMPTED}:
        steps.append(f"`quantize eval {called}`")
    elif missing & PROMPTED:
        steps.append("golden prompts in the recipe (`evaluation.golden`) that its source can answer, and a build")
    if missing & {*SERVING}:
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
    serving = [
        ("latency, 95th percentile", limits.max_latency_p95_seconds, "{:g} s"),
        ("memory at the peak", limits.max_memory_bytes, "{:,} bytes"),
    ]
    golden = f"at least {limits.min_golden_pass_rate:.0%} of what the source passes"
    return (
        ("mean KL divergence", f"at most {limits.max_kl:g} nats"),
        ("perplexity", f"at most {limits.max_perplexity_ratio:g} times the source's"),
        ("golden prompts", golden + (", unless chance explains the loss" if limits.golden_beyond_chance else "")),
        ("JSON answers", f"at most {limits.max_json_loss:.0%} of the source's good ones lost"),
        ("size", f"under {limits.max_size_ratio:g} times the source"),
        ("error rate", f"at most {_error_rate(limits):g}, where a load was measured"),
        *((name, f"at most {form.format(value)}" if value else "no limit given") for name, value, form in serving),
    )


def _error_rate(limits: GateThresholds) -> float:
    return MAX_ERROR_RATE if limits.max_error_rate is None else limits.max_error_rate


def _conditions(chosen: ServingVerdict, subject: PageSubject) -> list[str]:
    """What the figures hold for; nothing else was measured."""
    entry, quality = chosen.entry, chosen.entry.quality
    lines = [f"The artifact is `{entry.artifact.ref}`: another digest is another decision."]
    if quality:
        lines.append(f"Quality was measured in {quality.get('runtime')} ({quality.get('runtime_version')}).")
    lines += _load_conditions(entry)
    lines += [f"A person looks at: {item.gate} ({item.reason})." for item in chosen.decision.flags]
    if chosen.not_measured:
        names = listed(chosen.not_measured)
        lines.append(f"Nothing is known of {names}: run `quantize bench {entry.called}` before it takes load.")
    limits = chosen.limits
    for name, value in (("latency", limits.max_latency_p95_seconds), ("memory", limits.max_memory_bytes)):
        if value is None and name not in chosen.not_measured:
            key = "max_latency_p95_seconds" if name == "latency" else "max_memory_bytes"
            lines.append(f"No limit on {name} was given: decide whether the figure will do, or set `gates.{key}`.")
    if subject.source.license:
        lines.append(f"The licence of the base model applies: {subject.source.license}.")
    return lines


def _load_conditions(entry: MeasuredArtifact) -> list[str]:
    bench = entry.bench
    if bench is None:
        return []
    used = bench.measured_with
    machine = ", ".join([f"{used.processor}, {used.cores} cores", *used.gpus])
    context = f", context {used.context:,} tokens" if used.context else ""
    lines = [f"Latency, errors and memory were measured with {used.server} on {machine}{context}."]
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
    when = [f"more than {_error_rate(limits):g} of the requests fail"]
    if limits.max_latency_p95_seconds is not None:
        when.append(f"the 95th percentile of latency passes {limits.max_latency_p95_seconds:g} s")
    when.append("`quantize eval` no longer gives these figures after a change of runtime")
    return (
        back,
        f"When: {', or '.join(when)}.",
        f"{kept} in `artifacts.lock`, so that `quantize gc` leaves what is served and what is gone back to.",
    )
