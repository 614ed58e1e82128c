"""AWQ from Gram matrices: input-channel scales that protect the channels that matter, then a clip search.

In: weights [out, in] that read one input, and Gram matrices. Out: channel scales; Quantized of scaled weights.
Left to others: folding the inverse scales into what feeds the input (folding), packing. Method: Lin et al. 2023 (AWQ);
where AWQ runs the layer for every grid point, the output error here is tr(ΔW G ΔWᵀ), which is the same number.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantize.numerics.constants import RATIOS, REFINEMENT, SEARCHED_ROWS, WEIGHT_RATIOS
from quantize.numerics.gptq import DAMPING, Solution, factorize, row_losses, solve
from quantize.numerics.gram import Gram
from quantize.numerics.rtn import Quantized, check_shape, encode, round_to_nearest
from quantize.numerics.scales import GPU_SEARCHED_VALUES, ScaleSearch

BITS = 4


@dataclass(frozen=True)
class Reader:
    """A weight [out, in] and the Gram matrix of the input that it reads. Readers of a group share their channels."""

    weight: Tensor
    gram: Gram


@dataclass(frozen=True)
class Tie:
    """Channels that must share a scale: `repeats` runs of `head_dim` in a row (query heads of one key-value head)."""

    head_dim: int
    repeats: int

    def mean(self, values: Tensor) -> Tensor:
        """Replace each channel's value by the mean over the channels it is tied to; [in] in and out."""
        if self.repeats == 1:
            return values
        runs = values.view(-1, self.repeats, self.head_dim)
        return runs.mean(1, keepdim=True).expand_as(runs).reshape(-1)


@dataclass(frozen=True)
class ScaleChoice:
    """scales: float32 [in], by which weights are multiplied and inputs divided; all 1 when both ratios are 0.

    ratio, weight_ratio: exponents of the input's and the weights' magnitude. loss and nearest_loss: tr(ΔW G ΔWᵀ) over
    the rows searched, at the chosen ratios and at 0.
    """

    scales: Tensor
    ratio: float
    weight_ratio: float
    loss: float
    nearest_loss: float


def channel_scales(
    energy: Tensor, ratio: float, tie: Tie | None = None, *, weights: Tensor | None = None, weight_ratio: float = 0.0
) -> Tensor:
    """rms(x)^ratio / |w|^weight_ratio, tied, normalized to a geometric mid-range of 1.

    energy: float32 [in], mean of squared activations. weights: float32 [in], |w| summed over the rows that read the
    channel. Returns float32 [in]; exactly 1 when both ratios are 0.
    """
    scales = _tied(energy, 1e-8, tie).sqrt().pow(ratio)
    if weights is not None and weight_ratio:
        scales = scales / _tied(weights, 1e-4, tie).pow(weight_ratio)
    return scales / (scales.amax() * scales.amin()).sqrt()


def _tied(values: Tensor, floor: float, tie: Tie | None) -> Tensor:
    """Values >= 0 [in] with tied channels averaged, none below a share of their mean."""
    tied = values if tie is None else tie.mean(values)
    return tied.clamp_min(float(tied.mean()) * floor + 1e-30)


def search_scales(
    readers: Sequence[Reader], *, group_size: int, symmetric: bool = False, tie: Tie | None = None,
    ratios: Sequence[float] = RATIOS,
) -> ScaleChoice:  # fmt: skip
    """The exponents that lose least over all readers: the ratio on a grid, the weights' at that ratio, both refined.

    Only every n-th output row is looked at, up to SEARCHED_ROWS for each Gram matrix: the best exponent is a sum over
    rows, and a sample finds it. Rounding is to nearest without clipping, as in the paper's search; dividing by the
    weights' magnitude as well is AutoAWQ's later form ("duo scaling"), with an exponent of its own here.

    Raises:
        BuildError: the group size does not divide the input width.
    """
    check_shape(readers[0].weight.shape[1], BITS, group_size)
    samples = _samples(readers)
    energy = _energy(readers)
    weights = torch.stack([reader.weight.float().abs().sum(0) for reader in readers]).sum(0)
    losses: dict[tuple[float, float], float] = {}

    def scales(point: tuple[float, float]) -> Tensor:
        return channel_scales(energy, point[0], tie, weights=weights, weight_ratio=point[1])

    def best_with(points: Iterable[tuple[float, float]]) -> tuple[float, float]:
        for point in points:
            if point not in losses and point[0] >= 0:
                found = scales(point)
                losses[point] = sum(_rounding_loss(rows, gram, found, group_size, symmetric) for rows, gram in samples)
        return min(losses, key=lambda point: losses[point])

    best = best_with((ratio, 0.0) for ratio in (0.0, *ratios))
    if len(ratios) > 1:
        best = best_with((best[0], weight_ratio) for weight_ratio in WEIGHT_RATIOS)
        best = best_with((round(best[0] + step, 2), best[1]) for step in REFINEMENT)
    return ScaleChoice(scales(best), *best, losses[best], losses[0.0, 0.0])


def quantize_scaled(
    weights: Sequence[Tensor], energy: Tensor, scales: Tensor, *, group_size: int, clip: bool = True,
    symmetric: bool = False,
) -> list[Quantized]:  # fmt: skip
    """4-bit codes of already scaled weights that share one input.

    weights: each [out, in], multiplied by `scales` [in]. energy: diag of the unscaled input's Gram matrix, [in].
    clip=False rounds to nearest over the full range.

    Raises:
        BuildError: the group size does not divide the input width.
    """
    check_shape(weights[0].shape[1], BITS, group_size)
    if not clip:
        return [round_to_nearest(each, bits=BITS, group_size=group_size, symmetric=symmetric) for each in weights]
    stacked = torch.cat([each.float() for each in weights]) if len(weights) > 1 else weights[0].float()
    importance = energy / scales.square()
    if float(importance.sum()) <= 0:
        importance = torch.ones_like(importance)
    steps, zeros = _clip(stacked, importance, group_size, ScaleSearch(BITS, symmetric))
    encoded = encode(stacked, steps, zeros, bits=BITS, group_size=group_size)
    return list(encoded.split([each.shape[0] for each in weights]))


def _clip(stacked: Tensor, importance: Tensor, group_size: int, search: ScaleSearch) -> tuple[Tensor, Tensor]:
    """Scales and zero points that lose least, [out, in / group_size] each.

    Groups don't depend on one another: a GPU searches as many at once as fill it, a CPU one after the other.
    """
    out, groups = stacked.shape[0], stacked.shape[1] // group_size
    steps, zeros = stacked.new_empty(out, groups), stacked.new_empty(out, groups)
    if not stacked.is_cuda:
        for group in range(groups):
            part = slice(group * group_size, (group + 1) * group_size)
            steps[:, group], zeros[:, group] = search.best(stacked[:, part].T.contiguous(), importance[part])
        return steps, zeros
    at_once = max(1, GPU_SEARCHED_VALUES // (out * group_size))
    for start in range(0, groups, at_once):
        part = slice(start, start + at_once)
        values = stacked.view(out, groups, group_size)[:, part].permute(2, 1, 0).reshape(group_size, -1)
        weights = importance.view(groups, group_size)[part].T.repeat_interleave(out, 1)
        found = search.best(values, weights)
        steps[:, part], zeros[:, part] = (each.view(-1, out).T for each in found)
    return steps, zeros


def quantize_compensated(
    weights: Sequence[Tensor], gram: Tensor, scales: Tensor, *, group_size: int, damping: float = DAMPING,
    symmetric: bool = False,
) -> list[Solution]:  # fmt: skip
    """As quantize_scaled, but each column's rounding error is fed forward as GPTQ does, under the scaled Gram matrix.

    This goes beyond AWQ, which rounds to nearest; the artifact is the same kind. It roughly halves the divergence from
    the full-precision model.
    weights: each [out, in], multiplied by `scales` [in]. gram: [in, in], of the unscaled input.

    Raises:
        BuildError: the Gram matrix is not finite, or the group size does not divide the input width.
    """
    factor = factorize(gram / scales / scales[:, None], group_size, damping=damping)
    return solve(weights, factor, bits=BITS, symmetric=symmetric, smallest_zero=0)


def _samples(readers: Sequence[Reader]) -> list[tuple[Tensor, Tensor]]:
    """(sampled rows [n, in] float32, Gram matrix) for each distinct Gram matrix."""
    shared: dict[int, list[Reader]] = {}
    for reader in readers:
        shared.setdefault(id(reader.gram.matrix), []).append(reader)
    limit = max(32, SEARCHED_ROWS // len(shared))
    samples: list[tuple[Tensor, Tensor]] = []
    for alike in shared.values():
        stride = -(-sum(reader.weight.shape[0] for reader in alike) // limit)
        rows = torch.cat([reader.weight[::stride].float() for reader in alike])
        samples.append((rows, alike[0].gram.matrix))
    return samples


def _energy(readers: Sequence[Reader]) -> Tensor:
    grams = {id(reader.gram.matrix): reader.gram for reader in readers}.values()
    total = torch.stack([gram.matrix.diagonal() for gram in grams]).sum(0)
    return total / max(1, sum(gram.tokens for gram in grams))


def _rounding_loss(rows: Tensor, gram: Tensor, scales: Tensor, group_size: int, symmetric: bool) -> float:
    rounded = round_to_nearest(rows * scales, bits=BITS, group_size=group_size, symmetric=symmetric).dequantize()
    return float(row_losses(rounded.div_(scales).sub_(rows), gram).double().cpu().sum())
