"""Every fold is proved before it is used: random positive scales go in, and the logits of a small model must not move.

In: a tiny model in float64, what was found to feed the inputs of its blocks. Out: what stands. Method: the identity
that AWQ and SmoothQuant fold by (Lin et al. 2023; Xiao et al. 2022), held to nine digits of the whole model's output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantize.model.anatomy.feeds import Feed, NormFeed, folded_into
from quantize.model.anatomy.observe import DOWN, FUSED, Input, Mixture
from quantize.model.anatomy.watch import same


@dataclass(frozen=True)
class Fold:
    """A fold of one kind of block. item: the input; feed: what takes the inverse."""

    kind: int
    place: int
    item: Input
    feed: Feed
    mixture: Mixture | None


def proved(folds: Sequence[Fold], blocks: Sequence[Sequence[nn.Module]], logits: Callable[[], Tensor]) -> list[Fold]:
    """Those that change no logit, alone and together. blocks: of each kind. logits: of the model as it is."""
    expected = logits()

    def holds(chosen: Sequence[Fold]) -> bool:
        generator = torch.Generator().manual_seed(11)
        with ExitStack() as stack:
            for fold in chosen:
                for block in blocks[fold.kind]:
                    stack.enter_context(_folded(block, fold, generator))
            return same(logits(), expected)

    if holds(folds):
        return list(folds)
    kept = [fold for fold in folds if holds([fold])]
    return kept if holds(kept) else []


def mixture_folds(mixture: Mixture, blocks: Sequence[nn.Module], logits: Callable[[], Tensor]) -> bool:
    """Whether what an expert's down projection reads can be scaled in the rows of its up projection."""
    expected = logits()
    generator = torch.Generator().manual_seed(12)
    with ExitStack() as stack:
        for block in blocks:
            module = block.get_submodule(mixture.path)
            down = getattr(module, DOWN)
            scales = _random(down.shape[0] * down.shape[2], generator).view(down.shape[0], -1)
            fused = getattr(module, FUSED).detach().clone()
            fused[:, down.shape[2] :] /= scales[:, :, None]
            stack.enter_context(_replaced(module, FUSED, fused))
            stack.enter_context(_replaced(module, DOWN, down * scales[:, None]))
        return same(logits(), expected)


@contextmanager
def _folded(block: nn.Module, fold: Fold, generator: torch.Generator) -> Iterator[None]:
    width = fold.item.value.shape[-1]
    if isinstance(fold.feed, NormFeed):
        scales = given = _random(width, generator)
    else:
        feed = fold.feed
        given = _random(feed.stop - feed.start, generator)
        scales = given.view(-1, 1, feed.head_dim).expand(-1, feed.repeats, -1).reshape(-1)
    with ExitStack() as stack:
        stack.enter_context(folded_into(block, fold.feed, given))
        names = [f"{path}.weight" for path in fold.item.readers] + list(fold.item.passengers)
        if fold.item.mixture and fold.mixture is not None:
            names.append(f"{fold.mixture.path}.{FUSED}")
        for name in names:
            path, _, leaf = name.rpartition(".")
            module = block.get_submodule(path)
            stack.enter_context(_replaced(module, leaf, getattr(module, leaf) * scales))
        yield


@contextmanager
def _replaced(module: nn.Module, leaf: str, value: Tensor) -> Iterator[None]:
    parameter = getattr(module, leaf)
    before = parameter.data
    parameter.data = value
    try:
        yield
    finally:
        parameter.data = before


def _random(width: int, generator: torch.Generator) -> Tensor:
    return 4.0 ** (2 * torch.rand(width, generator=generator) - 1)
