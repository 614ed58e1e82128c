"""The streamed pass against hooks on transformers' whole model, for every architecture in the table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantize.activations import stream_blocks
from quantize.architecture import TABLE, block_layouts
from tests.architectures import CONFIGS, SavedCheckpoint, save, tiny_model, token_ids


@pytest.fixture(autouse=True)
def no_starved_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantize.block_runner.STARVED_TOKENS", 1)


def oracle(model: Any, checkpoint: SavedCheckpoint, ids: list[list[int]]) -> dict[tuple[int, str], Tensor]:
    """Rows read by each input, from pre-hooks on the whole model, one sequence at a time."""
    rows: dict[tuple[int, str], list[Tensor]] = {}
    handles = []

    def keep(index: int, key: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows.setdefault((index, key), []).append(inputs[0].reshape(-1, inputs[0].shape[-1]).double())

        return hook

    def split_experts(index: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: Any, inputs: tuple[Tensor, ...]) -> None:
            states, chosen, _ = inputs
            for expert in range(module.gate_up_proj.shape[0]):
                mine = states[(chosen == expert).any(-1)]
                gate, up = (mine @ module.gate_up_proj[expert].T).chunk(2, -1)
                rows.setdefault((index, f"expert_{expert}"), []).append(mine.double())
                rows.setdefault((index, f"expert_{expert}_output"), []).append((module.act_fn(gate) * up).double())

        return hook

    for layout in block_layouts(checkpoint.config):
        layer = model.model.layers[layout.index]
        for key, linears in layout.inputs.items():
            if linears[0].expert is None:
                module = layer.get_submodule(layout.module_path(linears[0].tensor).removesuffix(".weight"))
                handles.append(module.register_forward_pre_hook(keep(layout.index, key)))
        if layout.experts is not None:
            experts = layer.get_submodule(layout.experts.module)
            handles.append(experts.register_forward_pre_hook(split_experts(layout.index)))
    with torch.no_grad():
        for sequence in ids:
            model(input_ids=torch.tensor([sequence]), use_cache=False)
    for handle in handles:
        handle.remove()
    return {key: torch.cat(parts) for key, parts in rows.items()}


@pytest.mark.parametrize("name", sorted(TABLE))
def test_gram_matrices_equal_those_of_the_whole_model(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    checkpoint = save(model, tmp_path)
    ids = token_ids()
    expected = oracle(model, checkpoint, ids)
    found: set[tuple[int, str]] = set()
    for block in stream_blocks(checkpoint, ids, tokens_per_batch=60):
        for key in set(block.inputs.values()):
            rows, gram = expected[block.index, key], block.grams[key]
            found.add((block.index, key))
            assert gram.tokens == len(rows)
            torch.testing.assert_close(gram.matrix.double(), rows.T @ rows, rtol=2e-4, atol=2e-4)
            torch.testing.assert_close(gram.mean_abs.double(), rows.abs().mean(0), rtol=2e-4, atol=2e-5)
    assert found == set(expected)
    assert set(CONFIGS) == set(TABLE)
