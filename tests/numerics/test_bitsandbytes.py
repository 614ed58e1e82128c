"""INT8 and NF4 against the tensors that transformers itself saves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quantize.numerics.int8 import quantize_int8
from quantize.numerics.nf4 import quantize_nf4
from tests.architectures import tiny_model

transformers = pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")
pytestmark = [pytest.mark.filterwarnings("ignore")]  # bitsandbytes and torchao warn on import


def saved_by_transformers(tmp_path: Path, dtype: torch.dtype, **options: object) -> tuple[dict, dict]:
    tiny_model("LlamaForCausalLM").to(dtype).save_pretrained(tmp_path / "source")
    config = transformers.BitsAndBytesConfig(**options)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "source", quantization_config=config, dtype=dtype, device_map="cpu"
    )
    model.save_pretrained(tmp_path / "quantized")
    source = load_file(tmp_path / "source" / "model.safetensors")
    return source, load_file(tmp_path / "quantized" / "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_int8_equals_transformers(tmp_path: Path, dtype: torch.dtype) -> None:
    source, saved = saved_by_transformers(tmp_path, dtype, load_in_8bit=True)
    names = [name.removesuffix(".SCB") for name in saved if name.endswith(".SCB")]
    assert len(names) == 21
    for name in names:
        rows = quantize_int8(source[f"{name}.weight"])
        assert torch.equal(rows.codes, saved[f"{name}.weight"])
        assert torch.equal(rows.scales, saved[f"{name}.SCB"])
        error = (rows.dequantize() - source[f"{name}.weight"].float()).abs()
        assert bool((error <= rows.scales[:, None] / 254 * 1.01).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_nf4_equals_transformers(tmp_path: Path, dtype: torch.dtype) -> None:
    source, saved = saved_by_transformers(
        tmp_path, dtype, load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )
    names = [name.removesuffix(".absmax") for name in saved if name.endswith(".absmax")]
    assert len(names) == 21
    for name in names:
        blocks = quantize_nf4(source[name])
        assert torch.equal(blocks.words, saved[name])
        assert torch.equal(blocks.absmax, saved[f"{name}.absmax"])
        assert torch.equal(blocks.levels, saved[f"{name}.quant_map"])


def test_int8_keeps_zero_rows_zero() -> None:
    weight = torch.randn(4, 64)
    weight[2] = 0
    assert bool((quantize_int8(weight).dequantize()[2] == 0).all())
