"""GGUF files with the widths of well-known models, a few layers and no contents: what memory depends on, in no time.

In: a Shape and a ggml type. Out: a file that llama.cpp loads. The tensor data is a hole in the file, so that it takes
next to no disk. Buffers do not depend on the values, and of the layers only weights and KV cache do.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter

ALIGNMENT = 32
QUERY_RANK = 1536


@dataclass(frozen=True)
class Shape:
    """Widths of a decoder; experts > 0 makes every layer a mixture; latent > 0 is the width of latent attention."""

    name: str
    architecture: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    feed_forward: int
    vocab: int
    tied: bool = True
    window: int = 0
    experts: int = 0
    experts_used: int = 0
    latent: int = 0


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("SmolLM2-135M", "llama", 30, 576, 9, 3, 64, 1536, 49152),
        Shape("Qwen2.5-0.5B", "qwen2", 24, 896, 14, 2, 64, 4864, 151936),
        Shape("Llama-3.2-1B", "llama", 16, 2048, 32, 8, 64, 8192, 128256),
        Shape("Gemma-3-1B", "gemma3", 26, 1152, 4, 1, 256, 6912, 262144, window=512),
        Shape("Llama-3.1-8B, 4 layers", "llama", 4, 4096, 32, 8, 128, 14336, 128256, tied=False),
        Shape("Mistral-7B, 4 layers", "llama", 4, 4096, 32, 8, 128, 14336, 32000, tied=False),
        Shape("Qwen3-MoE, 2 layers", "qwen3moe", 2, 2048, 32, 4, 128, 768, 151936, False, experts=32, experts_used=8),
        Shape("DeepSeek-V2, narrow, 3 layers", "deepseek2", 3, 2048, 16, 1, 192, 10944, 102400, tied=False, latent=512),
    )
}  # fmt: skip


def write_gguf(path: Path, shape: Shape, kind: str, *, max_context: int = 131072) -> None:
    """Write a file of that shape with every matrix of ggml type `kind`; vectors are float32."""
    writer = GGUFWriter(path, shape.architecture)
    _write_metadata(writer, shape, max_context)
    sizes = []
    for name, dims in _tensors(shape):
        ggml = GGMLQuantizationType[kind] if len(dims) > 1 else GGMLQuantizationType.F32
        block, block_bytes = GGML_QUANT_SIZES[ggml]
        sizes.append(prod(dims) // block * block_bytes)
        writer.add_tensor_info(name, dims, np.dtype(np.float32), sizes[-1], raw_dtype=ggml)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    (file,) = writer.fout
    end = _aligned(file.tell()) + sum(_aligned(size) for size in sizes)
    file.truncate(end)
    file.close()


def _write_metadata(writer: GGUFWriter, shape: Shape, max_context: int) -> None:
    writer.add_block_count(shape.layers)
    writer.add_context_length(max_context)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(shape.vocab)
    if shape.window:
        writer.add_sliding_window(shape.window)
    if shape.experts:
        writer.add_expert_count(shape.experts)
        writer.add_expert_used_count(shape.experts_used)
        writer.add_expert_feed_forward_length(shape.feed_forward)
    if shape.latent:
        rope = 64
        writer.add_leading_dense_block_count(shape.layers)
        writer.add_q_lora_rank(QUERY_RANK)
        writer.add_kv_lora_rank(shape.latent)
        writer.add_key_length(shape.latent + rope)
        writer.add_value_length(shape.latent)
        writer.add_key_length_mla(shape.head_dim)
        writer.add_value_length_mla(128)
        writer.add_rope_dimension_count(rope)
        writer.add_expert_count(2)
        writer.add_expert_used_count(1)
        writer.add_expert_feed_forward_length(1408)
        writer.add_expert_shared_count(1)
        writer.add_expert_weights_scale(1.0)
    else:
        writer.add_key_length(shape.head_dim)
        writer.add_value_length(shape.head_dim)
        writer.add_rope_dimension_count(shape.head_dim)


def _tensors(shape: Shape) -> list[tuple[str, tuple[int, ...]]]:
    found: list[tuple[str, tuple[int, ...]]] = [
        ("token_embd.weight", (shape.vocab, shape.hidden)),
        ("output_norm.weight", (shape.hidden,)),
    ]
    if not shape.tied:
        found.append(("output.weight", (shape.vocab, shape.hidden)))
    for layer in range(shape.layers):
        parts = {"attn_norm": (shape.hidden,), "ffn_norm": (shape.hidden,), **_attention(shape), **_mlp(shape)}
        found += [(f"blk.{layer}.{name}{'' if '.' in name else '.weight'}", dims) for name, dims in parts.items()]
    return found


def _attention(shape: Shape) -> dict[str, tuple[int, ...]]:
    hidden, query, key = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    if shape.latent:
        nope = shape.head_dim - 64
        return {
            "attn_q_a": (QUERY_RANK, hidden),
            "attn_q_a_norm": (QUERY_RANK,),
            "attn_q_b": (query, QUERY_RANK),
            "attn_kv_a_mqa": (shape.latent + 64, hidden),
            "attn_kv_a_norm": (shape.latent,),
            "attn_k_b": (shape.heads, shape.latent, nope),
            "attn_v_b": (shape.heads, 128, shape.latent),
            "attn_output": (hidden, shape.heads * 128),
        }
    parts: dict[str, tuple[int, ...]] = {
        "attn_q": (query, hidden), "attn_k": (key, hidden), "attn_v": (key, hidden), "attn_output": (hidden, query),
    }  # fmt: skip
    if shape.architecture in ("gemma3", "qwen3moe"):
        parts |= {"attn_q_norm": (shape.head_dim,), "attn_k_norm": (shape.head_dim,)}
    if shape.architecture == "gemma3":
        parts |= {"post_attention_norm": (hidden,), "post_ffw_norm": (hidden,)}
    if shape.architecture == "qwen2":
        parts |= {"attn_q.bias": (query,), "attn_k.bias": (key,), "attn_v.bias": (key,)}
    return parts


def _mlp(shape: Shape) -> dict[str, tuple[int, ...]]:
    hidden, wide, experts = shape.hidden, shape.feed_forward, shape.experts
    if experts:
        return {
            "ffn_gate_inp": (experts, hidden),
            "ffn_gate_exps": (experts, wide, hidden),
            "ffn_up_exps": (experts, wide, hidden),
            "ffn_down_exps": (experts, hidden, wide),
        }
    return {"ffn_gate": (wide, hidden), "ffn_up": (wide, hidden), "ffn_down": (hidden, wide)}


def metadata_of(path: Path) -> dict[str, Any]:
    """The metadata of a GGUF file as plain values."""
    from gguf import GGUFReader

    return {key: field.contents() for key, field in GGUFReader(path).fields.items()}


def tensor_table(path: Path) -> list[tuple[str, str, int]]:
    """(name, ggml type, bytes) of every tensor of a GGUF file."""
    from gguf import GGUFReader

    return [(t.name, t.tensor_type.name, int(t.n_bytes)) for t in GGUFReader(path).tensors]


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
