"""From a recipe's source to pinned files: folders, packages, GGUF files, hub repositories; hashes read only once."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quantize.errors import CheckpointError, MissingExtraError, StoreError
from quantize.events import EventKind, ListReporter, SilentReporter
from quantize.formats import option_models
from quantize.model.checkpoint import open_checkpoint
from quantize.model.source import PinnedSource, card_metadata, open_source, pin_source
from quantize.recipe.model import Recipe, load_recipe
from quantize.system.cache import Cache, hash_file
from quantize.testing import TinyModel, make_checkpoint, write_recipe
from tests.conftest import Built
from tests.elsewhere import run_elsewhere

COMMIT = "0123456789abcdef0123456789abcdef01234567"
VARIANTS = "variants: [{format: gguf, type: Q8_0}]\n"


def recipe_for(tmp_path: Path, source: str) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"name: demo\nsource: {source}\n{VARIANTS}", encoding="utf-8")
    return load_recipe(path, option_models())


def pin(tmp_path: Path, source: str, cache: Cache) -> PinnedSource:
    return pin_source(recipe_for(tmp_path, source), cache, SilentReporter())


# --- hashes -----------------------------------------------------------------------------------------------------------


class Reads:
    """Counts which files are really read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        monkeypatch.setattr("quantize.system.cache.hash_file", self._read)

    def _read(self, path: Path, progress: Callable[[int], None] | None = None) -> str:
        self.names.append(path.name)
        return hash_file(path, progress)


def test_a_file_is_read_once_until_it_changes(
    own_tiny: Path, tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = Reads(monkeypatch)
    first = pin(tmp_path, "{model: ./model}", cache)
    assert sorted(reads.names) == sorted(file.path for file in first.files)
    reads.names.clear()
    assert pin(tmp_path, "{model: ./model}", cache) == first
    assert reads.names == []
    card = own_tiny / "README.md"
    os.utime(card, ns=(1, 1))
    assert pin(tmp_path, "{model: ./model}", Cache(cache.root)) == first
    assert reads.names == ["README.md"]
    reads.names.clear()
    card.write_text(card.read_text() + "More.\n")
    os.utime(card, ns=(1, 1))
    assert pin(tmp_path, "{model: ./model}", cache).digest != first.digest
    assert reads.names == ["README.md"], "same time, other size"


def test_hashes_are_those_of_hashlib(own_tiny: Path, tmp_path: Path, cache: Cache) -> None:
    pinned = pin(tmp_path, "{model: ./model}", cache)
    for file in pinned.files:
        raw = (own_tiny / file.path).read_bytes()
        assert (file.size_bytes, file.sha256) == (len(raw), hashlib.sha256(raw).hexdigest())
    lines = "".join(f"{file.sha256}  {file.path}\n" for file in sorted(pinned.files, key=lambda item: item.path))
    assert pinned.digest == hashlib.sha256(lines.encode()).hexdigest()


def test_all_that_makes_the_model_is_pinned(tmp_path: Path, cache: Cache) -> None:
    make_checkpoint(tmp_path / "model", shards=2)
    (tmp_path / "model" / "notes.txt").write_text("not part of the model")
    names = {file.path for file in pin(tmp_path, "{model: ./model}", cache).files}
    shards = {f"model-0000{index}-of-00002.safetensors" for index in (1, 2)}
    rest = {"config.json", "tokenizer.json", "tokenizer_config.json", "README.md", "LICENSE"}
    assert names == {*shards, *rest, "model.safetensors.index.json"}


def test_a_cache_that_can_not_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match=r"cache .*file/cache can't be used"):
        Cache(tmp_path / "file" / "cache").sha256(tmp_path / "file")


# --- the cache's entries ----------------------------------------------------------------------------------------------


def test_an_entry_is_made_once_and_whole(cache: Cache) -> None:
    made: list[str] = []

    def build(folder: Path) -> None:
        made.append(folder.name)
        (folder / "data").write_text("x")

    assert cache.make("kind", "key", build) == cache.make("kind", "key", build) == cache.entry("kind", "key")
    assert len(made) == 1
    assert (cache.entry("kind", "key") / "data").read_text() == "x"


def test_a_failed_entry_leaves_nothing_and_can_be_made_again(cache: Cache) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        cache.make("kind", "key", fail)
    assert [path.name for path in (cache.root / "kind").iterdir() if not path.name.endswith(".lock")] == []
    (cache.root / "kind" / ".key.0123.tmp").mkdir()  # as a killed build leaves it
    cache.make("kind", "key", lambda _: None)
    assert not (cache.root / "kind" / ".key.0123.tmp").exists()


# --- folders and packages ---------------------------------------------------------------------------------------------


def test_a_folder_tells_its_name_and_licence(own_tiny: Path, tmp_path: Path, cache: Cache) -> None:
    pinned = pin(tmp_path, "{model: ./model}", cache)
    assert (pinned.uri, pinned.name, pinned.license) == ("local:model", "model", "apache-2.0")
    assert (pinned.revision, pinned.base_model, pinned.quantized_before) == (None, None, None)
    assert str(tmp_path) not in pinned.uri
    told = pin(tmp_path, "{model: ./model, name: Better-1B, base_model: org/base, license: mit}", cache)
    assert (told.name, told.base_model, told.license) == ("Better-1B", "org/base", "mit")
    assert told.digest == pinned.digest


def test_a_packaged_gguf(built: Built, tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site" / "tiny_gguf_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('a package must not be run to be read')\n")
    (artifact,) = [item for item in built.store.artifacts() if item.manifest.variant == "q4_0"]
    (file,) = artifact.folder.glob("*.gguf")
    (package / "tiny.gguf").write_bytes(file.read_bytes())
    monkeypatch.syspath_prepend(package.parent)
    pinned = pin(tmp_path, "{model: {package: tiny_gguf_package, file: tiny.gguf}}", cache)
    assert (pinned.uri, pinned.quantized_before) == ("package:tiny_gguf_package/tiny.gguf", "Q4_0")
    assert pinned.is_gguf
    with pytest.raises(CheckpointError, match=r"package 'tiny_gguf_package' has no file 'other\.gguf'") as caught:
        pin(tmp_path, "{model: {package: tiny_gguf_package, file: other.gguf}}", cache)
    assert caught.value.hint == "it has: tiny.gguf"
    (package / "out.gguf").symlink_to("/etc/passwd")
    with pytest.raises(CheckpointError, match=r"has no file 'out\.gguf'"):
        pin(tmp_path, "{model: {package: tiny_gguf_package, file: out.gguf}}", cache)


def test_a_gguf_file_becomes_a_checkpoint_once(built: Built, tmp_path: Path, cache: Cache) -> None:
    """F16 in GGUF and back is lossless, so the checkpoint that comes out has the weights that went in."""
    (artifact,) = [item for item in built.store.artifacts() if item.manifest.variant == "f16"]
    (file,) = artifact.folder.glob("*.gguf")
    (tmp_path / "tiny.gguf").write_bytes(file.read_bytes())
    pinned = pin(tmp_path, "{model: ./tiny.gguf}", cache)
    checkpoint = open_source(pinned, cache, SilentReporter())
    model = TinyModel()
    assert {name: item.shape for name, item in checkpoint.tensors.items()} == model.shapes()
    for name, wanted in model.weights().items():
        assert abs(checkpoint.read(name).float().numpy() - wanted).max() < 2**-9, name
    events = ListReporter()
    assert open_source(pinned, cache, events).folder == checkpoint.folder
    assert events.events == [], "the second time nothing is done"
    assert (pinned.name, pinned.quantized_before) == ("tiny", None)


def test_a_gguf_file_in_another_locale(built: Built, tmp_path: Path) -> None:
    """Rust's tokenizers takes no path that is not UTF-8; the command speaks it whatever the locale is."""
    (artifact,) = [item for item in built.store.artifacts() if item.manifest.variant == "f16"]
    (file,) = artifact.folder.glob("*.gguf")
    (tmp_path / "tïny.gguf").write_bytes(file.read_bytes())
    variants = [{"format": "gguf", "type": "Q8_0"}]
    recipe = write_recipe(tmp_path / "räzept.yaml", tmp_path / "tïny.gguf", variants, name="tiny")
    result = run_elsewhere(tmp_path, "build", str(recipe), "--no-eval", "--json")
    assert result.returncode == 0, result.stderr.decode()
    (built_there,) = json.loads(result.stdout)
    assert built_there["state"] == "built"


def test_a_gguf_file_that_is_none(tmp_path: Path, cache: Cache) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF, but not really, and far too short")
    with pytest.raises(CheckpointError, match=r"bad\.gguf: not a GGUF file that can be read"):
        pin(tmp_path, "{model: ./bad.gguf}", cache)


def test_weights_are_checked_for_nan_once(own_tiny: Path, tmp_path: Path, cache: Cache) -> None:
    pinned, events = pin(tmp_path, "{model: ./model}", cache), ListReporter()
    open_source(pinned, cache, events)
    assert {event.text for event in events.events} == {"checking weights for NaN and Inf"}
    assert events.events[-1].done == events.events[-1].total == open_checkpoint(own_tiny).weights_bytes
    events.events.clear()
    open_source(pinned, cache, events)
    assert events.events == []


def test_card_metadata(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    assert card_metadata(card) == {}
    card.write_text("---\nlicense: mit\ntags: [a]\n---\n# Title\n")
    assert card_metadata(card) == {"license": "mit", "tags": ["a"]}
    for text in ("# Title\n", "---\n- a\n---\n", "---\n{a: [\n---\n", "---\nlicense: mit\n"):
        card.write_text(text)
        assert card_metadata(card) == {}


# --- the hub ----------------------------------------------------------------------------------------------------------


class FakeHub:
    """Stands for huggingface_hub's two calls; gives a folder, or raises."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path | None, error: Exception | None = None) -> None:
        self.folder, self.error, self.asked, self.fetched = folder, error, [], []
        monkeypatch.setattr("huggingface_hub.HfApi", lambda: self)
        monkeypatch.setattr("huggingface_hub.snapshot_download", self.snapshot_download)

    asked: list[str]
    fetched: list[dict[str, Any]]

    def model_info(self, repo: str, revision: str, timeout: float) -> SimpleNamespace:
        if self.error:
            raise self.error
        self.asked.append(f"{repo}@{revision}")
        return SimpleNamespace(sha=COMMIT)

    def snapshot_download(self, repo: str, revision: str, allow_patterns: list[str]) -> str:
        if self.error:
            raise self.error
        self.fetched.append({"repo": repo, "revision": revision, "allow": allow_patterns})
        return str(self.folder)


@pytest.mark.parametrize(("asked", "revision"), [("main", ""), ("v1.0", ", revision: v1.0")])
def test_a_moving_revision_is_resolved_and_recorded(
    asked: str, revision: str, tiny: Path, tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, events = FakeHub(monkeypatch, tiny), ListReporter()
    pinned = pin_source(recipe_for(tmp_path, f"{{model: org/tiny-model{revision}}}"), cache, events)
    assert hub.asked == [f"org/tiny-model@{asked}"]
    assert hub.fetched[0]["revision"] == COMMIT
    assert (pinned.uri, pinned.revision) == (f"hub:org/tiny-model@{COMMIT}", COMMIT)
    assert (pinned.name, pinned.base_model) == ("tiny-model", "org/tiny-model")
    notes = [event.text for event in events.events if event.kind is EventKind.NOTE]
    assert notes == [f"org/tiny-model@{asked} is commit {COMMIT}; pin it with `revision: {COMMIT}`"]


def test_a_commit_is_taken_as_it_is(tiny: Path, tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub(monkeypatch, tiny)
    pinned = pin(tmp_path, f"{{model: org/tiny-model, revision: {COMMIT}}}", cache)
    assert (hub.asked, pinned.revision) == ([], COMMIT)
    assert not any(pattern.endswith((".bin", ".pt", ".py", "*")) for pattern in hub.fetched[0]["allow"][:5])


def test_a_folder_of_that_name_is_not_mistaken_for_the_hub(
    tiny: Path, tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = FakeHub(monkeypatch, tiny)
    make_checkpoint(tmp_path / "org" / "tiny-model", TinyModel(hidden=64, intermediate=64, blocks=1))
    assert pin(tmp_path, "{model: org/tiny-model}", cache).uri == "local:tiny-model"
    assert hub.fetched == []


def test_offline_the_hub_client_itself_is_translated(tmp_path: Path, cache: Cache) -> None:
    """No fake here: huggingface_hub in offline mode, as conftest sets it, raises what it raises."""
    with pytest.raises(
        CheckpointError, match=r"source org/none@main: the hub (can't be reached|does not give it)"
    ) as one:
        pin(tmp_path, "{model: org/none}", cache)
    assert "or name a" in str(one.value.hint)
    with pytest.raises(CheckpointError, match=f"source org/none@{COMMIT}: the hub "):
        pin(tmp_path, f"{{model: org/none, revision: {COMMIT}}}", cache)


def test_network_errors_are_translated_and_others_are_not(
    tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeHub(monkeypatch, None, error=ConnectionResetError("reset"))
    with pytest.raises(CheckpointError, match="the hub can't be reached"):
        pin(tmp_path, "{model: org/none}", cache)
    FakeHub(monkeypatch, None, error=ZeroDivisionError("a bug"))
    with pytest.raises(ZeroDivisionError, match="a bug"):
        pin(tmp_path, "{model: org/none}", cache)


def test_without_the_hub_client_the_extra_is_named(
    tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match="fetching from the hub needs an extra") as caught:
        pin(tmp_path, "{model: org/none}", cache)
    assert caught.value.hint == "install it with: pip install 'quantize-models[hub]'"


@pytest.mark.parametrize("rules", ["smollm", "gpt-2"])
def test_the_digits_of_a_gguf_source_stand_apart_where_its_rules_say_so(rules: str, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    from quantize.model.from_gguf import _mend_tokenizer

    tokenizer = Tokenizer(models.BPE({"Ġ": 0, "ĠĠ": 1, "4": 2, "44": 3}, [("Ġ", "Ġ"), ("4", "4")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    _mend_tokenizer({"tokenizer.ggml.pre": rules}, tmp_path / "tokenizer.json")
    ids = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("  44").ids
    assert ids == ([1, 2, 2] if rules == "smollm" else [0, 0, 3])


def test_the_vocabulary_of_a_gguf_source_is_sentencepieces_own(built: Built, tiny: Path) -> None:
    """What llama.cpp's converter needs beside tokenizer.json: pieces with scores and kinds."""
    import sentencepiece
    from gguf import GGUFReader
    from tokenizers import Tokenizer

    from quantize.model.from_gguf import sentencepiece_model

    file = next(built.root.rglob("*.gguf"))
    fields = GGUFReader(file).fields
    tokens, scores, kinds = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "scores", "token_type"))
    assert fields["tokenizer.ggml.model"].contents() == "llama"
    processor = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model(file))
    assert [processor.id_to_piece(index) for index in range(len(tokens))] == tokens
    assert [processor.get_score(index) for index in range(len(tokens))] == pytest.approx(scores)
    assert [index for index in range(len(tokens)) if processor.is_control(index)] == [
        index for index, kind in enumerate(kinds) if kind == 3
    ]
    reader = Tokenizer.from_file(str(tiny / "tokenizer.json"))
    for text in ("What is the capital of France?", "the quick brown fox", "4 foxes, 11 dogs"):
        assert processor.encode(text) == reader.encode(text, add_special_tokens=False).ids
