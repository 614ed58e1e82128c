"""AWQ INT4 as a Format."""

from __future__ import annotations

from quantize.formats.awq.build import AwqBuilder
from quantize.formats.packed.format import packed_format

FORMAT = packed_format(AwqBuilder())
