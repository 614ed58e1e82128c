"""AWQ INT4 as a Format."""

from __future__ import annotations

from quantize.formats.format import late
from quantize.formats.packed.format import packed_format

FORMAT = packed_format("awq", late("quantize.formats.awq.build:AwqBuilder"), folded=True)
