"""The production decision in words: what is decided, under which conditions it holds, and how to go back.

In: a Subject and its Choice. Out: DecisionText, for production_decision.md and the page.
"""

from __future__ import annotations

from dataclasses import dataclass

from quantize.evaluate.decision import Limits
from quantize.pages.collect import Entry, Subject
from quantize.pages.production import Choice, Verdict


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


def decision_text(subject: Subject, choice: Choice) -> DecisionText:
    """Put a choice into words."""
    word, headline, why = _headline(choice)
    limits = choice.verdicts[0].limits
    return DecisionText(
        word=word,
        headline=headline,
        why=why,
        context=_context(subject),
        limits=_limits(limits),
        conditions=tuple(_conditions(choice.serve, subject)) if choice.serve else (),
        rollback=_rollback(choice, subject),
    )


def _headline(choice: Choice) -> tuple[str, str, str]:
    if choice.serve is not None:
        name = choice.serve.entry.variant
        others = sum(item.usable for item in choice.verdicts) - 1
        why = "It is the smallest artifact that keeps every limit with every figure measured"
        why += f"; {others} larger one{'s do' if others > 1 else ' does'} too." if others else "; no other one does."
        return choice.serve.word, f"Serve {name}.", why
    refused = [item.entry.variant for item in choice.verdicts if item.word == "refused"]
    unknown = [item for item in choice.verdicts if item.word == "insufficient evidence"]
    if not unknown:
        return "refused", "Serve none of these.", f"Every artifact breaks a limit: {', '.join(refused)}."
    gates = dict.fromkeys(finding.gate for item in unknown for finding in item.decision.missing)
    why = f"No artifact is refused by what was measured of {', '.join(item.entry.variant for item in unknown)}, but "
    why += f"there is no evidence of: {', '.join(gates)}."
    return (
        "insufficient evidence",
        "Insufficient evidence.",
        why + (f" Refused: {', '.join(refused)}." if refused else ""),
    )


def _context(subject: Subject) -> tuple[str, ...]:
    source = subject.source
    lines = [f"{source.name} ({source.uri}), {source.parameters:,} parameters, recipe `{subject.name}`."]
    if subject.description:
        lines.append(subject.description)
    if source.quantized_before:
        lines.append(f"The source was {source.quantized_before} once: it is what all of these are compared with.")
    return tuple(lines)


def _limits(limits: Limits) -> tuple[tuple[str, str], ...]:
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
        ("error rate", f"at most {limits.max_error_rate:g}" if limits.max_error_rate is not None else "no limit"),
        *((name, f"at most {form.format(value)}" if value else "no limit given") for name, value, form in serving),
    )


def _conditions(chosen: Verdict, subject: Subject) -> list[str]:
    """What the figures hold for; nothing else was measured."""
    entry, quality = chosen.entry, chosen.entry.quality
    lines = [f"The artifact is `{entry.artifact.ref}`: another digest is another decision."]
    if quality:
        lines.append(f"Quality was measured in {quality.get('runtime')} ({quality.get('runtime_version')}).")
    lines += _load_conditions(entry)
    lines += [f"A person looks at: {item.gate} ({item.reason})." for item in chosen.decision.flags]
    limits = chosen.limits
    for name, value in (("latency", limits.max_latency_p95_seconds), ("memory", limits.max_memory_bytes)):
        if value is None:
            key = "max_latency_p95_seconds" if name == "latency" else "max_memory_bytes"
            lines.append(f"No limit on {name} was given: decide whether the figure will do, or set `gates.{key}`.")
    if subject.source.license:
        lines.append(f"The licence of the base model applies: {subject.source.license}.")
    return lines


def _load_conditions(entry: Entry) -> list[str]:
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


def _rollback(choice: Choice, subject: Subject) -> tuple[str, ...]:
    if choice.serve is None:
        return ("Nothing new is served: what serves now goes on.",)
    source = subject.source
    if choice.fallback is not None:
        back = f"Go back to `{choice.fallback.entry.artifact.ref}`, the next larger artifact that keeps every limit."
    else:
        size = f"{source.weights_bytes:,} bytes"
        back = f"Go back to the source itself, {source.uri} ({size}): no other artifact is accepted."
    kept = "Name both digests" if choice.fallback else "Name its digest"
    limits = choice.serve.limits
    when = [f"more than {limits.max_error_rate:g} of the requests fail"]
    if limits.max_latency_p95_seconds is not None:
        when.append(f"the 95th percentile of latency passes {limits.max_latency_p95_seconds:g} s")
    when.append("`quantize eval` no longer gives these figures after a change of runtime")
    return (
        back,
        f"When: {', or '.join(when)}.",
        f"{kept} in `artifacts.lock`, so that `quantize gc` leaves what is served and what is gone back to.",
    )
