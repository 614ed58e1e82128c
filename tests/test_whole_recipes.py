"""Kinds of models that people quantize now, tiny, through a whole recipe: each variant is built, measured and accepted,
or refused at plan with the reason.

GGUF in Q8_0 and Q4_K_M, GPTQ, AWQ and INT8; judged by the runtimes against transformers, at limits for random weights.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quantize.testing import write_recipe
from tests.conftest import Run
from tests.families import Family, family_named, make_family
from tests.wrappers import GEMMA_3, make_wrapper

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.every_class]  # half a minute each, and more
NEAR = {"q8_0": 0.02, "bnb-int8": 0.02}  # nats; 4 bits cost random weights much more
FUSED = "its experts are saved fused, and no format here writes them so"
APART = "most weights of a block are of a form that is not taken apart, mlp.experts.gate_up_proj among them"
PACKED = ("gptq-int4-g32", "awq-int4-g32")
CALIBRATED = (*PACKED, "bnb-int8")
REFUSED: dict[str, dict[str, str]] = {
    "gpt-oss": dict.fromkeys(CALIBRATED, APART),
    "DeepSeek V3": {"bnb-int8": "bitsandbytes does not quantize the experts of DeepseekV3ForCausalLM"},
    "Granite hybrid": dict.fromkeys(CALIBRATED, FUSED),
}
NAMES = ("Qwen3.5", "gpt-oss", GEMMA_3.architecture, "DeepSeek V3", "Granite hybrid", "Granite hybrid, dense", "LFM2")


def family_of(name: str) -> Family:
    """The row of that name; a Granite hybrid that has shared experts alone."""
    if name != "Granite hybrid, dense":
        return family_named(name)
    family = family_named("Granite hybrid")
    return replace(family, extra={**family.extra, "num_local_experts": 0, "num_experts_per_tok": 0})


def recipe_of(name: str, root: Path) -> Path:
    """A tiny checkpoint, and a recipe for it in five formats."""
    pre_tokenizer = None
    if name == GEMMA_3.architecture:
        make_wrapper(GEMMA_3, root / "model")
    else:
        make_family(family_of(name), root / "model")
        pre_tokenizer = family_of(name).pre_tokenizer
    own = {"pre_tokenizer": pre_tokenizer} if pre_tokenizer else {}
    text = [f"Paragraph {index}: the quick brown fox jumps over the lazy dog. " * 3 for index in range(40)]
    (root / "text.txt").write_text("\n\n".join(text))
    variants: list[dict[str, Any]] = [
        {"format": "gguf", "type": "Q8_0", **own},
        {"format": "gguf", "type": "Q4_K_M", **own},
        {"format": "gptq", "group_size": 32},
        {"format": "awq", "group_size": 32},
        {"format": "bitsandbytes", "type": "int8"},
    ]
    return write_recipe(
        root / "recipe.yaml", root / "model", variants,
        calibration={"dataset": "text.txt", "samples": 8, "sequence_length": 64, "minimum_tokens": 16},
        evaluation={"text": "prose", "windows": 2, "window": 64, "golden": []},
        gates={"max_kl": 5, "max_perplexity_ratio": 10},
    )  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_each_variant_is_accepted_or_refused_at_plan(name: str, run: Run, tmp_path: Path) -> None:
    recipe, refused = recipe_of(name, tmp_path), REFUSED.get(name, {})
    planned = run("plan", recipe, "--json")
    assert planned.exit_code == (3 if refused else 0), planned.stderr
    said = {item["name"]: item["refusal"] for item in json.loads(planned.stdout)["variants"]}
    assert {variant for variant, reason in said.items() if reason} == {*refused}
    assert all(reason in said[variant] for variant, reason in refused.items())
    result = run("build", recipe, "--store", tmp_path / "store")
    assert result.exit_code == (3 if refused else 0), result.stderr
    found = {path.parents[1].name: path for path in (tmp_path / "store").glob("*/*/current/measurements.json")}
    assert {*found} == {*said} - {*refused}
    for variant, path in found.items():
        quality = json.loads(path.read_text())["evaluation"]["quality"]
        assert quality["mean_kl"] < NEAR.get(variant, 1.5), variant
