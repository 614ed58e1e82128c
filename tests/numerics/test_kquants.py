"""The blocks of llama.cpp's types, taken apart and put together. Oracles: llama.cpp's own rounding, gguf's reader."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantize.files.gguf import TENSOR_TYPES
from quantize.numerics.kquants import GRIDS, Blocks, decode, encode
from tests.numerics.llama_blocks import rounded, values

kinds = st.sampled_from(sorted(GRIDS))
seeds = st.integers(0, 2**32 - 1)


def sums(kind: str, blocks: Blocks) -> np.ndarray:
    """What blocks stand for by the definition of a grid, float32 [blocks, block]."""
    grid = GRIDS[kind]
    levels = np.asarray(grid.levels, np.float32)[blocks.codes].reshape(len(blocks.d), -1, grid.sub)
    scale = blocks.d.astype(np.float32)[:, None] * blocks.scales
    least = blocks.dmin.astype(np.float32)[:, None] * blocks.mins
    return (levels * scale[..., None] - least[..., None]).reshape(len(blocks.d), -1)


def test_sizes_are_those_of_the_types() -> None:
    sizes = {name: (count, size) for name, count, size in TENSOR_TYPES.values()}
    for name, grid in GRIDS.items():
        assert (grid.block, grid.block_bytes) == sizes[name]


@given(kinds, seeds, st.integers(1, 4), st.sampled_from([1e-4, 0.05, 30.0]), st.booleans())
@settings(max_examples=120, deadline=None)
def test_what_llama_cpp_wrote_is_read_and_written_again(
    kind: str, seed: int, rows: int, size: float, weighted: bool
) -> None:
    random = np.random.default_rng(seed)
    weight = (random.standard_normal((rows, 512)) * size).astype(np.float32)
    importance = random.random(512).astype(np.float32) + 0.01
    data = rounded(kind, weight, importance if weighted else None)
    blocks = decode(GRIDS[kind], data.reshape(-1, GRIDS[kind].block_bytes))
    assert np.array_equal(encode(GRIDS[kind], blocks).reshape(data.shape), data)
    assert np.allclose(sums(kind, blocks).reshape(rows, -1), values(kind, data), rtol=1e-6, atol=1e-9)
    assert blocks.codes.min() >= GRIDS[kind].lowest


@given(kinds, seeds)
@settings(max_examples=120, deadline=None)
def test_any_integers_are_what_the_reader_of_gguf_finds(kind: str, seed: int) -> None:
    """All codes, scales and mins, the ends of their ranges among them; d and dmin of either sign."""
    random, grid, count = np.random.default_rng(seed), GRIDS[kind], 3
    subs = (count, grid.block // grid.sub)
    ones = np.ones(subs, np.int16)
    scales = ones if grid.scales is None else random.integers(grid.scales[0], grid.scales[1] + 1, subs, np.int16)
    mins = random.integers(0, grid.mins + 1, subs, np.int16) if grid.mins else ones * (0 if grid.mins is None else -1)
    blocks = Blocks(
        random.standard_normal(count).astype(np.float16),
        np.zeros(count, np.float16) if grid.mins is None else random.standard_normal(count).astype(np.float16),
        scales, mins, random.integers(0, len(grid.levels), (count, grid.block), np.uint8),
    )  # fmt: skip
    data = encode(grid, blocks)
    found = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
    assert np.allclose(found.reshape(count, -1), sums(kind, blocks), rtol=1e-6, atol=1e-6)
    back = decode(grid, data)
    assert all(np.array_equal(getattr(back, name), getattr(blocks, name)) for name in vars(blocks))


@pytest.mark.parametrize("kind", ["Q8_1", "IQ3_S", "TQ2_0", "F16"])
def test_other_types_have_no_grid(kind: str) -> None:
    assert kind not in GRIDS
