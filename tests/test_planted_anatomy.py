"""Architectures that no table has: classes made here, found as they are, or refused, and never folded wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from quantize.calibration.folding import fold_block
from quantize.calibration.stream import stream_blocks
from quantize.errors import CheckpointError
from quantize.formats.awq.build import AwqOptions, solve_block
from quantize.model.anatomy.find import find
from quantize.model.anatomy.found import Anatomy
from quantize.model.architecture import anatomy_of, block_layouts
from quantize.model.layout import FoldGroup, NormSource, RowsSource
from tests.architectures import SavedCheckpoint, save, token_ids
from tests.test_every_class import check_folds, rows_read

pytestmark = pytest.mark.filterwarnings("ignore")
WIDTH, INNER, HEADS, KV_HEADS = 64, 96, 4, 2


class PlantedConfig(PreTrainedConfig):
    """kind: what is unusual in a block."""

    model_type = "planted"

    def __init__(self, kind: str = "plain", num_hidden_layers: int = 3, **others: Any) -> None:
        self.kind, self.num_hidden_layers = kind, num_hidden_layers
        self.hidden_size, self.vocab_size = others.pop("hidden_size", WIDTH), others.pop("vocab_size", 96)
        self.intermediate_size = others.pop("intermediate_size", INNER)
        self.num_attention_heads = others.pop("num_attention_heads", HEADS)
        self.num_key_value_heads = others.pop("num_key_value_heads", KV_HEADS)
        super().__init__(**others)


class Gain(nn.Module):
    """A norm that multiplies by 1 + gamma, under a name that no other has."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(width))

    def forward(self, states: Tensor) -> Tensor:
        return states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + self.gamma)


class Mixer(nn.Module):
    """Causal attention with grouped heads; `gated` multiplies what it gives by a sigmoid of its input."""

    def __init__(self, config: PlantedConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.head_dim = width // config.num_attention_heads
        narrow = self.head_dim * config.num_key_value_heads
        self.ask, self.offer = nn.Linear(width, width, bias=False), nn.Linear(width, narrow, bias=False)
        self.give, self.out = nn.Linear(width, narrow, bias=True), nn.Linear(width, width, bias=False)
        self.kind = config.kind
        if self.kind == "gated":
            self.gate = nn.Linear(width, width, bias=False)
        if self.kind == "squared":
            self.lift = nn.Parameter(torch.ones(1))

    def forward(self, states: Tensor) -> Tensor:
        def heads(found: Tensor) -> Tensor:
            return found.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        query, key, value = (heads(part(states)) for part in (self.ask, self.offer, self.give))
        found = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        mixed = found.transpose(1, 2).flatten(-2)
        if self.kind == "gated":
            mixed = mixed * torch.sigmoid(self.gate(states))
        if self.kind == "squared":
            mixed = mixed * mixed.abs() * self.lift
        return self.out(mixed)


class Part(nn.Module):
    """A block. `leaky`: the norm's output goes on beside the linears that read it, bent."""

    def __init__(self, config: PlantedConfig) -> None:
        super().__init__()
        self.before, self.mixer = Gain(config.hidden_size), Mixer(config)
        self.between = Gain(config.hidden_size)
        self.rise = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.swell = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.sink = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.kind = config.kind

    def forward(self, states: Tensor) -> Tensor:
        normed = self.before(states)
        states = states + self.mixer(normed)
        if self.kind == "leaky":
            states = states + torch.tanh(normed)
        normed = self.between(states)
        return states + self.sink(nn.functional.silu(self.rise(normed)) * self.swell(normed))


class Inner(nn.Module):
    """Where the blocks are, some way down."""

    def __init__(self, config: PlantedConfig) -> None:
        super().__init__()
        self.parts = nn.ModuleList(Part(config) for _ in range(config.num_hidden_layers))
        self.kind = config.kind

    def forward(self, states: Tensor) -> Tensor:
        first = states
        for place, part in enumerate(self.parts):
            states = part(states)
            if self.kind == "skipping" and place:
                states = states + first
            if self.kind == "twice":
                states = part(states)
        return states


class PlantedModel(PreTrainedModel):
    """The whole model; a class that transformers does not have."""

    config_class = PlantedConfig
    base_model_prefix = "deep"
    _supports_sdpa = True

    def __init__(self, config: PlantedConfig) -> None:
        super().__init__(config)
        self.table = nn.Embedding(config.vocab_size, config.hidden_size)
        self.deep = nn.ModuleDict({"er": Inner(config)})
        self.last, self.head = Gain(config.hidden_size), nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, **_: Any) -> CausalLMOutput:
        states = self.table(input_ids) if inputs_embeds is None else inputs_embeds
        return CausalLMOutput(logits=self.head(self.last(self.deep["er"](states))))


@pytest.fixture(autouse=True)
def _registered() -> None:
    """transformers knows the class, as it knows one that a package has registered."""
    AutoConfig.register("planted", PlantedConfig, exist_ok=True)
    AutoModelForCausalLM.register(PlantedConfig, PlantedModel, exist_ok=True)


def planted(kind: str) -> dict[str, Any]:
    return PlantedConfig(kind).to_dict() | {"architectures": ["PlantedModel"]}


def groups_of(found: Anatomy) -> dict[str, FoldGroup]:
    assert found.refusal == ""
    return {group.linears[0].module: group for group in found.layout(1).groups}


def test_a_norm_that_multiplies_by_more_under_another_name_is_found_in_a_nested_list() -> None:
    found = find(planted("plain"))
    assert found.blocks == "deep.er.parts"
    groups = groups_of(found)
    assert [linear.module for linear in groups["mixer.ask"].linears] == ["mixer.ask", "mixer.offer", "mixer.give"]
    assert groups["mixer.ask"].source == NormSource("deep.er.parts.1.before.gamma", 1.0)
    assert groups["mixer.out"].source == RowsSource("deep.er.parts.1.mixer.give.weight", 0, 32, 16, 2)
    assert groups["rise"].source == NormSource("deep.er.parts.1.between.gamma", 1.0)
    assert groups["sink"].source == RowsSource("deep.er.parts.1.swell.weight", 0, INNER)


def test_a_norm_that_is_read_in_two_places_is_not_folded_into() -> None:
    groups = groups_of(find(planted("leaky")))
    assert groups["mixer.ask"].source is None
    assert groups["rise"].source is not None


def test_a_gate_between_value_and_output_takes_scales_where_it_may() -> None:
    groups = groups_of(find(planted("gated")))
    assert "mixer.gate" in [linear.module for linear in groups["mixer.ask"].linears]
    assert groups["mixer.out"].source == RowsSource("deep.er.parts.1.mixer.give.weight", 0, 32, 16, 2)
    assert groups_of(find(planted("squared")))["mixer.out"].source is None


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("skipping", "a block reads more than the one before it gives|computes with what its blocks give"),
        ("twice", r"a block of deep\.er\.parts runs 2 times in one pass"),
    ],
)
def test_blocks_that_do_not_run_one_at_a_time_are_refused(kind: str, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        anatomy_of(planted(kind))


def planted_checkpoint(kind: str, folder: Path) -> tuple[Any, SavedCheckpoint]:
    torch.manual_seed(0)
    model: Any = PlantedModel(PlantedConfig(kind)).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * (0.3 if parameter.dim() == 1 else 0.1))
    return model, save(model, folder)


@pytest.mark.parametrize("kind", ["plain", "gated", "leaky", "squared"])
def test_statistics_and_folds_of_a_class_that_no_table_has(kind: str, tmp_path: Path) -> None:
    model, checkpoint = planted_checkpoint(kind, tmp_path / "source")
    found, ids = anatomy_of(checkpoint.config), token_ids()
    expected = rows_read(model, found, ids)
    keys = set()
    for block in stream_blocks(checkpoint, ids):
        for key, gram in block.grams.items():
            rows = expected[block.index, key]
            torch.testing.assert_close(gram.matrix.double(), rows.T @ rows, rtol=1e-3, atol=1e-3)
            keys.add((block.index, key))
        tensors, layers = solve_block(block, AwqOptions(group_size=32), 1)
        assert len(layers) == len(block.layout.linears)
        assert all(bool(torch.isfinite(tensor.float()).all()) for tensor in tensors.values())
    assert keys == set(expected)
    check_folds(model, checkpoint, found, tmp_path / "folded")


def test_a_fold_that_is_not_proved_would_have_been_wrong(tmp_path: Path) -> None:
    """The source that the leaky class must not have: folded into it, the logits move."""
    model, checkpoint = planted_checkpoint("leaky", tmp_path / "source")
    tensors = {name: checkpoint.read(name).double() for name in checkpoint.tensors}
    layout = next(iter(block_layouts(checkpoint.config)))
    wrong = [
        FoldGroup(group.name, group.linears, NormSource(f"{layout.prefix}before.gamma", 1.0))
        for group in layout.groups if group.linears[0].module == "mixer.ask"
    ]  # fmt: skip
    forced = type(layout)(layout.index, layout.prefix, tuple(wrong), None)
    scales = {group.name: torch.linspace(0.5, 2.0, WIDTH).double() for group in wrong}
    tensors |= fold_block(forced, {n: t for n, t in tensors.items() if n.startswith(layout.prefix)}, scales, {}).weights
    folded: Any = PlantedModel(PlantedConfig("leaky")).double().eval()
    folded.load_state_dict(tensors)
    ids = torch.tensor([token_ids()[0]])
    with torch.no_grad():
        moved = (folded(ids).logits - model.double()(ids).logits).abs().max()
    assert float(moved) > 1e-3
