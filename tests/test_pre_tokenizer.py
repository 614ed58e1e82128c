"""Pre-tokenizers that the converter does not know: named with the nearest, chosen by the recipe, and checked."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest

from quantize.events import SilentReporter
from quantize.formats import option_models
from quantize.formats.base import RunLimits
from quantize.formats.gguf.build import GgufBuilder
from quantize.formats.gguf.check import said_of_ends
from quantize.formats.gguf.source import load_tokenizer
from quantize.model.checkpoint import open_checkpoint, read_chat_template
from quantize.recipe.model import load_recipe
from quantize.runtimes.llama_cpp.vocabulary import PRE_TOKENIZERS, _tokenized, names, source_ends, turn_ends
from quantize.runtimes.token_lines import token_lines
from quantize.store.store import Store
from quantize.store.workspace import Workspace
from quantize.system.cache import Cache
from quantize.testing import TinyModel, make_checkpoint, write_json, write_recipe
from tests.bad_checkpoints import change_json
from tests.conftest import Run, build

VOCABULARY = 1500
MODEL = TinyModel(hidden=64, intermediate=96, blocks=1, heads=2, kv_heads=1, vocabulary=VOCABULARY)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint with byte-level BPE: GPT-2's rules, and merges of its own, whose hash nobody knows.

    GPT-2's digits stand together, however many: by rules that part them other ids come out.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = make_checkpoint(tmp_path_factory.mktemp("pre") / "bytes", MODEL)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    tokenizer.train_from_iterator([*token_lines(), *(f"{number} {number}" for number in range(3000))], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def recipe(folder: Path, model: Path, **options: Any) -> Path:
    return write_recipe(folder / "bytes.yaml", model, [{"format": "gguf", "type": "Q8_0", **options}])


def test_plan_names_the_hash_and_the_nearest(byte_level: Path, tmp_path: Path, run: Run) -> None:
    result = run("plan", recipe(tmp_path, byte_level))
    shown = re.sub(r"\s+", " ", result.stderr)
    assert result.exit_code == 3
    assert re.search(r"does not know this tokenizer's pre-tokenizer \(hash [0-9a-f]{64}\)", shown)
    assert re.search(r"tokenizes as the model does: gpt-2 \(all\), ", shown)
    assert "write `pre_tokenizer: gpt-2` in the variant" in shown


def test_the_chosen_one_is_built_and_written(byte_level: Path, tmp_path: Path, store: Store, cache: Cache) -> None:
    path = recipe(tmp_path, byte_level, pre_tokenizer="gpt-2")
    (outcome,) = build(load_recipe(path, option_models()), Workspace(store, cache, SilentReporter()), evaluate=False)
    assert outcome.artifact is not None, outcome.error
    assert outcome.variant == "q8_0"
    (file,) = outcome.artifact.folder.glob("*.gguf")
    assert gguf.GGUFReader(file).fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    assert outcome.artifact.measurements()["verify"]["lines"] > 2000
    again = GgufBuilder().verify(outcome.artifact.folder, open_checkpoint(byte_level), RunLimits(), SilentReporter())
    assert again["divergence"] < 0.01 * again["divergence_elsewhere"]


def test_a_wrong_choice_is_refused_with_the_first_line(byte_level: Path, tmp_path: Path, run: Run) -> None:
    result = run("build", "--no-eval", recipe(tmp_path, byte_level, pre_tokenizer="qwen2"))
    shown = re.sub(r"\s+", " ", result.stderr)
    assert result.exit_code == 3
    assert re.search(
        r"llama\.cpp tokenizes [\d,]+ of [\d,]+ lines otherwise than the source, first '.*': \[.*\] instead of \[",
        shown,
    )
    assert "it splits text by the rules of 'qwen2': choose others with `pre_tokenizer`" in shown
    assert "loosen" not in shown


def test_two_choices_share_no_16_bit_file(byte_level: Path, tmp_path: Path, cache: Cache) -> None:
    """A wrong one that was tried before must not be what the right one is made of."""
    for choice in ("qwen2", "gpt-2"):
        path = recipe(tmp_path, byte_level, pre_tokenizer=choice)
        workspace = Workspace(Store(tmp_path / choice), cache, SilentReporter())
        (outcome,) = build(load_recipe(path, option_models()), workspace, evaluate=False)
        assert (outcome.error is None) == (choice == "gpt-2"), outcome.error


def test_a_name_that_llama_cpp_does_not_know(byte_level: Path, tmp_path: Path, run: Run) -> None:
    result = run("plan", recipe(tmp_path, byte_level, pre_tokenizer="qwen22"))
    assert result.exit_code == 2
    assert "unknown pre-tokenizer" in result.stderr
    assert "qwen2" in result.stderr


def test_a_vocabulary_without_rules_to_choose(tiny: Path, tmp_path: Path, run: Run) -> None:
    result = run("plan", recipe(tmp_path, tiny, pre_tokenizer="qwen2"))
    assert result.exit_code == 3
    assert "pre_tokenizer: qwen2 can't be chosen" in result.stderr


@pytest.mark.parametrize("name", names())
def test_llama_cpp_knows_every_name(name: str, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "llama")
    letters = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list(letters)
    writer.add_token_types([1] * len(letters))
    writer.add_token_merges(["a b"])
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_feed_forward_length(64)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert _tokenized(tmp_path / "v.gguf", ["ab"]) is not None


def test_every_name_that_the_converter_writes_can_be_chosen() -> None:
    """What it recognizes has a name here, so that a stored file can be verified without its hash."""
    import inspect

    from quantize.runtimes.llama_cpp.convert import converter_package

    converter_package()
    from conversion.base import TextModel  # type: ignore[import-not-found]

    written = set(re.findall(r'res = "([^"]+)"', inspect.getsource(TextModel.get_vocab_base_pre)))
    encoders = {"bert-bge", "bert-bge-large", "jina-v2-en", "jina-v1-en", "roberta-bpe"}
    assert written - encoders - set(names()) == set()
    assert len(names()) == len(set(names())) == sum(map(len, PRE_TOKENIZERS))


# --- the lines --------------------------------------------------------------------------------------------------------


def test_the_lines_are_the_same_each_time_and_of_every_kind() -> None:
    import unicodedata

    lines = token_lines(["<|im_end|>"])
    assert lines == token_lines(["<|im_end|>"])
    assert 2500 < len(lines) < 5000
    assert all(unicodedata.is_normalized("NFC", line) for line in lines)
    text = "\n".join(lines)
    for kind in ("def ", "👩🏿‍💻", "\t\t", "\r\n", "<|im_end|>", "ươ", "é"):
        assert kind in text, kind
    assert len(re.findall(r"[\u4e00-\u9fa5]", text)) > 500
    assert len(re.findall(r"[\u1ea0-\u1ef9]", text)) > 500  # of Vietnamese alone
    assert len(re.findall(r"\d{3}", text)) > 100


# --- templates and ends -----------------------------------------------------------------------------------------------


def named(template: object) -> Callable[[Path], None]:
    return lambda folder: change_json(folder / "tokenizer_config.json", chat_template=template)


@pytest.mark.parametrize(
    ("write", "wanted"),
    [
        (named("{{ a }}"), "{{ a }}"),
        (named([{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]), "d"),
        (named({"default": "d", "tool_use": "t"}), "d"),
        (named([{"name": "tool_use", "template": "t"}]), None),
        (lambda folder: (named(None)(folder), write_json(folder / "chat_template.json", {"chat_template": "j"})), "j"),
        (lambda folder: (folder / "chat_template.jinja").write_text("file"), "file"),
    ],
    ids=["text", "list", "object", "no-default", "json", "jinja"],
)
def test_the_template_is_what_transformers_finds(
    write: Callable[[Path], object], wanted: str | None, own_tiny: Path
) -> None:
    write(own_tiny)
    assert read_chat_template(own_tiny) == wanted
    if not (own_tiny / "chat_template.json").exists():  # where only processors look
        found = load_tokenizer(own_tiny).chat_template
        assert (found.get("default") if isinstance(found, dict) else found) == wanted


def fields_of(own_tiny: Path, tmp_path: Path, store: Store, cache: Cache) -> tuple[dict[str, Any], dict[str, Any]]:
    path = write_recipe(tmp_path / "t.yaml", own_tiny, [{"format": "gguf", "type": "F16"}])
    (outcome,) = build(load_recipe(path, option_models()), Workspace(store, cache, SilentReporter()), evaluate=False)
    assert outcome.artifact is not None, outcome.error
    (file,) = outcome.artifact.folder.glob("*.gguf")
    fields = {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}
    return fields, outcome.artifact.measurements()["verify"]


def test_a_template_in_an_object_is_kept(own_tiny: Path, tmp_path: Path, store: Store, cache: Cache) -> None:
    named({"default": "{{ messages }}", "tool_use": "t"})(own_tiny)
    fields, _ = fields_of(own_tiny, tmp_path, store, cache)
    assert fields["tokenizer.chat_template"] == "{{ messages }}"


def test_the_models_own_ends_are_taken(own_tiny: Path, tmp_path: Path, store: Store, cache: Cache) -> None:
    """The tokenizer's eos is another token, and the template closes a turn with a third."""
    change_json(own_tiny / "tokenizer_config.json", eos_token="<0x00>", chat_template="{{ messages }}<0x05>")
    write_json(own_tiny / "generation_config.json", {"eos_token_id": [2, 8]})
    assert source_ends(own_tiny) == (2, 8)
    assert turn_ends(own_tiny) == {8}
    fields, facts = fields_of(own_tiny, tmp_path, store, cache)
    assert fields["tokenizer.ggml.eos_token_id"] == 2
    assert fields["tokenizer.ggml.eot_token_id"] == 8
    assert facts["ends"] == [2, 8]
    (said,) = said_of_ends(open_checkpoint(own_tiny), facts)
    assert said == "answers end at token 2, 8, as the model's settings say; the tokenizer's own eos token is 3"
