"""Checkpoints as people have them: what is mended is what transformers reads, and is said; the rest is refused at once.

The wrongs that are refused are among tests/bad_checkpoints.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from quantize.build.find_source import reopen_source
from quantize.build.plan import make_plan
from quantize.errors import CheckpointError, VerifyError
from quantize.events import EventKind, ListReporter, SilentReporter
from quantize.files.safetensors import INDEX_NAME
from quantize.formats import option_models
from quantize.formats.folder_build import copied_files
from quantize.model.checkpoint import Checkpoint, open_checkpoint, read_chat_template
from quantize.model.source import PinnedSource, open_headers, open_source, pin_source
from quantize.recipe.model import load_recipe
from quantize.store.store import Store
from quantize.store.workspace import Workspace
from quantize.system.cache import Cache
from quantize.testing import TinyModel, make_checkpoint, write_json, write_recipe, write_weights
from tests.bad_checkpoints import change_json
from tests.conftest import Run

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers warns on import

GGUF = {"format": "gguf", "type": "Q8_0"}
INT8 = {"format": "bitsandbytes", "type": "int8"}
MODEL = TinyModel()


def recipe_of(folder: Path, tmp_path: Path, *variants: dict[str, Any], **source: Any) -> Path:
    path = write_recipe(tmp_path / "recipe.yaml", folder, list(variants) or [GGUF])
    data = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**data, "source": {**data["source"], **source}}))
    return path


def opened(folder: Path, tmp_path: Path, **source: Any) -> tuple[Checkpoint, PinnedSource, list[str]]:
    """The checkpoint as builders get it, its pin, and what was said."""
    reporter, cache = ListReporter(), Cache(tmp_path / "cache")
    pinned = pin_source(load_recipe(recipe_of(folder, tmp_path, **source), option_models()), cache, reporter)
    checkpoint = open_source(pinned, cache, reporter)
    return checkpoint, pinned, [event.text for event in reporter.events if event.kind is EventKind.NOTE]


def same_tensors(left: Checkpoint, right: Checkpoint) -> bool:
    return set(left.tensors) == set(right.tensors) and all(
        torch.equal(left.read(name), right.read(name)) for name in left.tensors
    )


def renamed(folder: Path, change: Callable[[str], str], **writing: Any) -> None:
    (folder / "model.safetensors").unlink()
    write_weights(folder, {change(name): values for name, values in MODEL.weights().items()}, **writing)


def in_a_larger_model(name: str) -> str:
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda name: f"_orig_mod.{name}", "begin with `_orig_mod.`: it is left off"),
        (lambda name: f"base_model.model.{name}", "begin with `base_model.model.`: it is left off"),
        (lambda name: f"module._orig_mod.{name}", "begin with `module._orig_mod.`: it is left off"),
        (in_a_larger_model, "begin with `model.language_model.`: they are read as `model.`"),
        (lambda name: f"language_model.{name}", "begin with `language_model.model.`: they are read as `model.`"),
        (lambda name: name.removeprefix("model."), "names lack `model.`: it is put before them"),
        (lambda name: f"module.{name.removeprefix('model.')}", "names lack `model.`: it is put before them"),
    ],
    ids=["compiled", "peft", "ddp", "part", "wrapped", "bare", "bare-ddp"],
)
@pytest.mark.parametrize("shards", [1, 2])
def test_a_prefix_that_training_left_is_taken_off(
    change: Callable[[str], str], said: str, shards: int, own_tiny: Path, tiny: Path, tmp_path: Path
) -> None:
    renamed(own_tiny, change, shards=shards)
    checkpoint, pinned, notes = opened(own_tiny, tmp_path)
    assert same_tensors(checkpoint, open_checkpoint(tiny))
    assert any(said in note for note in notes)
    headers = open_headers(pinned, Cache(tmp_path / "other"), tmp_path / "scratch", SilentReporter())
    assert {name: info.shape for name, info in headers.tensors.items()} == {
        name: info.shape for name, info in checkpoint.tensors.items()
    }


def test_a_class_whose_names_are_bare_keeps_them(own_tiny: Path) -> None:
    from quantize.model.mending import find_renames

    names = [name.removeprefix("model.") for name in MODEL.shapes()]
    assert find_renames(names, {"architectures": ["LlamaModel"]}) == ((), [])
    whole = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": {"hidden_size": 8}}
    assert find_renames([f"language_model.{name}" for name in MODEL.shapes()], whole) == ((), [])


def test_of_two_sets_of_weights_transformers_takes_the_whole_one(own_tiny: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    other = make_checkpoint(tmp_path / "other", TinyModel(seed=9), shards=2)
    for path in [*other.glob("model-*"), other / INDEX_NAME]:
        shutil.copy(path, own_tiny)
    checkpoint, pinned, notes = opened(own_tiny, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(own_tiny, dtype=torch.float16).state_dict()
    assert all(torch.equal(checkpoint.read(name), theirs[name]) for name in checkpoint.tensors)
    assert any("two sets of weights" in note for note in notes)
    assert [item.path for item in pinned.files if item.path.endswith("safetensors")] == ["model.safetensors"]
    assert [path.name for path in checkpoint.folder.glob("*.safetensors*")] == ["model.safetensors"]
    (weights,) = checkpoint.folder.glob("*.safetensors")
    assert weights.stat().st_ino == (own_tiny / "model.safetensors").stat().st_ino  # linked: nothing was copied


@pytest.fixture
def apart(own_tiny: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A model's folder without a tokenizer, and the tokenizer's."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (own_tiny / name).rename(folder / name)
    return own_tiny, folder


def test_a_tokenizer_in_another_folder_is_the_models(
    apart: tuple[Path, Path], tmp_path: Path, run: Run, store: Store
) -> None:
    model, tokenizer = apart
    refused = run("plan", recipe_of(model, tmp_path))
    assert "no tokenizer (tokenizer.json" in refused.stderr
    path = recipe_of(model, tmp_path, GGUF, INT8, tokenizer="./tokenizer")
    result = run("build", path, "--no-eval")
    assert result.exit_code == 0, result.stderr
    by_format = {artifact.manifest.format: artifact for artifact in store.artifacts()}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (by_format["bitsandbytes"].folder / name).read_bytes() == (tokenizer / name).read_bytes()
    pinned = {item.path for item in by_format["gguf"].manifest.source.files}
    assert {"tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json", "model.safetensors"} <= pinned
    assert run("verify", "recipe/q8_0").exit_code == 0
    found = reopen_source(by_format["gguf"], Cache(tmp_path / "cache"), SilentReporter())
    assert (found.folder / "tokenizer.json").is_file()


def test_another_tokenizer_is_another_build(apart: tuple[Path, Path], tmp_path: Path, store: Store) -> None:
    model, tokenizer = apart
    path = recipe_of(model, tmp_path, tokenizer=str(tokenizer))
    workspace = Workspace(store, Cache(tmp_path / "cache"), SilentReporter())
    keys = []
    for eos in ("</s>", "<s>"):
        change_json(tokenizer / "tokenizer_config.json", eos_token=eos)
        keys += [job.build_key for job in make_plan(load_recipe(path, option_models()), workspace).jobs]
    assert len(set(keys)) == 2


def test_a_tokenizer_that_is_none_is_refused(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="empty: no tokenizer there"):
        opened(tiny, tmp_path, tokenizer="./empty")
    with pytest.raises(CheckpointError, match=r"tokenizer '\./nowhere': no such folder"):
        opened(tiny, tmp_path, tokenizer="./nowhere")


def test_a_template_where_tokenizers_do_not_look_is_found(own_tiny: Path, tiny: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    template = read_chat_template(own_tiny)
    change_json(own_tiny / "tokenizer_config.json", chat_template=None)
    write_json(own_tiny / "chat_template.json", {"chat_template": template})
    assert AutoTokenizer.from_pretrained(own_tiny).chat_template is None
    checkpoint, _, notes = opened(own_tiny, tmp_path)
    assert AutoTokenizer.from_pretrained(checkpoint.folder).chat_template == template == checkpoint.chat_template
    assert any("chat template is that of chat_template.json" in note for note in notes)


def test_named_templates_in_files_go_along(own_tiny: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    (own_tiny / "additional_chat_templates").mkdir()
    (own_tiny / "chat_template.jinja").write_text("plain")
    (own_tiny / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    checkpoint, pinned, _ = opened(own_tiny, tmp_path)
    name = "additional_chat_templates/tool_use.jinja"
    assert name in {item.path for item in pinned.files}
    copied = tmp_path / "copied"
    for path in copied_files(checkpoint):
        (copied / path.relative_to(checkpoint.folder)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copied / path.relative_to(checkpoint.folder))
    write_json(copied / "config.json", dict(checkpoint.config))
    assert AutoTokenizer.from_pretrained(copied).chat_template == {"default": "plain", "tool_use": "tools"}
    assert checkpoint.chat_template == "plain"


def test_what_models_compute_is_left_out(own_tiny: Path, tiny: Path, tmp_path: Path) -> None:
    computed = {f"model.layers.{block}.self_attn.rotary_emb.inv_freq": np.ones(32, np.float32) for block in range(2)}
    write_weights(own_tiny, {**MODEL.weights(), **computed})
    checkpoint, _, _ = opened(own_tiny, tmp_path)
    assert same_tensors(checkpoint, open_checkpoint(tiny))
    assert set(checkpoint.computed) == set(computed)


def test_code_that_a_known_class_does_not_need_is_no_hindrance(own_tiny: Path, tmp_path: Path) -> None:
    change_json(own_tiny / "config.json", auto_map={"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"})
    checkpoint, _, _ = opened(own_tiny, tmp_path)
    assert "auto_map" not in checkpoint.config


@pytest.mark.parametrize("equal", [True, False])
def test_a_head_saved_beside_a_tied_embedding_stays_right(equal: bool, own_tiny: Path, tmp_path: Path) -> None:
    weights = MODEL.weights()
    if equal:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    write_weights(own_tiny, weights)
    change_json(own_tiny / "config.json", tie_word_embeddings=True)
    checkpoint, _, _ = opened(own_tiny, tmp_path)
    assert set(checkpoint.tensors) == set(weights)


def test_a_padded_vocabulary_stays_right(tiny: Path, tmp_path: Path) -> None:
    padded = make_checkpoint(tmp_path / "padded", TinyModel(vocabulary=448))
    shutil.copy(tiny / "tokenizer.json", padded)
    assert opened(padded, tmp_path)[0].tensors["model.embed_tokens.weight"].shape[0] == 448


def test_norms_in_float32_beside_matrices_in_bfloat16_are_built(tmp_path: Path, run: Run, store: Store) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_checkpoint(tmp_path / "mixed", dtype="BF16")
    path = folder / "model.safetensors"
    save_file({name: item.float() if item.dim() == 1 else item for name, item in load_file(path).items()}, path)
    types = [INT8, {"format": "bitsandbytes", "type": "nf4"}]
    result = run("build", recipe_of(folder, tmp_path, *types), "--no-eval")
    assert result.exit_code == 0, result.stderr
    for artifact in store.artifacts():
        kept = load_file(artifact.folder / "model.safetensors")["model.norm.weight"]
        assert torch.equal(kept, load_file(path)["model.norm.weight"].to(kept.dtype))


def test_a_mended_source_is_built_described_and_found_again(
    own_tiny: Path, tmp_path: Path, run: Run, store: Store
) -> None:
    renamed(own_tiny, lambda name: f"_orig_mod.{name}")
    result = run("build", recipe_of(own_tiny, tmp_path, GGUF, INT8), "--no-eval")
    assert result.exit_code == 0, result.stderr
    said = "all names of tensors begin with `_orig_mod.`: it is left off"
    for artifact in store.artifacts():
        assert artifact.manifest.source.mended == (said,)
        assert said in (artifact.folder / "README.md").read_text()
    found = reopen_source(store.artifacts()[0], Cache(tmp_path / "cache"), SilentReporter())
    assert set(found.tensors) == set(MODEL.shapes())
    change_json(own_tiny / "config.json", rope_theta=5000.0)
    with pytest.raises(VerifyError, match="not the one that it was built from"):
        reopen_source(store.artifacts()[0], Cache(tmp_path / "cache"), SilentReporter())


def test_manifests_of_what_was_not_mended_are_as_they_were(tiny: Path, tmp_path: Path, run: Run, store: Store) -> None:
    assert run("build", recipe_of(tiny, tmp_path), "--no-eval").exit_code == 0
    assert "mended" not in json.loads((store.artifacts()[0].folder / "manifest.json").read_text())["source"]


@pytest.mark.parametrize(
    "said", [{"quant_method": "fp8", "weight_block_size": [128, 128]}, {"load_in_8bit": True}], ids=["fp8", "int8"]
)
def test_plain_floats_that_only_claim_to_be_quantized_are_taken_as_they_are(
    said: dict[str, Any], own_tiny: Path, tmp_path: Path
) -> None:
    change_json(own_tiny / "config.json", quantization_config=said)
    checkpoint, pinned, notes = opened(own_tiny, tmp_path)
    assert pinned.quantized_before is None
    (note,) = notes
    assert "config.json says that the weights are quantized" in note
    assert "every tensor is a plain float: they are taken as they are" in note
    assert "quantization_config" not in checkpoint.config
    before = load_file(own_tiny / "model.safetensors")
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in before.items())
