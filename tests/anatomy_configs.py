"""A config of every class of the installed transformers that writes text on: what the tables of architectures are of.

In: nothing. Out: config dictionaries as in config.json, by model type: the class's own defaults, and what they lack.
"""

from __future__ import annotations

import warnings
from typing import Any

_QWEN4_EXP = {
    "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 256, "indexer_budget": 2048,
    "indexer_compress_ratio": 4,
}  # fmt: skip
# What the defaults of a class lack, or have in a form that the class itself refuses.
EXTRAS: dict[str, dict[str, Any]] = {
    "big_bird": {"attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")
        },
    },
    "dbrx": {"attn_config": {"kv_n_heads": 8, "rope_theta": 500000.0, "clip_qkv": 8}},
    "deepseek_v2": {"num_experts_per_tok": 6, "n_group": 1, "topk_group": 1},
    "dots1": {"n_routed_experts": 128, "num_experts_per_tok": 6, "n_shared_experts": 2, "head_dim": 128},
    "gemma4_text": {"hidden_size_per_layer_input": 0},
    "gemma4_unified_text": {"hidden_size_per_layer_input": 0},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128, "num_experts": 16, "moe_topk": 2},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention"] * 8, "num_hidden_layers": 24},
    "ministral": {"head_dim": 128},
    "nemotron": {"head_dim": 128, "num_key_value_heads": 8},
    "xmod": {"default_language": "en_XX"},
    "qwen4_exp_text": _QWEN4_EXP,
}
_ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e6}
_MROPE = {"rope_parameters": {**_ROPE, "mrope_section": [16, 24, 24]}}
_NARROW_MROPE = {"rope_parameters": {**_ROPE, "mrope_section": [8, 12, 12]}}
_HALF_MROPE = {"rope_parameters": {**_ROPE, "mrope_section": [8, 12, 12], "partial_rotary_factor": 0.5}}
TEXT_EXTRAS: dict[str, dict[str, Any]] = {
    "gemma4": {"hidden_size_per_layer_input": 0},
    "qwen4_exp": _QWEN4_EXP,
    **dict.fromkeys(("paddleocr_vl", "qwen2_vl", "qwen2_5_vl"), _MROPE),
    **dict.fromkeys(("glm46v", "glm4v"), _HALF_MROPE),
    **dict.fromkeys(("glm4v_moe", "glm_ocr"), _NARROW_MROPE),
}


def model_types() -> dict[str, str]:
    """Model type -> the name of its causal language model class, as the installed transformers has them."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def image_types() -> dict[str, str]:
    """Model type -> the name of its class that reads images beside text, where that is not its causal one too."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    causal = model_types()
    return {kind: name for kind, name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items() if causal.get(kind) != name}


def config_of(model_type: str, architecture: str | None = None) -> dict[str, Any]:
    """The config of a model type, of its causal class or another. Raises what its class raises of its own defaults."""
    from transformers import CONFIG_MAPPING

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = CONFIG_MAPPING[model_type](**EXTRAS.get(model_type, {}))
    config: dict[str, Any] = settings.to_dict()
    config["architectures"] = [architecture or model_types()[model_type]]
    if "is_decoder" in config:
        config["is_decoder"] = True
    if model_type in TEXT_EXTRAS:
        config["text_config"] |= TEXT_EXTRAS[model_type]
    return config
