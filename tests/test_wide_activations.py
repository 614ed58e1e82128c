"""Models whose activations FP16 does not hold, as Gemma 3's: what folders store in 16 bits is BF16 then, and said.

Oracles: transformers with gptqmodel and bitsandbytes, which load and run every artifact, and which give no finite
logits for the same model in FP16; safetensors' own reader.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from quantize.build.execution import RunOptions
from quantize.build.outcome import Outcome, OutcomeState
from quantize.events import ListReporter
from quantize.formats import option_models
from quantize.provenance.card import render_card
from quantize.recipe.model import load_recipe
from quantize.store.artifact import open_artifact
from quantize.store.store import Store
from quantize.store.workspace import Workspace
from quantize.system.cache import Cache
from quantize.testing import TinyModel, make_checkpoint, write_recipe, write_weights
from tests.conftest import build

torch = pytest.importorskip("torch")
pytest.importorskip("gptqmodel")
pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore")  # transformers and its plugins warn on import

VARIANTS: list[dict[str, Any]] = [
    {"format": "gptq", "group_size": 64},
    {"format": "awq", "group_size": 64},
    {"format": "bitsandbytes", "type": "int8"},
]
CALIBRATION = {"dataset": "text.txt", "samples": 8, "sequence_length": 64, "minimum_tokens": 16}
MODEL = TinyModel()
LOUD, GAIN = "model.layers.0.mlp.down_proj.weight", 1e5  # what it adds to the hidden states is past 65,504


@dataclass(frozen=True)
class Made:
    source: Path
    reporter: ListReporter
    outcomes: dict[str, Outcome]

    def folder(self, variant: str) -> Path:
        artifact = self.outcomes[variant].artifact
        assert artifact is not None, self.outcomes[variant].error
        return artifact.folder

    @property
    def said(self) -> str:
        return "\n".join(event.text for event in self.reporter.events)


def made(root: Path, source: Path, variants: list[dict[str, Any]], *, judge: bool = True) -> Made:
    paragraphs = [f"Paragraph {index}: the quick brown fox jumps over the lazy dog. " * 3 for index in range(12)]
    (root / "text.txt").write_text("\n\n".join(paragraphs))
    path = write_recipe(root / "tiny.yaml", source, variants, calibration=CALIBRATION)
    reporter = ListReporter()
    workspace = Workspace(Store(root / "artifacts"), Cache(root / "cache"), reporter)
    run = RunOptions(judge=judge)
    outcomes = build(load_recipe(path, option_models()), workspace, run, evaluate=False)
    return Made(source, reporter, {item.variant.split("-")[0]: item for item in outcomes})


def types(folder: Path) -> dict[str, str]:
    """The type of each tensor."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 - it is no mapping


@pytest.fixture(scope="module")
def loud(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A model in FP16 that does not run in it, in all three formats."""
    root = tmp_path_factory.mktemp("loud")
    source, weights = make_checkpoint(root / "model", MODEL), MODEL.weights()
    weights[LOUD] *= GAIN
    write_weights(source, weights)
    return made(root, source, VARIANTS)


@pytest.mark.parametrize("variant", ["gptq", "awq", "bnb"])
def test_what_fp16_does_not_hold_is_stored_in_bf16_and_runs(loud: Made, variant: str) -> None:
    """Verification has generated with it: finite logits, the same twice."""
    outcome = loud.outcomes[variant]
    assert outcome.error is None
    folder = loud.folder(variant)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    floats = {name: kind for name, kind in types(folder).items() if kind in ("F16", "BF16")}
    assert set(floats.values()) == {"BF16"}
    assert {"lm_head.weight", "model.norm.weight"} < set(floats)
    assert outcome.artifact is not None
    manifest = outcome.artifact.manifest
    assert manifest.stored is not None
    assert manifest.stored.type == "BF16"
    assert "it does not run in FP16" in manifest.stored.reason
    assert "stored in BF16: the source's activations" in render_card(manifest)
    assert {item.type for item in manifest.kept_in_high_precision} == {"BF16"}


def test_it_is_said_with_how_far_they_reach(loud: Made) -> None:
    assert "activations of the source reach " in loud.said
    assert "FP16 ends at 65,504: what is not quantized is stored and computed in BF16" in loud.said


def test_the_model_does_not_run_in_fp16(loud: Made) -> None:
    """So that it is the type that makes the difference."""
    from transformers import AutoModelForCausalLM

    ids = torch.arange(8, 40)[None]
    for dtype, runs in ((torch.float16, False), (torch.bfloat16, True)):
        model = AutoModelForCausalLM.from_pretrained(loud.source, dtype=dtype)
        assert bool(torch.isfinite(model(ids).logits).all()) == runs


def test_a_source_in_bf16_keeps_its_own_values(tmp_path: Path) -> None:
    """One of them is beyond FP16's range; nothing is looked at for it."""
    source, weights = make_checkpoint(tmp_path / "model", MODEL, dtype="BF16"), MODEL.weights()
    weights["model.embed_tokens.weight"][-1, -1] = weights["model.norm.weight"][3] = 70_000.0
    write_weights(source, weights, dtype="BF16")
    found = made(tmp_path, source, VARIANTS[:1], judge=False)
    assert found.outcomes["gptq"].error is None
    with (
        safe_open(source / "model.safetensors", "pt") as theirs,
        safe_open(found.folder("gptq") / "model.safetensors", "pt") as ours,
    ):
        for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
            assert torch.equal(ours.get_tensor(name), theirs.get_tensor(name))
    artifact = found.outcomes["gptq"].artifact
    assert artifact is not None
    assert artifact.manifest.stored is not None
    assert artifact.manifest.stored.reason == "the source's own type"
    assert "how far" not in found.said


def test_what_passes_fp16_inside_llama_cpp_is_measured_against_the_source_in_float32(tmp_path: Path) -> None:
    """llama.cpp rounds inputs of FP16 weights to FP16; the artifact's own types have a scale. Dead channels beside."""
    source, weights = make_checkpoint(tmp_path / "model", MODEL), MODEL.weights()
    for block in range(MODEL.blocks):
        weights[f"model.layers.{block}.post_attention_layernorm.weight"][9:12] = 0, 1, 1_000
        weights[f"model.layers.{block}.input_layernorm.weight"][5] = 0
    write_weights(source, weights)
    path = write_recipe(
        tmp_path / "recipe.yaml", source, [{"format": "gguf", "type": "Q8_0"}],
        evaluation={"text": "prose", "windows": 2, "window": 64, "golden": []}, gates={"max_kl": 5},
    )  # fmt: skip
    reporter = ListReporter()
    workspace = Workspace(Store(tmp_path / "artifacts"), Cache(tmp_path / "cache"), reporter)
    (outcome,) = build(load_recipe(path, option_models()), workspace)
    assert outcome.error is None
    said = "\n".join(event.text for event in reporter.events)
    assert "model-F16.gguf: the logits are not finite: it is measured once more in a type with more range" in said
    assert outcome.artifact is not None
    assert outcome.artifact.measurements()["evaluation"]["quality"]["mean_kl"] < 0.1


def test_a_source_in_bf16_that_was_stored_in_fp16_is_built_again(tmp_path: Path) -> None:
    """Its manifest says nothing of the type, as before there was a choice; what is built has the digest of today."""
    source = make_checkpoint(tmp_path / "model", MODEL, dtype="BF16")
    first = made(tmp_path, source, VARIANTS[:1], judge=False).folder("gptq")
    today = open_artifact(first).manifest
    kept = tuple(item.model_copy(update={"type": "F16"}) for item in today.kept_in_high_precision)
    before = today.model_copy(update={"stored": None, "kept_in_high_precision": kept}).sealed()
    (first / "manifest.json").write_text(before.to_json())
    old = first.rename(first.with_name(before.short_digest))
    (first.parent / "current").unlink()
    (first.parent / "current").symlink_to(old.name)
    again = made(tmp_path, source, VARIANTS[:1], judge=False)
    assert f"{old.name} is of an earlier version (the source is in BF16" in again.said
    assert again.folder("gptq") == first
    assert open_artifact(first).manifest.digest == today.digest
    assert made(tmp_path, source, VARIANTS[:1], judge=False).outcomes["gptq"].state is OutcomeState.UP_TO_DATE
