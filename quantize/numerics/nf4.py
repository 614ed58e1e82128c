"""NF4 blocks (Dettmers et al. 2023, QLoRA): 4-bit codes of normal quantiles, one absolute maximum per block.

In: a weight [out, in]. Out: what bitsandbytes keeps of it on disk. Left to others: names, the JSON of the quantization
state, files (builders). The arithmetic is bitsandbytes' own; absolute maxima are not quantized again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from quantize.numerics.constants import NF4_BLOCK
from quantize.numerics.dequantize import four_bit


@dataclass(frozen=True)
class Nf4Blocks:
    """words: uint8 [out * in / 2, 1], two codes each, high nibble first. absmax: float32 [out * in / NF4_BLOCK].

    levels: float32 [16], what each code stands for as a fraction of absmax.
    """

    words: Tensor
    absmax: Tensor
    levels: Tensor

    def dequantize(self, shape: Sequence[int]) -> Tensor:
        """The weight of that shape that the codes stand for, float32."""
        return four_bit(self.words, self.absmax, self.levels, NF4_BLOCK, shape)


def quantize_nf4(weight: Tensor) -> Nf4Blocks:
    """Round each run of NF4_BLOCK weights (row-major) to the nearest of 16 normal quantiles."""
    from bitsandbytes import functional

    words, state = functional.quantize_4bit(
        weight.contiguous(), blocksize=NF4_BLOCK, compress_statistics=False, quant_type="nf4"
    )
    return Nf4Blocks(words, state.absmax, state.code)
