"""Linears that stay in high precision beside quantized ones: whoever loads the artifact is told to leave them alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quantize.testing import write_recipe
from tests.conftest import Run
from tests.families import family_named, make_family

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers and its plugins warn on import


def test_bitsandbytes_is_refused_at_plan_where_transformers_replaces_no_linear(run: Run, tmp_path: Path) -> None:
    """Falcon's are of a class of its own; the artifact would hold INT8 weights that are read as if they were none."""
    make_family(family_named("Falcon"), tmp_path / "model")
    variants = [{"format": "bitsandbytes", "type": kind} for kind in ("int8", "nf4")]
    result = run("plan", write_recipe(tmp_path / "recipe.yaml", tmp_path / "model", variants))
    assert result.exit_code == 3
    words = " ".join(result.stderr.split())
    assert "the linears of FalconForCausalLM are FalconLinear, which transformers does not replace" in words


def test_bitsandbytes_names_the_linears_of_linear_attention_that_steer(run: Run, tmp_path: Path) -> None:
    """Else transformers makes them quantized ones without their scales; building loads the artifact."""
    make_family(family_named("Qwen3.5"), tmp_path / "model")
    recipe = write_recipe(tmp_path / "recipe.yaml", tmp_path / "model", [{"format": "bitsandbytes", "type": "int8"}])
    result = run("build", recipe, "--no-eval", "--store", tmp_path / "store", "-q")
    assert result.exit_code == 0, result.stderr
    (config,) = (path for path in (tmp_path / "store").rglob("config.json") if "current" not in path.parts)
    skipped = json.loads(config.read_text())["quantization_config"]["llm_int8_skip_modules"]
    assert "lm_head" in skipped
    assert any(name.endswith("linear_attn.in_proj_b") for name in skipped)
    assert not any(name.endswith("mlp.down_proj") for name in skipped)
