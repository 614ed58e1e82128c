"""SmoothQuant from Gram matrices: channel scales that share the range of activations with the weights, for W8A8.

In: weights [out, in] that read one input, and Gram matrices. Out: channel scales. Left to others: folding, rounding.
Method: Xiao et al. 2023 (SmoothQuant): inputs are divided, and weights multiplied, by x^a / w^(1 - a), with x and w the
largest magnitudes of a channel. Here x is a channel's root mean square, and the exponent is the one that loses least:
rounding of weights under the Gram matrix, and rounding of activations, whose step is a share of each token's largest
channel, which is estimated from the root mean squares.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantize.numerics.awq import Reader, ScaleChoice, Tie
from quantize.numerics.constants import SEARCHED_ROWS
from quantize.numerics.gptq import Solution, factorize, row_losses, solve
from quantize.numerics.rtn import round_to_nearest

BITS = 8
EXPONENTS = (0.35, 0.45, 0.55, 0.65, 0.75, 0.85)
STEPS = 127.5  # of half the range of a token's activations
# The largest of many normal numbers of unlike spread is near their norm of this order: exact for one that leads, and
# 3.6 times the spread for 600 alike, where the expected value is 3.2.
ORDER = 5.0


def search_smoothing(readers: Sequence[Reader], tie: Tie | None = None) -> ScaleChoice:
    """The scales that lose least over all readers; 1 where none lose less than not to scale.

    weight_ratio is 1 - ratio; both are 0 where nothing is scaled.
    """
    grams = list({id(reader.gram.matrix): reader.gram for reader in readers}.values())
    tokens = max(1, sum(gram.tokens for gram in grams))
    spread = _tied(torch.stack([gram.matrix.diagonal() for gram in grams]).sum(0) / tokens, tie).sqrt()
    largest = _tied(torch.stack([reader.weight.float().abs().amax(0) for reader in readers]).amax(0), tie)
    plain = torch.ones_like(spread)
    best, least, nothing = (0.0, plain), float("inf"), 0.0
    for exponent in (0.0, *EXPONENTS):
        scales = plain if exponent == 0 else _scales(spread, largest, exponent, tie)
        loss = sum(_loss(reader, scales, tokens) for reader in readers)
        nothing = loss if exponent == 0 else nothing
        if loss < least:
            best, least = (exponent, scales), loss
    exponent, scales = best
    return ScaleChoice(scales, exponent, 1 - exponent if exponent else 0.0, least, nothing)


def quantize_rows(weights: Sequence[Tensor], gram: Tensor, scales: Tensor, *, damping: float) -> list[Solution]:
    """INT8 codes with a scale for each row of already scaled weights, with error feedback under the scaled Gram matrix.

    weights: each [out, in], multiplied by `scales` [in]. gram: [in, in], of the unscaled input. Raises BuildError: it
    is not finite.
    """
    factor = factorize(gram / scales / scales[:, None], len(gram), damping=damping)
    return solve(weights, factor, bits=BITS, symmetric=True, smallest_zero=0)


def _scales(spread: Tensor, largest: Tensor, exponent: float, tie: Tie | None) -> Tensor:
    found = spread.pow(exponent) / largest.pow(1 - exponent)
    found = found if tie is None else tie.mean(found)  # a power depends on where in a vector a number stands
    return found / (found.amax() * found.amin()).sqrt()


def _tied(values: Tensor, tie: Tie | None) -> Tensor:
    tied = values if tie is None else tie.mean(values)
    return tied.clamp_min(float(tied.mean()) * 1e-8 + 1e-30)


def _loss(reader: Reader, scales: Tensor, tokens: int) -> float:
    """Squared output error over the calibration tokens, of every n-th row, as if of all."""
    stride = -(-len(reader.weight) // SEARCHED_ROWS)
    rows = reader.weight[::stride].float() * scales
    gram = reader.gram.matrix
    rounded = round_to_nearest(rows, bits=BITS, group_size=rows.shape[1], symmetric=True).dequantize()
    weights = float(row_losses((rounded - rows) / scales, gram).double().sum())
    spread = (gram.diagonal() / tokens).clamp_min(0).sqrt() / scales
    step = float(torch.linalg.vector_norm(spread, ORDER)) / STEPS
    activations = float(rows.double().square().sum()) * step * step / 12 * tokens
    return (weights + activations) * len(reader.weight) / len(rows)
