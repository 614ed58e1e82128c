"""GPTQ and AWQ of mixtures of experts, which transformers reads fused only: built, read back, measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quantize.formats.packed.mixtures import is_mixture
from quantize.formats.packed.weights import packed_linears
from quantize.testing import write_recipe
from tests.conftest import Run
from tests.families import family_named, make_family

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers and its plugins warn on import
VARIANTS: list[dict[str, Any]] = [{"format": name, "bits": 4, "group_size": 32} for name in ("gptq", "awq")]
EXPERTS = 2 * 4 * 3  # blocks, experts of each, linears of each


def built(run: Run, root: Path, family: str) -> dict[str, Path]:
    """A tiny checkpoint of a family, built: the folder of each variant."""
    make_family(family_named(family), root / "model")
    text = [f"Paragraph {index}: the quick brown fox jumps over the lazy dog. " * 3 for index in range(40)]
    (root / "text.txt").write_text("\n\n".join(text))
    calibration = {"dataset": "text.txt", "samples": 24, "sequence_length": 64, "minimum_tokens": 16}
    evaluation = {"text": "prose", "windows": 3, "window": 64, "golden": []}
    gates = {"max_kl": 5, "max_perplexity_ratio": 10}
    extra = {"calibration": calibration, "evaluation": evaluation, "gates": gates}
    recipe = write_recipe(root / "recipe.yaml", root / "model", VARIANTS, **extra)
    result = run("build", recipe, "--store", root / "store", "-q", "--json")
    assert result.exit_code == 0, result.output + result.stderr
    return {path.parent.parent.name.split("-")[0]: path.parent for path in (root / "store").glob("*/*/*/manifest.json")}


def measurements(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "measurements.json").read_text())
    return found


@pytest.mark.parametrize("family", ["Qwen2-MoE", pytest.param("Qwen3-MoE", marks=pytest.mark.every_class)])
def test_experts_are_read_back_and_measured_by_gptqmodel(run: Run, tmp_path: Path, family: str) -> None:
    found = built(run, tmp_path, family)
    assert {*found} == {"gptq", "awq"}
    for folder in found.values():
        assert is_mixture(folder)
        assert sum(".mlp.experts." in name for name in packed_linears(folder)) == EXPERTS
        facts, figures = measurements(folder)["verify"], measurements(folder)["evaluation"]["quality"]
        assert (facts["runtime"], facts["linears"]) == ("gptqmodel", len(packed_linears(folder)))
        assert figures["runtime"] == "transformers"
        assert figures["mean_kl"] < 0.5


def test_experts_that_gptqmodel_knows_by_other_names_are_read_block_by_block(run: Run, tmp_path: Path) -> None:
    """Mixtral's are w1, w2 and w3 in block_sparse_moe, as published, which is what vLLM reads."""
    for folder in built(run, tmp_path, "Mixtral").values():
        assert sum(".block_sparse_moe.experts." in name for name in packed_linears(folder)) == EXPERTS
        facts, figures = measurements(folder)["verify"], measurements(folder)["evaluation"]["quality"]
        assert facts["linears"] == len(packed_linears(folder))
        assert facts["runtime"].startswith("gptqmodel's kernels alone")
        assert figures["runtime"] == "streamed blocks"
        assert figures["mean_kl"] < 0.5
