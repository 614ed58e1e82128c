"""Models that are read block by block, beside transformers' whole ones: the same numbers, in less memory, and said."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from quantize.build.execution import RunOptions
from quantize.errors import UsageError, VerifyError
from quantize.evaluate import engine
from quantize.evaluate.decision import GateThresholds
from quantize.evaluate.device import ModelRun, find_place
from quantize.evaluate.engine import STREAMED, STREAMED_ON_CPU, engine_tools, memory_on_cpu
from quantize.evaluate.gates import decide
from quantize.evaluate.job import EvaluationJob
from quantize.evaluate.kinds import text_parts
from quantize.evaluate.session import evaluate, evidence, prepare_source
from quantize.evaluate.streamed import StreamedRuntime, open_streamed
from quantize.events import ListReporter, Reporter, SilentReporter
from quantize.formats import find_format, open_runtime, option_models
from quantize.model.checkpoint import open_checkpoint
from quantize.numerics.int8 import multiply, quantize_int8
from quantize.recipe.evaluation import Extent
from quantize.recipe.model import load_recipe
from quantize.runtimes.base import ModelRef, Prompted
from quantize.runtimes.devices import ON_CPU
from quantize.store.store import Store
from quantize.store.workspace import Workspace
from quantize.system.cache import Cache
from quantize.system.process import run_step
from quantize.system.sizes import GIB
from quantize.testing import write_recipe
from tests.architectures import CONFIGS, save, tiny_model, token_ids
from tests.conftest import Built, build
from tests.families import family_named, make_family

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers and its plugins warn on import
QUIET = SilentReporter()
NEAR = 1e-4  # nats between two engines; the tests below find a hundredth of it, or say why not


def rows_of(runtime: Any, windows: list[list[int]]) -> list[Any]:
    """All log-probabilities of each window."""
    return [np.concatenate([block.numpy() for block in blocks]) for blocks in runtime.read(windows)]


def mean_kl(first: list[Any], second: list[Any]) -> float:
    ours, theirs = (np.concatenate(rows).astype(np.float64) for rows in (first, second))
    return float((np.exp(ours) * (ours - theirs)).sum(-1).mean())


def by_transformers(model: Any, windows: list[list[int]]) -> list[Any]:
    """A plain forward pass of the whole model over each window."""
    found = []
    for ids in windows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids[:-1]]), use_cache=False).logits[0]
        found.append(torch.log_softmax(logits.double(), -1).numpy())
    return found


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("tied", [False, True], ids=["own-head", "tied"])
def test_every_architecture_gives_what_transformers_gives(name: str, tied: bool, tmp_path: Path) -> None:
    model = tiny_model(name, tied=tied)
    model.set_attn_implementation("eager")  # with which alone attention is capped
    windows = token_ids((24, 17, 24, 2, 31))
    with closing(StreamedRuntime(save(model, tmp_path), name, STREAMED_ON_CPU, QUIET, tmp_path)) as runtime:
        found = rows_of(runtime, windows)
    expected = by_transformers(model, windows)
    assert [len(rows) for rows in found] == [23, 16, 23, 1, 30]
    assert max(float(np.abs(ours - theirs).max()) for ours, theirs in zip(found, expected, strict=True)) < 1e-3
    assert abs(mean_kl(expected, found)) < NEAR / 100


def test_what_is_told_apart_is_felt(tmp_path: Path) -> None:
    """The architectures' peculiarities after the blocks matter in these tiny models, so that losing one would show."""
    windows = token_ids((24, 17))
    gemma = tiny_model("Gemma2ForCausalLM")
    capped = by_transformers(gemma, windows)
    gemma.config.final_logit_softcapping = None
    assert mean_kl(capped, by_transformers(gemma, windows)) > 100 * NEAR
    with torch.no_grad():
        gemma.model.norm.weight.sub_(1)
    assert mean_kl(capped, by_transformers(gemma, windows)) > 100 * NEAR


def test_states_in_a_file_and_small_blocks_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, windows = save(tiny_model("LlamaForCausalLM"), tmp_path / "model"), token_ids()
    with closing(StreamedRuntime(source, "llama", STREAMED_ON_CPU, QUIET, tmp_path)) as runtime:
        whole = rows_of(runtime, windows)
        again = [np.concatenate([block.numpy() for block in runtime.log_probs(ids)]) for ids in windows]
    monkeypatch.setattr("quantize.runtimes.base.BLOCK_BYTES", 4 * 96 * 16)
    monkeypatch.setattr("quantize.calibration.output_head.PIECE_BYTES", 4 * 64 * 7)
    scratch = tmp_path / "scratch"
    with closing(StreamedRuntime(source, "llama", STREAMED_ON_CPU, QUIET, scratch, state_bytes=0)) as runtime:
        pieces = [[block.numpy() for block in blocks] for blocks in runtime.read(windows)]
    assert list(scratch.iterdir()) == [], "the file has no name, and is gone whatever happens"
    assert [len(blocks) for blocks in pieces] == [2, 1, 2, 2]
    for ours, alone, parts in zip(whole, again, pieces, strict=True):
        assert np.allclose(ours, alone, atol=1e-5)
        assert np.allclose(ours, np.concatenate(parts), atol=1e-5)


@dataclasses.dataclass(frozen=True)
class Made:
    """Artifacts of a tiny checkpoint by variant."""

    source: Path
    store: Store

    def model(self, variant: str) -> ModelRef:
        """An artifact, or what was made of one that its runtime refuses: gptqmodel packs no experts of these sizes."""
        kept = list(self.store.root.glob(f"tiny/{variant}/current/config.json"))
        (config,) = kept or self.store.root.glob(f"tiny/{variant}/refused/*/config.json")
        return ModelRef(config.parent, {"a": "awq", "g": "gptq", "b": "bitsandbytes"}[variant[0]])


VARIANTS: list[dict[str, Any]] = [
    {"format": "awq", "group_size": 32},
    {"format": "gptq", "group_size": 32},
    {"format": "bitsandbytes", "types": ["int8", "nf4"]},
]


def make(source: Path, root: Path, variants: list[dict[str, Any]]) -> Made:
    root.mkdir()
    text = [f"Paragraph {index}: the quick brown fox jumps over the lazy dog. " * 3 for index in range(8)]
    (root / "text.txt").write_text("\n\n".join(text))
    spec = {"dataset": "text.txt", "samples": 6, "sequence_length": 64, "minimum_tokens": 16, "precision": "float32"}
    recipe = load_recipe(write_recipe(root / "tiny.yaml", source, variants, calibration=spec), option_models())
    store = Store(root / "artifacts")
    workspace = Workspace(store, Cache(root / "cache"), QUIET)
    build(recipe, workspace, RunOptions(), evaluate=False)
    return Made(source, store)


@pytest.fixture(scope="module")
def made(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tiny, tmp_path_factory.mktemp("artifacts") / "run", VARIANTS)


def dequantized(artifact: ModelRef, source: Path, folder: Path) -> Path:
    """An artifact as a checkpoint in full precision: what its weights facet says, and its other tensors as they are."""
    checkpoint, facet = open_checkpoint(source), find_format(artifact.format).weights
    assert facet is not None
    read = facet.reader(artifact.path, checkpoint)
    own: dict[str, Any] = {}
    for path in artifact.folder.glob("*.safetensors"):
        own |= load_file(path)
    tensors = {}
    for name in checkpoint.tensors:
        found = read(name, checkpoint.read(name).float())
        tensors[name] = (own[name] if found is None else found).float().contiguous()
    folder.mkdir()
    config = json.loads((artifact.folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def loaded(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


WINDOWS = [list(range(3, 67)), list(range(40, 90))]


@pytest.mark.parametrize("variant", ["awq-int4-g32", "gptq-int4-g32", "bnb-nf4"])
def test_an_artifact_is_the_model_that_its_codes_stand_for(variant: str, made: Made, tmp_path: Path) -> None:
    artifact = made.model(variant)
    with closing(open_streamed(artifact, made.source, STREAMED_ON_CPU, QUIET, tmp_path)) as runtime:
        found = rows_of(runtime, WINDOWS)
    expected = by_transformers(loaded(dequantized(artifact, made.source, tmp_path / "plain")), WINDOWS)
    assert abs(mean_kl(expected, found)) < NEAR / 100
    assert mean_kl(by_transformers(loaded(made.source), WINDOWS), found) > NEAR, "it is not the source that is read"


@pytest.mark.parametrize("name", ["Qwen2", "Gemma 2", "Phi-3", "Qwen2-MoE"])
def test_what_awq_folds_into_norms_and_biases_is_the_artifact_s(name: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    make_family(family_named(name), source)
    made = make(source, tmp_path / "run", [{"format": "awq", "group_size": 32}])
    artifact = made.model("awq-int4-g32")
    with closing(open_streamed(artifact, source, STREAMED_ON_CPU, QUIET, tmp_path)) as runtime:
        found = rows_of(runtime, WINDOWS)
    expected = by_transformers(loaded(dequantized(artifact, source, tmp_path / "plain")), WINDOWS)
    assert abs(mean_kl(expected, found)) < NEAR / 100


@dataclasses.dataclass(frozen=True)
class Engines:
    """Mean KL divergences: of the streamed artifact from its real runtime, and of both from the source."""

    apart: float
    real: float
    streamed: float


def compare_engines(reporter: Reporter, artifact: ModelRef, source: Path) -> Engines:
    """In a worker, for runtimes patch much."""
    expected = by_transformers(loaded(source), WINDOWS)
    with closing(open_runtime(artifact, context=64, threads=1)) as runtime:
        real = rows_of(runtime, WINDOWS)
    with closing(open_streamed(artifact, source, STREAMED_ON_CPU, reporter, source, threads=1)) as runtime:
        streamed = rows_of(runtime, WINDOWS)
    return Engines(mean_kl(real, streamed), mean_kl(expected, real), mean_kl(expected, streamed))


@pytest.mark.parametrize("variant", ["awq-int4-g32", "gptq-int4-g32", "bnb-nf4", "bnb-int8"])
def test_an_artifact_gives_what_its_runtime_gives(variant: str, made: Made) -> None:
    assert run_step("comparing", QUIET, compare_engines, made.model(variant), made.source).apart < NEAR


def test_int8_is_its_runtime_bit_for_bit(made: Made, tmp_path: Path) -> None:
    """It rounds inputs to 8 bits, so that the least difference sends some to the other of two levels, and the next
    blocks start from there: what is nearly the same arithmetic is as far off as INT8 is from its source.
    """
    artifact = made.model("bnb-int8")
    found = run_step("comparing", QUIET, compare_engines, artifact, made.source)
    assert abs(found.apart) < 1e-12
    expected = by_transformers(loaded(made.source), WINDOWS)
    exact = by_transformers(loaded(dequantized(artifact, made.source, tmp_path / "plain")), WINDOWS)
    assert mean_kl(expected, exact) < 0.6 * found.real, "half of what is lost is lost in the inputs"


@pytest.mark.parametrize("threshold", [6.0, 0.0])
def test_int8_linears_multiply_as_those_of_bitsandbytes(threshold: float) -> None:
    from bitsandbytes import nn

    generator = torch.Generator().manual_seed(0)
    inputs, bias = torch.randn(1, 7, 64, generator=generator), torch.randn(32, generator=generator)
    inputs[0, 2, 5], inputs[0, 4, 9], inputs[0, 3] = 8.0, -6.5, 0.5
    rows = quantize_int8(torch.randn(32, 64, generator=generator))
    theirs: Any = nn.Linear8bitLt(64, 32, has_fp16_weights=False, threshold=threshold)
    theirs.weight = nn.Int8Params(rows.codes, requires_grad=False, CB=rows.codes, SCB=rows.scales)
    theirs.bias = torch.nn.Parameter(bias)
    with torch.no_grad():
        assert torch.equal(multiply(rows, threshold, inputs, bias), theirs.eval()(inputs))
        plain = inputs @ rows.dequantize().T + bias
        assert 0 < float((multiply(rows, threshold, inputs, None) + bias - plain).abs().max()) < 1


GOLDEN = """\
name: mine
prompts: [{id: same, prompt: The quick brown fox, max_tokens: 4, grade: {kind: same}}]
"""


@pytest.fixture
def job(made: Made, tmp_path: Path) -> EvaluationJob:
    golden = tmp_path / "mine.yaml"
    golden.write_text(GOLDEN)
    return EvaluationJob(
        source=ModelRef(made.source, "safetensors"), source_digest="a" * 64, artifact=made.model("bnb-nf4"),
        cache=tmp_path / "cache", text=text_parts("python-docs", Path()), text_name="python-docs",
        extent=Extent(128, 2, 0, 0), golden=(golden,), context=256, device="cpu",
    )  # fmt: skip


def said(reporter: ListReporter, kind: str = "note") -> list[str]:
    return [event.text for event in reporter.events if event.kind == kind]


def test_a_session_says_what_was_streamed(job: EvaluationJob) -> None:
    whole = evaluate(QUIET, job)
    reporter = ListReporter()
    found = evaluate(reporter, dataclasses.replace(job, engine="streamed"))
    assert whole.golden is not None
    assert whole.quality is not None
    assert found.quality is not None
    assert (whole.quality.runtime, whole.quality.source_runtime) == ("transformers", "transformers")
    assert (found.quality.runtime, found.quality.source_runtime) == (STREAMED, STREAMED)
    assert found.quality.runtime_version == f"torch {torch.__version__}, transformers {transformers_version()}"
    assert found.quality.perplexity == pytest.approx(whole.quality.perplexity, rel=1e-3)
    assert found.quality.mean_kl == pytest.approx(whole.quality.mean_kl, abs=NEAR)
    assert len(list(job.cache.glob("baselines/[0-9a-f]*"))) == 2, "another engine, another baseline"
    assert found.golden is None
    assert "nothing is asked: the source is read block by block, and answers would take too long" in said(reporter)
    missing = decide(evidence(found, size_bytes=1, source_bytes=2), GateThresholds()).missing
    assert "golden prompts" in {item.gate for item in missing}
    prepare_source(QUIET, dataclasses.replace(job, engine="streamed", artifact=job.source))


def transformers_version() -> str:
    from importlib.metadata import version

    return version("transformers")


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Have the machine say that so many bytes of its memory are free."""
    return lambda size: monkeypatch.setattr(engine, "ram", lambda: (64 * GIB, size))


def test_what_does_not_fit_in_memory_is_streamed(job: EvaluationJob, free: Callable[[int], None]) -> None:
    wanted = ModelRun(job.source, "cpu", 128, job.source.folder)
    needed = memory_on_cpu(job.source, 128)
    assert needed is not None
    floats = sum(4 * info.elements for info in open_checkpoint(job.source.folder).tensors.values())
    assert needed.need_bytes > floats, "the CPU computes in float32, whatever is on disk"
    reporter = ListReporter()
    free(2 * needed.need_bytes)
    assert find_place(reporter, wanted) == ON_CPU
    assert reporter.events == []
    free(needed.need_bytes)
    assert find_place(reporter, wanted) == STREAMED_ON_CPU
    (text,) = said(reporter)
    assert text.startswith("the safetensors model is read block by block on the CPU: whole it takes ")
    assert find_place(QUIET, dataclasses.replace(wanted, engine="runtime")) == ON_CPU
    assert find_place(QUIET, dataclasses.replace(wanted, source=None)) == ON_CPU
    assert find_place(QUIET, dataclasses.replace(wanted, model=job.artifact)) == STREAMED_ON_CPU


def test_what_can_not_be_streamed_is_said(
    job: EvaluationJob, built: Built, own_tiny: Path, free: Callable[[int], None]
) -> None:
    (path,) = (built.store.root / "tiny" / "f16" / "current").glob("*.gguf")
    file = ModelRef(path.parent, "gguf", path.name)
    reporter = ListReporter()
    assert find_place(reporter, ModelRun(file, "cpu", 64, job.source.folder, "streamed")) == ON_CPU
    assert said(reporter) == ["the gguf model is not read block by block: gguf files are read by llama.cpp alone"]
    config = json.loads((own_tiny / "config.json").read_text())
    (own_tiny / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaModel"]}))
    free(GIB // 8)
    assert find_place(reporter, ModelRun(ModelRef(own_tiny, "safetensors"), "cpu", 64, own_tiny)) == ON_CPU
    (text,) = said(reporter, "warning")
    assert text.startswith("the safetensors model may not fit in memory: whole it takes ")
    assert "not block by block: LlamaModel is no causal language model" in text


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_llama_cpp_maps_what_it_measures(built: Built) -> None:
    (path,) = (built.store.root / "tiny" / "f16" / "current").glob("*.gguf")
    file = path.resolve()
    with closing(open_runtime(ModelRef(file.parent, "gguf", file.name), context=64)):
        mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(file))]
    sizes = [int(stop, 16) - int(start, 16) for start, stop in (line.split()[0].split("-") for line in mapped)]
    assert sum(sizes) > 0.9 * file.stat().st_size, (
        "its weights are pages of the file, which need no memory of their own"
    )


def test_a_damaged_artifact_does_not_run(made: Made, tmp_path: Path) -> None:
    artifact = made.model("awq-int4-g32")
    folder = tmp_path / "copy"
    folder.mkdir()
    tensors: dict[str, Any] = {}
    for path in artifact.folder.glob("*.safetensors"):
        tensors |= load_file(path)
    (folder / "config.json").write_bytes((artifact.folder / "config.json").read_bytes())
    lost = "model.layers.1.input_layernorm.weight"
    save_file({name: item for name, item in tensors.items() if name != lost}, folder / "model.safetensors")
    with (
        pytest.raises(VerifyError, match=r"copy: block 1: tensors don't fit the architecture(.|\n)*input_layernorm"),
        closing(open_streamed(ModelRef(folder, "awq"), made.source, STREAMED_ON_CPU, QUIET, tmp_path)) as runtime,
    ):
        rows_of(runtime, WINDOWS)
    save_file({name: item for name, item in tensors.items() if name != "lm_head.weight"}, folder / "model.safetensors")
    with pytest.raises(VerifyError, match=r"copy: there is no tensor lm_head\.weight"):
        open_streamed(ModelRef(folder, "awq"), made.source, STREAMED_ON_CPU, QUIET, tmp_path)


def test_it_answers_nothing(made: Made, tmp_path: Path) -> None:
    source = ModelRef(made.source, "safetensors")
    with (
        closing(open_streamed(source, made.source, STREAMED_ON_CPU, QUIET, tmp_path)) as runtime,
        pytest.raises(UsageError, match="answers no prompts"),
    ):
        runtime.answer([Prompted((3, 4), 1)])
    assert engine_tools(source, STREAMED_ON_CPU)["name"] == STREAMED
    assert engine_tools(source, ON_CPU)["name"] == "transformers"
