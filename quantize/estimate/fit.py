"""Does it fit the card, and what to change so that it does.

In: an Estimate (or what one is made from) and the bytes of a card. Out: a Fit: a word, the figures that it rests on,
and suggestions that were each tried first. The arithmetic is vram.py's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from quantize.estimate.vram import CONTEXTS, Estimate, EstimateSettings, VramProfile, estimate
from quantize.model.shape import ModelShape
from quantize.system.sizes import memory_text as _gib

USABLE_PERCENT = 90
"""Share of a card that may be planned with: 7.5 of 8 GB (94 %) counts as not enough. The rest is the display's, the
driver's and the allocator's; vLLM's own default reservation is 90 % too."""

MAX_SUGGESTIONS = 4


class FitWord(StrEnum):
    """FITS: the safe-upper figure is within the usable bytes. TIGHT: only the expected one is."""

    FITS = "fits"
    TIGHT = "tight"
    DOES_NOT_FIT = "does not fit"


@dataclass(frozen=True)
class Fit:
    """What came of holding an estimate against a card."""

    word: FitWord
    card_bytes: int
    usable_bytes: int
    expected_bytes: int
    upper_bytes: int
    reason: str
    suggestions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Workload:
    """A model and how it is to be run: what the suggestions vary. gpu_layers: on the GPU; None is all of them."""

    shape: ModelShape
    weights_bytes: int
    profile: VramProfile
    settings: EstimateSettings
    context: int
    concurrency: int
    gpu_layers: int | None = None

    def estimate(self) -> Estimate:
        """Its Estimate: of what is on the device, where some layers are elsewhere."""
        whole = estimate(
            self.shape, self.weights_bytes,
            profile=self.profile, settings=self.settings, context=self.context, concurrency=self.concurrency,
        )  # fmt: skip
        if self.gpu_layers is None or self.gpu_layers > self.shape.layers:
            return whole
        return _part(whole, self.gpu_layers, self.shape.layers)


def _part(whole: Estimate, layers: int, of: int) -> Estimate:
    """Some of all layers, each with its part of the weights and the KV cache; the overhead is the same."""
    weights, kv = -(-whole.weights_bytes * layers // of), -(-whole.kv_bytes * layers // of)
    left = whole.weights_bytes - weights + whole.kv_bytes - kv
    return replace(
        whole, weights_bytes=weights, kv_bytes=kv,
        expected_bytes=whole.expected_bytes - left, upper_bytes=whole.upper_bytes - left,
    )  # fmt: skip


def usable_bytes(card_bytes: int) -> int:
    """Bytes of a card that may be planned with."""
    return card_bytes * USABLE_PERCENT // 100


def judge(cell: Estimate, card_bytes: int) -> Fit:
    """The verdict for one Estimate, without suggestions."""
    usable = usable_bytes(card_bytes)
    if cell.upper_bytes <= usable:
        word, comparison = FitWord.FITS, f"at most {_gib(cell.upper_bytes)} of {_gib(usable)} usable"
    elif cell.expected_bytes <= usable:
        word = FitWord.TIGHT
        comparison = (
            f"{_gib(cell.expected_bytes)} expected, but up to {_gib(cell.upper_bytes)} of {_gib(usable)} usable"
        )
    else:
        word, comparison = (
            FitWord.DOES_NOT_FIT,
            f"{_gib(cell.expected_bytes)} expected of {_gib(usable)} usable",
        )
    reason = f"{comparison} ({USABLE_PERCENT} % of {_gib(card_bytes)})"
    return Fit(word, card_bytes, usable, cell.expected_bytes, cell.upper_bytes, reason)


def advise(workload: Workload, card_bytes: int, variants: Mapping[str, tuple[int, VramProfile]] | None = None) -> Fit:
    """The verdict for a workload with suggestions that make it fit: single changes first, then two together, and of
    each kind the gentlest that is enough. variants: other builds of the model, name -> (bytes, profile).
    """
    verdict = judge(workload.estimate(), card_bytes)
    if verdict.word is FitWord.FITS:
        return verdict
    single = list(_changes(workload, variants or {}))
    found = [text for text, changed in single if _fits(changed, card_bytes)]
    found += [
        f"{first}, and {second}"
        for first, once in single
        for second, twice in _changes(once, {})
        if _knob(first) < _knob(second) and _fits(twice, card_bytes)
    ]
    return replace(verdict, suggestions=tuple(_gentlest(found)) or (_hopeless(workload),))


def _changes(workload: Workload, variants: Mapping[str, tuple[int, VramProfile]]) -> Iterator[tuple[str, Workload]]:
    """Every single change, the gentlest of each kind first."""
    settings = workload.settings
    kv_types = ("f16", "q8_0", "q4_0")
    for kv_type in kv_types[kv_types.index(settings.kv_type) + 1 :]:
        yield f"KV cache at {kv_type}", replace(workload, settings=replace(settings, kv_type=kv_type))
    for context in sorted((c for c in (*CONTEXTS, 1024) if c < workload.context), reverse=True):
        yield f"context {context}", replace(workload, context=context)
    for concurrency in (c for c in (8, 4, 2, 1) if c < workload.concurrency):
        yield f"concurrency {concurrency}", replace(workload, concurrency=concurrency)
    smaller = [(size, name, kind) for name, (size, kind) in variants.items() if size < workload.weights_bytes]
    for size, name, kind in sorted(smaller, reverse=True):
        moved = settings if kind == workload.profile else replace(settings, runtime=kind.runtime)
        changed = replace(workload, weights_bytes=size, profile=kind, settings=moved)
        yield f"variant {name} ({_gib(size)})", changed


def _fits(workload: Workload, card_bytes: int) -> bool:
    return judge(workload.estimate(), card_bytes).word is FitWord.FITS


def _knob(text: str) -> str:
    return text.split()[0]


def _gentlest(texts: Iterable[str]) -> list[str]:
    """The gentlest change of each kind, or pair of kinds, in the order given: more is noise."""
    seen: dict[tuple[str, ...], str] = {}
    for text in texts:
        seen.setdefault(tuple(_knob(part) for part in text.split(", and ")), text)
    return list(seen.values())[:MAX_SUGGESTIONS]


def _hopeless(workload: Workload) -> str:
    settings = replace(workload.settings, kv_type="q4_0")
    least = replace(workload, settings=settings, context=min(1024, workload.context), concurrency=1).estimate()
    return (
        f"no change of context, concurrency or KV type is enough: at the least of all three it takes up to "
        f"{_gib(least.upper_bytes)}, {_gib(least.weights_bytes)} of it weights; use fewer bits, a smaller model, "
        f"another runtime or a larger card"
    )
