"""What a scale of input channels can be folded into: found by trying, in one block.

In: a block, its call, an input of its linears. Out: the norm (multiplying by w or by 1 + w) or the rows of a linear
whose change by 1/s changes the input by 1/s and nothing else of it, or None. Whether the whole model then computes the
same is proved afterwards (prove).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantize.model.anatomy.observe import Input, Sight, run_watched
from quantize.model.anatomy.watch import BlockCall, same

_REPEATS = (1, 2, 3, 4, 5, 6, 7, 8)
_LIVE = 1e-6  # of an input's largest value: what is smaller says nothing about a ratio


@dataclass(frozen=True)
class NormFeed:
    """A norm's parameter, by its path in the block, and what it is added to before it multiplies."""

    parameter: str
    offset: float


@dataclass(frozen=True)
class RowsFeed:
    """Rows [start, stop) of a linear, by its path in the block; each run of head_dim feeds `repeats` runs."""

    linear: str
    start: int
    stop: int
    head_dim: int = 1
    repeats: int = 1


Feed = NormFeed | RowsFeed


class FeedSearch:
    """Runs one block with changed weights, and says what one of its modules reads then."""

    def __init__(self, block: nn.Module, call: BlockCall, sight: Sight) -> None:
        self.block, self.call, self.sight = block, call, sight
        self._generator = torch.Generator().manual_seed(7)

    def feed(self, item: Input) -> Feed | None:
        """What feeds an input."""
        reader = item.readers[0] if item.readers else self.sight.mixture.path  # type: ignore[union-attr]
        return self._norm(item, reader) or self._rows(item, reader)

    def scales(self, width: int) -> Tensor:
        """Random and distinct, log-uniform in [1/4, 4]."""
        return 4.0 ** (2 * torch.rand(width, generator=self._generator) - 1)

    def _norm(self, item: Input, reader: str) -> NormFeed | None:
        width = item.value.shape[-1]
        before = self.sight.uses[reader].order if reader in self.sight.uses else len(self.sight.uses)
        for use in sorted(self.sight.uses.values(), key=lambda use: -use.order):
            if use.order >= before or not same(use.gave, item.value):
                continue
            for leaf, parameter in use.module.named_parameters(recurse=False):
                if parameter.dim() != 1 or len(parameter) != width or leaf == "bias":
                    continue
                for offset in (0.0, 1.0):
                    feed = NormFeed(f"{use.path}.{leaf}", offset)
                    scales = self.scales(width)
                    with folded_into(self.block, feed, scales):
                        changed = self._read(reader)
                    if same(changed * scales, item.value):
                        return feed
        return None

    def _rows(self, item: Input, reader: str) -> RowsFeed | None:
        width = item.value.shape[-1]
        order = self.sight.uses[reader].order if reader in self.sight.uses else len(self.sight.uses)
        before = [path for path in self.sight.linears if self.sight.uses[path].order < order]
        for path in reversed(before):
            if path in item.readers:
                continue
            rows = self.sight.uses[path].gave.shape[-1]
            for start, stop, repeats in _ranges(rows, width):
                feed = self._tried(path, start, stop, repeats, item.value, reader)
                if feed is not None:
                    return feed
        return None

    def _tried(self, path: str, start: int, stop: int, repeats: int, value: Tensor, reader: str) -> RowsFeed | None:
        scales = self.scales(stop - start)
        with folded_into(self.block, RowsFeed(path, start, stop), scales):
            changed = self._read(reader)
        live = value.abs() > _LIVE * value.abs().max()
        if changed.shape != value.shape or not bool(live.any(0).all()):
            return None
        best = value.abs().argmax(0, keepdim=True)
        ratio = (value.gather(0, best) / changed.gather(0, best))[0]
        if not same(changed * ratio, value):
            return None
        nearest = (ratio[:, None] - scales[None]).abs().argmin(1)
        if not same(scales[nearest], ratio):
            return None
        for head_dim in _divisors(stop - start) if repeats > 1 else (1,):
            runs = torch.arange(stop - start).view(-1, 1, head_dim).expand(-1, repeats, -1).reshape(-1)
            if torch.equal(runs, nearest):
                return RowsFeed(path, start, stop, head_dim, repeats)
        return None

    def _read(self, reader: str) -> Tensor:
        return run_watched(self.block, self.call, [reader])[reader].read


def _ranges(rows: int, width: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, repeats) of rows that may feed so many channels."""
    for repeats in _REPEATS:
        length, rest = divmod(width, repeats)
        if rest or length > rows:
            continue
        if length == rows:
            yield 0, rows, repeats
        elif rows % length == 0 and rows // length <= 2 + 2 * _REPEATS[-1]:
            yield from ((start, start + length, repeats) for start in reversed(range(0, rows, length)))


def _divisors(number: int) -> list[int]:
    return [value for value in range(number, 0, -1) if number % value == 0]


@contextmanager
def folded_into(block: nn.Module, feed: Feed, scales: Tensor) -> Iterator[None]:
    """While open, the feed gives 1/scales of what it gave. scales: [channels] of a norm, [rows] of a linear."""
    if isinstance(feed, NormFeed):
        path, _, leaf = feed.parameter.rpartition(".")
        module = block.get_submodule(path)
        touched = {leaf: (getattr(module, leaf) + feed.offset) / scales - feed.offset}
        bias = getattr(module, "bias", None)
        if isinstance(bias, Tensor):
            touched["bias"] = bias / scales
    else:
        module, part = block.get_submodule(feed.linear), slice(feed.start, feed.stop)
        touched = {}
        for leaf in ("weight", "bias"):
            old = getattr(module, leaf, None)
            if isinstance(old, Tensor):
                touched[leaf] = old.detach().clone()
                touched[leaf][part] /= scales if old.dim() == 1 else scales[:, None]
    kept = {leaf: getattr(module, leaf).data for leaf in touched}
    for leaf, value in touched.items():
        getattr(module, leaf).data = value
    try:
        yield
    finally:
        for leaf, value in kept.items():
            getattr(module, leaf).data = value
