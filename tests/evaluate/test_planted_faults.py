"""Faults that a build, a converter or a hand may make: each is refused by the gate that is named for it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantize.errors import BuildError
from quantize.evaluate.decision import Decision, GateThresholds
from quantize.evaluate.gates import decide
from quantize.evaluate.job import EvaluationJob, Reference
from quantize.evaluate.kinds import text_parts
from quantize.evaluate.session import TOKENS, evaluate, evidence
from quantize.evaluate.structure import NEAR, Intended
from quantize.events import SilentReporter
from quantize.recipe.evaluation import Extent
from quantize.runtimes.base import ModelRef
from quantize.runtimes.llama_cpp.convert import ConvertRequest, convert
from quantize.runtimes.llama_cpp.quantize import QuantizeSettings, quantize
from quantize.testing import TinyModel, make_checkpoint, write_weights

QUIET = SilentReporter()
SCALING = {"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0}
SHARP = ("q_proj.weight", "k_proj.weight")  # attention that looks at positions at all


def weights(seed: int = 0) -> dict[str, Any]:
    """A model in which it matters where a token stands."""
    found = TinyModel(seed=seed).weights()
    return {name: array * (4 if name.endswith(SHARP) else 1) for name, array in found.items()}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose positions are scaled."""
    folder = make_checkpoint(tmp_path_factory.mktemp("faults") / "source")
    write_weights(folder, weights())
    change_config(folder, rope_scaling=SCALING)
    return folder


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def converted(folder: Path) -> ModelRef:
    """The checkpoint as a 16-bit GGUF file."""
    out = folder.parent / f"{folder.name}-F16.gguf"
    convert(QUIET, ConvertRequest(folder, "F16", {"general.name": "tiny"}), out)
    return ModelRef(out.parent, "gguf", out.name)


def quantized(folder: Path, kind: str = "Q8_0") -> ModelRef:
    """The checkpoint as a GGUF file of a type."""
    out = folder.parent / f"{folder.name}-{kind}.gguf"
    quantize(QUIET, converted(folder).path, out, QuantizeSettings(type=kind, threads=1))
    return ModelRef(out.parent, "gguf", out.name)


@pytest.fixture
def judged(source: Path, tmp_path: Path) -> Callable[..., Decision]:
    """What the gates say of an artifact. reference: the 16-bit file that it is measured against."""

    def judge(artifact: ModelRef, reference: ModelRef | None = None, bits: int = 8) -> Decision:
        job = EvaluationJob(
            source=ModelRef(source, "safetensors"), source_digest="a" * 64, artifact=artifact, cache=tmp_path / "cache",
            text=text_parts("prose", Path()), text_name="prose", extent=Extent(64, 12, 0, 0), threads=1, device="cpu",
            intended=Intended(bits), reference=Reference("b" * 64, reference or converted(source)),
        )  # fmt: skip
        found = evaluate(QUIET, job)
        assert found is not None
        return decide(evidence(found, size_bytes=1, source_bytes=2), GateThresholds())

    return judge


def refused(decision: Decision) -> set[str]:
    return {item.gate for item in decision.refusals}


def test_a_sound_artifact_is_refused_by_none(source: Path, judged: Callable[..., Decision]) -> None:
    assert refused(judged(quantized(source))) == set()


def test_a_rope_scaling_that_the_converter_loses(source: Path, tmp_path: Path, judged: Callable[..., Decision]) -> None:
    """The artifact is near the file that it was quantized from: only the conversion can tell."""
    copy = Path(shutil.copytree(source, tmp_path / "lost"))
    change_config(copy, rope_scaling=None)
    found = judged(quantized(copy), converted(copy))
    assert refused(found) == {"conversion"}
    assert "before anything is quantized is over the limit of 0.02" in found.refusals[0].reason


def test_layers_in_another_order(source: Path, tmp_path: Path, judged: Callable[..., Decision]) -> None:
    copy = Path(shutil.copytree(source, tmp_path / "swapped"))
    swap = {"model.layers.0.": "model.layers.1.", "model.layers.1.": "model.layers.0."}
    write_weights(copy, {swap.get(name[:15], name[:15]) + name[15:]: array for name, array in weights().items()})
    assert NEAR in refused(judged(quantized(copy)))


def test_weights_of_another_source_in_four_bits(tmp_path: Path, judged: Callable[..., Decision]) -> None:
    other = make_checkpoint(tmp_path / "other", TinyModel(seed=1))
    assert NEAR in refused(judged(quantized(other, "Q4_0"), bits=4))


def test_a_reference_that_does_not_run_is_no_fault_of_the_artifact(
    source: Path, tmp_path: Path, judged: Callable[..., Decision]
) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(BuildError, match="measured as a gguf model"):
        judged(quantized(source), ModelRef(tmp_path, "gguf", broken.name))


def test_a_tokenizer_of_another_model(source: Path, tmp_path: Path, judged: Callable[..., Decision]) -> None:
    copy = Path(shutil.copytree(source, tmp_path / "copy"))
    tokenizer = json.loads((copy / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    plain = [token for token in vocabulary if token.isalpha() and token.isascii()]
    turned = dict(zip(plain, [*plain[1:], plain[0]], strict=True))
    tokenizer["model"]["vocab"] = {turned.get(token, token): number for token, number in vocabulary.items()}
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    found = judged(quantized(copy))
    assert refused(found) == {TOKENS}
