"""The config.json that llama.cpp's converter is shown: transformers' reading of it, with the names of old put back.

In: config.json as transformers 5 reads it, and as it is in the file. Out: a dict with the keys that the converter looks
for, or PlanError where llama.cpp runs an architecture in one way only and the checkpoint asks for another. transformers
5 moved several keys into `rope_parameters` and dropped others that its classes take for granted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from quantize.errors import PlanError

Config = dict[str, Any]
SIGMOID_ROUTERS = (
    "DeepseekV3ForCausalLM", "Dots1ForCausalLM", "Glm4MoeLiteForCausalLM", "GlmMoeDsaForCausalLM",
    "MiniMaxM2ForCausalLM", "AfmoeForCausalLM", "ExaoneMoeForCausalLM", "ExaoneMoEForCausalLM", "SolarOpenForCausalLM",
)  # fmt: skip
GRANITE_HYBRID = "GraniteMoeHybridForCausalLM"
# Classes of one model that the converter knows by one name only.
SAME_MODEL = {
    "BitNetForCausalLM": "BitnetForCausalLM",
    "ExaoneMoeForCausalLM": "ExaoneMoEForCausalLM",
    "Gemma4ForCausalLM": "Gemma4ForConditionalGeneration",
    "MptForCausalLM": "MPTForCausalLM",
    "PhimoeForCausalLM": "PhiMoEForCausalLM",
}


def converter_config(architecture: str, loaded: Mapping[str, Any], written: Mapping[str, Any]) -> Config:
    """The config for the converter. loaded: as transformers has it; written: as config.json has it.

    Raises PlanError: the config asks for what llama.cpp does not do.
    """
    config = _merged(loaded, written)
    text = config.get("text_config")
    if isinstance(text, dict):
        config["text_config"] = _classic(architecture, text)
    else:
        config = _classic(architecture, config)
    _refuse(architecture, text if isinstance(text, dict) else config)
    return config


def _merged(loaded: Mapping[str, Any], written: Mapping[str, Any]) -> Config:
    """What transformers has, and beside it what only the file has."""
    config = {**written, **loaded}
    inner, inner_written = loaded.get("text_config"), written.get("text_config")
    if isinstance(inner, dict) and isinstance(inner_written, dict):
        config["text_config"] = {**inner_written, **inner}
    return config


def _classic(architecture: str, config: Config) -> Config:
    """Add the keys that are missing and that something else in the config says."""
    config = dict(config)
    rope = _rope(config)
    if rope is config.get("rope_parameters"):  # not one of several, each for a kind of layer
        _add(config, "rope_theta", rope.get("rope_theta"))
        if rope.get("rope_type") not in (None, "default"):
            _add(config, "rope_scaling", rope)
        _add(config, "partial_rotary_factor", rope.get("partial_rotary_factor"))
        _add(config, "original_max_position_embeddings", rope.get("original_max_position_embeddings"))
    for key, value in _ADDED.get(architecture, {}).items():
        if config.get(key) is None:
            _add(config, key, value(config))
    if architecture == GRANITE_HYBRID and not config.get("num_local_experts"):  # the shared experts are all there are
        config["intermediate_size"] = config.get("shared_intermediate_size") or config.get("intermediate_size")
    for key, names in _RENAMED.get(architecture, {}).items():
        config[key] = [names.get(item, item) for item in config.get(key) or []]
    return config


def _add(config: Config, key: str, value: Any) -> None:
    if value is not None and config.get(key) is None:
        config[key] = value


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict):
        return {}
    full = rope.get("full_attention")
    return full if isinstance(full, dict) else rope


def _rotated(config: Mapping[str, Any]) -> int:
    """How many values of a head are rotated."""
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return int(width * _share(config))


def _share(config: Mapping[str, Any]) -> float:
    return float(_rope(config).get("partial_rotary_factor") or 1.0)


def _of_full_attention(key: str) -> Callable[[Mapping[str, Any]], Any]:
    """A value of the first block with full attention, which transformers 5 keeps apart from the others'."""

    def find(config: Mapping[str, Any]) -> Any:
        apart = config.get("per_layer_config") or {}
        blocks = [str(index) for index, kind in enumerate(config["layer_types"]) if kind == "full_attention"]
        return next((apart[block][key] for block in blocks if key in apart.get(block, {})), None)

    return find


# What an architecture's config was published with, and transformers 5 does not write.
_ADDED: dict[str, dict[str, Callable[[Mapping[str, Any]], Any]]] = {
    **{name: {"scoring_func": lambda _: "sigmoid"} for name in SIGMOID_ROUTERS},
    "BambaForCausalLM": {"attn_rotary_emb": _rotated},
    "Cohere2ForCausalLM": {"rotary_pct": _share},
    "GPTNeoXForCausalLM": {"rotary_pct": _share, "use_parallel_residual": lambda _: True},
    "Gemma4ForCausalLM": {
        "global_head_dim": _of_full_attention("head_dim"),
        "num_global_key_value_heads": _of_full_attention("num_key_value_heads"),
    },
    "GPT2LMHeadModel": {"n_ctx": lambda config: config.get("n_positions")},
}
_ADDED["MiniMaxM2ForCausalLM"]["rotary_dim"] = _rotated
_ADDED["AfmoeForCausalLM"]["route_norm"] = lambda _: True
_ADDED["SolarOpenForCausalLM"]["partial_rotary_factor"] = _share
_ADDED["Gemma4ForConditionalGeneration"] = _ADDED["Gemma4ForCausalLM"]
# What transformers 5 calls otherwise.
_RENAMED = {
    GRANITE_HYBRID: {"layer_types": {"full_attention": "attention", "linear_attention": "mamba"}},
}


def _refuse(architecture: str, config: Mapping[str, Any]) -> None:
    if architecture in _OTHERWISE:
        raise PlanError(
            f"config.json: llama.cpp's {architecture} is another model: {_OTHERWISE[architecture]}",
            hint="its answers would not be the model's; choose a format other than GGUF",
        )
    for key, value in _ALWAYS.get(architecture, {}).items():
        found = config.get(key, value)
        if found != value:
            raise _refusal(architecture, f"{key} is {found!r}", f"{value!r}")
    if architecture == "Exaone4ForCausalLM" and config.get("sliding_window") and config["num_hidden_layers"] != 64:
        blocks = config["num_hidden_layers"]
        raise _refusal(architecture, f"sliding_window is set in a model of {blocks} blocks", "none, but for 64 blocks")


def _refusal(architecture: str, found: str, taken: str) -> PlanError:
    return PlanError(
        f"config.json: {found}, and llama.cpp runs every {architecture} as if it were {taken}",
        hint="its answers would not be the model's; the formats other than GGUF do what config.json says",
    )


_SPARSE_MIXER = "it weighs the chosen experts by a softmax over all of them, the model by a sparse mixer"
_OTHERWISE = {"PhimoeForCausalLM": _SPARSE_MIXER, "PhiMoEForCausalLM": _SPARSE_MIXER}
# What llama.cpp does not ask the file for.
_ALWAYS: dict[str, dict[str, Any]] = {
    "AfmoeForCausalLM": {"mup_enabled": True},
    "DeepseekV3ForCausalLM": {"rope_interleave": True},
    "Qwen3MoeForCausalLM": {"norm_topk_prob": True},
    "StableLmForCausalLM": {"rope_theta": 10000.0},
}
