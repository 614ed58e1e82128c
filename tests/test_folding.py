"""Folding channel scales into a block changes no function: tiny models of every architecture, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quantize.calibration.folding import fold_block
from quantize.errors import BuildError
from quantize.model.architecture import block_layouts
from quantize.model.layout import BlockLayout, FoldGroup, RowsSource
from tests.architectures import CONFIGS, SavedCheckpoint, save, tiny_model, token_ids


def random_scales(group: FoldGroup, width: int, generator: torch.Generator) -> Tensor:
    """Log-uniform in [1/4, 4], shared where grouped-query attention says so."""
    repeats, head_dim = 1, 1
    if isinstance(group.source, RowsSource):
        repeats, head_dim = group.source.repeats, group.source.head_dim
    runs = torch.rand(width // (repeats * head_dim), 1, head_dim, generator=generator)
    return (4.0 ** (2 * runs - 1)).expand(-1, repeats, -1).reshape(-1)


def folded_model(name: str, checkpoint: SavedCheckpoint, folder: Path, **dtypes: torch.dtype) -> Any:
    """The checkpoint with every group of every block folded, loaded by transformers."""
    import transformers
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(7)
    tensors = {key: checkpoint.read(key).double() for key in checkpoint.tensors}
    for layout in block_layouts(checkpoint.config):
        block = {key: tensor for key, tensor in tensors.items() if key.startswith(layout.prefix)}
        tensors |= fold_block(layout, block, scales_of(layout, block, generator), dtypes).weights
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text((checkpoint.folder / "config.json").read_text())
    return getattr(transformers, name).from_pretrained(folder, dtype=torch.float64)


def scales_of(layout: BlockLayout, block: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    return {
        group.name: random_scales(group, block[group.linears[0].tensor].shape[1], generator).double()
        for group in layout.groups
        if group.source is not None
    }


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_folding_changes_no_function(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    checkpoint = save(model, tmp_path / "source")
    folded = folded_model(name, checkpoint, tmp_path / "folded")
    ids = torch.tensor([token_ids()[0]])
    with torch.no_grad():
        for each in (model, folded):
            each.set_experts_implementation("eager")  # the other one has no float64
        expected, found = model.double()(input_ids=ids).logits, folded(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert float(expected.std()) > 1e-2


def test_scales_are_what_the_stored_norm_divides_by() -> None:
    layout = next(iter(block_layouts(_config())))
    generator = torch.Generator().manual_seed(0)
    weights = _weights(layout, generator)
    scales = {"attention": torch.rand(64, generator=generator) * 3 + 0.5}
    norm = f"{layout.prefix}input_layernorm.weight"
    folded = fold_block(layout, weights, scales, {norm: torch.bfloat16})
    assert torch.equal(folded.weights[norm].bfloat16().float(), folded.weights[norm])
    product = folded.scales["attention"] * (1 + folded.weights[norm])
    torch.testing.assert_close(product, 1 + weights[norm])
    assert not torch.equal(folded.scales["attention"], scales["attention"])
    assert norm in folded.changed


def test_ones_change_no_bit() -> None:
    layout = next(iter(block_layouts(_config())))
    weights = _weights(layout, torch.Generator().manual_seed(0))
    ones = {group.name: torch.ones(weights[group.linears[0].tensor].shape[1]) for group in layout.groups}
    folded = fold_block(layout, weights, ones, {})
    assert all(torch.equal(folded.weights[name], weights[name]) for name in weights)


def test_query_heads_must_share() -> None:
    layout = next(iter(block_layouts(_config())))
    weights = _weights(layout, torch.Generator().manual_seed(0))
    scales = {"attention_output": torch.arange(1.0, 65.0)}
    with pytest.raises(BuildError, match="query heads of one key-value head must share"):
        fold_block(layout, weights, scales, {})


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_scales_are_refused(value: float) -> None:
    layout = next(iter(block_layouts(_config())))
    weights = _weights(layout, torch.Generator().manual_seed(0))
    with pytest.raises(BuildError, match="must be positive and finite"):
        fold_block(layout, weights, {"attention": torch.full((64,), value)}, {})


def _config() -> dict[str, Any]:
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }


def _weights(layout: BlockLayout, generator: torch.Generator) -> dict[str, Tensor]:
    shapes = {"q_proj": (64, 64), "k_proj": (32, 64), "v_proj": (32, 64), "o_proj": (64, 64)}
    shapes |= {"gate_proj": (96, 64), "up_proj": (96, 64), "down_proj": (64, 96)}
    weights = {
        linear.tensor: torch.randn(shapes[linear.module.rpartition(".")[2]], generator=generator)
        for linear in layout.linears
    }
    for norm in ("input_layernorm", "pre_feedforward_layernorm"):
        weights[f"{layout.prefix}{norm}.weight"] = torch.randn(64, generator=generator) * 0.2
    return weights
