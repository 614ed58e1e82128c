"""The numbers of an architecture that memory depends on.

In: a Hugging Face config (a dict, as in config.json) or the metadata of a GGUF file. Out: a frozen ModelShape: layers,
widths, vocabulary, and for every layer what a token leaves in the KV cache. Weights and bytes are estimate/'s matter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from quantize.errors import CheckpointError
from quantize.files.gguf import GgufFile
from quantize.model.config import MAX_NUMBER, first_number, number_or, text_part

MAX_LAYERS = 10_000
_NO_KV_LAYER_TYPES = frozenset({"linear_attention", "mamba", "mamba2", "recurrent", "conv", "mlp", "moe", "ffn"})
_SLIDING_LAYER_TYPES = frozenset({"sliding_attention", "chunked_attention", "local_attention", "local"})
_EXPERTS_USED = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k")
_NAMES: dict[str, tuple[str, ...]] = {  # today's name first, then the names older configs use
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "heads": ("num_attention_heads", "n_head", "n_heads"),
    "vocab_size": ("vocab_size", "padded_vocab_size"),
    "intermediate_size": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"),
    "max_context": ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length"),
}


@dataclass(frozen=True)
class KvLayer:
    """What one attention layer keeps for each token of each sequence.

    values: K and V values, as llama.cpp and vLLM store them (latent attention: the latent, once).
    expanded_values: the same as transformers stores them (latent attention: K and V of every head).
    window: number of last tokens that are kept; None keeps all.
    """

    values: int
    expanded_values: int
    window: int | None = None


@dataclass(frozen=True)
class ModelShape:
    """Shape of a decoder; counts are of values, never bytes.

    kv_layers has one entry for each layer with a KV cache of its own: recurrent layers, and layers that share another's
    cache, have none. `intermediate_size` is the width that one token passes: dense, or experts used at once.
    """

    architecture: str
    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    intermediate_size: int
    max_context: int
    kv_layers: tuple[KvLayer, ...] = field(repr=False)
    latent_attention: bool = False
    experts: int = 0
    experts_used: int = 0

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """Parse a Hugging Face config, or its text part. Raises CheckpointError on a missing or impossible number."""
        config = text_part(config)
        layers, hidden, heads = (_number(config, name) for name in ("layers", "hidden_size", "heads"))
        kv_heads = first_number(config, ("num_key_value_heads", "num_kv_heads", "n_head_kv"))
        if kv_heads is None:
            kv_heads = 1 if config.get("multi_query") else heads
        head_dim = first_number(config, ("head_dim", "attention_head_size")) or hidden // heads
        latent = config.get("kv_lora_rank") is not None
        names = config.get("architectures")
        architectures = names if isinstance(names, list) and names else [config.get("model_type", "unknown")]
        return cls(
            architecture=str(architectures[0]),
            layers=layers,
            hidden_size=hidden,
            heads=heads,
            kv_heads=int(kv_heads),
            head_dim=int(head_dim),
            vocab_size=_number(config, "vocab_size"),
            intermediate_size=_intermediate(config, hidden),
            max_context=first_number(config, _NAMES["max_context"]) or 2048,
            kv_layers=_kv_layers(config, layers, heads, int(kv_heads), int(head_dim)),
            latent_attention=latent,
            experts=first_number(config, ("num_local_experts", "num_experts", "n_routed_experts")) or 0,
            experts_used=first_number(config, _EXPERTS_USED) or 0,
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> ModelShape:
        """Parse GGUF metadata: {key: value}, arrays as lists. Raises CheckpointError on a missing key."""
        architecture = str(_gguf(metadata, "general.architecture"))

        def key(name: str, default: Any = None) -> Any:
            return metadata.get(f"{architecture}.{name}", default)

        heads = _scalar(key("attention.head_count"), f"{architecture}.attention.head_count", least=1)
        hidden = _scalar(key("embedding_length"), f"{architecture}.embedding_length")
        kv_heads = _scalar(key("attention.head_count_kv", heads), f"{architecture}.attention.head_count_kv")
        head_dim = _scalar(key("attention.key_length", hidden // heads), "attention.key_length")
        config: dict[str, Any] = {
            "architectures": [architecture],
            "num_hidden_layers": _scalar(key("block_count"), f"{architecture}.block_count"),
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "intermediate_size": _scalar(key("feed_forward_length", 4 * hidden), "feed_forward_length"),
            "max_position_embeddings": key("context_length"),
            "vocab_size": _gguf_vocab(metadata, architecture),
            "num_local_experts": key("expert_count", 0),
            "moe_intermediate_size": key("expert_feed_forward_length"),
            "num_experts_per_tok": key("expert_used_count", 0),
        }
        if key("attention.sliding_window"):
            config["sliding_window"] = key("attention.sliding_window")
            config.update(_gguf_window_pattern(architecture, key("attention.sliding_window_pattern")))
        if key("attention.kv_lora_rank"):
            config["kv_lora_rank"] = key("attention.kv_lora_rank")
            config["qk_rope_head_dim"] = key("rope.dimension_count", 64)
            config["v_head_dim"] = key("attention.value_length_mla") or key("attention.value_length", head_dim)
            nope = _scalar(key("attention.key_length_mla", head_dim), "attention.key_length_mla")
            rope = _scalar(config["qk_rope_head_dim"], "rope.dimension_count")
            config["qk_nope_head_dim"] = max(0, nope - rope)
        return cls.from_config(config)


def _number(config: Mapping[str, Any], name: str) -> int:
    value = first_number(config, _NAMES[name])
    if value is None or not 1 <= value <= (MAX_LAYERS if name == "layers" else MAX_NUMBER):
        raise CheckpointError(
            f"config.json has no usable {' or '.join(_NAMES[name])}",
            hint="the memory estimate needs it; check that the folder holds the config of a decoder",
        )
    return value


def _intermediate(config: Mapping[str, Any], hidden: int) -> int:
    dense = first_number(config, _NAMES["intermediate_size"]) or 4 * hidden
    used = first_number(config, _EXPERTS_USED) or 0
    expert = first_number(config, ("moe_intermediate_size",)) or dense
    return max(dense, used * expert)


def _layer_types(config: Mapping[str, Any], layers: int) -> list[str]:
    """One type a layer, from `layer_types`, or from the older `sliding_window_pattern` (each n-th layer is full)."""
    types = config.get("layer_types")
    if isinstance(types, list) and len(types) >= layers:
        return [str(kind) for kind in types[:layers]]
    window = config.get("sliding_window")
    if not window or config.get("use_sliding_window") is False:
        return ["full_attention"] * layers
    pattern = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern")
    if isinstance(pattern, int) and pattern > 0:
        return ["full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(layers)]
    first_sliding = number_or(config, "max_window_layers", 0) if config.get("use_sliding_window") else 0
    return ["sliding_attention" if i >= first_sliding else "full_attention" for i in range(layers)]


def _kv_layers(config: Mapping[str, Any], layers: int, heads: int, kv_heads: int, head_dim: int) -> tuple[KvLayer, ...]:
    window = config.get("sliding_window") or config.get("attention_chunk_size")
    own_cache = max(0, layers - number_or(config, "num_kv_shared_layers", 0))
    values = expanded = 2 * kv_heads * head_dim
    if (
        config.get("kv_lora_rank") is not None
    ):  # DeepSeek-V2, arXiv:2405.04434, section 2.1: the latent and the shared key
        rope, nope = number_or(config, "qk_rope_head_dim", 64), number_or(config, "qk_nope_head_dim", head_dim)
        value_dim = number_or(config, "v_head_dim", head_dim)
        values, expanded = number_or(config, "kv_lora_rank", 0) + rope, heads * (nope + rope + value_dim)
    kept = []
    for kind in _layer_types(config, layers)[:own_cache]:
        if kind in _NO_KV_LAYER_TYPES:
            continue
        sliding = kind in _SLIDING_LAYER_TYPES and isinstance(window, int) and window > 0
        kept.append(KvLayer(values, expanded, window if sliding else None))
    return tuple(kept)


def _gguf(metadata: Mapping[str, Any], key: str) -> Any:
    if key not in metadata:
        raise CheckpointError(f"the GGUF metadata has no {key}", hint="is this the file of a language model?")
    return metadata[key]


def _scalar(value: Any, key: str, *, least: int = 0) -> int:
    """A number, or the largest of an array with one number a layer."""
    if isinstance(value, list | tuple) and value and all(isinstance(item, int) for item in value):
        value = max(value)
    if not isinstance(value, int) or not least <= value <= MAX_NUMBER:
        raise CheckpointError(f"the GGUF metadata has no usable {key}", hint="is this the file of a language model?")
    return int(value)


def _gguf_vocab(metadata: Mapping[str, Any], architecture: str) -> int:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list):
        return len(tokens)
    return _scalar(_gguf(metadata, f"{architecture}.vocab_size"), f"{architecture}.vocab_size")


def _gguf_window_pattern(architecture: str, pattern: Any) -> dict[str, Any]:
    """llama.cpp keeps the pattern in its code for most architectures (src/models/*.cpp, set_swa_pattern)."""
    if isinstance(pattern, list):
        return {"layer_types": ["sliding_attention" if is_sliding else "full_attention" for is_sliding in pattern]}
    every = {"gemma2": 2, "gemma3": 6, "gemma3n": 5, "cohere2": 4, "gpt-oss": 2, "phi3": 1}
    if isinstance(pattern, int):
        return {"sliding_window_pattern": pattern}
    if architecture in every:
        return {"sliding_window_pattern": every[architecture]}
    return {"use_sliding_window": False}  # llama.cpp reads no window for the others: every layer keeps all


def gguf_shape(file: GgufFile) -> ModelShape:
    """The shape in a GGUF header. Raises CheckpointError."""
    fields = dict(file.fields)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is not None:  # as wide as the vocabulary, whose long list of tokens is not read
        fields[f"{fields.get('general.architecture')}.vocab_size"] = embedding.shape[-1]
        fields.pop("tokenizer.ggml.tokens", None)
    return ModelShape.from_gguf(fields)
