"""Both runtimes on a tiny model: against an independent computation, against themselves, and the whole session."""

from __future__ import annotations

import dataclasses
import math
import re
import shutil
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantize.errors import UsageError, VerifyError
from quantize.evaluate.baseline import record
from quantize.evaluate.decision import RUNS, GateThresholds
from quantize.evaluate.gates import decide
from quantize.evaluate.job import EvaluationJob
from quantize.evaluate.kinds import text_parts
from quantize.evaluate.measure import measure
from quantize.evaluate.prompts import PromptTokenizer
from quantize.evaluate.record import Quality
from quantize.evaluate.session import TOKENS, evaluate, evidence
from quantize.evaluate.text import Windows, cut_windows, load_text
from quantize.events import ListReporter, SilentReporter
from quantize.formats import open_runtime, option_models
from quantize.recipe.evaluation import Extent
from quantize.recipe.model import load_recipe
from quantize.runtimes.base import ModelRef, Prompted
from quantize.store.store import Store
from quantize.store.workspace import Workspace
from quantize.system.cache import Cache
from quantize.system.process import run_step
from quantize.testing import TinyModel, make_checkpoint, write_recipe, write_weights
from tests.conftest import Built, build

pytest.importorskip("torch")
pytest.importorskip("llama_cpp")
QUIET = SilentReporter()
WINDOW = 128


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    """Tiny matrices are not worth a second core, and threads that wait for a busy one are slow."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def windows(tiny: Path) -> Windows:
    tokenizer = PromptTokenizer(tiny)
    return cut_windows(
        load_text("python-docs", Path()), tokenizer.encode, prefix=tokenizer.prefix, window=WINDOW, limit=3
    )


def gguf(built: Built, kind: str) -> ModelRef:
    (path,) = [path for path in built.root.glob("artifacts/**/*.gguf") if kind.lower() in str(path).lower()]
    return ModelRef(path.parent, "gguf", path.name)


def source_of(tiny: Path) -> ModelRef:
    return ModelRef(tiny, "safetensors")


def quality(artifact: ModelRef, source: ModelRef, windows: Windows) -> Quality:
    with closing(open_runtime(source, context=WINDOW)) as runtime:
        baseline = record(runtime, windows, QUIET)
    with closing(open_runtime(artifact, context=WINDOW)) as runtime:
        return measure(runtime, windows, baseline, QUIET)


def independent_perplexity(model: Any, windows: Windows) -> float:
    """torch's own cross-entropy over a plain forward pass of each window."""
    import torch

    total, count = 0.0, 0
    for ids in windows.token_ids:
        tokens = torch.tensor([ids])
        with torch.inference_mode():
            logits = model(tokens).logits[0, :-1].double()
        total += float(torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum"))
        count += len(ids) - 1
    return math.exp(total / count)


def dequantized(reference: ModelRef) -> Any:
    """The same GGUF file, dequantized by transformers' own reader."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    return AutoModelForCausalLM.from_pretrained(
        reference.folder, gguf_file=reference.main_file, dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    ).eval()  # fmt: skip


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_K_M"])
def test_perplexity_of_a_gguf_is_that_of_its_weights(kind: str, built: Built, tiny: Path, windows: Windows) -> None:
    measured = quality(gguf(built, kind), source_of(tiny), windows)
    assert measured.perplexity == pytest.approx(
        independent_perplexity(dequantized(gguf(built, kind)), windows), rel=0.005
    )


def test_perplexity_of_the_source_is_torch_s(tiny: Path, windows: Windows) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    itself = quality(source_of(tiny), source_of(tiny), windows)
    assert itself.perplexity == pytest.approx(independent_perplexity(model, windows), rel=1e-5)
    assert (itself.mean_kl, itself.max_kl, itself.perplexity_ratio) == (0, 0, 1)


def test_f16_is_the_source_and_fewer_bits_are_farther(built: Built, tiny: Path, windows: Windows) -> None:
    found = {kind: quality(gguf(built, kind), source_of(tiny), windows) for kind in ("F16", "Q8_0", "Q4_K_M")}
    assert found["F16"].mean_kl < 0.001
    assert found["F16"].mean_kl < found["Q8_0"].mean_kl < found["Q4_K_M"].mean_kl
    assert found["F16"].top_token_agreement > found["Q4_K_M"].top_token_agreement


def test_a_gguf_does_not_diverge_from_itself(built: Built, windows: Windows) -> None:
    itself = quality(gguf(built, "Q4_K_M"), gguf(built, "Q4_K_M"), windows)
    assert (itself.mean_kl, itself.max_kl, itself.perplexity_ratio, itself.top_token_agreement) == (0, 0, 1, 1)


@pytest.mark.parametrize("format", ["gguf", "safetensors"])
def test_small_blocks_give_the_same(
    format: str, built: Built, tiny: Path, windows: Windows, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = gguf(built, "F16") if format == "gguf" else source_of(tiny)
    ids = windows.token_ids[0]
    with closing(open_runtime(model, context=WINDOW)) as runtime:
        whole = np.concatenate([block.numpy() for block in runtime.log_probs(ids)])
    monkeypatch.setattr("quantize.runtimes.base.BLOCK_BYTES", 4 * 384 * 20)
    with closing(open_runtime(model, context=WINDOW)) as runtime:
        blocks = [block.numpy() for block in runtime.log_probs(ids)]
    assert len(blocks) > 1
    assert whole.shape == (len(ids) - 1, 384)
    assert np.allclose(np.exp(whole).sum(axis=1), 1, atol=1e-4)
    assert np.allclose(np.concatenate(blocks), whole, atol=2e-2)  # llama.cpp keeps K and V in half precision


def greedy(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    import torch

    ids = list(prompt)
    for _ in range(count):
        with torch.inference_mode():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def behind_the_likeliest(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> float:
    """How far the logit of any token of a greedy answer is below the highest: rounding may turn two that are close."""
    import torch

    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
    return float((logits.max(dim=-1).values - logits.gather(1, torch.tensor(answer)[:, None])[:, 0]).max())


def test_answers_are_greedy_whatever_they_are_batched_with(built: Built, tiny: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    prompts = [tuple(range(10, 10 + length)) for length in (5, 40, 9, 17)]
    expected = [greedy(model, prompt, 8) for prompt in prompts]
    requests = [Prompted(prompt, 8) for prompt in prompts]
    with closing(open_runtime(source_of(tiny), context=64)) as runtime:
        assert runtime.answer(requests) == expected
        stop = expected[1][3]
        (short,) = runtime.answer([Prompted(prompts[1], 8, frozenset({stop}))])
        assert short == expected[1][: expected[1].index(stop)]
    with closing(open_runtime(gguf(built, "F16"), context=64)) as runtime:
        first = runtime.answer(requests)
        assert [answer[0] for answer in first] == [answer[0] for answer in expected]
        assert max(behind_the_likeliest(model, *pair) for pair in zip(prompts, first, strict=True)) < 0.02
        assert runtime.answer(requests) == first
        with pytest.raises(UsageError, match="exceed the context of 64"):
            runtime.answer([Prompted(tuple(range(60)), 8)])


GOLDEN = """\
name: mine
prompts:
  - {id: same, prompt: The quick brown fox, max_tokens: 8, grade: {kind: same}}
  - {id: json, prompt: Give JSON., max_tokens: 8, grade: {kind: json}}
  - id: long
    haystack: {share: 0.6, needle: The code is 7391., filler: [The dog does not mind.]}
    prompt: "{haystack} What is the code?"
    max_tokens: 8
    grade: {kind: contains, all: ["7391"]}
"""
PYTHON_DOCS = text_parts("python-docs", Path())


@pytest.fixture
def job(built: Built, tiny: Path, tmp_path: Path) -> EvaluationJob:
    golden = tmp_path / "mine.yaml"
    golden.write_text(GOLDEN)
    return EvaluationJob(
        source=source_of(tiny), source_digest="a" * 64, artifact=gguf(built, "F16"), cache=tmp_path / "cache",
        text=PYTHON_DOCS, text_name="python-docs", extent=Extent(WINDOW, 2, 0, 0), golden=(golden,), context=256,
    )  # fmt: skip


def test_a_session_from_folders_to_figures(job: EvaluationJob) -> None:
    found = evaluate(QUIET, job)
    assert found.quality.mean_kl < 0.001
    assert (found.quality.runtime, found.quality.source_runtime) == ("llama.cpp", "transformers")
    assert found.golden is not None
    assert [item.key for item in found.golden.results] == ["mine/same", "mine/json", "mine/long"]
    assert found.golden.results[0].source.passed
    measured = evidence(found, size_bytes=1, source_bytes=2)
    assert (measured.quality, measured.golden) == (found.quality, found.golden)
    assert found.golden.prompts == 2
    assert measured.figures.checks[RUNS] == "", "what was measured runs"
    assert "size" not in {item.gate for item in decide(measured, GateThresholds()).missing}


def test_the_source_is_read_once(job: EvaluationJob, built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    first = ListReporter()
    evaluate(first, job)
    second = ListReporter()
    evaluate(second, dataclasses.replace(job, artifact=gguf(built, "Q8_0")))
    loads = [
        [event.text for event in reporter.events if event.text == "loading the source"] for reporter in (first, second)
    ]
    assert [len(item) for item in loads] == [1, 0]


def test_no_golden_prompts_are_no_result(job: EvaluationJob) -> None:
    assert evaluate(QUIET, dataclasses.replace(job, golden=())).golden is None


def test_an_artifact_of_another_model_is_refused(job: EvaluationJob, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other", TinyModel(vocabulary=300))
    found = evaluate(QUIET, dataclasses.replace(job, artifact=ModelRef(other, "safetensors")))
    assert found.quality is None
    assert found.checks[TOKENS].startswith("the artifact knows 300 tokens and its source 384")


def test_other_tokens_under_the_same_numbers_are_refused(job: EvaluationJob, tiny: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny, tmp_path / "copy"))
    text = (copy / "tokenizer.json").read_text(encoding="utf-8").replace("▁", "_")
    (copy / "tokenizer.json").write_text(text, encoding="utf-8")
    found = evaluate(QUIET, dataclasses.replace(job, artifact=ModelRef(copy, "safetensors")))
    assert re.match(r"\d+ of \d+ tokens of the text are others in the artifact", found.checks[TOKENS])
    decision = decide(evidence(found, size_bytes=1, source_bytes=2), GateThresholds())
    assert [item.gate for item in decision.refusals] == [TOKENS]


def test_weights_that_are_not_a_model_are_refused(tmp_path: Path, built: Built) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(VerifyError, match=r"broken\.gguf: llama\.cpp does not load it"):
        open_runtime(ModelRef(tmp_path, "gguf", "broken.gguf"), context=64)
    with pytest.raises(VerifyError, match="transformers does not load it"):
        open_runtime(ModelRef(tmp_path, "safetensors"), context=64)
    with pytest.raises(UsageError, match=r"nowhere: no such folder"):
        open_runtime(ModelRef(tmp_path / "nowhere", "safetensors"), context=64)
    with pytest.raises(UsageError, match="1000 tokens are more than its context of 512"):
        open_runtime(gguf(built, "F16"), context=1000)


def test_references_are_checked() -> None:
    with pytest.raises(UsageError, match="the format 'onnx' is not installed here"):
        open_runtime(ModelRef(Path(), "onnx"), context=64)
    with pytest.raises(UsageError, match="needs the name of its file"):
        open_runtime(ModelRef(Path(), "gguf"), context=64)


def test_a_tensor_that_is_not_finite_is_refused(job: EvaluationJob, tiny: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny, tmp_path / "damaged"))
    weights = TinyModel().weights()
    weights["model.layers.1.mlp.up_proj.weight"][7, 7] = np.nan
    write_weights(copy, weights)
    with pytest.raises(VerifyError, match="damaged: the logits are not finite"):
        evaluate(QUIET, dataclasses.replace(job, artifact=ModelRef(copy, "safetensors")))


@pytest.mark.demo
def test_packed_formats_in_their_real_runtime(tiny: Path, job: EvaluationJob, tmp_path: Path) -> None:
    """AWQ and GPTQ through gptqmodel, INT8 through bitsandbytes; in workers: gptqmodel patches other libraries."""
    pytest.importorskip("gptqmodel")
    pytest.importorskip("bitsandbytes")
    variants = [{"format": "awq"}, {"format": "gptq"}, {"format": "bitsandbytes"}]
    calibration = {"dataset": "python-docs", "samples": 4, "sequence_length": 128}
    recipe = load_recipe(
        write_recipe(tmp_path / "packed.yaml", tiny, variants, calibration=calibration), option_models()
    )
    for outcome in build(recipe, Workspace(Store(tmp_path / "artifacts"), Cache(tmp_path / "cache"), QUIET)):
        assert outcome.artifact is not None, outcome.error
        artifact = ModelRef(outcome.artifact.folder, outcome.artifact.manifest.format)
        found = run_step("evaluate", QUIET, evaluate, dataclasses.replace(job, artifact=artifact))
        assert 0 < found.quality.mean_kl < 0.1
        assert found.quality.perplexity_ratio == pytest.approx(1, abs=0.1)
        assert found.golden is not None
