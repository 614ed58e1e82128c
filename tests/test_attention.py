"""Causal attention in pieces against torch's own, over whole sequences and in double precision."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from quantize.calibration.attention import LONGEST, PIECE, attend


def made(length: int, *, heads: int = 4, shared: int = 2, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Queries, keys and values [2, heads, length, 16]; each key-value head is read by so many query heads."""
    generator = torch.Generator().manual_seed(length)
    shapes = [(2, count, length, 16) for count in (heads, heads // shared, heads // shared)]
    return [(3 * torch.randn(shape, generator=generator)).to(dtype) for shape in shapes]


def module(groups: int = 2, **attributes: Any) -> Any:
    return SimpleNamespace(num_key_value_groups=groups, **attributes)


def exact(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """Attention written out, [batch, length, heads, head_dim] float64."""
    query, key, value = query.double(), key.double(), value.double()
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scale is None else scale)
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return (scores.masked_fill(later, -torch.inf).softmax(-1) @ value).transpose(1, 2)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many queries each call of torch's kernel has."""
    found: list[int] = []

    def counted(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        found.append(query.shape[2])
        return scaled_dot_product_attention(query, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    return found


@pytest.mark.parametrize("length", [1, PIECE, PIECE + 1, 3 * PIECE, 200, LONGEST, LONGEST + 1])
@pytest.mark.parametrize("shared", [1, 4])
def test_it_is_causal_attention(length: int, shared: int, calls: list[int]) -> None:
    query, key, value = made(length, shared=shared)
    found, weights = attend(module(shared), query, key, value, None, scaling=0.3)
    torch.testing.assert_close(found.double(), exact(query, key, value, 0.3), rtol=1e-4, atol=5e-5)
    assert weights is None
    assert sum(calls) == length
    assert max(calls) == (PIECE if PIECE < length <= LONGEST else length)


def test_bfloat16_is_no_further_off_than_the_kernel_on_the_whole() -> None:
    query, key, value = made(500, dtype=torch.bfloat16)
    expected = exact(query, key, value)
    whole = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).transpose(1, 2)
    pieces, _ = attend(module(), query, key, value, None)
    assert pieces.dtype == torch.bfloat16
    assert float((pieces - expected).norm()) < 1.01 * float((whole - expected).norm())


def test_a_mask_of_the_model_is_respected(calls: list[int]) -> None:
    query, key, value = made(200)
    near = torch.ones(200, 200, dtype=torch.bool).tril().triu(-7)
    found, _ = attend(module(), query, key, value, near[None, None])
    expected = scaled_dot_product_attention(query, key, value, attn_mask=near, enable_gqa=True)
    torch.testing.assert_close(found, expected.transpose(1, 2), rtol=1e-4, atol=1e-5)
    assert calls[0] == 200


def test_attention_both_ways_stays_so() -> None:
    query, key, value = made(200)
    expected = scaled_dot_product_attention(query, key, value, enable_gqa=True).transpose(1, 2)
    for found in (
        attend(module(is_causal=False), query, key, value, None)[0],
        attend(module(), query, key, value, None, is_causal=False)[0],
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_queries_after_earlier_keys_are_left_to_transformers(calls: list[int]) -> None:
    query, key, value = made(200)
    attend(module(), query[:, :, :100], key, value, None)
    assert calls == [100]
