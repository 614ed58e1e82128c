"""Checkpoints that were quantized: what is dequantized is what the library that wrote them computes with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantize.errors import CheckpointError
from quantize.events import SilentReporter
from quantize.formats import option_models
from quantize.model.checkpoint import Checkpoint
from quantize.model.source import PinnedSource, open_headers, open_source, pin_source
from quantize.recipe.model import load_recipe
from quantize.store.store import Store
from quantize.system.cache import Cache
from quantize.testing import make_checkpoint, write_recipe
from tests.bad_checkpoints import change_json
from tests.conftest import Run

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers warns on import

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


def opened(folder: Path, tmp_path: Path) -> tuple[Checkpoint, PinnedSource]:
    recipe = load_recipe(
        write_recipe(tmp_path / "recipe.yaml", folder, [{"format": "gguf", "type": "Q8_0"}]), option_models()
    )
    cache = Cache(tmp_path / "cache")
    pinned = pin_source(recipe, cache, SilentReporter())
    checkpoint = open_source(pinned, cache, SilentReporter())
    headers = open_headers(pinned, Cache(tmp_path / "other"), tmp_path / "headers", SilentReporter())
    assert {name: (info.dtype, info.shape) for name, info in headers.tensors.items()} == {
        name: (info.dtype, info.shape) for name, info in checkpoint.tensors.items()
    }
    assert "quantization_config" not in checkpoint.config
    return checkpoint, pinned


def half(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model", dtype="BF16")


def to_fp8(folder: Path) -> None:
    """As DeepSeek-V3 is published: E4M3 with a float32 scale for each 128 x 128 block, the last ones cut short."""
    path, tensors = folder / "model.safetensors", {}
    for name, weight in load_file(path).items():
        if "proj" not in name:
            tensors[name] = weight
            continue
        out, width = weight.shape
        padded = torch.zeros(-(-out // 128) * 128, -(-width // 128) * 128)
        padded[:out, :width] = weight.float()
        blocks = padded.reshape(padded.shape[0] // 128, 128, -1, 128)
        scales = blocks.abs().amax((1, 3)) / 448
        codes = (blocks / scales[:, None, :, None]).reshape(padded.shape)[:out, :width]
        tensors |= {name: codes.to(torch.float8_e4m3fn), f"{name}_scale_inv": scales}
    save_file(tensors, path)
    change_json(folder / "config.json", quantization_config=FP8)


def test_fp8_in_blocks_is_what_transformers_dequantizes(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    folder = half(tmp_path)
    to_fp8(folder)
    checkpoint, pinned = opened(folder, tmp_path)
    assert pinned.quantized_before == "FP8 in blocks of 128 x 128"
    wanted = FineGrainedFP8Config(dequantize=True, weight_block_size=(128, 128))
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=wanted, dtype=torch.bfloat16)
    theirs = model.state_dict()
    assert any("proj" in name for name in checkpoint.tensors)
    for name in checkpoint.tensors:
        assert torch.equal(checkpoint.read(name), theirs[name].to(torch.bfloat16)), name


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "double"])
def test_bitsandbytes_4_bits_are_what_it_dequantizes(kind: str, nested: bool, tmp_path: Path) -> None:
    from bitsandbytes import functional
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folder = half(tmp_path)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=nested,
                                  bnb_4bit_compute_dtype=torch.bfloat16)  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, dtype=torch.bfloat16)
    theirs = {
        f"{name}.weight": functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        for name, module in model.named_modules() if hasattr(getattr(module, "weight", None), "quant_state")
    }  # fmt: skip
    saved = tmp_path / "saved"
    model.save_pretrained(saved)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (saved / name).write_bytes((folder / name).read_bytes())
    checkpoint, pinned = opened(saved, tmp_path)
    assert pinned.quantized_before == f"bitsandbytes {kind}"
    assert len(theirs) == 14
    for name, weight in theirs.items():
        assert torch.allclose(checkpoint.read(name).float(), weight.float(), rtol=2**-7, atol=1e-7), name


def test_bitsandbytes_8_bits_are_what_it_dequantizes(tmp_path: Path) -> None:
    from bitsandbytes import functional
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folder = half(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True), dtype=torch.bfloat16
    )
    theirs = {
        f"{name}.weight": functional.int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
        for name, module in model.named_modules() if getattr(getattr(module, "weight", None), "SCB", None) is not None
    }  # fmt: skip
    saved = tmp_path / "saved"
    model.save_pretrained(saved)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (saved / name).write_bytes((folder / name).read_bytes())
    checkpoint, pinned = opened(saved, tmp_path)
    assert pinned.quantized_before == "bitsandbytes int8"
    assert len(theirs) == 14
    for name, weight in theirs.items():
        assert torch.allclose(checkpoint.read(name).float(), weight.float(), rtol=2**-7, atol=1e-6), name


def test_mxfp4_is_what_transformers_dequantizes() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    from quantize.numerics.dequantize import mxfp4

    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 64, 4, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(110, 140, (3, 64, 4), dtype=torch.uint8, generator=generator)
    theirs = convert_moe_packed_tensors(blocks.clone(), scales.clone(), dtype=torch.float32)
    assert torch.equal(mxfp4(blocks, scales), theirs)


def test_the_experts_of_gpt_oss_get_the_names_that_transformers_has(tmp_path: Path) -> None:
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        vocab_size=384, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=2, num_experts_per_tok=1, bos_token_id=1,
        eos_token_id=2, pad_token_id=0, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    config.architectures = ["GptOssForCausalLM"]
    model = GptOssForCausalLM(config).bfloat16()
    folder = make_checkpoint(tmp_path / "model")
    model.save_pretrained(folder)
    tensors, generator = {}, torch.Generator().manual_seed(0)
    for name, weight in load_file(folder / "model.safetensors").items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[name] = weight
            continue
        experts, width, out = weight.shape
        size = (experts, out, width // 32)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*size, 16), dtype=torch.uint8, generator=generator)
        tensors[f"{name}_scales"] = torch.randint(118, 122, size, dtype=torch.uint8, generator=generator)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    change_json(folder / "config.json", quantization_config={"quant_method": "mxfp4"})
    checkpoint, pinned = opened(folder, tmp_path)
    assert pinned.quantized_before == "MXFP4"
    plain = model.state_dict()
    assert {name: tuple(item.shape) for name, item in plain.items()} == {
        name: info.shape for name, info in checkpoint.tensors.items()
    }


COMPRESSED: dict[str, dict[str, Any]] = {
    "pack-quantized": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32},
    "int-quantized": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
    "float-quantized": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"},
}


@pytest.mark.parametrize("layout", COMPRESSED)
def test_compressed_tensors_are_what_the_library_decompresses(layout: str, tmp_path: Path) -> None:
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")

    arguments = quantization.QuantizationArgs(**COMPRESSED[layout])
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=arguments)
    compressor = compressors.BaseCompressor.load_from_registry(layout)
    folder = half(tmp_path)
    tensors, theirs = {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if "proj" not in name:
            tensors[name] = weight
            continue
        wide, top = weight.float(), 7 if arguments.num_bits == 4 else 127 if arguments.type == "int" else 448
        groups = wide.reshape(wide.shape[0], -1, arguments.group_size or wide.shape[1])
        scales = groups.abs().amax(-1) / top
        stem = name.removesuffix("weight")
        packed = compressor.compress({"weight": wide, "weight_scale": scales}, scheme)
        tensors |= {f"{stem}{key}": value for key, value in packed.items()}
        theirs[name] = compressor.decompress(dict(packed), scheme)["weight"]
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    written = {"quant_method": "compressed-tensors", "format": layout,
               "config_groups": {"group_0": {"targets": ["Linear"], "weights": COMPRESSED[layout]}}}  # fmt: skip
    change_json(folder / "config.json", quantization_config=written)
    checkpoint, _ = opened(folder, tmp_path)
    for name, weight in theirs.items():
        assert torch.allclose(checkpoint.read(name).float(), weight.float(), rtol=2**-7, atol=1e-7), name


def test_a_weight_without_its_scales_is_refused(tmp_path: Path) -> None:
    folder = half(tmp_path)
    to_fp8(folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight_scale_inv"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"'model.layers.1.mlp.up_proj.weight' lacks .*_scale_inv"):
        opened(folder, tmp_path)


def test_what_is_built_of_it_says_so(tmp_path: Path, run: Run, store: Store) -> None:
    folder = half(tmp_path)
    to_fp8(folder)
    recipe = write_recipe(tmp_path / "recipe.yaml", folder, [{"format": "gguf", "type": "Q8_0"}])
    result = run("build", recipe, "--no-eval")
    assert result.exit_code == 0, result.stderr
    (artifact,) = store.artifacts()
    manifest = json.loads((artifact.folder / "manifest.json").read_text())
    assert manifest["source"]["quantized_before"] == "FP8 in blocks of 128 x 128"
    card = (artifact.folder / "README.md").read_text()
    assert "its weights were FP8 in blocks of 128 x 128 and were dequantized to 16 bits" in card
    assert run("verify", "recipe/q8_0").exit_code == 0
