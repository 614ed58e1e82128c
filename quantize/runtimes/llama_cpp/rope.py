"""How the source stretches its rotations, in the file too: what llama.cpp's converter passes over is added, or refused.

In: the config that the converter was shown, and its model. Out: the field that is lacking, or PlanError where llama.cpp
would run another model. The converter writes `linear` and `yarn` for every architecture, the tables of `llama3` and
`longrope` for a few, and nothing of the rest. What `yarn` is: transformers, modeling_rope_utils.py; llama.cpp's side:
llama_context's constructor, which has its own attention factor times `rope.scaling.attn_factor`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from quantize.errors import PlanError
from quantize.model.config import text_part

HINT = "its answers would not be the model's; the formats other than GGUF do what config.json says"
SCALED, ATTENTION, LOG_MULTIPLIER = (f".rope.scaling.{key}" for key in ("type", "attn_factor", "yarn_log_multiplier"))
LONG_AND_SHORT = ("rope_factors_long.weight", "rope_factors_short.weight")
TABLES = {"llama3": ("rope_freqs.weight",), "longrope": LONG_AND_SHORT, "su": LONG_AND_SHORT}  # su: Phi-3's old name
IN_FIELD = ("linear", "yarn")
BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}  # of which llama.cpp takes others for these architectures only:
TAKES_BETAS = ("grok", "mistral3")
LATENT = ("deepseek2", "deepseek32", "glm-dsa")  # in which llama.cpp scales attention too, by one factor for both
NEARLY = 1e-4


def follow_rope(model: Any, architecture: str, config: Mapping[str, Any]) -> None:
    """Have a model of the converter settle its rotations once it has its fields. Raises PlanError then."""
    prepare: Callable[..., None] = model.prepare_metadata

    def prepare_metadata(*args: Any, **kwargs: Any) -> None:
        prepare(*args, **kwargs)
        _settle(architecture, text_part(config), model.gguf_writer)

    model.prepare_metadata = prepare_metadata


def _settle(architecture: str, config: Mapping[str, Any], writer: Any) -> None:
    parameters = config.get("rope_parameters") or config.get("rope_scaling")
    if not isinstance(parameters, Mapping):
        return
    full, sliding = (parameters.get(f"{name}_attention") for name in ("full", "sliding"))
    rope = full if isinstance(full, Mapping) else parameters
    kind, tensors = _kind(rope), {name for shard in writer.tensors for name in shard}
    fields = {key: item.value for shard in writer.kv_data for key, item in shard.items()}
    lacks = any(name not in tensors for name in TABLES.get(kind, ()))
    if lacks or (kind in IN_FIELD and _ending(fields, SCALED) != kind):
        raise _refusal(f"rotations are scaled by `{kind}`", architecture)
    if isinstance(sliding, Mapping) and (other := _kind(sliding)) in (*TABLES, *IN_FIELD):
        raise _refusal(f"rotations of sliding attention are scaled by `{other}`", architecture)
    if kind in ("linear", "yarn") and fields.get("general.architecture") in LATENT:
        _check_latent(architecture, rope, kind)
    elif kind == "yarn":
        _settle_yarn(architecture, rope, fields, writer)
    elif kind in TABLES and TABLES[kind] == LONG_AND_SHORT:
        _set_attention(writer, fields, _long_attention(rope, config), by_itself=1.0)


def _check_latent(architecture: str, rope: Mapping[str, Any], kind: str) -> None:
    """`yarn` as DeepSeek's models are published with it is what llama.cpp knows."""
    one, all_of_them = rope.get("mscale"), rope.get("mscale_all_dim")
    if kind != "yarn" or not one or one != all_of_them or rope.get("attention_factor") is not None:
        raise _refusal(f"rotations are scaled by `{kind}` without one mscale and the same mscale_all_dim", architecture)


def _settle_yarn(architecture: str, rope: Mapping[str, Any], fields: Mapping[str, Any], writer: Any) -> None:
    for key, usual in BETAS.items():
        if (rope.get(key) or usual) != usual and fields.get("general.architecture") not in TAKES_BETAS:
            raise _refusal(f"rotations are scaled by `yarn` with {key} {rope[key]:g}", architecture)
    factor, multiplier = float(rope["factor"]), _ending(fields, LOG_MULTIPLIER)
    own = _magnitude(factor, 1.0) / (1.0 if multiplier is None else _magnitude(factor, multiplier))
    _set_attention(writer, fields, _attention_factor(rope), by_itself=own)


def _set_attention(writer: Any, fields: Mapping[str, Any], wanted: float, *, by_itself: float) -> None:
    """Write what sines and cosines are multiplied by. by_itself: what llama.cpp multiplies by without being told."""
    found = _ending(fields, ATTENTION)
    if abs(wanted / (by_itself * (1.0 if found is None else found)) - 1) <= NEARLY:
        return
    for shard in writer.kv_data:
        for key in [key for key in shard if key.endswith(ATTENTION)]:
            del shard[key]  # a key is written once
    writer.add_rope_scaling_attn_factors(wanted / by_itself)


def _attention_factor(rope: Mapping[str, Any]) -> float:
    """What `yarn` multiplies sines and cosines by, as transformers has it."""
    factor = float(rope["factor"])
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    one, all_of_them = rope.get("mscale"), rope.get("mscale_all_dim")
    if one and all_of_them:
        return _magnitude(factor, float(one)) / _magnitude(factor, float(all_of_them))
    return _magnitude(factor, 1.0)


def _long_attention(rope: Mapping[str, Any], config: Mapping[str, Any]) -> float:
    """The same of `longrope`."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    longest = config["max_position_embeddings"]
    original = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings") or longest
    factor = float(rope.get("factor") or longest / original)
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def _magnitude(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1


def _kind(rope: Mapping[str, Any]) -> str:
    return str(rope.get("rope_type") or rope.get("type") or "default").lower()


def _ending(fields: Mapping[str, Any], end: str) -> Any:
    return next((value for key, value in fields.items() if key.endswith(end)), None)


def _refusal(what: str, architecture: str) -> PlanError:
    return PlanError(f"config.json: {what}, and llama.cpp does not do that for a {architecture}", hint=HINT)
