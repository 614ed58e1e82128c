"""The cost model of a calibration pass: operations and bytes of each block, from shapes alone.

In: a checkpoint's config and tensor shapes, the number of tokens. Out: BlockCost. docs/scale.md says how well it fits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quantize.model.architecture import block_layouts
from quantize.model.config import number_or
from quantize.model.layout import BlockLayout
from quantize.model.shape import ModelShape
from quantize.numerics.constants import RATIOS, REFINEMENT, SEARCHED_ROWS, WEIGHT_RATIOS

if TYPE_CHECKING:
    from quantize.build.spread.passwork import PassPlan

GRAM_SHARE = 5 / 8  # of the full product: only panels of the upper triangle are multiplied
CLIP_OPERATIONS = 100  # elementwise ones for each weight: the grid of the clip search
AWQ_POINTS = len(RATIOS) + len(WEIGHT_RATIOS) + len(REFINEMENT)  # that the ratio search tries, at most
PRODUCT_OPERATIONS = 24  # that take the time of one elementwise operation, on a CPU


@dataclass(frozen=True)
class BlockCost:
    """One block: operations (a multiplication and an addition are two), bytes.

    forward, gram: over all tokens. gptq_products, awq_products: of one variant's solve, in matrix products.
    clip_weights: weights whose scale is searched, with CLIP_OPERATIONS elementwise operations each. weight_bytes: as
    the pass holds them, float32. gram_bytes: of all its Gram matrices; each share sends as much once, and each solve
    reads it. state_bytes: hidden states of all tokens.
    """

    forward: float
    gram: float
    gptq_products: float
    awq_products: float
    clip_weights: float
    weight_bytes: int
    gram_bytes: int
    state_bytes: int

    @property
    def clip_products(self) -> float:
        """The search of the scales, in operations of a matrix product that take the same time."""
        return CLIP_OPERATIONS * PRODUCT_OPERATIONS * self.clip_weights


def block_costs(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], tokens: int) -> list[BlockCost]:
    """The cost of each block. shapes: of every tensor, by name."""
    return [_block_cost(config, layout, shapes, tokens) for layout in block_layouts(config)]


def pass_costs(plan: PassPlan) -> list[BlockCost]:
    """The cost of each block of a pass."""
    checkpoint = plan.parts[0][1].checkpoint
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    return block_costs(checkpoint.config, shapes, sum(len(ids) for ids in plan.token_ids))


def _block_cost(
    config: Mapping[str, Any], layout: BlockLayout, shapes: Mapping[str, tuple[int, ...]], tokens: int
) -> BlockCost:
    hidden = ModelShape.from_config(config).hidden_size
    used = 1.0
    if layout.experts is not None:
        used = number_or(config, "num_experts_per_tok", 1) / layout.experts.count
    forward = gram = gptq = awq = clip = 0.0
    gram_bytes = 0
    for linears in layout.inputs.values():
        width = shapes[linears[0].tensor][1]
        rows = sum(shapes[linear.tensor][0] for linear in linears)
        seen = tokens * (used if linears[0].expert is not None else 1.0)
        forward += 2 * rows * width * seen
        gram += 2 * width * width * seen * GRAM_SHARE
        gram_bytes += 4 * width * width
        clip += rows * width
        gptq += width**3 / 3 + rows * width**2 * (1 + 4 * GRAM_SHARE)
        sampled = rows // -(-rows // SEARCHED_ROWS)  # every n-th, so that no more are looked at
        awq += AWQ_POINTS * sampled * width**2 * 2 * GRAM_SHARE
    weights = sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(layout.prefix))
    return BlockCost(forward, gram, gptq, awq, clip, 4 * weights, gram_bytes, 4 * tokens * hidden)
