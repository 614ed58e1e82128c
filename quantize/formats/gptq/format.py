"""GPTQ as a Format."""

from __future__ import annotations

from quantize.formats.format import late
from quantize.formats.packed.format import packed_format

FORMAT = packed_format("gptq", late("quantize.formats.gptq.build:GptqBuilder"))
