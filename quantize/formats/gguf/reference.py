"""What GGUF artifacts are measured against: the source in llama.cpp, with nothing quantized.

In: the context of an artifact that is measured. Out: the 16-bit file that all variants are quantized from; where FP16
does not hold what the source computes, a file in float32.
"""

from __future__ import annotations

from quantize.formats.base import Context
from quantize.formats.gguf.build import GgufBuilder


class GgufReference(GgufBuilder):
    """See ReferenceMaker."""

    def outtype(self, context: Context) -> str:
        """F32 where the source is `wide`: llama.cpp multiplies weights of FP16 with inputs that it rounds to FP16."""
        return "F32" if context.checkpoint.wide else context.checkpoint.dtype
