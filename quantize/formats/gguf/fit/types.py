"""Which types a matrix may take where a file must fit, and which matrices take the same one.

In: names and shapes of tensors. Out: candidates. Types that runtimes run fast and that are solved: none of IQ1 to IQ3,
whose codebooks are slow on a CPU. Rows that are no multiple of 256 take blocks of 32, as llama.cpp falls back to them.
"""

from __future__ import annotations

import re

from quantize.formats.gguf.types import ELEMENT_TYPES
from quantize.formats.gguf.vocabulary import EMBEDDING, HEAD

NARROW = ("Q4_0", "IQ4_NL", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
WIDE = ("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
FLOORS = {EMBEDDING: ELEMENT_TYPES["IQ4_XS"], HEAD: ELEMENT_TYPES["Q5_K"]}
"""Bits that these have at the least: every token passes them, and they are few of a large model's weights."""

STOCK = (
    "Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "IQ4_XS", "IQ4_NL", "Q4_0", "Q4_K_S", "Q4_K_M", "Q5_0", "Q5_K_S", "Q5_K_M",
    "Q6_K", "Q8_0",
)  # fmt: skip
"""llama.cpp's own type maps that a choice is held against: those of the types above."""

_ATTENTION = re.compile(r"^(blk\.\d+)\.attn_[qkv]\.weight$")


def candidates(name: str, width: int, *, tied: bool) -> tuple[str, ...]:
    """The types that a matrix with rows of so many values may take; () where its rows are no blocks. tied: the token
    embedding is the output head too.
    """
    if width % 32:
        return ()
    floor = max(FLOORS.get(name, 0.0), FLOORS[HEAD] if tied and name == EMBEDDING else 0.0)
    return tuple(kind for kind in (NARROW if width % 256 else WIDE) if ELEMENT_TYPES[kind] >= floor)


def group_of(name: str) -> str:
    """What the matrices that take one type have in common: queries, keys and values of a block, which runtimes put
    into one product. Any other matrix is alone.
    """
    found = _ATTENTION.match(name)
    return f"{found[1]}.attn_qkv" if found else name
