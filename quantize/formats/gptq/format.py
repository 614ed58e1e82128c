"""GPTQ as a Format."""

from __future__ import annotations

from quantize.formats.gptq.build import GptqBuilder
from quantize.formats.packed.format import packed_format

FORMAT = packed_format(GptqBuilder())
