"""Linears that stay in high precision beside quantized ones: whoever loads the artifact is told to leave them alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quantize.formats.packed.runtime import odd_linear
from quantize.testing import TinyModel, make_checkpoint, write_recipe
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


def test_rows_that_blocks_of_nf4_do_not_fill_are_refused_at_plan(run: Run, tmp_path: Path) -> None:
    """They were built, and failed in bitsandbytes' product on a CPU; INT8 has no blocks."""
    model = make_checkpoint(tmp_path / "model", TinyModel(hidden=96, intermediate=128, blocks=1, heads=4, kv_heads=2))
    variants = [{"format": "bitsandbytes", "type": kind} for kind in ("nf4", "int8")]
    result = run("plan", write_recipe(tmp_path / "recipe.yaml", model, variants))
    assert result.exit_code == 3
    assert "self_attn.q_proj.weight has 96 inputs; NF4 takes multiples of 64\n  use int8, or a gguf" in result.stderr
    assert [line.split()[-2:] for line in result.stdout.splitlines() if line.startswith("bnb-int8")] == [
        ["to", "build"]
    ]


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


@pytest.mark.parametrize(
    ("model", "variant", "kernel", "said"),
    [
        (
            TinyModel(hidden=96, intermediate=96, blocks=1, heads=4, kv_heads=1),
            {"format": "awq", "group_size": 32},  # a GPTQ artifact takes the same way, to TorchLinear
            "AwqTorchLinear",
            "k_proj has 24 outputs, and torch's product of 4 bits takes multiples of 16",
        ),
        (
            TinyModel(hidden=64, intermediate=80, blocks=1, heads=4, kv_heads=4),
            {"format": "gptq", "group_size": 16},
            "TorchLinear",
            "down_proj has groups of 16 weights, and torch's product of 4 bits takes 32, 64, 128, 256",
        ),
    ],
    ids=["outputs", "groups"],
)
def test_a_shape_that_torchs_product_of_4_bits_does_not_take_runs_in_another_kernel(
    model: TinyModel, variant: dict[str, object], kernel: str, said: str, run: Run, tmp_path: Path
) -> None:
    """gptqmodel's first choice on a CPU calls it for any shape, and fails; verification generates with the artifact."""
    make_checkpoint(tmp_path / "model", model)
    (tmp_path / "text.txt").write_text("\n\n".join(f"Part {n}: the quick brown fox jumps. " * 6 for n in range(9)))
    calibration = {"dataset": "text.txt", "samples": 8, "sequence_length": 64, "minimum_tokens": 16}
    recipe = write_recipe(tmp_path / "recipe.yaml", tmp_path / "model", [variant], calibration=calibration)
    result = run("build", recipe, "--no-eval", "--store", tmp_path / "store", "-q")
    assert result.exit_code == 0, result.stderr
    (folder,) = {path.parent.resolve() for path in (tmp_path / "store").glob("*/*/*/measurements.json")}
    assert json.loads((folder / "measurements.json").read_text())["verify"]["kernel"] == kernel
    assert said in str(odd_linear(folder, str(variant["format"])))
