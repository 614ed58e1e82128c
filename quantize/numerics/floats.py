"""Weights as small floating-point numbers: FP8 with a scale for each row or block, and FP4 in groups (NVFP4, MXFP4).

In: weights [out, in]; for FP4 also the factor of their input's Gram matrix. Out: codes and scales as they are stored,
and what they lose. Left to others: statistics (gram), names and files (builders).
Formats: E4M3 and E2M1 with E8M0 scales as in OCP Microscaling Formats (MX) 1.0; NVFP4 as NVIDIA describes it: groups of
16 with E4M3 scales, relative to one float32 scale. Method for FP4: GPTQ's error feedback in the form that gptq.py has
it, into the grid of E2M1. A group's scale is chosen for its corrected target as the sweep reaches the group, among
scales that can be stored, by the error weighted with diag G.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from quantize.numerics import float_loops
from quantize.numerics.constants import SOLVED_ROWS
from quantize.numerics.dequantize import E2M1, MX_BIAS
from quantize.numerics.gptq import Factor, row_losses
from quantize.system.threads import without_gil

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
E4M3_LEAST = 2.0**-9  # above zero
E2M1_MAX = 6.0
NVFP4_GROUP, MXFP4_GROUP = 16, 32
# Shares of the range that a group's largest weight may become. E2M1 has wide steps at its end: 1.5 puts the largest
# weight on 4, where the steps below it are finer.
SHARES = (1.0, 1.5, 1.4, 1.3, 1.2, 1.1, 0.95, 0.9, 0.85, 0.8)


@dataclass(frozen=True)
class Fp8:
    """codes: float8_e4m3fn [out, in]. scales: [out, 1], or one for each block, in the type that they are stored in."""

    codes: Tensor
    scales: Tensor


@dataclass(frozen=True)
class Fp4Scales:
    """What scales of groups can be stored as.

    group: weights that share a scale, along the inputs. whole: what E4M3 scales are relative to (NVFP4); None for
    powers of two (MXFP4).
    """

    group: int
    whole: float | None

    @classmethod
    def nvfp4(cls, weights: Sequence[Tensor]) -> Fp4Scales:
        """For weights that one kernel multiplies at once: the largest of all of them is in range."""
        largest = max(float(weight.abs().amax()) for weight in weights)
        return cls(NVFP4_GROUP, E4M3_MAX * E2M1_MAX / largest if largest > 0 else 1.0)

    @classmethod
    def mxfp4(cls) -> Fp4Scales:
        """Powers of two, for any weights."""
        return cls(MXFP4_GROUP, None)

    @classmethod
    def nvfp4_alone(cls) -> Fp4Scales:
        """E4M3 scales as they are, relative to nothing, for any weights."""
        return cls(NVFP4_GROUP, 1.0)

    def nearest(self, wanted: Tensor) -> Tensor:
        """The scales, float32, that can be stored near those that are wanted; never 0."""
        if self.whole is None:
            exponents = wanted.clamp_min(2.0**-126).log2().round().clamp(-126, 126)
            return torch.exp2(exponents)
        return (wanted * self.whole).clamp(E4M3_LEAST, E4M3_MAX).to(E4M3).float() / self.whole

    def stored(self, scales: Tensor) -> Tensor:
        """Scales that `nearest` gave, as files have them: float8_e4m3fn, or uint8 exponents (E8M0)."""
        if self.whole is None:
            return (scales.log2().round() + MX_BIAS).to(torch.uint8)
        return (scales * self.whole).to(E4M3)


@dataclass(frozen=True)
class Fp4:
    """w[o, i] = E2M1[codes[o, i]] * scales[o, i // group].

    codes: uint8 [out, in], sign in bit 3. scales: float32 [out, in / group], values that can be stored.
    """

    codes: Tensor
    scales: Tensor

    def dequantize(self) -> Tensor:
        """float32 [out, in]."""
        levels = torch.tensor(E2M1, device=self.codes.device)[self.codes.long()]
        rows, groups = self.scales.shape
        return (levels.view(rows, groups, -1) * self.scales[..., None]).view(self.codes.shape)

    def packed(self) -> Tensor:
        """uint8 [out, in / 2]: two codes a byte, the first one in its low half."""
        return self.codes[:, 0::2] | (self.codes[:, 1::2] << 4)


@dataclass(frozen=True)
class Fp4Solution:
    """One rounded linear. loss, nearest_loss: tr(ΔW G ΔWᵀ), of the result and of rounding to nearest."""

    rounded: Fp4
    loss: float
    nearest_loss: float


def fp8_rows(weight: Tensor, stored: torch.dtype) -> Fp8:
    """E4M3 with a scale for each output row, which covers its range. stored: the type of scales, a 16-bit float."""
    scales = _fp8_scales(weight.float().abs().amax(1, keepdim=True), stored)
    return Fp8(_fp8(weight.float() / scales.float()), scales)


def fp8_blocks(weight: Tensor, size: int, stored: torch.dtype) -> Fp8:
    """E4M3 with a scale for each block of size x size weights; those at the edges may be smaller."""
    out, width = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -width % size, 0, -out % size))
    blocks = padded.view(-(-out // size), size, -(-width // size), size)
    scales = _fp8_scales(blocks.abs().amax((1, 3)), stored)
    codes = _fp8(blocks / scales.float()[:, None, :, None]).view(padded.shape)[:out, :width].contiguous()
    return Fp8(codes, scales)


def _fp8_scales(largest: Tensor, stored: torch.dtype) -> Tensor:
    """Scales that put the largest weight on the largest number; a little more where their type has no near one."""
    wanted = largest / E4M3_MAX
    scales = wanted.to(stored)
    least = torch.finfo(stored).smallest_normal * torch.finfo(stored).eps
    short = scales.float() * (E4M3_MAX + 16) <= largest  # half a step above the largest number still rounds to it
    return torch.where(short, scales + least, scales)


def _fp8(values: Tensor) -> Tensor:
    return values.clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)


def solve_fp4(weights: Sequence[Tensor], factor: Factor, scales: Fp4Scales) -> list[Fp4Solution]:
    """Round linears that share one input. factor: of its Gram matrix, in groups of scales.group.

    weights: each [out, in] floating. No output row is worse under the undamped Gram matrix than rounded to nearest.
    """
    return collect(weights, [task() for task in row_tasks(weights, factor, scales)])


def row_tasks(weights: Sequence[Tensor], factor: Factor, scales: Fp4Scales) -> list[Callable[[], tuple[Fp4, Tensor]]]:
    """As `solve_fp4`, in pieces that may run in any order, or at once; `collect` puts their results together."""
    stacked = torch.cat([weight.float() for weight in weights]) if len(weights) > 1 else weights[0].float()
    starts = range(0, len(stacked), SOLVED_ROWS)
    return [partial(_solve_rows, stacked[start : start + SOLVED_ROWS], factor, scales) for start in starts]


def collect(weights: Sequence[Tensor], parts: Sequence[tuple[Fp4, Tensor]]) -> list[Fp4Solution]:
    """The results of all of `row_tasks`, in order, as one solution for each weight."""
    sizes = [len(weight) for weight in weights]
    codes = torch.split(torch.cat([part.codes for part, _ in parts]), sizes)
    scales = torch.split(torch.cat([part.scales for part, _ in parts]), sizes)
    figures = torch.split(torch.cat([losses for _, losses in parts], dim=1).cpu().double(), sizes, dim=1)
    return [
        Fp4Solution(Fp4(code, scale), *map(float, losses.sum(1)))
        for code, scale, losses in zip(codes, scales, figures, strict=True)
    ]


def round_to_nearest(weight: Tensor, scales: Fp4Scales) -> Fp4:
    """Each group over its full range, each weight to the nearest number. weight: [out, in] floating."""
    groups = weight.float().view(len(weight), -1, scales.group)
    found = scales.nearest(groups.abs().amax(2) / E2M1_MAX)
    levels, borders = _grid(weight.device)
    steps = float_loops.nearest_level(groups / found[..., None], levels, borders).view(weight.shape)
    return Fp4(_codes(steps, borders), found)


def _solve_rows(rows: Tensor, factor: Factor, scales: Fp4Scales) -> tuple[Fp4, Tensor]:
    """Some rows, and their losses [2, rows]: what is left, and what rounding to nearest leaves."""
    solved, nearest = _sweep(rows, factor, scales), round_to_nearest(rows, scales)
    loss = row_losses(solved.dequantize() - rows, factor.gram)
    bound = row_losses(nearest.dequantize() - rows, factor.gram)
    worse = (loss > bound)[:, None]
    codes = torch.where(worse, nearest.codes, solved.codes)
    found = torch.where(worse, nearest.scales, solved.scales)
    return Fp4(codes, found), torch.stack((torch.minimum(loss, bound), bound))


def _sweep(rows: Tensor, factor: Factor, scales: Fp4Scales) -> Fp4:
    """Round column after column, feeding each error forward; everything is held transposed, [in, out]."""
    size, order, feedback = scales.group, factor.order, factor.feedback
    exact = rows.T.contiguous().index_select(0, order)
    errors, steps = torch.empty_like(exact), torch.empty_like(exact)
    found = torch.empty(len(exact) // size, exact.shape[1], device=rows.device)
    levels, borders = _grid(rows.device)
    round_group = without_gil(float_loops.round_group)
    for start in range(0, len(exact), size):
        part = slice(start, start + size)
        target = exact[part].clone()
        if start:
            target.addmm_(feedback[:start, part].T, errors[:start])
        scale = _best(target, factor.weights[part], scales, levels, borders)
        found[start // size] = scale
        round_group(target, exact[part], errors[part], steps[part], feedback[part, part], scale, levels, borders)
    groups = order[::size] // size
    codes = torch.empty_like(steps).index_copy_(0, order, steps).T.contiguous()
    return Fp4(_codes(codes, borders), torch.empty_like(found).index_copy_(0, groups, found).T.contiguous())


def _best(target: Tensor, weights: Tensor, scales: Fp4Scales, levels: Tensor, borders: Tensor) -> Tensor:
    """The scale of each column of a group [group, rows] that loses least, [rows]."""
    wanted = target.abs().amax(0) / E2M1_MAX
    best = scale = torch.empty(0)
    for share in SHARES if scales.whole is not None else (1.0, 2.0, 0.5):
        tried = scales.nearest(wanted * share)
        error = float_loops.nearest_level(target / tried, levels, borders) * tried - target
        loss = torch.mv(error.square().T, weights)
        better = loss < best if len(best) else torch.ones_like(loss, dtype=torch.bool)
        best = torch.where(better, loss, best) if len(best) else loss
        scale = torch.where(better, tried, scale) if len(scale) else tried
    return scale


def _grid(device: torch.device) -> tuple[Tensor, Tensor]:
    """The magnitudes of E2M1, and what lies halfway between them."""
    levels = torch.tensor(E2M1[:8], device=device)
    return levels, (levels[1:] + levels[:-1]) / 2


def _codes(steps: Tensor, borders: Tensor) -> Tensor:
    """uint8 codes of values of the grid; a zero has no sign."""
    return (torch.bucketize(steps.abs(), borders) + 8 * (steps < 0)).to(torch.uint8)
