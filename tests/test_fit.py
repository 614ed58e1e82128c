"""Files that fit: the types that are chosen, the bytes that they take, and what was predicted of them.

Oracles: gguf's reader, llama.cpp's dry run and its quantized file, the calibration pass's statistics in float64, the
VRAM estimate of the finished file.
"""

from __future__ import annotations

import json
import re
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

from quantize.build.execution import RunOptions
from quantize.build.plan import make_plan
from quantize.build.size import size_plan
from quantize.calibration.guide import Text, find_weights
from quantize.calibration.stream import stream_blocks
from quantize.calibration.text import load_calibration_set
from quantize.calibration.token_weights import TokenWeights
from quantize.calibration.vocabulary import VocabularyStatistics
from quantize.estimate.fit import usable_bytes
from quantize.estimate.vram import EstimateSettings, estimate
from quantize.events import ListReporter, SilentReporter
from quantize.files.gguf import read_gguf
from quantize.files.imatrix import read_imatrix
from quantize.formats.base import RunLimits
from quantize.formats.gguf.columns import column_order
from quantize.formats.gguf.fit import build as fit_build
from quantize.formats.gguf.fit.check import nearness
from quantize.formats.gguf.fit.costs import LOG_NAME, CostRequest, find_costs
from quantize.formats.gguf.fit.grams import FitCollector
from quantize.formats.gguf.fit.survey import Survey, settings_for, survey, survey_jobs
from quantize.formats.gguf.fit.table import NAME, Cost, CostTable, FitRecord, Measured, read_record, tensor_bytes
from quantize.formats.gguf.fit.types import NARROW, candidates
from quantize.formats.gguf.making import settings_of
from quantize.formats.gguf.options import GgufOptions
from quantize.formats.gguf.types import ELEMENT_TYPES
from quantize.model.shape import ModelShape, gguf_shape
from quantize.runtimes.llama_cpp.convert import ConvertRequest, convert
from quantize.runtimes.llama_cpp.quantize import SizedFile, dry_run
from quantize.runtimes.llama_cpp.rounding import round_rows
from quantize.store.store import Store
from quantize.testing import TinyModel, write_json, write_recipe, write_tokenizer
from tests.conftest import build
from tests.gguf_build import GgufBuild

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers and its plugins warn on import

CALIBRATION = {
    "dataset": "text.txt", "samples": 24, "sequence_length": 64, "minimum_tokens": 16, "guided": True,
    "precision": "float32",
}  # fmt: skip
BITS = 5.5
VARIANTS: list[dict[str, Any]] = [
    {"format": "gguf", "type": "Q4_K_M", "imatrix": True, "name": "stock"},
    {"format": "gguf", "fit": {"bits": BITS}, "name": "fitted"},
    {"format": "gguf", "fit": {"vram": 824_490_000, "context": 512, "kv": "q8_0"}, "gptq": True, "name": "card"},
]
LLAMA_3B = TinyModel(3072, 8192, 28, 24, 8, 128256, tied=True)
LLAMA_8B = TinyModel(4096, 14336, 32, 32, 8, 128256)


class Made(GgufBuild):
    """One build of all variants, from guided statistics."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, VARIANTS, CALIBRATION, RunOptions(keep_intermediates=True))

    def record(self, variant: str) -> FitRecord:
        return read_record(self.artifact(variant).folder / NAME)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("fit"))


# --- the file ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["fitted", "card"])
def test_the_file_is_within_its_budget_and_has_the_chosen_types(made: Made, variant: str) -> None:
    path, record = made.file(variant), made.record(variant)
    assert path.stat().st_size == record.point.bytes <= record.budget_bytes
    reader = gguf.GGUFReader(path)
    types = {item.name: item.tensor_type.name for item in reader.tensors}
    assert {name: types[name] for name in record.types} == record.types
    assert set(record.types) == {name for name in types if "norm" not in name}
    for block in range(2):
        assert len({types[f"blk.{block}.attn_{part}.weight"] for part in "qkv"}) == 1
    assert len(set(record.types.values())) > 1
    assert ELEMENT_TYPES[types["output.weight"]] >= ELEMENT_TYPES["Q5_K"]
    assert made.artifact(variant).manifest.options["fit"]
    assert NAME in {item.path for item in made.artifact(variant).manifest.files}


def test_bits_are_those_of_all_tensors(made: Made) -> None:
    tensors = gguf.GGUFReader(made.file("fitted")).tensors
    bits = 8 * sum(int(item.n_bytes) for item in tensors) / sum(int(item.n_elements) for item in tensors)
    assert 0.93 * BITS < bits <= BITS  # a matrix is a tenth of the model: no finer steps


def test_the_estimate_of_the_file_is_within_the_usable_part_of_the_card(made: Made) -> None:
    file = read_gguf(made.file("card"))
    weights = sum(item.size_bytes for item in file.tensors.values())
    found = estimate(gguf_shape(file), weights, settings=EstimateSettings("llama.cpp", "q8_0"), context=512)
    usable = usable_bytes(824_490_000)
    assert found.upper_bytes <= usable
    smallest_step = min(item.elements for item in made.record("card").table.matrices.values()) // 8
    assert found.upper_bytes + 4 * smallest_step > usable or made.record("card").point.bytes > 1_400_000


def test_it_was_measured_against_the_best_stock_map_of_no_more_bytes(made: Made) -> None:
    record = made.record("fitted")
    assert record.against is not None
    assert record.measured is not None
    assert record.taken == ("fitted" if record.measured.chosen_kl <= record.measured.stock_kl else record.against)
    within = {name: item for name, item in record.table.stock_points().items() if item.bytes <= record.budget_bytes}
    assert within[record.against].loss == min(item.loss for item in within.values())
    facts = made.artifact("fitted").measurements()["fit"]
    assert facts["measured"] == record.measured.model_dump()
    assert [point[0] for point in facts["curve"]] == sorted(point[0] for point in facts["curve"])
    stock = read_gguf(made.file("stock"))
    mapped = record.table.stock["Q4_K_M"]
    assert mapped.bytes == stock.path.stat().st_size
    assert {name: stock.tensors[name].type for name in mapped.types} == mapped.types


def test_a_stock_map_that_measures_better_is_taken(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    better = Measured(chosen_kl=0.2, stock_kl=0.1, tokens=1)
    monkeypatch.setattr(fit_build, "_measure", lambda *_: better)
    workspace = replace(made.workspace, store=Store(made.root / "other"), reporter=ListReporter())
    (outcome,) = build(made.recipe, workspace, RunOptions(keep_intermediates=True), only=("fitted",), evaluate=False)
    assert outcome.artifact is not None
    record, before = read_record(outcome.artifact.folder / NAME), made.record("fitted")
    assert (record.taken, record.table) == (before.against, before.table)
    tensors = read_gguf(next(outcome.artifact.folder.glob("*bit.gguf"))).tensors
    assert {name: tensors[name].type for name in record.types} == record.table.stock[record.taken].types


def test_a_rebuild_is_identical(made: Made) -> None:
    """On two threads."""
    workspace = replace(made.workspace, store=Store(made.root / "again"), reporter=ListReporter())
    options = RunOptions(RunLimits(threads=2), keep_intermediates=True)
    (outcome,) = build(made.recipe, workspace, options, only=("fitted",), evaluate=False)
    assert outcome.artifact is not None
    assert outcome.artifact.manifest.digest == made.artifact("fitted").manifest.digest


# --- what types cost --------------------------------------------------------------------------------------------------


def test_rows_are_rounded_as_llama_cpp_rounds_them_in_its_file(made: Made) -> None:
    tensors = {item.name: item for item in gguf.GGUFReader(made.file("stock")).tensors}
    importance = read_imatrix(next(made.artifact("stock").folder.glob("*.imatrix.gguf")))
    source = made.checkpoint.read("model.layers.1.mlp.up_proj.weight").float().numpy()
    for name, values in (("blk.1.ffn_up.weight", source),):
        kind = tensors[name].tensor_type.name
        assert round_rows(kind, values, importance[name]).tobytes() == tensors[name].data.tobytes()
        assert round_rows(kind, values, None).tobytes() != tensors[name].data.tobytes()


def test_costs_are_half_the_weighted_output_error_of_the_guided_pass(made: Made, tmp_path: Path) -> None:
    """In float64, by gguf's reader of llama.cpp's own file; and a record that was cut short changes nothing."""
    assert made.recipe.calibration is not None
    ids = load_calibration_set(made.recipe.calibration, made.root, made.checkpoint.folder).token_ids
    seed = made.recipe.calibration.seed
    table = find_weights(
        made.checkpoint, Text.of(ids, seed, "cpu"), tmp_path / "guide", {}, device="cpu", precision="float32",
        reporter=SilentReporter(),
    )  # fmt: skip
    collector = FitCollector(tmp_path, tmp_path / "imatrix.safetensors")
    stock = {item.name: item for item in gguf.GGUFReader(made.file("stock")).tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    losses, checked = made.record("fitted").table.matrices, 0
    for block in stream_blocks(made.checkpoint, ids, precision="float32", guide=TokenWeights(table, (table,))):
        collector.add(block.index, [collector.solve(block)])
        for linear in block.layout.linears:
            name = str(names.get_name(linear.tensor, try_suffixes=(".weight",)))
            if "attn_q" in name or "attn_k" in name:
                continue  # in another order of rows
            weight = block.weights[linear.tensor].double()
            found = gguf.quants.dequantize(stock[name].data, stock[name].tensor_type)
            delta, gram = torch.from_numpy(found).double() - weight, block.grams[linear.input].matrix.double()
            expected = 0.5 * float((block.outputs[linear.tensor].double() * ((delta @ gram) * delta).sum(1)).sum())
            assert losses[name].losses[stock[name].tensor_type.name] == pytest.approx(expected, rel=0.02), name
            checked += 1
    assert checked == 10
    _check_vocabulary(made, TokenWeights(table, (table,)).vocabulary(2))
    collector.finish()
    request = _request(made, tmp_path)
    whole = find_costs(SilentReporter(), request)
    lines = (tmp_path / LOG_NAME).read_text().splitlines()
    (tmp_path / LOG_NAME).write_text("\n".join(lines[:5]) + "\n" + lines[5][:20])
    said = ListReporter()
    again = find_costs(said, request)
    assert (again.costs, again.unit, again.ratios) == (whole.costs, whole.unit, whole.ratios)
    assert any("4 matrices are known" in event.text for event in said.events)
    assert {name: cost.losses for name, cost in whole.costs.items()} == {n: c.losses for n, c in losses.items()}


def _check_vocabulary(made: Made, found: VocabularyStatistics) -> None:
    """Costs of head and embedding by the definition: an output's error, and that of each row as often as it comes."""
    stock = {item.name: item for item in gguf.GGUFReader(made.file("stock")).tensors}
    losses = made.record("fitted").table.matrices
    for name, tensor in (("output.weight", "lm_head.weight"), ("token_embd.weight", "model.embed_tokens.weight")):
        weight = made.checkpoint.read(tensor).double()
        delta = torch.from_numpy(gguf.quants.dequantize(stock[name].data, stock[name].tensor_type)).double() - weight
        if name == "output.weight":
            expected = 0.5 * float((found.outputs.double() * ((delta @ found.gram.double()) * delta).sum(1)).sum())
        else:
            expected = 0.5 * float((found.counts.double() * (delta.square() @ found.channels.double())).sum())
        assert losses[name].found == "head"
        assert losses[name].losses[stock[name].tensor_type.name] == pytest.approx(expected, rel=0.02), name


def test_the_head_is_solved_by_its_own_gram_matrix(made: Made) -> None:
    """Where types are chosen and statistics are guided: no other variant changes a byte."""
    measured = made.artifact("card").measurements()
    assert measured["layers"]["lm_head"]["loss"] < 0.9 * measured["layers"]["lm_head"]["nearest_loss"]
    assert set(measured["unsolved"]) == {"token_embd.weight"}


def _request(made: Made, scratch: Path) -> CostRequest:
    exact = scratch / "exact-F16.gguf"
    convert(SilentReporter(), ConvertRequest(made.checkpoint.folder, "F16", {"general.name": "tiny"}, None), exact)
    options = GgufOptions.model_validate({"fit": {"bits": BITS}})
    found = survey(options, dry_run(SilentReporter(), exact, survey_jobs(options, RunLimits())), _shape(made))
    return CostRequest(exact, made.checkpoint, scratch, "fitted", found.matrices, solved=False)


def _shape(made: Made) -> ModelShape:
    return ModelShape.from_config(made.checkpoint.config)


def test_rows_in_another_order_have_their_own_weights(made: Made) -> None:
    """Queries and keys: the converter interleaves the halves of each head."""
    exact = {item.name: item for item in gguf.GGUFReader(_exact(made)).tensors}
    source = made.checkpoint.read("model.layers.0.self_attn.q_proj.weight")
    found = torch.from_numpy(np.array(exact["blk.0.attn_q.weight"].data))
    order = column_order(found.T, source.T)
    assert order
    assert torch.equal(source[list(order)], found)


def _exact(made: Made) -> Path:
    path = made.root / "exact.gguf"
    if not path.is_file():
        convert(SilentReporter(), ConvertRequest(made.checkpoint.folder, "F16", {"general.name": "tiny"}, None), path)
    return path


def test_nearness_is_a_divergence(made: Made) -> None:
    exact = _exact(made)
    found = nearness(SilentReporter(), exact, [exact, made.file("fitted"), made.file("stock")], "x", 1)
    assert found.kl[0] == 0
    assert 0 < found.kl[1] < found.kl[2]
    assert found.tokens > 500


# --- the bytes --------------------------------------------------------------------------------------------------------


def headers_only(folder: Path, model: TinyModel) -> Path:
    """A checkpoint with a hole for its weights."""
    from quantize.files.safetensors import write_sparse

    folder.mkdir()
    write_json(folder / "config.json", model.config("F16") | {"max_position_embeddings": 131072})
    write_sparse(folder / "model.safetensors", {name: ("F16", shape) for name, shape in model.shapes().items()})
    write_tokenizer(folder, 384)
    return folder


class Sized:
    """A model of a real shape, by its headers."""

    def __init__(self, root: Path, model: TinyModel) -> None:
        folder = headers_only(root / "model", model)
        self.exact, self.options = root / "exact.gguf", GgufOptions.model_validate({"fit": {"bits": 4.5}})
        request = ConvertRequest(folder, "F16", {"general.name": "tiny"}, None)
        convert(SilentReporter(), request, self.exact, header_only=True)
        self.shape = ModelShape.from_config(json.loads((folder / "config.json").read_text()))
        self.found = dry_run(SilentReporter(), self.exact, survey_jobs(self.options, RunLimits()))

    def survey(self, fit: dict[str, Any]) -> Survey:
        return survey(self.options, self.found, self.shape, spec=GgufOptions.model_validate({"fit": fit}).fit)

    def table(self, seed: int) -> CostTable:
        """With losses as rounding has them, on matrices that matter differently."""
        random, surveyed = np.random.default_rng(seed), self.survey({"bits": 4.5})
        costs = {}
        for name, item in surveyed.matrices.items():
            weight = float(10 ** random.uniform(-3, 0))
            losses = {kind: weight * 4.0 ** -ELEMENT_TYPES[kind] for kind in item.wanted}
            costs[name] = Cost(elements=item.elements, allowed=item.allowed, losses=losses, found="gram")
        return surveyed.table(costs, unit="nats", solved=True)

    def bytes_of(self, types: dict[str, str]) -> int:
        """By llama.cpp's own dry run."""
        settings = settings_for(types, settings_of(self.options, RunLimits(), None), "Q4_K_M")
        (sized,) = dry_run(SilentReporter(), self.exact, [settings])
        assert isinstance(sized, SizedFile)
        assert {name: kind for name, kind, _ in sized.tensors if name in types} == types
        return sized.file_bytes


@pytest.fixture(scope="module", params=["3B", "8B"])
def sized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Sized:
    return Sized(tmp_path_factory.mktemp(request.param), LLAMA_3B if request.param == "3B" else LLAMA_8B)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Sized:
    """Rows that are no multiples of 256, as the demo model has them."""
    return Sized(tmp_path_factory.mktemp("narrow"), TinyModel(576, 1536, 30, 9, 3, 4096, tied=True))


def smallest_step(table: CostTable, types: dict[str, str]) -> int:
    """Bytes of the least that a matrix can grow by, where one alone can."""
    steps = []
    for name, kind in types.items():
        larger = [tensor_bytes(other, table.matrices[name].elements) for other in table.matrices[name].allowed]
        own = tensor_bytes(kind, table.matrices[name].elements)
        steps += [size - own for size in larger if size > own]
    return min(steps, default=1)


@given(share=st.floats(0, 1), seed=st.integers(0, 5))
@settings(max_examples=25, deadline=None)
def test_a_choice_is_never_over_its_budget_and_within_a_hundredth_of_it(sized: Sized, share: float, seed: int) -> None:
    table = sized.table(seed)
    budget = round(table.least_bytes + share * (table.most_bytes - table.least_bytes))
    found = table.choose(budget)
    assert found.bytes <= budget
    assert found.bytes >= 0.99 * budget or budget - found.bytes < smallest_step(table, dict(found.types))
    assert found.bound <= found.loss <= 1.05 * found.bound + 1e-12


def test_the_bytes_are_those_of_llama_cpp(sized: Sized, narrow: Sized) -> None:
    for model in (sized, narrow):
        table = model.table(1)
        for share in (0.0, 0.37, 1.0):
            found = table.choose(round(table.least_bytes + share * (table.most_bytes - table.least_bytes)))
            assert model.bytes_of(dict(found.types)) == found.bytes
    assert set(found.types.values()) <= set(NARROW) | {"Q4_K", "Q6_K"}  # 1,536 is a multiple of 256


def test_a_card_leaves_what_its_estimate_leaves(sized: Sized) -> None:
    """The 8 GB card of the issue: the most weights whose safe-upper figure is within 90 % of it."""
    surveyed = sized.survey({"gpu": "RTX 4060 8GB", "context": 8192})
    weights = surveyed.budget.file_bytes - surveyed.frame.header_bytes
    upper = [estimate(sized.shape, weights + more, context=8192).upper_bytes for more in (0, 1)]
    assert upper[0] <= usable_bytes(8 << 30) < upper[1]
    smaller = sized.survey({"gpu": "RTX 4060", "context": 8192, "kv": "q8_0"}).budget.file_bytes
    assert smaller > surveyed.budget.file_bytes


@pytest.mark.parametrize("fit", [{"size": "100M"}, {"bits": 1.5}, {"vram": "1200MiB", "context": 512}])
def test_what_is_too_small_is_refused_with_the_least_that_fits(sized: Sized, fit: dict[str, Any]) -> None:
    from quantize.errors import UsageError

    with pytest.raises(UsageError, match=r"the smallest file takes|beside weights") as caught:
        _ = sized.survey(fit).budget
    assert caught.value.hint is not None
    least = re.search(r"the least that would fit: (size|bits): ([\d.]+)", caught.value.hint)
    if "vram" not in fit:
        assert least is not None
        value = int(least[2]) if least[1] == "size" else float(least[2])
        assert sized.survey({least[1]: value}).budget.file_bytes >= sized.survey({"bits": 8}).sizes.least_bytes


# --- the recipe -------------------------------------------------------------------------------------------------------


def options(fit: dict[str, Any], **more: Any) -> GgufOptions:
    return GgufOptions.model_validate({"fit": fit, **more})


def test_a_variant_has_its_name_and_one_way_to_be_written() -> None:
    found = options({"gpu": "RTX 4060 8GB", "context": 8192, "concurrency": 2, "kv": "q8_0"}, gptq=True)
    assert found.variant_name() == "fit-rtx-4060-8gb-8192-x2-q8_0-gptq"
    assert options({"size": "2.2G"}).variant_name() == "fit-2362232012"
    assert options({"size": "512M"}).variant_name() == "fit-512m"
    assert options({"bits": 4.5}, gptq=True).variant_name() == "fit-4.5bit-gptq"
    assert options({"bits": 4.5}) == options({"bits": 4.5}, imatrix=True)
    data = options({"bits": 4.5}).model_dump(mode="json")
    assert "type" not in data
    assert data["fit"] == {"bits": 4.5, "check": True}
    assert GgufOptions.model_validate(data) == options({"bits": 4.5})
    assert "fit" not in GgufOptions(type="Q4_K_M").model_dump()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"fit": {}}, "no budget"),
        ({"fit": {"size": "1G", "bits": 4.0}}, "more than one budget"),
        ({"fit": {"bits": 4.0, "context": 512}}, "goes with `gpu`"),
        ({"fit": {"gpu": "RTX 4061"}}, r"unknown card 'RTX 4061' \|\| did you mean RTX 4060"),
        ({"fit": {"gpu": "RTX 4060", "kv": "q7"}}, "unknown type of a KV cache"),
        ({"fit": {"bits": 4.0}, "type": "Q4_K_M"}, "`type` does not go with `fit`"),
        ({"fit": {"bits": 4.0}, "pure": True}, "`pure` does not go with `fit`"),
        ({"fit": {"bits": 4.0}, "imatrix": False}, "fit makes an importance matrix"),
        ({}, "key `type` is missing"),
    ],
)
def test_what_can_not_be_meant_is_refused(data: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        GgufOptions.model_validate(data)


def test_floors_and_rows() -> None:
    assert candidates("blk.0.ffn_up.weight", 48, tied=False) == ()
    assert candidates("output.weight", 3072, tied=False) == ("Q5_K", "Q6_K", "Q8_0")
    assert candidates("token_embd.weight", 3072, tied=True) == ("Q5_K", "Q6_K", "Q8_0")
    assert "Q4_K" in candidates("token_embd.weight", 3072, tied=False)
    assert candidates("token_embd.weight", 576, tied=True) == ("Q5_0", "Q5_1", "Q8_0")


def test_a_plan_says_the_most_that_there_will_be(made: Made) -> None:
    workspace = replace(made.workspace, store=Store(made.root / "empty"))
    sized = size_plan(make_plan(made.recipe, workspace), workspace, RunLimits())
    for job in sized.jobs:
        written = sum(path.stat().st_size for path in made.artifact(job.name).folder.glob("*.gguf"))
        assert job.size is not None
        assert job.size.at_most == (job.name != "stock")
        assert written <= job.size.file_bytes <= (1.15 * written if job.size.at_most else written)
        assert any("llama.cpp's own maps near it" in line for line in job.size.notes) == job.size.at_most


# --- the commands -----------------------------------------------------------------------------------------------------


def run(made: Made, *arguments: str, store: str = "store") -> Any:
    import click.testing

    from quantize.cli import main

    environment = {"QUANTIZE_STORE": str(made.root / store), "QUANTIZE_CACHE": str(made.root / "cache")}
    return click.testing.CliRunner().invoke(main, [*arguments, "--wide"], env=environment)


def test_the_command_answers_before_and_after_a_build(made: Made) -> None:
    recipe, size = str(made.recipe.path), ["--size", "1000000"]
    before, after = (run(made, "fit", recipe, *size, store=store) for store in ("none", "store"))
    assert (before.exit_code, after.exit_code) == (0, 0), before.output + after.output
    assert "no variant with `fit` is built yet" in before.output
    assert "Q4_K_M" in before.output
    assert "too large" in before.output
    assert "nats a token, from gradients" in after.output
    assert "build   - {format: gguf, fit: {size: 1000000}, gptq: true}" in after.output
    found = json.loads(run(made, "fit", recipe, *size, "--json").output)[0]
    table = made.record("card").table
    assert found["answer"]["best"]["bytes"] == table.choose(1_000_000).bytes
    assert found["options"]["gptq"] is True
    own = json.loads(run(made, "fit", recipe, "--json").output)
    assert {item["name"]: item["answer"]["best"]["bytes"] for item in own} == {
        name: made.record(name).table.choose(made.record(name).budget_bytes).bytes for name in ("fitted", "card")
    }


def test_report_card_and_show_say_what_was_chosen(made: Made) -> None:
    from quantize.provenance.card import render_card

    assert run(made, "report", "tiny", "--output", str(made.root / "page")).exit_code == 0
    page = (made.root / "page" / "report.html").read_text()
    assert "Types chosen to fit" in page
    assert page.count("predicted loss, nats a token against size") == 2
    for name in ("fitted", "card"):
        record, artifact = made.record(name), made.artifact(name)
        text = render_card(artifact.manifest, artifact.measurements())
        assert f"| this file | {record.point.bytes:,} | {record.point.loss:.4g} |" in text
        assert "| Q4_K_M | " in text
        assert ("Error feedback: 15 matrices solved; 1 not: token_embd.weight" in text) == (name == "card")
        shown = run(made, "show", f"tiny/{name}").output
        assert f"{record.point.bytes:,} of {record.budget_bytes:,} bytes" in shown
        assert ("15 matrices solved" in shown) == (name == "card")


def test_the_plan_draws_the_curve_with_stock_maps_on_it(made: Made) -> None:
    found = run(made, "plan", str(made.recipe.path))
    assert found.exit_code == 0, found.output
    lines = found.output.splitlines()
    start = lines.index("curve   fitted: size and predicted loss, nats a token")
    shown = lines[start + 1 : next(place for place in range(start + 1, len(lines)) if not lines[place].startswith(" "))]
    assert any(line.endswith(" Q4_K_M") for line in shown)
    assert sum(line.endswith(" this file") for line in shown) == 1
    assert sum(line.endswith(" chosen") for line in shown) >= 10
    assert any(line.startswith("note    fitted: at most ") for line in lines)


@pytest.mark.parametrize(
    ("fit", "said"),
    [
        (["--size", "100K"], "the least that would fit: size: 5"),
        (["--vram", "500MiB", "--context", "512"], "beside weights it takes up to"),
        (["--gpu", "RTX 4061"], "did you mean RTX 4060"),
        (["--gpu", "RTX 4060", "--context", "100000"], "more than the model's own context of 512"),
    ],
)
def test_what_can_not_fit_is_refused_with_exit_code_2(made: Made, fit: list[str], said: str) -> None:
    found = run(made, "fit", str(made.recipe.path), *fit)
    assert found.exit_code == 2, found.output
    assert said in found.output


def test_a_plan_of_a_budget_that_is_too_small_is_refused(made: Made) -> None:
    path = made.root / "small.yaml"
    write_recipe(path, made.checkpoint.folder, [{"format": "gguf", "fit": {"size": "100K"}}], calibration=CALIBRATION)
    found = run(made, "plan", str(path))
    assert found.exit_code == 2, found.output
    assert "the smallest file takes" in found.output
    least = re.search(r"the least that would fit: size: (\d+)", found.output)
    assert least is not None
    variant = {"format": "gguf", "fit": {"size": int(least[1])}}
    write_recipe(path, made.checkpoint.folder, [variant], calibration=CALIBRATION)
    assert run(made, "plan", str(path)).exit_code == 0
