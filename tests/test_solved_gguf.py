"""Solved GGUF: llama.cpp's own file but for the bytes of its matrices, and no matrix worse for it.

Oracles: the file that llama.cpp makes with the same importance matrix, gguf's reader, the 16-bit file, and the Gram
matrices of the calibration pass.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from quantize.calibration.stream import Block, stream_blocks
from quantize.calibration.text import load_calibration_set
from quantize.errors import BuildError
from quantize.events import ListReporter, SilentReporter
from quantize.files.gguf import read_gguf
from quantize.formats import option_models
from quantize.formats.gguf import solve
from quantize.formats.gguf.columns import column_order
from quantize.formats.gguf.grams import GramCollector, grams_bytes, read_gram
from quantize.formats.gguf.options import GgufOptions
from quantize.formats.gguf.solve import NO_GRAM, SolveRequest, solve_file
from quantize.model.checkpoint import open_checkpoint
from quantize.numerics.gptq import row_losses
from quantize.recipe.model import load_recipe
from quantize.store.store import Store
from quantize.store.workspace import Workspace
from quantize.system.cache import Cache
from quantize.testing import write_recipe
from tests.conftest import build
from tests.families import family_named, make_family
from tests.gguf_build import GgufBuild

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers and its plugins warn on import

CALIBRATION = {"dataset": "text.txt", "samples": 24, "sequence_length": 64, "minimum_tokens": 16}
TYPE = {"format": "gguf", "type": "Q4_K_M", "overrides": {r"attn_k": "IQ3_S", r"blk\.0\.attn_q": "F16"}}
VARIANTS: list[dict[str, Any]] = [
    {"format": "gguf", "type": "F16", "name": "exact"},
    {**TYPE, "imatrix": True, "name": "rounded"},
    {**TYPE, "gptq": True, "name": "solved"},
    {**TYPE, "gptq": True, "split_size": "300K", "name": "parts"},
]
SAME = ("token_embd.weight", "output.weight", "blk.0.attn_k.weight", "blk.1.attn_k.weight")


class Made(GgufBuild):
    """One build of all variants, and the statistics of its calibration text."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, VARIANTS, CALIBRATION)

    def folder(self, variant: str) -> Path:
        return self.artifact(variant).folder

    def tensors(self, variant: str) -> dict[str, Any]:
        paths = sorted(self.folder(variant).glob("*.gguf"))
        readers = [gguf.GGUFReader(path) for path in paths if ".imatrix.gguf" not in path.name]
        return {item.name: item for reader in readers for item in reader.tensors}

    def blocks(self) -> list[Block]:
        assert self.recipe.calibration is not None
        found = load_calibration_set(self.recipe.calibration, self.root, self.checkpoint.folder)
        precision = self.artifact("solved").manifest.calibration
        assert precision is not None
        return [*stream_blocks(self.checkpoint, found.token_ids, precision=precision.spec["precision"])]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("solved"))


@pytest.fixture(scope="module")
def blocks(made: Made) -> list[Block]:
    return made.blocks()


# --- the file ---------------------------------------------------------------------------------------------------------


def test_it_is_llama_cpps_file_but_for_the_bytes_of_its_matrices(made: Made) -> None:
    ours, theirs = made.file("solved"), made.file("rounded")
    assert (ours.name, theirs.name) == ("tiny-Q4_K_M-gptq.gguf", "tiny-Q4_K_M-imatrix.gguf")
    header = min(item.offset for item in read_gguf(ours).tensors.values())
    assert ours.stat().st_size == theirs.stat().st_size
    assert ours.read_bytes()[:header] == theirs.read_bytes()[:header]
    mine, other = made.tensors("solved"), made.tensors("rounded")
    assert {name: item.tensor_type for name, item in mine.items()} == {n: t.tensor_type for n, t in other.items()}
    same = {name for name, item in mine.items() if item.data.tobytes() == other[name].data.tobytes()}
    assert same == {*SAME, "blk.0.attn_q.weight", *(name for name in mine if "norm" in name)}
    matrix = ours.with_name("tiny-Q4_K_M-gptq.imatrix.gguf").read_bytes()
    assert matrix == theirs.with_name("tiny-Q4_K_M-imatrix.imatrix.gguf").read_bytes()


def test_no_matrix_loses_more_and_the_figures_are_right(made: Made, blocks: list[Block]) -> None:
    """By gguf's own reader, against the 16-bit file, under the Gram matrix of the linear's own input."""
    exact, ours, theirs = (made.tensors(name) for name in ("exact", "solved", "rounded"))
    layers = made.artifact("solved").measurements()["layers"]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, len(blocks))
    solved = 0
    for block in blocks:
        for linear in block.layout.linears:
            name = names.get_name(linear.tensor, try_suffixes=(".weight",))
            if (facts := layers.get(linear.tensor.removesuffix(".weight"))) is None:
                assert name in SAME or name == "blk.0.attn_q.weight"
                continue
            weight = torch.from_numpy(exact[name].data.astype(np.float64))
            gram = block.grams[linear.input].matrix.double()
            values = [
                torch.from_numpy(gguf.quants.dequantize(item[name].data, item[name].tensor_type)).double()
                for item in (ours, theirs)
            ]
            loss, nearest = (float(row_losses(found - weight, gram).sum()) for found in values)
            assert loss < 0.8 * nearest, name
            assert facts["loss"] / facts["nearest_loss"] == pytest.approx(loss / nearest, rel=0.02), name
            energy = float(row_losses(weight, gram).sum())
            assert facts["loss"] == pytest.approx(loss / energy, rel=0.3), name  # of the energy some rows are taken
            assert (facts["type"], facts["rows"]) == (ours[name].tensor_type.name, len(weight))
            solved += 1
    assert solved == len(layers) == 11


def test_what_is_not_solved_is_said(made: Made) -> None:
    unsolved = made.artifact("solved").measurements()["unsolved"]
    reasons = dict.fromkeys(SAME[:2], NO_GRAM) | dict.fromkeys(
        SAME[2:], "llama.cpp's own rounding: IQ3_S is not solved"
    )
    assert unsolved == reasons
    said = [event.text for event in made.said.events if event.subject == "solved"]
    assert any("not solved: blk.0.attn_k.weight, blk.1.attn_k.weight" in text for text in said)


def test_a_model_in_parts_has_the_same_matrices(made: Made) -> None:
    """Solved by itself, in another order of files: every byte is the same."""
    whole, parts = made.tensors("solved"), made.tensors("parts")
    assert len([*made.folder("parts").glob("*-of-*.gguf")]) > 2
    assert {name: item.data.tobytes() for name, item in parts.items()} == {
        name: item.data.tobytes() for name, item in whole.items()
    }


# --- the recipe -------------------------------------------------------------------------------------------------------


def test_a_variant_has_its_name_and_one_way_to_be_written() -> None:
    short, long = (GgufOptions(type="Q4_K_M", gptq=True, **more) for more in ({}, {"imatrix": True}))
    assert short == long
    assert short.variant_name() == "q4_k_m-gptq"
    assert GgufOptions(type="Q2_K", gptq=True, pure=True).variant_name() == "q2_k-gptq-pure"
    with pytest.raises(ValidationError, match="leave out `imatrix: false`"):
        GgufOptions(type="Q4_K_M", gptq=True, imatrix=False)
    with pytest.raises(ValidationError, match=r"nothing in F16 is rounded.*leave out `gptq: true`"):
        GgufOptions(type="F16", gptq=True)
    assert GgufOptions(type="F16", gptq=True, overrides={"ffn_down": "Q4_K"}).gptq


def test_options_of_variants_that_are_not_solved_are_those_of_before() -> None:
    assert "gptq" not in GgufOptions(type="Q4_K_M", imatrix=True).model_dump()
    assert GgufOptions(type="Q4_K_M", gptq=True).model_dump()["gptq"] is True


def test_a_plan_knows_the_bytes(made: Made) -> None:
    from quantize.build.plan import make_plan
    from quantize.build.size import size_plan
    from quantize.formats.base import RunLimits

    workspace = replace(made.workspace, store=Store(made.root / "empty"))
    sized = size_plan(make_plan(made.recipe, workspace), workspace, RunLimits())
    for job in sized.jobs:
        files = made.folder(job.name).glob("*.gguf")
        assert job.size is not None
        assert job.size.file_bytes == sum(path.stat().st_size for path in files), job.name
    notes = {job.name: job.size.notes for job in sized.jobs if job.size is not None}
    assert notes["rounded"] == ()
    assert notes["solved"] == (
        "up to 11 of 15 matrices are solved; 2 of types that are not solved (IQ3_S) and 2 of embedding and head keep "
        "llama.cpp's own rounding",
    )
    solved = 2 * (grams_bytes(made.checkpoint) + made.artifact("solved").manifest.weights_bytes)
    assert sized.disk.scratch == solved


# --- mixtures ---------------------------------------------------------------------------------------------------------


def test_each_expert_is_solved_in_its_place(tmp_path: Path) -> None:
    """Experts are one tensor in GGUF, and one each, with a Gram matrix of its own, in the source."""
    make_family(family_named("Qwen2-MoE"), tmp_path / "model")
    text = [f"Paragraph {index}: the quick brown fox jumps over the lazy dog. " * 3 for index in range(40)]
    (tmp_path / "text.txt").write_text("\n\n".join(text))
    variants = [{"format": "gguf", "type": "Q4_K_M", "gptq": True, "pre_tokenizer": "qwen2"}]
    recipe = load_recipe(
        write_recipe(tmp_path / "r.yaml", tmp_path / "model", variants, calibration=CALIBRATION), option_models()
    )
    workspace = Workspace(Store(tmp_path / "store"), Cache(tmp_path / "cache"), SilentReporter())
    (outcome,) = build(recipe, workspace, evaluate=False)
    assert outcome.artifact is not None, outcome.error
    measured = outcome.artifact.measurements()
    losses = measured["layers"]
    assert sum(".experts." in name for name in losses) == 2 * 4 * 3
    assert sum(item["loss"] < item["nearest_loss"] for item in losses.values()) > len(losses) // 2
    assert {*measured["unsolved"]} == {"token_embd.weight", "output.weight"}
    (path,) = (path for path in outcome.artifact.folder.glob("*.gguf") if ".imatrix." not in path.name)
    tensors = {item.name: item for item in gguf.GGUFReader(path).tensors}
    source = open_checkpoint(tmp_path / "model")
    for ours, theirs in (("ffn_gate_exps", "gate_proj"), ("ffn_down_exps", "down_proj")):
        item = tensors[f"blk.1.{ours}.weight"]
        values = gguf.quants.dequantize(item.data, item.tensor_type)
        for expert, found in enumerate(values):
            exact = source.read(f"model.layers.1.mlp.experts.{expert}.{theirs}.weight").float().numpy()
            assert float((found * exact).sum()) > 0.98 * float(np.linalg.norm(found) * np.linalg.norm(exact))


# --- stopped ----------------------------------------------------------------------------------------------------------


def requested(made: Made, blocks: list[Block], scratch: Path) -> SolveRequest:
    """What a build gives: llama.cpp's file, and the Gram matrices of the pass."""
    collector = GramCollector(scratch, scratch / "imatrix.safetensors")
    for block in blocks:
        collector.add(block.index, [collector.solve(block)])
    collector.finish()
    file = Path(shutil.copy(made.file("rounded"), scratch / "rounded.gguf"))
    return SolveRequest(made.file("exact"), file, made.checkpoint, scratch, "tiny", threads=2)


@pytest.fixture
def request_(made: Made, blocks: list[Block], tmp_path: Path) -> SolveRequest:
    return requested(made, blocks, tmp_path)


@pytest.fixture(scope="module")
def expected(made: Made, blocks: list[Block], tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, dict[str, Any]]:
    """The bytes and the losses of a file that was solved in one go, on one thread."""
    request = replace(requested(made, blocks, tmp_path_factory.mktemp("undisturbed")), threads=1)
    found = solve_file(SilentReporter(), request)
    return request.quantized.read_bytes(), found.layers


def test_gram_matrices_come_back_as_they_were(made: Made, blocks: list[Block], request_: SolveRequest) -> None:
    for block in blocks:
        for key, gram in block.grams.items():
            found = read_gram(request_.scratch, made.checkpoint, block.layout, key)
            assert torch.equal(found, gram.matrix)
    assert grams_bytes(made.checkpoint) == sum(path.stat().st_size for path in request_.scratch.glob("grams.*.f32"))


@pytest.mark.parametrize("damage", ["none", "data", "log"])
def test_solving_that_stopped_goes_on_and_ends_with_the_same_bytes(
    request_: SolveRequest, expected: tuple[bytes, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    add, left = solve._Log.add, [5]

    def stop(log: Any, *arguments: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        add(log, *arguments)

    before = request_.quantized.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(solve._Log, "add", stop)
        with pytest.raises(KeyboardInterrupt):
            solve_file(SilentReporter(), request_)
    assert request_.quantized.read_bytes() == before
    path = request_.scratch / (solve.LOG_NAME if damage == "log" else solve.DATA_NAME)
    data = bytearray(path.read_bytes())
    if damage == "data":
        data[len(data) // 2] ^= 1
    elif damage == "log":
        data = data[:-9]
    path.write_bytes(data)
    said = ListReporter()
    found = solve_file(said, request_)
    assert request_.quantized.read_bytes() == expected[0]
    goes_on = {"none": 6, "log": 5}.get(damage)
    texts = [event.text for event in said.events]
    assert any("goes on at matrix" in text for text in texts)
    assert goes_on is None or f"goes on at matrix {goes_on} of 11" in texts
    assert found.layers == expected[1]


def test_a_file_that_is_gone_or_short_is_an_error(request_: SolveRequest) -> None:
    path = next(request_.scratch.glob("grams.00001.f32"))
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(BuildError, match="became shorter"):
        solve_file(SilentReporter(), request_)


# --- the order of columns ---------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1), st.booleans())
@settings(max_examples=30, deadline=None)
def test_columns_are_found_whatever_the_order_of_the_rows(seed: int, moved: bool) -> None:
    made = torch.Generator().manual_seed(seed)
    source = torch.randn(48, 64, generator=made).half()
    rows = torch.randperm(48, generator=made)
    columns = torch.randperm(64, generator=made) if moved else torch.arange(64)
    assert column_order(source[rows][:, columns], source) == (tuple(columns.tolist()) if moved else ())


@pytest.mark.parametrize("what", ["split", "scaled", "another"])
def test_other_columns_are_not_taken_for_the_sources(what: str) -> None:
    source = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    found = {"split": source[:24], "scaled": source * torch.linspace(0.5, 1.5, 64), "another": source.flip(0) + 0.1}
    assert column_order(found[what], source) is None
