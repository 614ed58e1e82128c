"""Artifacts that were spoilt: each damage is refused, with its own message, by the command line."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from quantize.errors import VerifyError
from quantize.events import ListReporter, SilentReporter
from quantize.files.gguf import read_gguf
from quantize.formats.base import RunLimits
from quantize.formats.gguf import try_out as engine
from quantize.formats.gguf.build import GgufBuilder
from quantize.formats.gguf.check import compare_header
from quantize.formats.gguf.source import Expected, expected_of
from quantize.formats.packed.check import ROWS, agree
from quantize.model.checkpoint import open_checkpoint
from quantize.store.artifact import Artifact, open_artifact
from quantize.store.verify import check_files
from quantize.testing import write_json
from tests.bad_checkpoints import change_json
from tests.conftest import Built, Run
from tests.families import family_named, make_family


@pytest.fixture
def artifact(built: Built, tmp_path: Path) -> Artifact:
    """A Q8_0 artifact that a test may spoil."""
    (item,) = [item for item in built.store.artifacts() if item.manifest.variant == "q8_0"]
    return open_artifact(Path(shutil.copytree(item.folder, tmp_path / "spoilt")))


def weights(artifact: Artifact) -> Path:
    (path,) = artifact.folder.glob("*.gguf")
    return path


def flip(artifact: Artifact) -> None:
    with weights(artifact).open("r+b") as file:
        file.seek(-100_000, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def add_file(artifact: Artifact) -> None:
    (artifact.folder / "more").mkdir()
    (artifact.folder / "more" / "extra.bin").write_text("x")


def change_manifest(artifact: Artifact) -> None:
    path = artifact.folder / "manifest.json"
    path.write_text(path.read_text().replace('"bits": 8', '"bits": 4'))


def reseal(artifact: Artifact, path: str) -> None:
    """A manifest with a good digest that names another file first."""
    entry = artifact.manifest.files[0].model_copy(update={"path": path})
    files = (entry, *artifact.manifest.files[1:])
    sealed = artifact.manifest.model_copy(update={"files": files}).sealed()
    (artifact.folder / "manifest.json").write_text(sealed.to_json())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (flip, "tiny-Q8_0.gguf was altered: its sha256 is not the manifest's"),
        (lambda item: weights(item).unlink(), "tiny-Q8_0.gguf is missing"),
        (lambda item: os.truncate(weights(item), 1_000_000), "tiny-Q8_0.gguf has 1,000,000 bytes, the manifest says"),
        (lambda item: (item.folder / "LICENSE").write_text("mine"), "LICENSE has 4 bytes, the manifest says 29"),
        (add_file, "more/extra.bin is not in the manifest"),
        (change_manifest, "altered: its content does not have the digest that it states"),
        (lambda item: (item.folder / "manifest.json").write_text("{"), "manifest.json: not JSON"),
        (lambda item: reseal(item, "../tiny/LICENSE"), "the manifest names '../tiny/LICENSE', outside the artifact"),
        (lambda item: reseal(item, "/etc/passwd"), "the manifest names '/etc/passwd', outside the artifact"),
    ],
    ids=["flipped", "missing", "truncated", "licence", "extra", "manifest", "no-json", "dotdot", "absolute"],
)  # fmt: skip
def test_spoilt_files(spoil: Callable[[Artifact], object], message: str, artifact: Artifact, run: Run) -> None:
    assert run("verify", "--hashes-only", artifact.folder).exit_code == 0
    spoil(artifact)
    result = run("verify", "--hashes-only", artifact.folder)
    assert message in result.stderr
    assert result.exit_code == 3
    assert "good" not in result.stdout


def test_good_files_are_read_to_the_end(artifact: Artifact) -> None:
    events = ListReporter()
    check_files(artifact, events)
    assert events.events[-1].done == events.events[-1].total == artifact.manifest.size_bytes


def test_papers_may_change(artifact: Artifact) -> None:
    """Measurements and the card are about the artifact; eval and people may add to them."""
    (artifact.folder / "measurements.json").write_text("{}")
    (artifact.folder / "README.md").write_text("# Better words\n")
    check_files(artifact, SilentReporter())


# --- against the source -----------------------------------------------------------------------------------------------


def rewrite(
    path: Path, change: Callable[[dict[str, gguf.ReaderField]], object], drop: str = "",
    spoil: Callable[[dict[str, np.ndarray[Any, Any]]], None] = lambda _: None,
) -> None:  # fmt: skip
    """Write a GGUF file again by the gguf package, with other fields, without a tensor, or with other bytes in some."""
    reader = gguf.GGUFReader(path)
    raws = {item.name: np.array(item.data) for item in reader.tensors}
    spoil(raws)
    fields = dict(reader.fields)
    change(fields)
    writer = gguf.GGUFWriter(path.with_suffix(".new"), "llama")
    for name, field in fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            kind, sub = field.types[0], field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), kind, sub_type=sub)
    for item in reader.tensors:
        if item.name != drop:
            writer.add_tensor(item.name, raws[item.name], raw_dtype=item.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.with_suffix(".new").replace(path)


class Other:
    """A field with another value."""

    def __init__(self, field: gguf.ReaderField, value: object) -> None:
        self.types, self.value = field.types, value

    def contents(self) -> object:
        return self.value


def set_field(name: str, value: object) -> Callable[[dict[str, gguf.ReaderField]], None]:
    def change(fields: dict[str, gguf.ReaderField]) -> None:
        fields[name] = Other(fields[name], value)

    return change


@pytest.fixture(scope="module")
def builder() -> GgufBuilder:
    """One that asks the source once for all tests here."""
    return GgufBuilder()


Raws = dict[str, np.ndarray[Any, Any]]


def swap(first: str, second: str) -> Callable[[Raws], None]:
    def change(raws: Raws) -> None:
        raws[first], raws[second] = raws[second], raws[first]

    return change


def zero(name: str) -> Callable[[Raws], None]:
    def change(raws: Raws) -> None:
        raws[name] = np.zeros_like(raws[name])

    return change


def turn(name: str) -> Callable[[Raws], None]:
    """Rows in another order: what a rotation of the wrong kind would need."""

    def change(raws: Raws) -> None:
        raws[name] = np.roll(raws[name], 1, axis=0)

    return change


def swap_tokens(fields: dict[str, gguf.ReaderField]) -> None:
    tokens = fields["tokenizer.ggml.tokens"].contents()
    tokens[300], tokens[301] = tokens[301], tokens[300]
    fields["tokenizer.ggml.tokens"] = Other(fields["tokenizer.ggml.tokens"], tokens)


def nothing(_: object) -> None:
    """No change."""


@pytest.mark.parametrize(
    ("fields", "tensors", "drop", "message"),
    [
        (lambda fields: fields.pop("tokenizer.chat_template"), nothing, "", "the chat template is lost"),
        (set_field("tokenizer.chat_template", "{{ x }}"), nothing, "", "the chat template differs from the source's"),
        (set_field("tokenizer.ggml.eos_token_id", 0), nothing, "", "ggml.eos_token_id is 0, the source has 2"),
        (set_field("tokenizer.ggml.bos_token_id", 2), nothing, "", "ggml.bos_token_id is 2, the source has 1"),
        (lambda fields: fields.pop("tokenizer.ggml.eos_token_id"), nothing, "", "eos_token_id is missing, the source"),
        (set_field("llama.rope.freq_base", 5e5), nothing, "", "llama.rope.freq_base is 500000.0, the source has 10000"),
        (swap_tokens, nothing, "", "lines otherwise than the source, first "),
        (nothing, nothing, "blk.1.ffn_up.weight", "tensor blk.1.ffn_up.weight is missing: 131,072 of the source's"),
        (nothing, zero("blk.1.ffn_up.weight"), "", "tensor blk.1.ffn_up.weight (Q8_0) is all zeros"),
        (nothing, zero("blk.1.ffn_norm.weight"), "", "blk.1.ffn_norm.weight (F32) differs from the source's by 100%"),
        (nothing, swap("blk.0.attn_q.weight", "blk.1.attn_q.weight"), "", "blk.0.attn_q.weight (Q8_0) is not the"),
        (nothing, swap("blk.0.attn_norm.weight", "blk.1.attn_norm.weight"), "", "blk.0.attn_norm.weight (F32) differs"),
        (nothing, turn("blk.0.attn_k.weight"), "", "blk.0.attn_k.weight (Q8_0) is not the source's: a cosine"),
    ],
    ids=["no-template", "template", "eos", "bos", "no-eos", "rope", "tokens", "tensor", "zeros", "zero-norm", "layers",
         "norms", "rows"],
)  # fmt: skip
def test_what_is_not_the_sources(
    fields: Callable[[dict[str, gguf.ReaderField]], None], tensors: Callable[[Raws], None], drop: str, message: str,
    artifact: Artifact, tiny: Path, builder: GgufBuilder,
) -> None:  # fmt: skip
    rewrite(weights(artifact), fields, drop, tensors)
    with pytest.raises(VerifyError, match=re.escape(message)) as caught:
        builder.verify(artifact.folder, open_checkpoint(tiny), RunLimits(), SilentReporter())
    assert caught.value.message.startswith("tiny-Q8_0.gguf: ")
    assert caught.value.hint


def test_a_rewritten_file_without_a_fault_is_good(artifact: Artifact, tiny: Path, builder: GgufBuilder) -> None:
    """So that the faults above are what is refused, not the rewriting."""
    rewrite(weights(artifact), nothing)
    facts = builder.verify(artifact.folder, open_checkpoint(tiny), RunLimits(), SilentReporter())
    assert facts["lines"] > 2000
    assert facts["ends"] == [2]
    assert facts["divergence"] < 0.01 * facts["divergence_elsewhere"]


def asked(folder: Path) -> Expected:
    return expected_of(SilentReporter(), open_checkpoint(folder), None)


def without_token(number: int) -> Callable[[dict[str, gguf.ReaderField]], None]:
    """A piece that no text has any more in its place: what had it is split into smaller ones."""

    def change(fields: dict[str, gguf.ReaderField]) -> None:
        tokens = fields["tokenizer.ggml.tokens"].contents()
        tokens[number] = "\u2603\u2603\u2603"
        fields["tokenizer.ggml.tokens"] = Other(fields["tokenizer.ggml.tokens"], tokens)

    return change


def test_a_few_lines_in_other_tokens_of_the_same_text_are_a_warning(
    artifact: Artifact, tiny: Path, builder: GgufBuilder
) -> None:
    """Two good tokenizers part ways there (Gemma's long runs of spaces); with more such lines it is another one."""
    expected, path = asked(tiny), weights(artifact)
    plain = [set(ids) for ids in expected.line_ids["transformers"][: expected.plain_lines]]
    others = set().union(*map(set, expected.line_ids["transformers"][expected.plain_lines :]))
    lines = {number: sum(number in ids for ids in plain) for number in range(260, 384) if number not in others}
    few = max((number for number in lines if 0 < lines[number] <= 10), key=lambda number: lines[number])
    many = min((number for number in lines if lines[number] > 30), key=lambda number: lines[number])
    good, reporter = path.read_bytes(), ListReporter()
    rewrite(path, without_token(few))
    facts = builder.verify(artifact.folder, open_checkpoint(tiny), RunLimits(), reporter)
    assert 0 < facts["split_otherwise"]["lines"] <= 10
    (said,) = [event.text for event in reporter.events if "into other tokens" in event.text]
    assert f"llama.cpp splits {facts['split_otherwise']['lines']:,} lines of the same text" in said
    path.write_bytes(good)
    rewrite(path, without_token(many))
    with pytest.raises(VerifyError, match="lines otherwise than the source, first "):
        builder.verify(artifact.folder, open_checkpoint(tiny), RunLimits(), SilentReporter())


def test_a_file_that_computes_otherwise_is_refused(artifact: Artifact, own_tiny: Path) -> None:
    """Everything in the file is as the converter has it, and llama.cpp rotates otherwise than the source."""
    good = asked(own_tiny)
    change_json(own_tiny / "config.json", rope_theta=100.0)
    other = replace(good, log_probs=asked(own_tiny).log_probs)
    checkpoint = open_checkpoint(own_tiny)
    facts = engine.try_out(SilentReporter(), weights(artifact), 4, 1, checkpoint, good)
    assert facts["divergence"] < 0.001
    with pytest.raises(
        VerifyError, match=r"it does not compute what the source computes: the predictions are [\d.]+ nats"
    ):
        engine.try_out(SilentReporter(), weights(artifact), 4, 1, checkpoint, other)


def test_a_source_that_does_not_fit_into_memory_is_said(
    own_tiny: Path, monkeypatch: pytest.MonkeyPatch, artifact: Artifact
) -> None:
    monkeypatch.setattr("quantize.formats.gguf.source.ram", lambda: (10**6, 10**6))
    expected = asked(own_tiny)
    assert expected.log_probs is None
    facts = engine.try_out(SilentReporter(), weights(artifact), 4, 1, open_checkpoint(own_tiny), expected)
    assert facts["unmeasured"] == "the source takes 1 GiB of memory in transformers, 0 GiB are free"


def test_batches_and_single_tokens_must_agree(artifact: Artifact, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = engine.predictions

    def spoilt(model: Any, name: str, parts: Any) -> Any:
        found = real(model, name, parts)
        return found if len(parts) == 1 else np.roll(found, 1, axis=0)

    monkeypatch.setattr(engine, "predictions", spoilt)
    with pytest.raises(VerifyError, match=r"llama\.cpp computes 64 tokens at once otherwise than one by one"):
        engine.try_out(SilentReporter(), weights(artifact), 4, 1, open_checkpoint(tiny), asked(tiny))


def test_another_source_of_the_same_shape_is_not_taken_for_it(built: Built, run: Run, tmp_path: Path) -> None:
    (item,) = [item for item in built.store.artifacts() if item.manifest.variant == "q8_0"]
    folder = Path(shutil.copytree(item.folder, tmp_path / "copy"))
    model = Path(shutil.copytree(str(built.recipe.source.model), tmp_path / "tiny"))
    change_json(model / "config.json", rope_theta=500_000.0)
    (folder / "recipe.yaml").write_text(built.recipe.text.replace(str(built.recipe.source.model), str(model)))
    result = run("verify", folder)
    assert "the source local:tiny is not the one that it was built from" in result.stderr
    assert result.exit_code == 3


def test_verify_runs_every_current_artifact(built: Built, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTIZE_STORE", str(built.store.root))
    monkeypatch.setenv("QUANTIZE_CACHE", str(built.cache.root))
    names = [f"tiny/{name}" for name in ("q8_0", "iq4_xs")]
    result = run("verify", "--json", *names)
    assert result.exit_code == 0
    for item in json.loads(result.stdout):
        assert item["runtime"] == "llama.cpp"
        assert len(item["tokens"]) == 16


def test_verify_with_nothing_to_verify(run: Run) -> None:
    result = run("verify")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "no artifacts in" in result.stderr


# --- in the runtime ---------------------------------------------------------------------------------------------------


def spoil_tensor(artifact: Artifact, name: str, raw: bytes) -> None:
    path = weights(artifact)
    (item,) = [item for item in gguf.GGUFReader(path).tensors if item.name == name]
    with path.open("r+b") as file:
        file.seek(int(item.data_offset))
        file.write(raw)


def test_a_nan_in_a_tensor_does_not_load(artifact: Artifact) -> None:
    spoil_tensor(artifact, "blk.0.ffn_up.weight", np.float16("nan").tobytes())
    with pytest.raises(
        VerifyError, match=r"does not load it: load_all_data: tensor 'blk\.0\.ffn_up\.weight' has invalid"
    ):
        engine.try_out(SilentReporter(), weights(artifact), 4, 1)


def test_weights_that_overflow_are_seen_in_the_logits(artifact: Artifact) -> None:
    """Finite in the file, so it loads; not finite once it runs."""
    spoil_tensor(artifact, "output_norm.weight", np.full(256, 3e38, dtype=np.float32).tobytes())
    with pytest.raises(VerifyError, match=r"tiny-Q8_0\.gguf: the logits are not finite"):
        engine.try_out(SilentReporter(), weights(artifact), 4, 1)


def test_a_truncated_file_does_not_load(artifact: Artifact) -> None:
    os.truncate(weights(artifact), 1_400_000)
    with pytest.raises(VerifyError, match=r"tiny-Q8_0\.gguf: llama\.cpp does not load it"):
        engine.try_out(SilentReporter(), weights(artifact), 4, 1)


def test_two_runs_that_differ_are_refused(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([[1, 2], [1, 3]])
    monkeypatch.setattr(engine, "generate", lambda *_: next(answers))
    with pytest.raises(VerifyError, match=r"two greedy runs differ \(\[1, 2\] and \[1, 3\]\)"):
        engine.try_out(SilentReporter(), weights(artifact), 2, 1)


def test_a_good_file_runs_the_same_each_time(artifact: Artifact) -> None:
    facts = [engine.try_out(SilentReporter(), weights(artifact), 8, 1) for _ in range(2)]
    assert facts[0]["tokens"] == facts[1]["tokens"] == artifact.measurements()["verify"]["tokens"][:8]


def test_a_folder_without_weights(tmp_path: Path, tiny: Path) -> None:
    write_json(tmp_path / "manifest.json", {})
    with pytest.raises(VerifyError, match=r"no \.gguf file"):
        GgufBuilder().verify(tmp_path, open_checkpoint(tiny), RunLimits(), SilentReporter())


@pytest.mark.parametrize("place", [(0, 0), (ROWS, 7), (2 * ROWS, 31)])
@pytest.mark.parametrize("damage", [3e-3, -3e-3, float("nan"), float("inf")])
def test_two_readers_of_a_linear_agree_as_allclose_says(place: tuple[int, int], damage: float) -> None:
    torch = pytest.importorskip("torch")
    ours = torch.ones(2 * ROWS + 1, 32)
    theirs = (ours * (1 + 1e-3)).T.contiguous().T
    assert agree(theirs, ours)
    assert not agree(theirs[1:], ours)
    theirs[place] = 1 + damage
    assert not agree(theirs, ours)
    assert not torch.allclose(theirs, ours, rtol=2e-3, atol=1e-6)


# --- what a check by names refused ------------------------------------------------------------------------------------


def without_prefix(path: Path) -> None:
    """Gemma's vocabulary puts no space before a text; the tiny one of its family does."""
    data = json.loads(path.read_text(encoding="utf-8"))
    data["normalizer"]["normalizers"] = [
        item for item in data["normalizer"]["normalizers"] if item["type"] != "Prepend"
    ]
    write_json(path, data)


@pytest.mark.parametrize("name", ["DeepSeek V3", "gpt-oss", "LFM2-MoE", "Hunyuan", "Granite hybrid", "Gemma 3n"])
def test_good_files_of_models_that_the_converter_rearranges(name: str, tmp_path: Path) -> None:
    """Split latent matrices, fused experts, biases of routers, extra embeddings: good, and with other weights not."""
    from quantize.runtimes.llama_cpp.convert import ConvertRequest, convert

    family, silent = family_named(name), SilentReporter()
    make_family(family, tmp_path / "model")
    if name.startswith("Gemma"):
        without_prefix(tmp_path / "model" / "tokenizer.json")
    checkpoint = open_checkpoint(tmp_path / "model")
    request = ConvertRequest(checkpoint.folder, checkpoint.dtype, {"general.name": "x"}, family.pre_tokenizer)
    convert(silent, request, tmp_path / "x.gguf")
    expected = expected_of(silent, checkpoint, family.pre_tokenizer)
    assert expected.left_out == {}
    compare_header(read_gguf(tmp_path / "x.gguf"), checkpoint, expected)
    facts = engine.try_out(silent, tmp_path / "x.gguf", 4, 1, checkpoint, expected)
    assert facts["divergence"] < 1e-3 * facts["divergence_elsewhere"]
    other = replace(expected, log_probs=np.roll(expected.log_probs, 3, axis=0))
    with pytest.raises(VerifyError, match="does not compute what the source computes"):
        engine.try_out(silent, tmp_path / "x.gguf", 4, 1, checkpoint, other)
