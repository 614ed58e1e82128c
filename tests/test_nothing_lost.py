"""Each tensor of a source is quantized, carried, folded or left out by name; a planted loss is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from quantize.cli import main
from quantize.errors import VerifyError
from quantize.files.gguf import read_gguf
from quantize.formats import find_format
from quantize.formats.nothing_lost import account
from quantize.model.belonging import check_headers, prediction_tensors
from quantize.model.checkpoint import open_checkpoint
from quantize.store.artifact import Artifact
from quantize.store.store import Store
from quantize.testing import TinyModel, make_checkpoint, write_recipe, write_weights
from tests.bad_checkpoints import change_json

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers and its plugins warn on import

VARIANTS: list[dict[str, Any]] = [
    {"format": "gguf", "type": "Q8_0"},
    {"format": "gptq", "group_size": 64},
    {"format": "awq", "group_size": 64},
    {"format": "bitsandbytes", "type": "int8"},
    {"format": "bitsandbytes", "type": "nf4"},
]
TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind at all. " * 6
FOLDERS = ("gptq-int4-g64", "awq-int4-g64", "bnb-int8", "bnb-nf4")


def with_blocks_after(weights: dict[str, Any]) -> dict[str, Any]:
    """As DeepSeek-V3 has it: a block after the last one, with a projection of what it reads."""
    more = {name.replace("layers.1.", "layers.2."): 2 * item for name, item in weights.items() if "layers.1." in name}
    width = weights["model.norm.weight"].shape[0]
    return {**weights, **more, "model.layers.2.eh_proj.weight": np.ones((width, 2 * width), np.float32) / 8}


def with_named_heads(weights: dict[str, Any]) -> dict[str, Any]:
    """As Qwen3-Next has it."""
    width = weights["model.norm.weight"].shape[0]
    return {**weights, "mtp.fc.weight": np.ones((width, 2 * width), np.float32) / 8,
            "mtp.norm.weight": np.ones(width, np.float32)}  # fmt: skip


KINDS: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], dict[str, Any], int]] = {
    "blocks": (with_blocks_after, {"num_nextn_predict_layers": 1}, 10),
    "named": (with_named_heads, {}, 2),
}


class Made:
    """All variants of a source with heads that predict ahead."""

    def __init__(self, root: Path, kind: str) -> None:
        change, settings, self.count = KINDS[kind]
        self.source = make_checkpoint(root / "model")
        write_weights(self.source, change(dict(TinyModel().weights())))
        change_json(self.source / "config.json", **settings)
        (root / "text.txt").write_text("\n\n".join([TEXT] * 8))
        calibration = {"dataset": "text.txt", "samples": 8, "sequence_length": 64}
        recipe = write_recipe(root / "ahead.yaml", self.source, VARIANTS, calibration=calibration)
        import click.testing

        arguments = ["build", str(recipe), "--no-eval", "--store", str(root / "artifacts")]
        result = click.testing.CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.output
        self.artifacts = {item.manifest.variant: item for item in Store(root / "artifacts").artifacts()}


@pytest.fixture(scope="module", params=["blocks", pytest.param("named", marks=pytest.mark.every_class)])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp(request.param), request.param)


def test_heads_that_predict_ahead_are_known_by_name_and_place(made: Made) -> None:
    checkpoint = open_checkpoint(made.source)
    check_headers(checkpoint)
    assert len(prediction_tensors(checkpoint)) == made.count


@pytest.mark.parametrize("variant", FOLDERS)
def test_they_are_carried_in_16_bits(made: Made, variant: str) -> None:
    artifact, source = made.artifacts[variant], open_checkpoint(made.source)
    have = load_file(artifact.folder / "model.safetensors")
    reasons = {item.tensor: item.reason for item in artifact.manifest.kept_in_high_precision}
    for name in prediction_tensors(source):
        assert torch.equal(have[name], source.read(name))
        assert reasons[name] == "heads that predict several tokens ahead (MTP) stay unquantized"
    assert artifact.manifest.left_out == ()


def test_gguf_names_them_as_left_out(made: Made) -> None:
    artifact = made.artifacts["q8_0"]
    left_out = {item.tensor: item.reason for item in artifact.manifest.left_out}
    assert set(left_out) == set(prediction_tensors(open_checkpoint(made.source)))
    assert set(left_out.values()) == {
        "a head that predicts several tokens ahead (MTP), which llama.cpp's converter does not know here"
    }
    plain = len(TinyModel().shapes())
    assert len(read_gguf(next(artifact.folder.glob("*.gguf"))).tensors) == plain
    assert "## Left out" in (artifact.folder / "README.md").read_text()


def test_runtimes_are_told_not_to_take_them_as_packed(made: Made) -> None:
    module = "model.layers.2" if made.count > 2 else "mtp"
    settings = {
        name: json.loads((made.artifacts[name].folder / "config.json").read_text())["quantization_config"]
        for name in ("gptq-int4-g64", "awq-int4-g64")
    }
    assert module in settings["awq-int4-g64"]["modules_to_not_convert"]
    (pattern,) = settings["gptq-int4-g64"]["dynamic"]
    assert pattern.startswith("-:^" + module.replace(".", r"\."))


def counts(artifact: Artifact, source: Path) -> dict[str, int]:
    folds = getattr(find_format(artifact.manifest.format).builder, "folds", False)
    return account(artifact.folder, open_checkpoint(source), folds=folds)


@pytest.mark.parametrize("variant", FOLDERS)
def test_every_tensor_is_found_again(made: Made, variant: str) -> None:
    found = counts(made.artifacts[variant], made.source)
    assert found["quantized"] == 14
    assert sum(found.values()) == len(open_checkpoint(made.source).tensors)
    assert (found["folded"] > 0) == (variant == "awq-int4-g64")


def lose(tensors: dict[str, torch.Tensor]) -> str:
    del tensors["model.norm.weight"]
    return "tensor model.norm.weight of the source is lost"


def lose_packed(tensors: dict[str, torch.Tensor]) -> str:
    for name in [name for name in tensors if "layers.1.mlp.up_proj" in name]:
        del tensors[name]
    return "tensor model.layers.1.mlp.up_proj.weight of the source is lost"


def change_value(tensors: dict[str, torch.Tensor]) -> str:
    tensors["model.embed_tokens.weight"][3, 5] += 1
    return "tensor model.embed_tokens.weight has other values than the source's"


def cut(tensors: dict[str, torch.Tensor]) -> str:
    name = next(name for name in tensors if name.endswith(("layers.0.self_attn.q_proj.qweight", "q_proj.weight")))
    tensors[name] = tensors[name][: tensors[name].shape[0] // 2].contiguous()
    return r"model.layers.0.self_attn.q_proj.weight has 32,768 quantized weights, the source 65,536"


@pytest.mark.parametrize("plant", [lose, lose_packed, change_value, cut])
@pytest.mark.parametrize("variant", FOLDERS)
def test_a_planted_loss_is_refused_by_name(
    made: Made, variant: str, plant: Callable[[dict[str, torch.Tensor]], str], tmp_path: Path
) -> None:
    artifact = made.artifacts[variant]
    folder = Path(shutil.copytree(artifact.folder, tmp_path / "spoiled"))
    tensors = load_file(folder / "model.safetensors")
    message = plant(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(VerifyError, match=message):
        counts(Artifact(folder, artifact.manifest), made.source)
