"""The architecture table: names that exist, roles of every tensor, and refusals."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from quantize.errors import CheckpointError
from quantize.model.architecture import (
    anatomy_of,
    block_count,
    block_layout,
    block_layouts,
)
from quantize.model.layout import RowsSource
from tests.architectures import CONFIGS, save, tiny_model


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_names_exist_and_every_matrix_has_a_role(name: str, tmp_path: Path) -> None:
    checkpoint = save(tiny_model(name), tmp_path)
    tensors = set(checkpoint.tensors)
    named: set[str] = set()
    for layout in block_layouts(checkpoint.config):
        for group in layout.groups:
            named |= {linear.tensor for linear in group.linears} | set(group.passengers)
            assert group.source is not None
            assert group.source.tensor in tensors
            if isinstance(group.source, RowsSource):
                width = checkpoint.read(group.linears[0].tensor).shape[1]
                assert (group.source.stop - group.source.start) * group.source.repeats == width
                assert group.source.stop <= checkpoint.read(group.source.tensor).shape[0]
    assert named <= tensors
    matrices = named | {"model.embed_tokens.weight", "lm_head.weight"}
    for tensor in tensors:
        assert (checkpoint.read(tensor).dim() == 2) == (tensor in matrices), tensor
        assert tensor in matrices or tensor.endswith(("norm.weight", ".bias")), tensor


def test_grouped_query_attention_shares_scales_of_query_heads() -> None:
    config = {"architectures": ["LlamaForCausalLM"], "hidden_size": 96, "intermediate_size": 8}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2}
    source = block_layout(config, 1).groups[1].source
    assert source == RowsSource("model.layers.1.self_attn.v_proj.weight", 0, 32, 16, 3)


def test_fused_values_are_the_last_rows() -> None:
    config = {"architectures": ["Phi3ForCausalLM"], "hidden_size": 64, "intermediate_size": 40}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    groups = {group.name: group.source for group in block_layout(config, 0).groups}
    assert groups["attention_output"] == RowsSource("model.layers.0.self_attn.qkv_proj.weight", 96, 128, 16, 2)
    assert groups["mlp_output"] == RowsSource("model.layers.0.mlp.gate_up_proj.weight", 40, 80)


def test_what_is_no_causal_model_is_refused() -> None:
    with pytest.raises(CheckpointError, match="LlamaForSequenceClassification is no causal language model"):
        anatomy_of({"architectures": ["LlamaForSequenceClassification"], "model_type": "llama"})
    with pytest.raises(CheckpointError, match=r"NobodysForCausalLM is unknown to transformers 5"):
        anatomy_of({"architectures": ["NobodysForCausalLM"]})
    with pytest.raises(CheckpointError, match=r"config\.json has no 'architectures'"):
        anatomy_of({})


@pytest.mark.parametrize("value", [None, 0, -1, True, "4", 2.5])
def test_missing_or_wrong_number_is_refused(value: object) -> None:
    config = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": value}
    with pytest.raises(CheckpointError, match=r"num_hidden_layers must be a positive whole number"):
        block_count(config)


def test_block_index_of_a_tensor() -> None:
    config = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 13}
    assert anatomy_of(config).block_of("model.layers.12.mlp.down_proj.weight") == 12
    assert anatomy_of(config).block_of("model.norm.weight") is None


def test_reading_the_table_imports_no_torch() -> None:
    code = "import sys, quantize.model.architecture; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
