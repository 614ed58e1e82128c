"""An adapter merged tensor by tensor is what PEFT's own merge gives, in each way in which PEFT scales and keeps it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quantize.errors import CheckpointError
from quantize.events import EventKind, ListReporter, SilentReporter
from quantize.formats import option_models
from quantize.model.adapter import Merged
from quantize.model.checkpoint import Checkpoint, open_checkpoint
from quantize.model.source import open_source, pin_source
from quantize.recipe.model import load_recipe
from quantize.system.cache import Cache
from quantize.testing import TinyModel, make_checkpoint, write_recipe, write_safetensors

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")  # transformers and PEFT warn on import

GGUF = [{"format": "gguf", "type": "Q8_0"}]
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "rslora": {"r": 4, "lora_alpha": 3, "target_modules": ["q_proj"], "use_rslora": True},
    "dora": {"r": 8, "lora_alpha": 8, "target_modules": ["o_proj", "up_proj"], "use_dora": True},
    "all-linear": {"r": 2, "target_modules": "all-linear"},
    "patterns": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj"], "rank_pattern": {"k_proj": 2},
                 "alpha_pattern": {"layers.0.self_attn.q_proj": 32}},
    "embedding": {"r": 4, "target_modules": ["embed_tokens", "q_proj"]},
    "whole-head": {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in float32; heads and rows are no multiple of what is merged at once."""
    model = TinyModel(hidden=96, intermediate=160, heads=3, kv_heads=1, vocabulary=700)
    return make_checkpoint(tmp_path_factory.mktemp("base") / "base", model, dtype="F32")


def save_adapter(base: Path, folder: Path, **settings: Any) -> Path:
    """A random adapter, as PEFT saves it: of both factors, not of zeros."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    wrapped = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(task_type="CAUSAL_LM", **settings)
    )
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                parameter.copy_(torch.randn_like(parameter) / 8)
            elif parameter.requires_grad:
                parameter.mul_(1.0 + 0.1 * torch.rand_like(parameter))
    wrapped.save_pretrained(folder)
    return folder


def merged_by_peft(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    tensors: dict[str, torch.Tensor] = model.merge_and_unload().state_dict()
    return tensors


def merged_here(base: Path, adapter: Path, tmp_path: Path, reporter: Any = None) -> Checkpoint:
    recipe = tmp_path / "recipe.yaml"
    write_recipe(recipe, base, GGUF)
    recipe.write_text(recipe.read_text().replace("source:\n", f"source:\n  adapter: {adapter}\n"))
    cache, reporter = Cache(tmp_path / "cache"), reporter or SilentReporter()
    return open_source(pin_source(load_recipe(recipe, option_models()), cache, reporter), cache, reporter)


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_is_what_peft_merges(kind: str, base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(base, tmp_path / "lora", **KINDS[kind])
    theirs = merged_by_peft(base, adapter)
    ours = merged_here(base, adapter, tmp_path)
    plain = open_checkpoint(base)
    assert set(ours.tensors) == set(plain.tensors)
    changed = 0
    for name in ours.tensors:
        found = ours.read(name)
        assert (found - theirs[name]).abs().max() < 1e-6, name
        changed += not torch.equal(found, plain.read(name))
    assert changed >= 2


def test_what_is_done_is_said_and_pinned(base: Path, tmp_path: Path) -> None:
    adapter, reporter = save_adapter(base, tmp_path / "lora", **KINDS["lora"]), ListReporter()
    merged_here(base, adapter, tmp_path, reporter)
    notes = [event.text for event in reporter.events if event.kind is EventKind.NOTE]
    assert f"base: the adapter lora, trained on {base}, is merged" in notes
    recipe = load_recipe(tmp_path / "recipe.yaml", option_models())
    first = pin_source(recipe, Cache(tmp_path / "cache"), SilentReporter())
    assert {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"} <= {item.path for item in first.files}
    save_adapter(base, adapter, **KINDS["lora"] | {"lora_alpha": 17})
    second = pin_source(recipe, Cache(tmp_path / "cache"), SilentReporter())
    assert first.digest != second.digest


def change(folder: Path, **settings: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def add_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    save_file({**load_file(path), "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": torch.ones(1, 1),
               "base_model.model.model.layers.9.self_attn.q_proj.lora_B.weight": torch.ones(1, 1)}, path)  # fmt: skip


def of_another_size(folder: Path) -> None:
    import numpy as np

    names = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    write_safetensors(
        folder / "adapter_model.safetensors",
        {names.format("A"): np.ones((2, 64), np.float32), names.format("B"): np.ones((64, 2), np.float32)}, "F32",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: change(folder, peft_type="IA3"), "of type IA3 is not merged here: LoRA and DoRA are"),
        (lambda folder: change(folder, layer_replication=[[0, 1]]), "`layer_replication` is not merged here"),
        (lambda folder: change(folder, init_lora_weights="pissa"), "`init_lora_weights: pissa` changed"),
        (lambda folder: change(folder, lora_alpha="much"), "`lora_alpha`, `alpha_pattern` or a rank is none"),
        (lambda folder: change(folder, alpha_pattern={"(": 2}), "`lora_alpha`, `alpha_pattern` or a rank is none"),
        (add_tensor, "layers.9.self_attn.q_proj belongs to no tensor of the base"),
        (
            of_another_size,
            r"has \[64, 64\] for model.layers.0.self_attn.q_proj.weight, which is \[96, 96\]",
        ),
        (lambda folder: write_safetensors(folder / "adapter_model.safetensors", {}, "F32"), "has no tensors"),
        (lambda folder: change(folder, use_dora=True), "has no magnitude, and adapter_config.json says that it is"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "no adapter_config.json"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors"),
    ],
    ids=["method", "replication", "pissa", "alpha", "pattern", "block", "size", "empty", "dora", "no-config",
         "no-weights"],
)  # fmt: skip
def test_an_adapter_that_does_not_fit_is_refused(
    spoil: Callable[[Path], object], message: str, base: Path, tmp_path: Path
) -> None:
    adapter = save_adapter(base, tmp_path / "lora", **KINDS["lora"])
    spoil(adapter)
    with pytest.raises(CheckpointError, match=message):
        merged_here(base, adapter, tmp_path)


def test_a_16_bit_base_is_merged_in_float32_and_rounded_once(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "half", TinyModel(hidden=96, heads=3, kv_heads=1), dtype="BF16")
    wide = Path(shutil.copytree(folder, tmp_path / "wide"))
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(folder).float().save_pretrained(wide)
    adapter = save_adapter(wide, tmp_path / "lora", **KINDS["lora"])
    exact = merged_by_peft(wide, adapter)
    ours = merged_here(folder, adapter, tmp_path)
    for name in ours.tensors:
        assert ours.read(name).dtype == torch.bfloat16
        assert torch.allclose(ours.read(name).float(), exact[name], rtol=2**-8, atol=1e-6), name


def test_no_more_than_one_tensor_of_the_base_is_held(base: Path, tmp_path: Path) -> None:
    """The base is asked for one tensor at a time, when that one is asked for."""
    adapter = save_adapter(base, tmp_path / "lora", **KINDS["lora"])
    plain, asked = open_checkpoint(base), []

    class Watched:
        table = {name: (info.dtype, info.shape) for name, info in plain.tensors.items()}  # noqa: RUF012 - a stub

        def read(self, name: str) -> torch.Tensor:
            asked.append(name)
            return plain.read(name)

    merged = Merged(Watched(), adapter)
    assert asked == []
    for name in merged.table:
        merged.read(name)
    assert asked == list(merged.table)
