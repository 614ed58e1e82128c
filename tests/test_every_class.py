"""Every causal language model class of the installed transformers: proved, or refused with the reason.

Each row of docs/anatomy.md that says `proved` is run here: a tiny checkpoint as transformers saves it, its Gram
matrices against hooks on the whole model, its folds against its own logits. Parts can run on machines of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from quantize.calibration.attention import PIECE
from quantize.calibration.folding import fold_block
from quantize.calibration.stream import stream_blocks
from quantize.model.anatomy.build import load_config, quietly, random_model, take_plain_experts
from quantize.model.anatomy.cached import cached_anatomy
from quantize.model.anatomy.doubles import doubles
from quantize.model.anatomy.found import Anatomy
from quantize.model.anatomy.shrink import shrink
from quantize.model.anatomy.watch import forward
from quantize.model.layout import BlockLayout, FoldGroup, RowsSource
from tests.anatomy_configs import config_of, image_types, model_types
from tests.anatomy_page import IMAGES_HEADING, PAGE, Row, cells_of, row_of
from tests.architectures import SavedCheckpoint, token_ids

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers warns of much
LENGTHS = (24, 17, 24, PIECE + 20)  # the last one's attention goes in pieces
CELLS = cells_of(PAGE.read_text(encoding="utf-8"))
PARTS = 3  # one of them is looked at whenever all tests are, the others by `pytest -m every_class`
PROVED = [
    pytest.param(kind, marks=() if number % PARTS == 0 else pytest.mark.every_class)
    for number, kind in enumerate(kind for kind, cells in CELLS.items() if cells[2].startswith("proved"))
]


IMAGES = cells_of(PAGE.read_text(encoding="utf-8"), IMAGES_HEADING)
IMAGE_PARTS = 6
IMAGE_KINDS = [
    pytest.param(kind, marks=() if number % IMAGE_PARTS == 0 else pytest.mark.every_class)
    for number, kind in enumerate(sorted(image_types()))
]


@pytest.mark.parametrize("kind", IMAGE_KINDS)
def test_the_page_says_what_is_found_of_classes_that_read_images(kind: str) -> None:
    row = row_of(kind, image_types()[kind])
    assert IMAGES[kind][:5] == row.cells()[:5], "run: python -m tests.anatomy_page"
    assert row.found.towers or row.found.refusal


def test_every_class_that_reads_images_is_proved_or_refused() -> None:
    assert {*IMAGES} == {*image_types()}
    assert all(cells[4] for cells in IMAGES.values() if cells[2] != "proved"), "refused without a reason"


@pytest.mark.parametrize("kind", sorted(model_types()))
def test_the_page_says_what_is_found(kind: str) -> None:
    row = row_of(kind)
    assert CELLS[kind][:5] == row.cells()[:5], "run: python -m tests.anatomy_page"


def test_most_classes_are_proved() -> None:
    classes = {cells[1] for cells in CELLS.values()}
    solved = {cells[1] for cells in CELLS.values() if cells[2].startswith("proved")}
    folded = {cells[1] for cells in CELLS.values() if cells[3].startswith("proved")}
    assert len(classes) == len(set(model_types().values()))
    assert sum(cells[2] == "proved" for cells in CELLS.values()) >= 150
    assert len(solved) >= 140
    assert len(folded) >= 110
    assert all(cells[4] for cells in CELLS.values() if not cells[2].startswith("proved")), "refused without a reason"


def tiny_checkpoint(kind: str, folder: Path) -> tuple[Any, SavedCheckpoint, Anatomy]:
    """A float32 model of a few blocks, as transformers saves it, and what is found out of its config."""
    config = config_of(kind)
    whole = row_of(kind).found
    settings = load_config(config)
    layers = 1 + max(whole.kinds.index(number) for number in range(len(whole.templates)))
    tiny = load_config(shrink(settings.to_dict(), max(2, layers)))
    with doubles():
        model = random_model(tiny, attn_implementation=whole.attention)
    model = model.float()
    with quietly():
        model.save_pretrained(folder)
    checkpoint = SavedCheckpoint(folder)
    return model, checkpoint, cached_anatomy(checkpoint.config)


@pytest.mark.parametrize("kind", PROVED)
def test_gram_matrices_and_folds_are_those_of_the_whole_model(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantize.calibration.block_runner.STARVED_TOKENS", 1)
    monkeypatch.setattr("quantize.calibration.block_runner.SURE_TOKENS", 1)
    model, checkpoint, anatomy = tiny_checkpoint(kind, tmp_path / "source")
    assert anatomy.refusal == ""
    ids = token_ids(LENGTHS)
    expected = rows_read(model, anatomy, ids)
    checked = 0
    for block in stream_blocks(checkpoint, ids, tokens_per_batch=60):
        for key, gram in block.grams.items():
            rows = expected.get((block.index, key))
            if rows is None or gram.note:
                continue  # an expert that saw no token
            assert gram.tokens == len(rows)
            size = float((rows.T @ rows).abs().max())
            torch.testing.assert_close(gram.matrix.double(), rows.T @ rows, rtol=1e-3, atol=2e-4 * size)
            checked += 1
    assert checked >= len(anatomy.kinds)
    if anatomy.folds[0]:
        check_folds(model, checkpoint, anatomy, tmp_path / "folded")


def rows_read(model: Any, anatomy: Anatomy, ids: list[list[int]]) -> dict[tuple[int, str], Tensor]:
    """What each input is, from hooks on the whole model, one sequence at a time."""
    found: dict[tuple[int, str], list[Tensor]] = {}

    def keep(index: int, key: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found.setdefault((index, key), []).append(inputs[0].reshape(-1, inputs[0].shape[-1]).double())

        return hook

    def split(index: int) -> Callable[..., None]:
        def hook(module: Any, inputs: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            states, chosen, _ = (*inputs, *kwargs.values())
            for expert in range(module.gate_up_proj.shape[0]):
                mine = states[(chosen == expert).any(-1)]
                gate, up = (mine @ module.gate_up_proj[expert].T).chunk(2, -1)
                found.setdefault((index, f"expert_{expert}"), []).append(mine.double())
                found.setdefault((index, f"expert_{expert}_output"), []).append((module.act_fn(gate) * up).double())

        return hook

    handles = []
    for index in range(len(anatomy.kinds)):
        layout, block = anatomy.layout(index), model.get_submodule(anatomy.blocks)[index]
        for key, linears in layout.inputs.items():
            if linears[0].expert is None:
                module = block.get_submodule(linears[0].module)
                handles.append(module.register_forward_pre_hook(keep(index, key)))
        if layout.experts is not None:
            experts = block.get_submodule(layout.experts.module)
            handles.append(experts.register_forward_pre_hook(split(index), with_kwargs=True))
    with torch.no_grad():
        for sequence in ids:
            forward(model, torch.tensor([sequence]))
    for handle in handles:
        handle.remove()
    return {key: torch.cat(parts) for key, parts in found.items()}


def check_folds(model: Any, checkpoint: SavedCheckpoint, anatomy: Anatomy, folder: Path) -> None:
    """Scales in every group that has a source, folded into the files by the function that builds use: same logits."""
    generator = torch.Generator().manual_seed(7)
    tensors = {name: checkpoint.read(name).double() for name in checkpoint.tensors}
    for index in range(len(anatomy.kinds)):
        layout = anatomy.layout(index)
        block = {name: tensor for name, tensor in tensors.items() if name.startswith(layout.prefix)}
        tensors |= fold_block(layout, block, scales_of(layout, block, generator), {}).weights
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text((checkpoint.folder / "config.json").read_text())
    ids = torch.tensor([token_ids((20,))[0]])
    with quietly():
        folded = type(model).from_pretrained(folder, dtype=torch.float64, attn_implementation=anatomy.attention)
    take_plain_experts(folded)
    with doubles():
        expected, found = (forward(each.double().eval(), ids) for each in (model, folded))
    assert float((found - expected).abs().max()) <= 1e-6 * float(expected.abs().max())


def scales_of(layout: BlockLayout, block: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Log-uniform in [1/4, 4], shared where grouped-query attention says so."""

    def scales(group: FoldGroup) -> Tensor:
        width = block[group.linears[0].tensor].shape[1]
        repeats, head_dim = 1, 1
        if isinstance(group.source, RowsSource):
            repeats, head_dim = group.source.repeats, group.source.head_dim
        runs = torch.rand(width // (repeats * head_dim), 1, head_dim, generator=generator)
        return (4.0 ** (2 * runs - 1)).expand(-1, repeats, -1).reshape(-1).double()

    return {group.name: scales(group) for group in layout.groups if group.source is not None}


def test_a_row_that_is_refused_says_why() -> None:
    row = Row("x", Anatomy("XForCausalLM", refusal="its blocks run twice"))
    assert row.cells() == ["x", "XForCausalLM", "refused", "refused", "its blocks run twice", "0.0"]
