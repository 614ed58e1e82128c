"""GPTQ, AWQ, bitsandbytes and imatrix GGUF, end to end on a tiny checkpoint: one pass, one contract.

Oracles: transformers with gptqmodel or bitsandbytes (inside verify, in a worker), transformers' own save_pretrained,
gguf's reader, safetensors' own reader, and activations recorded from the whole model.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
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
from quantize.errors import VerifyError
from quantize.events import ListReporter
from quantize.formats import builders, option_models
from quantize.formats.base import RunLimits
from quantize.model.checkpoint import open_checkpoint
from quantize.recipe.model import Recipe, load_recipe
from quantize.runtimes.base import ModelRef
from quantize.store.artifact import Artifact
from quantize.store.store import Store
from quantize.store.workspace import Workspace
from quantize.system.cache import Cache
from quantize.system.process import run_step
from quantize.system.processor import MKL_MODE, device_name, strict_mode
from quantize.testing import TinyModel, make_checkpoint, write_recipe, write_weights
from tests.conftest import build
from tests.elsewhere import rebuild_elsewhere
from tests.kernel_steps import load_without_compiler

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers and its plugins warn on import

VARIANTS: list[dict[str, Any]] = [
    {"format": "gptq", "group_size": 64},
    {"format": "gptq", "bits": 8, "group_size": 32, "symmetric": False},
    {"format": "awq", "group_size": 64},
    {"format": "awq", "group_size": 64, "rounding": "gptq"},
    {"format": "gguf", "type": "Q4_K_M", "imatrix": True},
    {"format": "gguf", "type": "IQ2_XXS", "imatrix": True},
    {"format": "bitsandbytes", "type": "int8"},
    {"format": "bitsandbytes", "type": "nf4"},
]
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
def run(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A build on two threads, in an environment that says nothing of MKL's mode."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(MKL_MODE)
        return run_all(checkpoint, tmp_path_factory.mktemp("first") / "run", threads=2)


def tensors_of(artifact: Artifact) -> dict[str, torch.Tensor]:
    return load_file(artifact.folder / "model.safetensors")


def test_every_variant_is_built_and_named(run: Run) -> None:
    names = {item.manifest.variant for item in run.store.artifacts()}
    assert names == {
        "gptq-int4-g64", "gptq-int8-g32-asym", "awq-int4-g64", "awq-int4-g64-gptq", "q4_k_m-imatrix", "iq2_xxs-imatrix",
        "bnb-int8", "bnb-nf4",
    }  # fmt: skip


def test_one_pass_served_all_calibrated_variants(run: Run) -> None:
    passes = [event.text for event in run.reporter.events if event.text.startswith("calibration pass for")]
    assert len(passes) == 1
    measured = [
        json.dumps(item.measurements()["calibration_pass"], sort_keys=True)
        for item in run.store.artifacts()
        if item.manifest.calibration is not None
    ]
    assert len(measured) == 6
    assert len(set(measured)) == 1


def test_the_pass_took_no_more_memory_than_the_plan_says_it_needs(run: Run, checkpoint: Path) -> None:
    variants = [item for item in run.recipe.variants if builders()[item.format].needs_calibration(item.options)]
    parts = [(builders()[item.format], item.options) for item in variants]
    taken = run.artifact("gptq-int4-g64").measurements()["calibration_pass"]["peak_memory_bytes"]
    assert 0.5 < taken / pass_bytes(open_checkpoint(checkpoint), parts, 2) <= 1


def test_the_manifest_has_the_text_by_hash(run: Run) -> None:
    entries = {item.manifest.variant: item.manifest.calibration for item in run.store.artifacts()}
    assert entries.pop("bnb-int8") is None
    assert entries.pop("bnb-nf4") is None
    (entry,) = {json.dumps(item.model_dump(), sort_keys=True) for item in entries.values() if item}
    data = json.loads(entry)
    assert data["sequences"] == 8
    assert 8 * 16 <= data["tokens"] <= 8 * 64
    assert data["spec"]["dataset"] == "text.txt"
    assert data["spec"]["precision"] == "float32"


def test_the_manifest_has_the_kind_of_processor_that_the_pass_ran_on(run: Run) -> None:
    """And what is not calibrated, that its numbers were computed on; the GGUF types here are calibrated too."""
    kinds = {item.manifest.variant: item.manifest.device for item in run.store.artifacts()}
    assert {"bnb-int8", "bnb-nf4", "q4_k_m-imatrix"} < set(kinds)
    assert set(kinds.values()) == {device_name("cpu")}
    tools = {item.manifest.variant for item in run.store.artifacts() if "torch" in item.manifest.tools}
    assert tools == set(kinds), "the kind is beside the tools wherever torch is among them"
    assert f"MKL {strict_mode()}" in kinds["gptq-int4-g64"]


@pytest.mark.parametrize(
    "variant", ["gptq-int4-g64", "awq-int4-g64", "awq-int4-g64-gptq", "q4_k_m-imatrix", "bnb-int8"]
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


def test_weights_beyond_fp16_are_an_error_that_names_them(tmp_path: Path) -> None:
    tensor = "model.embed_tokens.weight"
    checkpoint, weights = make_checkpoint(tmp_path / "wide", dtype="BF16"), TinyModel().weights()
    weights[tensor][-1, -1] = 70_000.0
    write_weights(checkpoint, weights, dtype="BF16")
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    path = write_recipe(tmp_path / "wide.yaml", checkpoint, VARIANTS[:1], calibration=CALIBRATION)
    store = Store(tmp_path / "artifacts")
    workspace = Workspace(store, Cache(tmp_path / "cache"), ListReporter())
    (outcome,) = build(load_recipe(path, option_models()), workspace, evaluate=False)
    assert outcome.error is not None
    assert f"tensor {tensor} does not fit FP16" in outcome.error.message
    assert "beyond its range of 65,504" in str(outcome.error.hint)
    assert store.artifacts() == []


def test_size_equals_plan(run: Run, tmp_path: Path) -> None:
    workspace = Workspace(Store(tmp_path / "empty"), run.cache, ListReporter())
    plan = size_plan(make_plan(run.recipe, workspace), workspace, RunLimits())
    assert [str(job.refusal) for job in plan.jobs if job.refusal] == []
    for job in plan.jobs:
        assert job.size is not None
        manifest = run.artifact(job.variant.name).manifest
        written = sum(entry.size_bytes for entry in manifest.files if entry.path != "LICENSE")
        assert (job.variant.name, job.size.file_bytes) == (job.variant.name, written)
        assert job.size.bits_per_weight == manifest.bits_per_weight


def test_every_kept_tensor_has_its_reason(run: Run, checkpoint: Path) -> None:
    kept = {item.tensor: item.reason for item in run.artifact("gptq-int4-g64").manifest.kept_in_high_precision}
    assert set(kept) == {name for name in open_checkpoint(checkpoint).tensors if "proj" not in name}
    assert all(kept.values())


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
