"""What every format owes, and what some owe beside it, on one build of a tiny checkpoint with one calibration pass.

The formats are those that are installed: GPTQ, AWQ, bitsandbytes, GGUF, and the toy of tests/toy_format, a plugin. What
is asked of all of them is at the end. Oracles: transformers with gptqmodel or bitsandbytes (inside verify, in a
worker), transformers' own save_pretrained, gguf's reader, safetensors' own reader, and activations recorded from the
whole model.
"""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click.testing
import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from quantize.build.execution import RunOptions
from quantize.build.plan import make_plan
from quantize.build.size import size_plan
from quantize.calibration.budget import pass_bytes
from quantize.cli import main
from quantize.cli.requirements import required_by
from quantize.errors import RefusedError, VerifyError
from quantize.estimate.vram import RUNTIMES, estimate
from quantize.evaluate.structure import NEAR, QUANTIZED, TEMPLATE, Intended, check_structure
from quantize.events import ListReporter
from quantize.formats import builders, find_format, formats, option_models, plugin_of
from quantize.formats.base import RunLimits
from quantize.formats.format import Format
from quantize.model.checkpoint import open_checkpoint
from quantize.model.shape import ModelShape
from quantize.provenance.card import render_card
from quantize.recipe.model import Recipe, load_recipe
from quantize.runtimes.base import ModelRef
from quantize.store.artifact import Artifact
from quantize.store.store import Store
from quantize.store.workspace import Workspace
from quantize.system.cache import Cache
from quantize.system.process import run_step
from quantize.system.processor import MKL_MODE, device_name, strict_mode
from quantize.testing import TinyModel, make_checkpoint, write_recipe
from tests.conftest import build
from tests.contract_steps import compute
from tests.elsewhere import rebuild_elsewhere
from tests.kernel_steps import load_without_compiler, try_kernels
from tests.toy import toy_installed

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers and its plugins warn on import

VARIANTS: list[dict[str, Any]] = [
    {"format": "gptq", "group_size": 64},
    {"format": "gptq", "bits": 8, "group_size": 32, "symmetric": False},
    {"format": "awq", "group_size": 64},
    {"format": "awq", "group_size": 64, "rounding": "gptq"},
    {"format": "gguf", "type": "Q4_K_M", "imatrix": True},
    {"format": "gguf", "type": "IQ2_XXS", "imatrix": True},
    {"format": "gguf", "fit": {"bits": 5}},
    {"format": "bitsandbytes", "type": "int8"},
    {"format": "bitsandbytes", "type": "nf4"},
    {"format": "compressed-tensors", "scheme": "W4A16", "group_size": 64},
    {"format": "compressed-tensors", "scheme": "FP8_DYNAMIC"},
    {"format": "mlx"},
    {"format": "toy"},
    {"format": "toy", "search": True},
]
# One variant of each format, for what is asked of its facets.
OF_FORMAT = {
    "gptq": "gptq-int4-g64", "awq": "awq-int4-g64", "gguf": "q4_k_m-imatrix", "bitsandbytes": "bnb-nf4",
    "compressed-tensors": "ct-w4a16-g64", "mlx": "mlx-int4-g64", "toy": "toy-int8-searched",
}  # fmt: skip
UNCALIBRATED = ("bnb-int8", "bnb-nf4", "ct-fp8-dynamic", "toy-int8")
CALIBRATION = {
    "dataset": "text.txt", "samples": 8, "sequence_length": 64, "minimum_tokens": 16, "precision": "float32",
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One build of all variants."""

    recipe: Recipe
    store: Store
    cache: Cache
    reporter: ListReporter

    def artifact(self, variant: str) -> Artifact:
        return self.store.find(f"tiny/{variant}")


def run_all(checkpoint: Path, root: Path, threads: int, only: tuple[str, ...] = ()) -> Run:
    root.mkdir()
    paragraphs = [f"Paragraph {index}: the quick brown fox jumps over the lazy dog. " * 3 for index in range(12)]
    (root / "text.txt").write_text("\n\n".join(paragraphs))
    recipe = load_recipe(
        write_recipe(root / "tiny.yaml", checkpoint, VARIANTS, calibration=CALIBRATION), option_models()
    )
    run = Run(recipe, Store(root / "artifacts"), Cache(root / "cache"), ListReporter())
    workspace, options = Workspace(run.store, run.cache, run.reporter), RunOptions(RunLimits(threads=threads))
    outcomes = build(recipe, workspace, options, only=only, evaluate=False)
    assert {item.variant: str(item.error) for item in outcomes if item.error} == {}
    return run


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("calibrated") / "tiny", TinyModel())


@pytest.fixture(scope="module")
def run(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A build on two threads, in an environment that says nothing of MKL's mode."""
    with toy_installed(), pytest.MonkeyPatch.context() as patch:
        patch.delenv(MKL_MODE)
        made = run_all(checkpoint, tmp_path_factory.mktemp("first") / "run", threads=2)
        patch.undo()
        yield made


def tensors_of(artifact: Artifact) -> dict[str, torch.Tensor]:
    return load_file(artifact.folder / "model.safetensors")


def test_every_variant_is_built_and_named(run: Run) -> None:
    names = {item.manifest.variant for item in run.store.artifacts()}
    assert names == {
        "gptq-int4-g64", "gptq-int8-g32-asym", "awq-int4-g64", "awq-int4-g64-gptq", "q4_k_m-imatrix", "iq2_xxs-imatrix",
        "fit-5bit", "bnb-int8", "bnb-nf4", "ct-w4a16-g64", "ct-fp8-dynamic", "mlx-int4-g64", "toy-int8",
        "toy-int8-searched",
    }  # fmt: skip


def test_one_pass_served_all_calibrated_variants(run: Run) -> None:
    passes = [event.text for event in run.reporter.events if event.text.startswith("calibration pass for")]
    assert len(passes) == 1
    measured = [
        json.dumps(item.measurements()["calibration_pass"], sort_keys=True)
        for item in run.store.artifacts()
        if item.manifest.calibration is not None
    ]
    assert len(measured) == 10
    assert len(set(measured)) == 1


def test_the_pass_took_no_more_memory_than_the_plan_says_it_needs(run: Run, checkpoint: Path) -> None:
    variants = [item for item in run.recipe.variants if builders()[item.format].needs_calibration(item.options)]
    parts = [(builders()[item.format], item.options) for item in variants]
    taken = run.artifact("gptq-int4-g64").measurements()["calibration_pass"]["peak_memory_bytes"]
    assert 0.35 < taken / pass_bytes(open_checkpoint(checkpoint), parts, 2) <= 1  # a part is counted for each variant


def test_the_manifest_has_the_text_by_hash(run: Run) -> None:
    entries = {item.manifest.variant: item.manifest.calibration for item in run.store.artifacts()}
    assert [entries.pop(name) for name in UNCALIBRATED] == [None] * 4
    (entry,) = {json.dumps(item.model_dump(), sort_keys=True) for item in entries.values() if item}
    data = json.loads(entry)
    assert data["sequences"] == 8
    assert 8 * 16 <= data["tokens"] <= 8 * 64
    assert data["spec"]["dataset"] == "text.txt"
    assert data["spec"]["precision"] == "float32"


def test_the_manifest_has_the_kind_of_processor_that_the_pass_ran_on(run: Run) -> None:
    """And what is not calibrated, that its numbers were computed on; the GGUF types here are calibrated too."""
    kinds = {item.manifest.variant: item.manifest.device for item in run.store.artifacts()}
    assert kinds.pop("toy-int8") is None, "numpy rounds it, on any processor alike"
    assert {"bnb-int8", "bnb-nf4", "ct-fp8-dynamic", "q4_k_m-imatrix"} < set(kinds)
    assert set(kinds.values()) == {device_name("cpu")}
    tools = {item.manifest.variant for item in run.store.artifacts() if "torch" in item.manifest.tools}
    assert tools == set(kinds), "the kind is beside the tools wherever torch is among them"
    assert f"MKL {strict_mode()}" in kinds["gptq-int4-g64"]


@pytest.mark.parametrize(
    "variant",
    ["gptq-int4-g64", "awq-int4-g64", "awq-int4-g64-gptq", "q4_k_m-imatrix", "bnb-int8", "toy-int8-searched"],
)
def test_the_same_digest_from_the_manifest_alone_elsewhere(run: Run, variant: str, tmp_path: Path) -> None:
    """One of each solver, each in a pass of its own, on one thread, with other locale, umask, hash seed and folders."""
    renamed = shutil.copy(run.recipe.path.parent / "text.txt", tmp_path / "any name.md")
    options = ["--calibration", str(renamed)] if variant == "gptq-int4-g64" else []
    data = rebuild_elsewhere(run.artifact(variant).folder, tmp_path, *options)
    assert (data["tools"], data["device"], data["manifest_fields"], data["differences"]) == ([], None, [], [])
    assert data["rebuilt_digest"] == data["digest"] == run.artifact(variant).manifest.digest


def test_another_kind_of_processor_is_told_from_another_result(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's and MKL's kernels for processors of long ago stand for one: codes may differ, and that is why."""
    artifact = run.artifact("gptq-int4-g64")
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    monkeypatch.setenv(MKL_MODE, "COMPATIBLE")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    result = click.testing.CliRunner().invoke(main, ["rebuild", str(artifact.folder)])
    lines = result.stdout.splitlines()
    told = f"made on another kind of processor: {artifact.manifest.device} there, cpu DEFAULT"
    assert lines[0].startswith(told)
    assert lines[0].endswith(", MKL COMPATIBLE here")
    assert f"gptq-int4-g64: warning: {told}" in result.stderr
    assert not [line for line in lines if line.startswith("manifest:")]
    assert f"{'identical' if result.exit_code == 0 else 'different'} (" in lines[-1]
    assert "the digests differ" in lines[-1]


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [("Another text, and not a short one. " * 40, 3, "the calibration text is not the one that it was built with"),
     (None, 2, "its calibration text ")],
)  # fmt: skip
def test_rebuilding_with_another_text_is_refused_before_the_pass(
    run: Run, text: str | None, code: int, message: str, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / "other.txt").write_text(text)
    folder = str(run.artifact("gptq-int4-g64").folder)
    arguments = ["rebuild", folder, "--calibration", str(tmp_path / "other.txt"), "--quiet"]
    result = click.testing.CliRunner().invoke(main, arguments)
    assert (result.exit_code, result.stdout) == (code, "")
    assert message in result.stderr


def test_size_equals_plan(run: Run, tmp_path: Path) -> None:
    workspace = Workspace(Store(tmp_path / "empty"), run.cache, ListReporter())
    plan = size_plan(make_plan(run.recipe, workspace), workspace, RunLimits())
    assert [str(job.refusal) for job in plan.jobs if job.refusal] == []
    for job in plan.jobs:
        assert job.size is not None
        manifest = run.artifact(job.variant.name).manifest
        written = sum(entry.size_bytes for entry in manifest.files if entry.path not in ("LICENSE", "fit.json"))
        if job.size.at_most:  # types are chosen after the pass; a matrix is a tenth of this model
            assert 0.9 * job.size.file_bytes < written <= job.size.file_bytes
            assert manifest.bits_per_weight <= job.size.bits_per_weight <= 5
            continue
        assert (job.variant.name, job.size.file_bytes) == (job.variant.name, written)
        assert job.size.bits_per_weight == manifest.bits_per_weight


@pytest.mark.parametrize("variant", ["gptq-int4-g64", "bnb-int8", "toy-int8"])
def test_what_is_kept_is_all_but_the_linears(run: Run, checkpoint: Path, variant: str) -> None:
    kept = {item.tensor for item in run.artifact(variant).manifest.kept_in_high_precision}
    assert kept == {name for name in open_checkpoint(checkpoint).tensors if "proj" not in name}


@pytest.mark.parametrize("variant", ["gptq-int4-g64", "gptq-int8-g32-asym", "awq-int4-g64", "awq-int4-g64-gptq"])
def test_verify_found_every_linear_as_gptqmodel_unpacks_it(run: Run, variant: str) -> None:
    facts = run.artifact(variant).measurements()["verify"]
    assert facts["linears"] == 14  # two blocks of seven
    assert len(facts["tokens"]) == 16


def test_gptq_leaves_less_than_rounding_to_nearest(run: Run) -> None:
    layers = run.artifact("gptq-int4-g64").measurements()["layers"]
    assert len(layers) == 14
    assert all(0 < item["loss"] <= item["nearest_loss"] < 1 for item in layers.values())


def test_error_feedback_leaves_less_than_awq_alone(run: Run) -> None:
    plain, fed = (
        sum(item["loss"] for item in run.artifact(name).measurements()["layers"].values())
        for name in ("awq-int4-g64", "awq-int4-g64-gptq")
    )
    assert fed < plain


def test_what_is_not_packed_is_the_source_bit_for_bit(run: Run, checkpoint: Path) -> None:
    source = load_file(checkpoint / "model.safetensors")
    written = tensors_of(run.artifact("gptq-int4-g64"))
    for name, tensor in source.items():
        if "proj" not in name:
            assert torch.equal(written[name], tensor)


@pytest.mark.parametrize(("kind", "flag"), [("int8", "load_in_8bit"), ("nf4", "load_in_4bit")])
def test_bitsandbytes_tensors_are_what_transformers_saves(
    run: Run, checkpoint: Path, tmp_path: Path, kind: str, flag: str
) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {flag: True}
    if kind == "nf4":
        options |= {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float16}
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, quantization_config=BitsAndBytesConfig(**options), device_map="cpu", dtype=torch.float16
    )
    model.save_pretrained(tmp_path / "theirs")
    theirs, ours = load_file(tmp_path / "theirs" / "model.safetensors"), tensors_of(run.artifact(f"bnb-{kind}"))
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name
    saved = json.loads((tmp_path / "theirs" / "config.json").read_text())["quantization_config"]
    config = json.loads((run.artifact(f"bnb-{kind}").folder / "config.json").read_text())["quantization_config"]
    assert config == saved


def test_the_importance_matrix_is_the_mean_square_of_what_each_linear_reads(run: Run, checkpoint: Path) -> None:
    from transformers import AutoModelForCausalLM

    from quantize.calibration.text import load_calibration_set

    assert run.recipe.calibration is not None
    ids = load_calibration_set(run.recipe.calibration, run.recipe.path.parent, checkpoint).token_ids
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    sums: dict[str, torch.Tensor] = {}

    def add(key: str) -> Any:
        def hook(_module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            sums[key] = sums.get(key, torch.zeros(inputs[0].shape[-1])) + inputs[0].reshape(
                -1, inputs[0].shape[-1]
            ).square().sum(0)

        return hook

    layers = model.model.layers
    layers[0].self_attn.q_proj.register_forward_pre_hook(add("blk.0.attn_q.weight"))
    layers[1].mlp.down_proj.register_forward_pre_hook(add("blk.1.ffn_down.weight"))
    with torch.inference_mode():
        for row in ids:
            model(input_ids=torch.tensor([row]))
    (path,) = run.artifact("q4_k_m-imatrix").folder.glob("*.imatrix.gguf")
    reader = gguf.GGUFReader(path)
    found = {item.name: np.asarray(item.data) for item in reader.tensors}
    assert reader.fields["general.type"].contents() == "imatrix"
    assert len(found) == 2 * 14
    for name, expected in sums.items():
        assert found[f"{name}.counts"].item() == sum(map(len, ids))
        np.testing.assert_allclose(found[f"{name}.in_sum2"].reshape(-1), expected.numpy(), rtol=2e-4)


def test_llama_cpp_used_the_importance_matrix(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "plain.yaml", checkpoint, [{"format": "gguf", "type": "Q4_K_M"}])
    workspace = Workspace(Store(tmp_path / "plain"), run.cache, ListReporter())
    (plain,) = build(load_recipe(path, option_models()), workspace, evaluate=False)
    assert plain.artifact is not None
    weighted = run.artifact("q4_k_m-imatrix").folder
    (first,) = plain.artifact.folder.glob("*.gguf")
    (second,) = [item for item in weighted.glob("*.gguf") if not item.name.endswith(".imatrix.gguf")]
    one, two = ({t.name: t.data.tobytes() for t in gguf.GGUFReader(item).tensors} for item in (first, second))
    assert one.keys() == two.keys()
    assert sum(one[name] != two[name] for name in one) >= 10


@pytest.mark.parametrize(
    ("variant", "tensor", "spoil", "message"),
    [
        ("gptq-int4-g64", "model.layers.1.mlp.up_proj.scales", float("nan"), "unpacks differently|not finite"),
        ("awq-int4-g64", "model.layers.0.input_layernorm.weight", float("inf"), "not finite"),
        ("bnb-int8", "model.layers.1.mlp.down_proj.SCB", float("nan"), "not finite"),
        ("ct-w4a16-g64", "model.layers.1.mlp.up_proj.weight_scale", float("nan"), "unpacks differently|not finite"),
        ("mlx-int4-g64", "model.layers.0.self_attn.k_proj.biases", float("nan"), "unpacks differently|not finite"),
    ],
)
def test_a_damaged_tensor_is_refused(
    run: Run, checkpoint: Path, tmp_path: Path, variant: str, tensor: str, spoil: float, message: str
) -> None:
    artifact = run.artifact(variant)
    folder = Path(shutil.copytree(artifact.folder, tmp_path / "spoilt"))
    tensors = load_file(folder / "model.safetensors")
    tensors[tensor] = torch.full_like(tensors[tensor], spoil)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    builder = builders()[artifact.manifest.format]
    with pytest.raises(VerifyError, match=message):
        builder.verify(folder, open_checkpoint(checkpoint), RunLimits(), ListReporter())


@pytest.mark.parametrize(("variant", "instead"), [("gptq-int4-g64", "TorchLinear"), ("awq-int4-g64", "AwqTorchLinear")])
def test_a_kernel_that_can_not_be_compiled_is_replaced_and_said(run: Run, variant: str, instead: str) -> None:
    """As on a machine with a GPU and its driver, and no nvcc: gptqmodel's first choice raises ModuleNotFoundError."""
    artifact = run.artifact(variant)
    assert artifact.measurements()["verify"]["kernel"]
    model = ModelRef(artifact.folder, artifact.manifest.format)
    first, second, warnings, same = run_step("loading", run.reporter, load_without_compiler, model)
    assert (first != second, second) == (True, instead)
    (said,) = warnings
    assert said.startswith(f"{instead} computes, slower than what could: the torch.ops kernels are not installed")
    assert same


@pytest.mark.parametrize(("variant", "on_gpu"), [("gptq-int4-g64", True), ("awq-int4-g64", False)])
def test_verification_on_a_gpu_tries_the_kernels_there(
    run: Run, checkpoint: Path, variant: str, on_gpu: bool
) -> None:
    """By products. AWQ on the CPU alone: gptqmodel indexes with a list there, which the emulated GPU does not take."""
    artifact, source = run.artifact(variant), open_checkpoint(checkpoint)
    linears = artifact.measurements()["verify"]["linears"]
    step = partial(try_kernels, on_gpu=on_gpu)
    good, said, facts, asked = run_step("trying", run.reporter, step, artifact.folder, artifact.manifest.format, source)
    assert good == linears
    assert "computes otherwise in gptqmodel's" in said
    if on_gpu:
        assert (asked, facts["linears"], len(facts["tokens"])) == (["cuda:0"], linears, 16)


# --- every format, facet by facet -------------------------------------------------------------------------------------


@pytest.fixture(params=OF_FORMAT)
def made(request: pytest.FixtureRequest, run: Run) -> Artifact:
    """One artifact of each format."""
    return run.artifact(OF_FORMAT[request.param])


@pytest.fixture
def kind(made: Artifact) -> Format:
    return find_format(made.manifest.format)


@pytest.fixture
def model(made: Artifact, kind: Format) -> ModelRef:
    main = kind.layout.main_file(made.folder)
    return ModelRef(made.folder, kind.name, main.name if main else None)


def test_no_format_is_left_out(run: Run) -> None:
    """A new one is held to all that follows as soon as it is installed: give it a variant above."""
    assert set(OF_FORMAT) == set(builders())
    assert {item["format"] for item in VARIANTS} == set(builders())


def test_what_it_needs_is_known(kind: Format) -> None:
    needed = {item.name for item in required_by(kind)}
    assert kind.runtime is not None
    plugin = plugin_of(kind.name)
    assert {*kind.runtime.packages, *(item.package for item in kind.probes)} - needed <= {plugin and plugin.name}
    assert kind.runtime.devices.startswith("CPU")
    assert kind.revision >= 1


def test_its_parts_go_to_other_processes(kind: Format) -> None:
    for part in (kind.builder, kind.runtime, *kind.probes):
        assert type(pickle.loads(pickle.dumps(part))) is type(part)


def test_only_it_knows_its_artifacts(made: Artifact, kind: Format, model: ModelRef) -> None:
    assert [name for name, item in formats().items() if item.layout.recognizes(model.path)] == [kind.name]
    assert kind.layout.main_name(entry.path for entry in made.manifest.files) == model.main_file
    assert not kind.layout.recognizes(made.folder / "manifest.json")


def test_headers_say_what_the_manifest_says(made: Artifact, kind: Format, model: ModelRef, checkpoint: Path) -> None:
    found = kind.layout.measure(model.path)
    source = ModelShape.from_config(open_checkpoint(checkpoint).config)
    assert (found.shape.layers, found.shape.vocab_size) == (source.layers, source.vocab_size)
    assert found.shape.kv_layers == source.kv_layers
    names = kind.layout.weight_names(entry.path for entry in made.manifest.files)
    tensors = [item for name in names for item in kind.layout.read(made.folder / name).tensors.values()]
    assert found.weights_bytes == sum(item.size_bytes for item in tensors)
    assert 8 * found.weights_bytes / made.manifest.source.parameters == pytest.approx(
        made.manifest.bits_per_weight, abs=1e-4
    )


def test_its_chat_template_is_the_sources(kind: Format, model: ModelRef, checkpoint: Path) -> None:
    assert kind.layout.chat_template(model.path) == open_checkpoint(checkpoint).chat_template is not None


def test_nothing_is_left_and_every_group_is_near(made: Artifact, model: ModelRef, checkpoint: Path) -> None:
    manifest = made.manifest
    intended = Intended(manifest.bits, manifest.group_size, manifest.options)
    checks = check_structure(ListReporter(), model, checkpoint, intended)
    assert checks == dict.fromkeys((TEMPLATE, QUANTIZED, NEAR), "")


def test_the_runtime_computes_with_the_weights_that_are_read(kind: Format, model: ModelRef, checkpoint: Path) -> None:
    """Both as evaluation opens it and as the gateway does."""
    found = run_step("computing", ListReporter(), compute, model, checkpoint)
    assert kind.runtime is not None
    assert found.runtime == (kind.runtime.name, kind.runtime.name)
    assert found.answered == found.served
    assert found.from_weights < 0.1 * found.from_source


def test_its_memory_is_that_of_a_runtime_that_is_known(made: Artifact, kind: Format, model: ModelRef) -> None:
    assert kind.runtime is not None
    assert {kind.runtime.memory, kind.vram.runtime} <= set(RUNTIMES)
    found = kind.layout.measure(model.path)
    guess = estimate(found.shape, found.weights_bytes, profile=kind.vram, context=256)
    assert found.weights_bytes < guess.expected_bytes <= guess.upper_bytes


def test_its_card_says_how_it_is_run(made: Artifact, kind: Format) -> None:
    ways = kind.card.ways(made.manifest.options)
    text = render_card(made.manifest)
    assert ways
    for way in ways:
        assert f"\n{way.runtime}:\n\n```{way.language}\n" in text
    assert "{file}" not in text
    assert "{name}" not in text
    assert all(f"- {sentence}\n" in text for sentence in kind.card.limits(made.manifest.options))
    assert all(sentence.endswith(".") for sentence in kind.card.limits(made.manifest.options))


def test_what_else_takes_it_is_said_or_refused(made: Artifact, kind: Format, model: ModelRef) -> None:
    answer = kind.handover.vllm(made.manifest.options)
    assert isinstance(answer, str) or (answer.reason and answer.hint)
    assert not kind.handover.llama_cpp_file or model.main_file is not None
    assert re.fullmatch(r"[A-Za-z0-9_.-]+", kind.quantized_as(made.manifest.options))


def test_every_tensor_in_high_precision_has_its_reason(made: Artifact) -> None:
    assert made.manifest.kept_in_high_precision
    assert all(item.reason and item.type for item in made.manifest.kept_in_high_precision)


def test_what_is_cut_short_is_refused(made: Artifact, kind: Format, checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made.folder, tmp_path / "short"))
    (name, *_) = kind.layout.weight_names(entry.path for entry in made.manifest.files)
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2])
    assert kind.builder is not None
    with pytest.raises(RefusedError):
        kind.builder.verify(folder, open_checkpoint(checkpoint), RunLimits(), ListReporter())
