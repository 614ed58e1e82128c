"""A config.json with the same structure and tiny widths: what a class of transformers is built and run of in no time.

In: a config as a dictionary. Out: another one, in which widths, heads, experts and the vocabulary are small, in
proportions that are kept where they can be: heads to key-value heads, parts of a head to one another. Left to others:
whether transformers builds it (build), what it shows (observe). Imports no torch.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantize.model.config import LAYER_KEYS, TOWER_KEYS, first_number, text_part

VOCABULARY = 128
HEAD_DIM = 16
MOST_REPEATS = 8  # query heads of one key-value head
EXPERTS = 4

_HIDDEN = ("hidden_size", "n_embd", "d_model", "emb_dim", "embedding_dim", "hidden_dim", "dim")
_HEADS = (
    "num_attention_heads", "n_head", "n_heads", "decoder_attention_heads", "attention_heads", "num_heads",
    "num_decoder_attention_heads",
)  # fmt: skip
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num")
_HEAD_DIMS = frozenset({
    "head_dim", "global_head_dim", "swa_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "qk_head_dim", "v_head_dim",
    "attention_head_size", "attention_head_dim", "kv_channels", "d_head", "dim_head", "d_kv", "rotary_dim",
    "mamba_d_head", "mamba_head_dim", "mamba_headdim", "linear_key_head_dim", "linear_value_head_dim",
    "linear_head_dim", "index_head_dim", "indexer_head_dim", "local_head_dim", "rope_head_dim", "nope_head_dim",
    "swa_v_head_dim", "swa_rotary_dim",
})  # fmt: skip
_HEAD_COUNTS = frozenset({
    *_HEADS, "swa_num_attention_heads", "encoder_attention_heads", "num_encoder_attention_heads", "mamba_n_heads",
    "mamba_num_heads", "linear_num_value_heads", "linear_num_heads", "n_mamba_heads",
    "index_n_heads", "num_global_attention_heads",
})  # fmt: skip
_KV_COUNTS = frozenset({
    *_KV_HEADS, "kv_n_heads", "swa_num_key_value_heads", "num_global_key_value_heads", "linear_num_key_heads",
    "num_query_groups",
})  # fmt: skip
_WIDTHS = frozenset({
    *_HIDDEN, "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size",
    "shared_experts_intermediate_size", "shared_intermediate_size", "moe_shared_expert_intermediate_size",
    "expert_ffn_hidden_size", "ffn_hidden_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner", "d_inner",
    "dff", "dim_ff", "feed_forward_size", "intermediate_size_mlp", "dense_intermediate_size", "kv_lora_rank",
    "q_lora_rank", "o_lora_rank", "mamba_d_ssm", "lru_width", "attention_hidden_size", "embedding_size",
    "input_embedding_size", "output_embedding_size", "word_embed_proj_dim", "hidden_size_per_layer_input",
    "backbone_hidden_size", "router_hidden_size", "cross_attention_hidden_size", "ple_embed_dim",
    "pronunciation_embed_dim", "shape_embed_dim", "prompt_mid_dim", "attn_hidden_size", "adapter_in_dim",
    "adapter_input_size",
})  # fmt: skip
_FOR_EACH_PAIR = ("short_factor", "long_factor")  # of values of a head that are rotated
_TOWER_BLOCKS = 2
_GIVEN = ("out_hidden_size", "text_hidden_size")  # of a tower: the width that it gives the text, if it is the text's
_RANKS = frozenset({
    "mamba_dt_rank", "time_step_rank", "laurel_rank", "hc_lowrank", "gated_norm_rank", "adapter_rank", "d_rel",
})  # fmt: skip
_STATES = {"mamba_d_state": 8, "state_size": 8, "ssm_state_size": 8, "mamba_chunk_size": 8, "chunk_size": 8}
_EXPERT_COUNTS = frozenset({
    "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts",
})  # fmt: skip
_EXPERTS_USED = frozenset({
    "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k", "top_k_experts",
})  # fmt: skip
_VOCABULARIES = {
    "vocab_size": VOCABULARY, "padded_vocab_size": VOCABULARY, "vocab_size_per_layer_input": VOCABULARY,
    "decoder_vocab_size": VOCABULARY, "unpadded_vocab_size": VOCABULARY,
}  # fmt: skip
_SMALL = {
    "encoder_layers": 1, "num_encoder_layers": 1, "num_nextn_predict_layers": 0, "ngram_vocab_size_base": 64,
    "split_ngram_parts": 4, "make_ngram_vocab_size_divisible_by": 4, "block_multiple_of": 8, "zero_expert_num": 2,
    "index_topk": 8, "indexer_budget": 8,
    "max_source_positions": 64, "ffn_round_up_to_multiple_of": 8, "rel_extent": 64,
    "pronunciation_vocab_size": 16, "shape_vocab_size": 16, "position_bias_num_buckets": 32, "prompt_length": 8,
    "num_nextn_layers": 0, "encoder_hash_byte_group_vocab": 64,
    "sliding_window": 8, "attention_chunk_size": 8, "sliding_window_size": 8,
    "n_groups": 2, "mamba_n_groups": 2, "mamba_ngroups": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Smaller:
    """How much smaller widths, counts of heads and widths of heads are, and what heads and key-value heads become."""

    width: float
    head_dim: float
    heads: int
    tiny_heads: int
    kv_heads: int
    tiny_kv_heads: int

    def count(self, value: int) -> int:
        """So many heads of the kind that there are `value` of."""
        if value == self.heads:
            return self.tiny_heads
        if value == self.kv_heads:
            return self.tiny_kv_heads
        return max(1, round(value * self.tiny_heads / self.heads))


def scale_of(config: Mapping[str, Any]) -> Smaller:
    """How the widths of a config become tiny."""
    hidden = first_number(config, _HIDDEN) or 1024
    heads = first_number(config, _HEADS) or 8
    kv_heads = first_number(config, _KV_HEADS) or (1 if config.get("multi_query") else heads)
    repeats = max(1, heads // kv_heads)
    tiny_kv = min(kv_heads, 2 if repeats > 1 else 4)
    tiny = tiny_kv * min(repeats, MOST_REPEATS) if heads % kv_heads == 0 else tiny_kv
    head_dim = first_number(config, ("v_head_dim", "head_dim")) or max(1, hidden // heads)
    inner = HEAD_DIM / head_dim if head_dim > HEAD_DIM else 1.0
    return Smaller(inner * tiny / heads, inner, heads, tiny, kv_heads, tiny_kv)


def shrink(config: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """The config with `layers` blocks and tiny widths."""
    real_layers = first_number(config, LAYER_KEYS) or layers
    tiny = _shrunk(config, scale_of(config), real_layers, layers)
    width, small = (first_number(text_part(each), _HIDDEN) for each in (config, tiny))
    for tower in (tiny[key] for key in TOWER_KEYS if isinstance(tiny.get(key), dict)):
        tower.update({key: small for key in _GIVEN if tower.get(key) == width and small})
        _shrink_tower(tower)
    return tiny


def _shrink_tower(tower: dict[str, Any]) -> None:
    """What towers alone have: nothing of them runs, and a few blocks are enough."""
    heads = first_number(tower, _HEADS)
    if _is_whole(tower.get("embed_dim")) and heads:
        tower["embed_dim"] = heads * HEAD_DIM
    if _is_whole(tower.get("depth")):
        tower["depth"] = min(tower["depth"], _TOWER_BLOCKS)


def with_layers(config: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """The config with fewer blocks and its own widths."""
    real_layers = first_number(config, LAYER_KEYS) or layers
    found = {key: _per_layer(value, real_layers, layers) for key, value in copy.deepcopy(dict(config)).items()}
    return found | {key: layers for key in LAYER_KEYS if config.get(key) == real_layers}


def _shrunk(config: Mapping[str, Any], scale: Smaller, real_layers: int, layers: int) -> dict[str, Any]:
    grouped = any((first_number(config, (key,)) or 0) > 1 for key in ("n_group", "num_expert_group"))
    tiny: dict[str, Any] = {}
    for key, value in copy.deepcopy(dict(config)).items():
        if isinstance(value, Mapping) and value and all(str(name).isdigit() for name in value):
            kept = {name: each for name, each in value.items() if int(name) < layers}
            tiny[key] = {
                name: _shrunk(each, scale, real_layers, layers) if isinstance(each, Mapping) else each
                for name, each in kept.items()
            }
        elif isinstance(value, Mapping):
            own = scale_of(value) if first_number(value, _HIDDEN) else scale
            inner = first_number(value, LAYER_KEYS) or real_layers
            tiny[key] = _shrunk(value, own, inner, layers)
        elif isinstance(value, list):
            items = _per_layer(value, real_layers, layers)
            tiny[key] = [_number(key, item, scale, grouped=grouped) if _is_whole(item) else item for item in items]
        elif key in LAYER_KEYS and value == real_layers:
            tiny[key] = layers
        else:
            tiny[key] = _number(key, value, scale, grouped=grouped) if _is_whole(value) else value
    _settle(config, tiny, layers, scale)
    return tiny


def _settle(config: Mapping[str, Any], tiny: dict[str, Any], layers: int, scale: Smaller) -> None:
    """Numbers that follow from others."""
    if _is_whole(config.get("qk_head_dim")) and _is_whole(tiny.get("qk_nope_head_dim")):
        tiny["qk_head_dim"] = tiny["qk_nope_head_dim"] + tiny["qk_rope_head_dim"]
    for key in ("moe_layer_end_index", "num_kv_shared_layers"):
        if _is_whole(config.get(key)) and config[key] >= layers:
            tiny[key] = layers - 1
    if _is_whole(config.get("mamba_d_ssm")) and _is_whole(tiny.get("mamba_n_heads")):
        tiny["mamba_d_ssm"] = tiny["mamba_n_heads"] * tiny["mamba_d_head"]
    for key in _FOR_EACH_PAIR:
        if isinstance(config.get(key), list):
            tiny[key] = config[key][: max(1, round(len(config[key]) * scale.head_dim))]
    section = tiny.get("mrope_section")
    if isinstance(section, list) and all(_is_whole(item) for item in section):
        tiny["mrope_section"] = _in_proportion(section, round(sum(section) * scale.head_dim))


def _in_proportion(parts: list[int], total: int) -> list[int]:
    """Whole numbers of at least one that are to each other as `parts`, and make `total` together, if that can be."""
    shares = [max(1, part * total // sum(parts)) for part in parts]
    shares[-1] = max(1, shares[-1] + total - sum(shares))
    return shares


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _per_layer(value: Any, real_layers: int, layers: int) -> Any:
    return value[:layers] if isinstance(value, list) and len(value) == real_layers else value


def _number(key: str, value: int, scale: Smaller, *, grouped: bool) -> int:
    if value <= 1 and key not in _WIDTHS:
        return value
    if key.endswith(("_token_id", "_token_index", "_token_ids", "_index")) and key != "moe_layer_end_index":
        return min(value, VOCABULARY - 1)
    if key in _VOCABULARIES:
        return _VOCABULARIES[key]
    if key in _KV_COUNTS or key in _HEAD_COUNTS:
        return scale.count(value)
    if key in _HEAD_DIMS:
        return max(4, 2 * round(value * scale.head_dim / 2))
    if key in _WIDTHS:
        return _width(value, scale)
    if key in _RANKS:
        return max(2, min(value, round(value * scale.width)))
    if key in _EXPERT_COUNTS:
        return min(value, 2 * EXPERTS if grouped else EXPERTS)
    if key in _EXPERTS_USED:
        return min(value, 2)
    if key in ("n_group", "num_expert_group"):
        return min(value, 2)
    if key == "topk_group":
        return 1
    return min(value, {**_STATES, **_SMALL}.get(key, value))


def _width(value: int, scale: Smaller) -> int:
    exact = value * scale.width
    if exact >= HEAD_DIM and exact == int(exact) and int(exact) % 8 == 0:
        return int(exact)
    return max(2 * HEAD_DIM, HEAD_DIM * round(exact / HEAD_DIM)) if value > 2 * HEAD_DIM else value
