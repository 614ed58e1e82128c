"""Many requests: as many at a time as told (closed loop), or at random times whether answered or not (open loop).

In: a function that asks once, how many, how. Out: Samples. A closed loop waits for an answer before it asks again, so a
slow server slows its own load down and hides its queue; in the open loop requests arrive as a Poisson process does, and
their time counts from when they were due.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Awaitable, Callable, Sequence

from quantize.bench.client import Sample
from quantize.bench.prompts import Shape
from quantize.bench.result import Cell, Percentiles

Ask = Callable[[int, float], Awaitable[Sample]]
"""Ask prompt `number`, which was due at a time of time.perf_counter()."""


async def closed_loop(
    ask: Ask, requests: int, concurrency: int, max_seconds: float, finished: Callable[[int], None]
) -> list[Sample]:
    """Ask `requests` prompts, `concurrency` at a time; none is begun after max_seconds."""
    samples: list[Sample] = []
    numbers = iter(range(requests))
    end = time.perf_counter() + max_seconds

    async def work() -> None:
        for number in numbers:
            now = time.perf_counter()
            if now >= end and samples:
                return
            samples.append(await ask(number, now))
            finished(len(samples))

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, requests)):
            group.create_task(work())
    return samples


async def open_loop(
    ask: Ask, requests: int, rate: float, max_seconds: float, seed: int, finished: Callable[[int], None]
) -> list[Sample]:
    """Ask prompts at the times of a Poisson process of `rate` a second, for at most max_seconds of arrivals."""
    samples: list[Sample] = []
    start = time.perf_counter()

    async def one(number: int, due: float) -> None:
        samples.append(await ask(number, due))
        finished(len(samples))

    async with asyncio.TaskGroup() as group:
        for number, offset in enumerate(arrivals(requests, rate, seed)):
            if offset > max_seconds and number:
                break
            await asyncio.sleep(start + offset - time.perf_counter())
            group.create_task(one(number, start + offset))
    return samples


def arrivals(requests: int, rate: float, seed: int) -> list[float]:
    """Seconds from the start at which a Poisson process of `rate` a second has its events; the same for a seed."""
    source = random.Random(f"arrivals:{seed}")
    times, now = [], 0.0
    for _ in range(requests):
        times.append(now)
        now += source.expovariate(rate)
    return times


def percentile(values: Sequence[float], share: float) -> float:
    """The nearest-rank percentile: the smallest value that at least `share` of them do not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def spread(values: Sequence[float]) -> Percentiles | None:
    """Percentiles, or None of nothing."""
    if not values:
        return None
    p50, p95, p99 = (round(percentile(values, share), 6) for share in (0.50, 0.95, 0.99))
    return Percentiles(p50=p50, p95=p95, p99=p99, mean=round(sum(values) / len(values), 6))


def summarize(shape: Shape, samples: Sequence[Sample], *, concurrency: int | None, rate: float | None) -> Cell:
    """One cell of the table."""
    good = [item for item in samples if item.error is None]
    seconds = max((item.ended for item in samples), default=0.0) - min((item.due for item in samples), default=0.0)
    tokens = [count for item in good if (count := tokens_of(item)) is not None]
    gaps = [gap for item in good if (gap := token_gap(item)) is not None]
    prompts = [item.prompt_tokens for item in good if item.prompt_tokens is not None]
    errors: dict[str, int] = {}
    examples: dict[str, str] = {}
    for item in samples:
        if item.error is not None:
            errors[item.error] = errors.get(item.error, 0) + 1
            examples.setdefault(item.error, item.detail)
    return Cell(
        shape=shape.name,
        prompt_tokens=shape.prompt_tokens,
        output_tokens=shape.output_tokens,
        concurrency=concurrency,
        rate=rate,
        requests=len(samples),
        succeeded=len(good),
        seconds=round(seconds, 6),
        first_token=spread([item.first_token - item.due for item in good if item.first_token is not None]),
        latency=spread([item.ended - item.due for item in good]),
        token_gap=spread(gaps),
        requests_per_second=round(len(good) / seconds, 6) if seconds else 0.0,
        output_tokens_per_second=round(sum(tokens) / seconds, 6) if seconds and len(tokens) == len(good) > 0 else None,
        mean_prompt_tokens=round(sum(prompts) / len(prompts), 2) if prompts else None,
        mean_output_tokens=round(sum(tokens) / len(tokens), 2) if tokens else None,
        errors=dict(sorted(errors.items())),
        without_text=sum(not item.has_text for item in good if item.chunks),
        error_examples=dict(sorted(examples.items())),
    )


def tokens_of(sample: Sample) -> int | None:
    """Tokens of an answer: as the server counts them, else pieces of the stream, else None (an answer in one piece)."""
    if sample.output_tokens is not None:
        return sample.output_tokens
    return sample.chunks if sample.streamed else None


def token_gap(sample: Sample) -> float | None:
    """Mean seconds between the tokens of a streamed answer; None for fewer than two."""
    tokens = tokens_of(sample)
    if sample.first_token is None or sample.last_token is None or tokens is None or tokens < 2 or sample.chunks < 2:
        return None
    return (sample.last_token - sample.first_token) / (tokens - 1)
