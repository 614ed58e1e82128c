"""Calibration mixes: several datasets in one set, pinned together, named everywhere, and built again to the bit."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click.testing
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantize.build.lockfile import lock_path, read_lock
from quantize.calibration.datasets.own_chat import questions
from quantize.calibration.mix import CalibrationText
from quantize.calibration.text import CalibrationSet, load_calibration_set, load_tokenizer
from quantize.errors import PlanError
from quantize.evaluate.held_out import CHANGED, CalibratedOn, hold_against
from quantize.evaluate.text import HeldOutText, Windows, cut_windows
from quantize.events import SilentReporter
from quantize.formats import option_models
from quantize.model.checkpoint import tensor_table
from quantize.recipe.calibration import CalibrationMix, CalibrationSpec, calibration_of, load_calibration
from quantize.recipe.model import load_recipe
from quantize.store.manifest import CalibrationEntry
from quantize.store.store import Store
from quantize.system.lookup import CALIBRATION, DATA
from quantize.testing import write_recipe
from tests.conftest import Run
from tests.elsewhere import rebuild_elsewhere

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers warns on import

FOX = "The quick brown fox jumps over the lazy dog, and the dog does not mind. "
GPTQ = {"format": "gptq", "group_size": 64}
IMATRIX = {"format": "gguf", "type": "Q4_K_M", "imatrix": True}
FILES = {"a.txt": [f"Paragraph {n} of the first file. {FOX}" * 2 for n in range(6)],
         "b.txt": [f"Another file has its part {n}, and {FOX}" * 3 for n in range(5)]}  # fmt: skip


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two files of text."""
    folder = tmp_path_factory.mktemp("texts")
    for name, paragraphs in FILES.items():
        (folder / name).write_text("\n\n".join(paragraphs))
    return folder


def mix(*parts: dict[str, Any], **shared: Any) -> CalibrationMix:
    return CalibrationMix.model_validate({"mix": list(parts), "sequence_length": 32, **shared})


def sha256(sequences: list[tuple[int, ...]]) -> str:
    """As docs/provenance.md has it: each sequence's length and ids as little-endian int32."""
    raw = b"".join(struct.pack(f"<{len(ids) + 1}i", len(ids), *ids) for ids in sequences)
    return hashlib.sha256(raw).hexdigest()


PART = st.fixed_dictionaries(
    {
        "dataset": st.sampled_from(sorted(FILES)), "samples": st.integers(1, 8), "packing": st.booleans(),
        "shuffle": st.booleans(), "minimum_tokens": st.integers(1, 24),
    }
)  # fmt: skip


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(PART, min_size=1, max_size=4), length=st.integers(24, 64), seed=st.integers(0, 3))
def test_a_mix_is_its_datasets_one_after_the_other(
    parts: list[dict[str, Any]], length: int, seed: int, texts: Path, tiny: Path
) -> None:
    wanted = mix(*parts, sequence_length=length, seed=seed)
    found = load_calibration_set(wanted, texts, tiny)
    alone = [
        load_calibration_set(
            CalibrationSpec.model_validate({**part, "sequence_length": length, "seed": seed}), texts, tiny
        )
        for part in parts
    ]
    joined = [ids for one in alone for ids in one.token_ids]
    assert list(found.token_ids) == joined
    assert found.hash == sha256(joined)
    assert [(part.dataset, part.sequences, part.tokens, part.hash) for part in found.parts] == [
        (part["dataset"], len(one.token_ids), sum(map(len, one.token_ids)), sha256(list(one.token_ids)))
        for part, one in zip(parts, alone, strict=True)
    ]
    assert found.tokens <= wanted.tokens
    assert len(found.token_ids) <= wanted.samples == sum(part["samples"] for part in parts)


@given(parts=st.lists(PART, min_size=1, max_size=4), limit=st.none() | st.integers(1, 10**12), seed=st.integers(0, 9))
def test_what_a_manifest_states_is_the_mix_again(parts: list[dict[str, Any]], limit: int | None, seed: int) -> None:
    wanted = mix(*({**part, "up_to_parameters": limit} for part in parts), seed=seed)
    stated = json.loads(json.dumps(CalibrationText(wanted, Path()).stated()))
    assert calibration_of(stated) == wanted
    assert calibration_of({**stated, "precision": "float32"}).precision == "float32"


def test_everything_about_the_text_is_in_its_identity(texts: Path, tmp_path: Path) -> None:
    first, second = {"dataset": "a.txt", "samples": 3}, {"dataset": "b.txt", "samples": 3}
    known = CalibrationText(mix(first, second), texts).identify()
    assert [part["content"] for part in known["mix"]] == [
        hashlib.sha256((texts / name).read_bytes()).hexdigest() for name in ("a.txt", "b.txt")
    ]
    others = [
        mix(second, first), mix(first), mix(first, second, second), mix(first, {**second, "samples": 4}),
        mix(first, {**second, "packing": True}), mix(first, {**second, "up_to_parameters": 9}),
        mix(first, second, seed=1), mix(first, second, sequence_length=33), mix(first, second, precision="float32"),
    ]  # fmt: skip
    seen = [json.dumps(CalibrationText(item, texts).identify(), sort_keys=True) for item in others]
    assert len({json.dumps(known, sort_keys=True), *seen}) == len(others) + 1
    for name in FILES:
        (tmp_path / name).write_bytes((texts / name).read_bytes())
    by_path = mix({**first, "dataset": str(tmp_path / "a.txt")}, {**second, "dataset": "./b.txt"})
    assert CalibrationText(by_path, tmp_path).identify() == known
    (tmp_path / "b.txt").write_text(FOX)
    assert CalibrationText(by_path, tmp_path).identify() != known


def test_each_hub_dataset_of_a_mix_is_pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Hub:
        def dataset_info(self, repo: str, revision: str, timeout: float) -> SimpleNamespace:
            return SimpleNamespace(sha={"org/one": "1", "org/two": "2"}[repo] * 40)

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    wanted = mix(
        {"dataset": "org/one", "samples": 2, "split": "test"}, {"dataset": "python-docs", "samples": 1},
        {"dataset": "org/two", "samples": 3, "revision": "v2"},
    )  # fmt: skip
    pinned = CalibrationText(wanted, tmp_path).pin(SilentReporter())
    assert [part.revision for part in pinned.parts] == ["1" * 40, None, "2" * 40]
    assert [(part.samples, part.split) for part in pinned.parts] == [(2, "test"), (1, "train"), (3, "train")]


def test_files_beside_a_spec_are_found_from_anywhere(texts: Path, tmp_path: Path) -> None:
    (texts / "own.yaml").write_text("mix: [{dataset: a.txt, samples: 1}, {dataset: self, samples: 1}]\n")
    found = load_calibration(texts / "own.yaml")
    assert [part.dataset for part in found.parts] == [str((texts / "a.txt").resolve()), "self"]
    assert CalibrationText(found, tmp_path).names == ("a.txt", "self")


# --- a part that is left out ------------------------------------------------------------------------------------------


def test_a_part_is_left_out_by_the_size_of_the_source_alone(texts: Path, tiny: Path) -> None:
    """The tiny model has about a million weights; not even the part's dataset is asked then."""
    kept = {"dataset": "a.txt", "samples": 4}
    limited = mix(kept, {"dataset": "self-chat", "samples": 2, "up_to_parameters": 1000})
    found = load_calibration_set(limited, texts, tiny)
    assert found.token_ids == load_calibration_set(mix(kept), texts, tiny).token_ids
    assert [(part.sequences, part.left_out is None) for part in found.parts] == [(4, True), (0, False)]
    assert re.fullmatch(
        r"the source has 1,[\d,]{7} parameters, and the mix takes it up to 1,000", found.parts[1].left_out
    )
    roomy = mix(kept, {"dataset": "b.txt", "samples": 2, "up_to_parameters": 10**7})
    assert len(load_calibration_set(roomy, texts, tiny).token_ids) == 6
    with pytest.raises(PlanError, match="every part of the mix is left out: the source has 1,") as caught:
        load_calibration_set(mix({**kept, "up_to_parameters": 1000}), texts, tiny)
    assert caught.value.hint == "raise up_to_parameters of a part, or add one without"


def test_the_plan_says_what_is_calibrated_on(texts: Path, tiny: Path, run: Run) -> None:
    parts = [{"dataset": "a.txt", "samples": 4}, {"dataset": "self", "samples": 2, "up_to_parameters": 1000}]
    path = write_recipe(texts / "r.yaml", tiny, [GPTQ], calibration={"mix": parts, "sequence_length": 64})
    lines = run("plan", path).stdout.splitlines()
    assert "text    a.txt, up to 4 sequences of 64 tokens" in lines
    (left_out,) = [line for line in lines if line.startswith("text    self is left out: the source has 1,")]
    assert left_out.endswith("the mix takes it up to 1,000")
    first, second = json.loads(run("plan", path, "--json").stdout)["calibration"]
    assert first == {"dataset": "a.txt", "sequences": 4, "tokens": 256, "left_out": None}
    assert (second["sequences"], second["tokens"]) == (0, 0)


def test_the_memory_of_a_model_that_writes_its_text_is_planned(
    texts: Path, tiny: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights as they are stored and in float32, and keys and values (2 blocks, 2 of 4 heads of 64) of 16 rows."""
    monkeypatch.setattr("quantize.build.size.pass_bytes", lambda *_, **_given: 1 << 20)

    def planned(*parts: dict[str, Any], budget: str = "1TB") -> click.testing.Result:
        calibration = {"mix": list(parts), "sequence_length": 64}
        path = write_recipe(texts / "memory.yaml", tiny, [GPTQ], calibration=calibration)
        return run("plan", path, "--json", "--memory-budget", budget)

    parameters = sum(info.elements for info in tensor_table(tiny).values())
    assert json.loads(planned(FILE).stdout)["pass_memory_bytes"] == 1 << 20
    keys_and_values = 16 * 64 * 4 * (2 * 2 * 2 * 64)
    whole = (420 << 20) + (2 + 4) * parameters + keys_and_values
    assert json.loads(planned(FILE, OWN).stdout)["pass_memory_bytes"] == whole
    left_out = planned(FILE, {**OWN, "up_to_parameters": parameters - 1})
    assert json.loads(left_out.stdout)["pass_memory_bytes"] == 1 << 20
    refused = planned(FILE, OWN, budget="400MB")
    assert (refused.exit_code, "`self-chat`) holds all of it in float32" in refused.stderr) == (3, True)


# --- chats by the model itself ----------------------------------------------------------------------------------------


def test_self_chat_is_questions_through_the_template_and_answers(tiny: Path, tmp_path: Path) -> None:
    def chats(**values: Any) -> CalibrationSet:
        spec = CalibrationSpec.model_validate({"dataset": "self-chat", "samples": 3, "sequence_length": 400, **values})
        return load_calibration_set(spec, tmp_path, tiny)

    found = chats()
    assert found == chats()
    assert found.hash != chats(seed=1).hash
    assert [len(ids) for ids in found.token_ids] == [400] * 3
    tokenizer = load_tokenizer(tiny)
    for number, ids in enumerate(found.token_ids):
        for turn, question in enumerate(questions()[number::3]):
            asked = tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], tokenize=True, add_generation_prompt=True, return_dict=False
            )
            start = next(at for at in range(len(ids)) if list(ids[at : at + len(asked)]) == asked[: len(ids) - at])
            assert (start == 0) == (turn == 0)
            ids = ids[start + len(asked) :]
            if len(ids) < 200:
                break


def test_a_model_without_a_template_is_asked_in_plain_text(own_tiny: Path, tmp_path: Path) -> None:
    config = own_tiny / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": None}))
    spec = CalibrationSpec.model_validate({"dataset": "self-chat", "samples": 1, "sequence_length": 64})
    (ids,) = load_calibration_set(spec, tmp_path, own_tiny).token_ids
    asked = load_tokenizer(own_tiny)(questions()[0] + "\n")["input_ids"]
    assert list(ids[: len(asked)]) == asked[:64]


# --- what is built with a mix -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recipe_of_a_mix(texts: Path, tiny: Path) -> Path:
    parts = [
        {"dataset": "a.txt", "samples": 4}, {"dataset": "self-chat", "samples": 2},
        {"dataset": "b.txt", "samples": 3, "packing": True}, {"dataset": "self", "samples": 9, "up_to_parameters": 10},
    ]  # fmt: skip
    calibration = {"mix": parts, "sequence_length": 64, "precision": "float32"}
    return write_recipe(texts / "mixed.yaml", tiny, [GPTQ, IMATRIX], name="mixed", calibration=calibration)


def test_a_mix_is_named_in_all_papers_and_rebuilt_to_the_bit(
    recipe_of_a_mix: Path, tiny: Path, run: Run, store: Store, tmp_path: Path
) -> None:
    result = run("build", recipe_of_a_mix, "--no-eval")
    assert result.exit_code == 0, result.stderr
    assert "warning: calibration goes without self: the source has 1," in result.stderr
    recipe = load_recipe(recipe_of_a_mix, option_models())
    assert recipe.calibration is not None
    found = load_calibration_set(recipe.calibration, recipe_of_a_mix.parent, tiny)
    for name in ("gptq-int4-g64", "q4_k_m-imatrix"):
        artifact = store.find(f"mixed/{name}")
        entry = artifact.manifest.calibration
        assert entry is not None
        assert (entry.hash, entry.sequences, entry.tokens) == (found.hash, len(found.token_ids), found.tokens)
        assert entry.names == ("a.txt", "self-chat", "b.txt")
        assert [part.hash for part in entry.parts or ()] == [part.hash for part in found.parts]
        assert "chosen on a.txt, self-chat, b.txt;" in (artifact.folder / "README.md").read_text()
        (tmp_path / name).mkdir()
        data = rebuild_elsewhere(artifact.folder, tmp_path / name, "--calibration", str(recipe_of_a_mix.parent))
        assert (data["manifest_fields"], data["differences"]) == ([], [])
        assert data["rebuilt_digest"] == artifact.manifest.digest
    folder = store.find("mixed/gptq-int4-g64").folder
    missing = run("rebuild", folder, "--calibration", tmp_path, "--quiet")
    assert (missing.exit_code, "say where it is with --calibration FOLDER" in missing.stderr) == (2, True)


def test_a_lock_pins_each_part(texts: Path, tiny: Path, tmp_path: Path, run: Run) -> None:
    for name in FILES:
        (tmp_path / name).write_bytes((texts / name).read_bytes())
    parts = [{"dataset": "a.txt", "samples": 2}, {"dataset": "b.txt", "samples": 2}]
    path = write_recipe(tmp_path / "r.yaml", tiny, [GPTQ], calibration={"mix": parts, "sequence_length": 64})
    assert run("lock", path).exit_code == 0
    lock = read_lock(lock_path(path))
    assert lock.calibration is not None
    assert (lock.calibration.asked, lock.calibration.sequences) == ((None, None), 4)
    assert run("build", path, "--locked", "--no-eval").exit_code == 0
    data = yaml.safe_load(path.read_text())
    data["calibration"]["mix"][1]["samples"] = 3
    path.write_text(yaml.safe_dump(data))
    refused = run("build", path, "--locked", "--no-eval")
    assert refused.exit_code == 3
    assert "one thing is not as it says\n  calibration.identity.mix.1.samples: 2 in the lock, 3 now" in refused.stderr


def test_only_a_mix_has_parts_in_its_manifest() -> None:
    entry = CalibrationEntry(spec={"dataset": "self"}, hash="ab", sequences=1, tokens=8, seed=0)
    assert entry.model_dump(mode="json") == {
        "spec": {"dataset": "self"}, "hash": "ab", "sequences": 1, "tokens": 8, "seed": 0,
    }  # fmt: skip
    assert entry.names == ("self",)


# --- what is measured on ----------------------------------------------------------------------------------------------


def held_out(text: str, seen: CalibratedOn, model: Path) -> str:
    tokenizer = load_tokenizer(model)
    document = HeldOutText("text", (text,), stream=True)
    windows: Windows = cut_windows(document, lambda part: tokenizer(part)["input_ids"], window=48)
    return hold_against([windows], seen, model)


OWN, FILE = {"dataset": "self", "samples": 2}, {"dataset": "a.txt", "samples": 4}


def test_text_of_a_part_is_not_measured_on_whatever_the_model_wrote_beside_it(
    texts: Path, tiny: Path, run: Run
) -> None:
    parts = [OWN, {"dataset": "a.txt", "samples": 6}]
    evaluation = {"text": "a.txt", "window": 48, "golden": []}
    path = write_recipe(
        texts / "seen.yaml", tiny, [IMATRIX], calibration={"mix": parts, "sequence_length": 128}, evaluation=evaluation
    )
    refused = run("build", path)
    assert refused.exit_code == 3
    assert re.search(r"a\.txt: \d+% of the held-out text was calibrated on", refused.stderr)


def test_other_text_is_compared_with_all_but_the_model_s_own(texts: Path, tiny: Path) -> None:
    other = "Nothing in here was ever seen by any pass, as far as anybody knows, or will be. " * 9
    wanted = mix(FILE, OWN)
    alone = load_calibration_set(mix(FILE), texts, tiny)
    compared = f"compared with {alone.tokens} tokens in 4 sequences, disjoint"
    said = held_out(other, CalibratedOn(wanted, texts), tiny)
    assert said == f"{compared}; beside it the model's own writing, which is not compared"
    assert held_out(other, CalibratedOn(mix(FILE), texts), tiny) == compared
    assert held_out(other, CalibratedOn(mix(OWN), texts), tiny) == "the model's own writing, which is not compared"
    hashes = (alone.hash, "00")
    assert held_out(other, CalibratedOn(wanted, texts, "ff", hashes), tiny) == said
    for spec, known in ((wanted, ("00", "00")), (wanted, (alone.hash,)), (mix(FILE), ())):
        assert held_out(other, CalibratedOn(spec, texts, "ff", known), tiny) == CHANGED


# --- the mix that is taken where a recipe names no text ---------------------------------------------------------------


def test_a_recipe_that_names_no_text_has_the_starter_mix(tiny: Path, tmp_path: Path, run: Run) -> None:
    starter = load_calibration(DATA / CALIBRATION / "starter.yaml")
    path = write_recipe(tmp_path / "demo.yaml", tiny, [GPTQ])
    recipe = load_recipe(path, option_models())
    assert recipe.calibration == starter
    planned = run("plan", path)
    assert planned.exit_code == 0, planned.stderr
    assert "the recipe names no calibration text: `starter` is taken" in planned.stderr
    assert [line.split()[1] for line in planned.stdout.splitlines() if line.startswith("text ")] == [
        "prose.txt,", "code.txt,", "self-chat,", "vietnamese.txt,"
    ]  # fmt: skip
    plain = write_recipe(tmp_path / "plain.yaml", tiny, [{"format": "gguf", "type": "Q8_0"}])
    shown = run("plan", plain)
    assert "calibration" not in shown.stderr
    assert not [line for line in shown.stdout.splitlines() if line.startswith("text ")]
    assert json.loads(run("plan", plain, "--json").stdout)["calibration"] is None


def test_the_starter_mix_asks_for_what_its_files_have() -> None:
    """Each file of text whole, at most 128 sequences of 512 tokens in all, and nothing that a download gives."""
    starter = load_calibration(DATA / CALIBRATION / "starter.yaml")
    files = [part for part in starter.parts if part.dataset.endswith(".txt")]
    rows = [len([row for row in Path(part.dataset).read_text().split("\n\n") if row.strip()]) for part in files]
    assert [part.samples for part in files] == rows
    assert [part.dataset for part in starter.parts if part not in files] == ["self-chat"]
    assert starter.samples <= 128
    assert starter.sequence_length == 512


def test_the_whole_of_a_mix_is_shown(texts: Path, tiny: Path, run: Run) -> None:
    (texts / "two.yaml").write_text(
        "mix: [{dataset: a.txt, samples: 2}, {dataset: b.txt, samples: 1}]\nsequence_length: 48\n"
    )
    path = write_recipe(texts / "q8.yaml", tiny, [{"format": "gguf", "type": "Q8_0"}])
    lines = run("calibration", "show", texts / "two.yaml", "--recipe", path).stdout.splitlines()
    assert [line.split() for line in lines if "a.txt" in line or "b.txt" in line] == [
        ["a.txt", "2", "sequences,", "96", "tokens"], ["b.txt", "1", "sequences,", "48", "tokens"]
    ]  # fmt: skip
    data = json.loads(run("calibration", "show", texts / "two.yaml", "--recipe", path, "--json").stdout)
    assert [part["sequences"] for part in data["parts"]] == [2, 1]
