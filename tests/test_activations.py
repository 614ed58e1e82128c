"""The streamed pass against hooks on transformers' whole model, for every architecture in the table."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantize.calibration.attention import PIECE
from quantize.calibration.block_runner import ROUND_BATCHES
from quantize.calibration.hidden_states import SavedStates, make_batches
from quantize.calibration.stream import Precision, Spill, fastest_precision, stream_blocks
from quantize.errors import BuildError, CheckpointError
from quantize.events import EventKind, ListReporter
from quantize.model.architecture import block_layouts
from quantize.numerics.gram import Gram
from tests.architectures import CONFIGS, SavedCheckpoint, save, tiny_model, token_ids


@pytest.fixture(autouse=True)
def no_starved_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantize.calibration.block_runner.STARVED_TOKENS", 1)
    monkeypatch.setattr("quantize.calibration.block_runner.SURE_TOKENS", 1)


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


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_gram_matrices_equal_those_of_the_whole_model(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    checkpoint = save(model, tmp_path)
    ids = token_ids((24, 17, 24, 31, PIECE + 20))  # the last one's attention goes in pieces
    expected = oracle(model, checkpoint, ids)
    found: set[tuple[int, str]] = set()
    for block in stream_blocks(checkpoint, ids, tokens_per_batch=60):
        for key in set(block.inputs.values()):
            rows, gram = expected[block.index, key], block.grams[key]
            found.add((block.index, key))
            assert gram.tokens == len(rows)
            torch.testing.assert_close(gram.matrix.double(), rows.T @ rows, rtol=2e-4, atol=2e-4)
    assert found == set(expected)


def collect(checkpoint: SavedCheckpoint, ids: list[list[int]], **options: Any) -> dict[tuple[int, str], Gram]:
    blocks = stream_blocks(checkpoint, ids, tokens_per_batch=60, **options)
    return {(block.index, key): gram for block in blocks for key, gram in block.grams.items()}


def assert_same_bits(found: dict[tuple[int, str], Gram], expected: dict[tuple[int, str], Gram]) -> None:
    assert set(found) == set(expected)
    for key, gram in expected.items():
        assert torch.equal(found[key].matrix, gram.matrix), key
        assert found[key].tokens == gram.tokens


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> SavedCheckpoint:
    return save(tiny_model("LlamaForCausalLM"), tmp_path_factory.mktemp("llama"))


def spill(folder: Path, **options: Any) -> Spill:
    return Spill(folder, budget_bytes=1, **options)


def test_spilled_states_change_no_bit_and_only_the_last_file_stays(llama: SavedCheckpoint, tmp_path: Path) -> None:
    expected = collect(llama, token_ids())
    assert_same_bits(collect(llama, token_ids(), spill=spill(tmp_path)), expected)
    assert len([*tmp_path.iterdir()]) == 1


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("times", [1, 16])
def test_thread_count_changes_no_bit(llama: SavedCheckpoint, times: int, precision: Precision) -> None:
    """Also over several rounds of batches."""
    before, ids = torch.get_num_threads(), token_ids() * times
    assert (len(make_batches([len(item) for item in ids], 60)) > ROUND_BATCHES) == (times > 1)
    try:
        found = []
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            found.append(collect(llama, ids, precision=precision))
    finally:
        torch.set_num_threads(before)
    assert_same_bits(found[0], found[1])
    assert_same_bits(found[0], found[2])


@pytest.mark.parametrize("budget", [None, 1])
def test_starting_at_a_later_block_changes_no_bit(llama: SavedCheckpoint, tmp_path: Path, budget: int | None) -> None:
    expected = {key: gram for key, gram in collect(llama, token_ids()).items() if key[0] >= 2}
    assert_same_bits(collect(llama, token_ids(), spill=Spill(tmp_path, budget), start_block=2), expected)


@pytest.mark.parametrize("budget", [None, 1])
def test_a_pass_goes_on_from_saved_states_of_either_kind(
    llama: SavedCheckpoint, tmp_path: Path, budget: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = {key: gram for key, gram in collect(llama, token_ids()).items() if key[0] >= 1}
    saved: list[SavedStates] = []
    options = Spill(tmp_path, budget, keep=lambda states: saved.append(states.save()))
    killed = stream_blocks(llama, token_ids(), tokens_per_batch=60, spill=options)
    assert next(killed).index == 0
    killed.close()
    assert [item.block for item in saved] == [1]
    read: list[str] = []
    spy = SavedCheckpoint.read
    monkeypatch.setattr(SavedCheckpoint, "read", lambda self, name: (read.append(name), spy(self, name))[1])
    for other in (None, 1):
        found = collect(llama, token_ids(), start_block=1, spill=Spill(tmp_path, other, saved[0], lambda _: None))
        assert_same_bits(found, expected)
    assert not any(name.startswith("model.layers.0.") for name in read)


@pytest.mark.parametrize("budget", [None, 1])
@pytest.mark.parametrize("damage", ["byte", "cut", "gone"])
def test_damaged_states_are_not_used(llama: SavedCheckpoint, tmp_path: Path, budget: int | None, damage: str) -> None:
    expected = {key: gram for key, gram in collect(llama, token_ids()).items() if key[0] >= 1}
    saved: list[SavedStates] = []
    options = Spill(tmp_path, budget, keep=lambda states: saved.append(states.save()))
    killed = stream_blocks(llama, token_ids(), spill=options)
    next(killed)
    killed.close()
    path = tmp_path / saved[0].file
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    {"byte": lambda: path.write_bytes(data), "cut": lambda: path.write_bytes(data[:-4]), "gone": path.unlink}[damage]()
    events = ListReporter()
    again = Spill(tmp_path, budget, saved[0])
    assert_same_bits(collect(llama, token_ids(), start_block=1, spill=again, reporter=events), expected)
    assert "damaged or gone" in " ".join(event.text for event in events.events)


def test_weights_are_float32_and_dropped_after_the_block(llama: SavedCheckpoint) -> None:
    stream = stream_blocks(llama, token_ids())
    block = next(stream)
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(block.weights[name], llama.read(name).float())
    weight, gram = weakref.ref(block.weights[name]), weakref.ref(block.grams["mlp"].matrix)
    del block
    next(stream)
    assert weight() is None
    assert gram() is None


def test_fastest_precision_is_one_that_the_pass_takes(llama: SavedCheckpoint) -> None:
    assert next(stream_blocks(llama, token_ids(), precision=fastest_precision("cpu"))).index == 0


def test_bfloat16_is_close(llama: SavedCheckpoint) -> None:
    expected, found = collect(llama, token_ids()), collect(llama, token_ids(), precision="bfloat16")
    for key, gram in expected.items():
        assert float((found[key].matrix - gram.matrix).norm() / gram.matrix.norm()) < 0.03


def test_experts_that_saw_few_tokens_lean_on_those_of_all_and_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = save(tiny_model("MixtralForCausalLM"), tmp_path)
    alone = next(stream_blocks(checkpoint, token_ids())).grams
    monkeypatch.setattr("quantize.calibration.block_runner.STARVED_TOKENS", 10_000)
    monkeypatch.setattr("quantize.calibration.block_runner.SURE_TOKENS", 10_000)
    monkeypatch.setattr("quantize.calibration.block_runner.PRIOR_TOKENS", 40)
    reporter = ListReporter()
    block = next(stream_blocks(checkpoint, token_ids(), reporter=reporter))
    mean = alone["mlp"].matrix / alone["mlp"].tokens
    for expert in range(4):
        own, gram = alone[f"expert_{expert}"], block.grams[f"expert_{expert}"]
        assert torch.allclose(gram.matrix, own.matrix + 40 * mean, rtol=1e-5, atol=1e-5)
        assert (gram.tokens, block.grams[f"expert_{expert}_output"].tokens) == (own.tokens + 40, own.tokens + 40)
        assert "fewer than 10000" in gram.note
    warning = next(event.text for event in reporter.events if event.kind is EventKind.WARNING)
    assert warning.startswith("block 0: 4 starved")


def test_what_an_expert_would_make_of_all_tokens_is_transformers_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In both precisions: bfloat16 is what processors that multiply it choose."""
    model = tiny_model("MixtralForCausalLM")
    seen: list[Tensor] = []
    mlp = model.model.layers[0].mlp
    handle = mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].reshape(-1, 64)))
    for ids in token_ids():
        model(torch.tensor([ids]))
    handle.remove()
    gate, up = mlp.experts.gate_up_proj[0].chunk(2)
    states = torch.cat(seen)
    inner = (nn.functional.silu(states @ gate.T) * (states @ up.T)).detach()
    chosen = inner[((states @ mlp.gate.weight.T).topk(2).indices == 0).any(dim=1)]
    assert 0 < len(chosen) < len(inner)
    monkeypatch.setattr("quantize.calibration.block_runner.SURE_TOKENS", 10_000)
    monkeypatch.setattr("quantize.calibration.block_runner.PRIOR_TOKENS", len(states))
    found = next(stream_blocks(save(model, tmp_path), token_ids())).grams
    gram = found["expert_0_output"]
    assert torch.allclose(gram.matrix, chosen.T @ chosen + inner.T @ inner, rtol=1e-4, atol=1e-3)
    own = next(stream_blocks(save(model, tmp_path), token_ids(), precision="bfloat16")).grams["expert_0_output"]
    assert float((own.matrix - gram.matrix).norm() / gram.matrix.norm()) < 0.05


def test_refusals(llama: SavedCheckpoint, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="no tokens"):
        next(stream_blocks(llama, [[]]))
    with pytest.raises(BuildError, match=r"more than the budget of 1\n.*folder to spill"):
        next(stream_blocks(llama, token_ids(), spill=Spill(budget_bytes=1)))
    foreign = tmp_path / "config.json"
    foreign.write_text((llama.folder / "config.json").read_text().replace("LlamaForCausalLM", "LlamaModel"))
    with pytest.raises(CheckpointError, match="LlamaModel is no causal language model"):
        next(stream_blocks(SavedCheckpoint(tmp_path), token_ids()))


def test_progress_ends_at_the_total(llama: SavedCheckpoint) -> None:
    reporter = ListReporter()
    for _ in stream_blocks(llama, token_ids(), reporter=reporter):
        pass
    events = [event for event in reporter.events if event.kind is EventKind.PROGRESS]
    assert events[-1].done == events[-1].total == 3 * sum(len(ids) for ids in token_ids())
