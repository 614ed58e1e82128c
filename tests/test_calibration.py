"""Calibration text: each kind of source, how it is cut, what is pinned, and what is refused."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from quantize.calibration.datasets import find_dataset
from quantize.calibration.datasets.base import Row
from quantize.calibration.datasets.own_writing import seed_prompts
from quantize.calibration.datasets.python_docs import help_topics
from quantize.calibration.text import CalibrationSet, load_calibration_set, load_tokenizer, read_rows
from quantize.errors import PlanError, RecipeError
from quantize.events import SilentReporter
from quantize.recipe.calibration import CalibrationSpec, load_calibration
from quantize.system.lookup import is_path_text

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers warns on import

TEXT = "One two three four five six seven eight nine ten. " * 8
SPECS = sorted((Path(__file__).parents[1] / "calibration").glob("*.yaml"))


def spec(**values: Any) -> CalibrationSpec:
    return CalibrationSpec(**{"dataset": "rows.jsonl", "samples": 4, "sequence_length": 32, **values})


def rows_of(wanted: CalibrationSpec, folder: Path) -> list[Row]:
    return list(read_rows(find_dataset(wanted, folder), folder))


def write_rows(folder: Path, rows: list[Any]) -> None:
    (folder / "rows.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in rows))


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_every_shipped_spec_loads(path: Path) -> None:
    for part in load_calibration(path).parts:
        if "/" in part.dataset and not is_path_text(part.dataset):
            assert part.revision is not None
            assert len(part.revision) == 40


def test_text_beside_a_spec_is_found_from_anywhere(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = load_calibration(SPECS[0].with_name("vietnamese.yaml"))
    rows = rows_of(found, tmp_path)
    assert len(rows) == 18
    assert find_dataset(found, tmp_path).stated()["dataset"] == "vietnamese.txt"
    assert load_calibration_set(found, tmp_path, tiny).tokens > 2000


def test_a_hub_dataset_is_pinned_to_a_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    class Hub:
        def dataset_info(self, repo: str, revision: str, timeout: float) -> SimpleNamespace:
            asked.append((repo, revision))
            return SimpleNamespace(sha="a" * 40)

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    reporter = SilentReporter()
    assert find_dataset(spec(dataset="org/set"), tmp_path).pin(reporter).revision == "a" * 40
    assert find_dataset(spec(dataset="org/set", revision="v2"), tmp_path).pin(reporter).revision == "a" * 40
    assert asked == [("org/set", "main"), ("org/set", "v2")]
    for local in (spec(dataset="python-docs"), spec(), spec(dataset="org/set", revision="b" * 40)):
        assert find_dataset(local, tmp_path).pin(reporter) == local
    assert len(asked) == 2


def test_the_hash_is_over_lengths_and_ids() -> None:
    found = CalibrationSet(((1, 2, 70_000), (5,)))
    raw = struct.pack("<I3i", 3, 1, 2, 70_000) + struct.pack("<Ii", 1, 5)
    assert found.hash == hashlib.sha256(raw).hexdigest()
    assert found.tokens == 4
    assert CalibrationSet(((1,), (2, 70_000, 5))).hash != found.hash


def test_rows_are_cut_and_short_ones_left_out(tiny: Path, tmp_path: Path) -> None:
    write_rows(tmp_path, ["Hi.", TEXT, "No.", TEXT, TEXT])
    found = load_calibration_set(spec(samples=2), tmp_path, tiny)
    assert [len(ids) for ids in found.token_ids] == [32, 32]
    assert found.skipped_rows == 2
    whole = load_tokenizer(tiny)(TEXT)["input_ids"]
    assert list(found.token_ids[0]) == whole[:32]


def test_packing_joins_rows_and_loses_no_token(tiny: Path, tmp_path: Path) -> None:
    write_rows(tmp_path, [TEXT, TEXT])
    found = load_calibration_set(spec(samples=100, packing=True), tmp_path, tiny)
    joined = load_tokenizer(tiny)(TEXT)["input_ids"] * 2
    flat = [token for ids in found.token_ids for token in ids]
    assert flat == joined[: len(flat)]
    assert len(joined) - len(flat) < 8
    assert {len(ids) for ids in found.token_ids[:-1]} == {32}


def test_chat_rows_go_through_the_models_own_template(tiny: Path, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Where is Paris?"}, {"role": "assistant", "content": "In France."}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": chat}))
    found = load_calibration_set(spec(column="messages", sequence_length=200), tmp_path, tiny)
    tokenizer = load_tokenizer(tiny)
    expected = tokenizer(tokenizer.apply_chat_template(chat, tokenize=False), add_special_tokens=False)["input_ids"]
    assert list(found.token_ids[0]) == expected


def test_shuffling_is_seeded(tmp_path: Path) -> None:
    write_rows(tmp_path, [str(number) for number in range(50)])
    first, again, other = (rows_of(spec(shuffle=True, seed=seed), tmp_path) for seed in (1, 1, 2))
    assert first == again
    assert sorted(first) == sorted(other)
    assert first != other
    assert rows_of(spec(), tmp_path) == [str(number) for number in range(50)]


def test_text_and_parquet_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("first\nstill first\n\n\n\nsecond\n")
    assert rows_of(spec(dataset="a.txt"), tmp_path) == ["first\nstill first", "second\n"]
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x", "y"], "other": [1, 2]}), tmp_path / "a.parquet")
    assert rows_of(spec(dataset="a.parquet"), tmp_path) == ["x", "y"]


def test_python_docs_keeps_what_is_measured_on_apart() -> None:
    shown, held_out = help_topics(), help_topics(held_out=True)
    assert len(shown) >= 32
    assert len(held_out) >= 5
    assert not set(shown) & set(held_out)
    assert max(map(len, shown + held_out)) <= 3000


def test_self_is_the_models_own_text_and_seeded(tiny: Path, tmp_path: Path) -> None:
    wanted = spec(dataset="self", samples=3, sequence_length=64)
    first, again = (load_calibration_set(wanted, tmp_path, tiny) for _ in range(2))
    other = load_calibration_set(spec(dataset="self", samples=3, sequence_length=64, seed=1), tmp_path, tiny)
    assert first == again
    assert first.hash != other.hash
    assert [len(ids) for ids in first.token_ids] == [64, 64, 64]
    start = load_tokenizer(tiny)(seed_prompts()[0])["input_ids"][:64]
    assert list(first.token_ids[0][: len(start)]) == start


def test_identity_follows_the_content_not_the_place(tmp_path: Path) -> None:
    identities = []
    for name, text in (("a", TEXT), ("b", TEXT), ("c", TEXT + "!")):
        folder = tmp_path / name
        folder.mkdir()
        write_rows(folder, [text])
        identities.append(find_dataset(spec(dataset="./rows.jsonl"), folder).identify())
    assert identities[0] == identities[1] != identities[2]
    assert find_dataset(spec(dataset="/somewhere/rows.jsonl"), tmp_path).stated()["dataset"] == "rows.jsonl"


@pytest.mark.parametrize(
    ("content", "options", "kind", "message"),
    [
        ('{"text": "a"}\n{oops', {}, RecipeError, r"rows\.jsonl:2:1: not JSON"),
        ('{"body": "a"}', {}, RecipeError, r"no column `text`(.|\n)*it has: body"),
        ('["a"]', {}, RecipeError, r"no column `text`"),
        ('{"text": 7}', {}, RecipeError, r"neither text nor chat messages"),
        ('{"text": "a"}', {}, PlanError, r"no row has 8 tokens"),
        ("", {}, PlanError, r"no row has 8 tokens"),
        ("x", {"dataset": "missing.txt"}, RecipeError, r"no such file: missing\.txt"),
        ("x", {"dataset": "./rows.csv"}, RecipeError, r"no such file"),
    ],
    ids=["json", "column", "list", "number", "short", "empty", "missing", "suffix"],
)
def test_unusable_text_is_refused(
    tiny: Path, tmp_path: Path, content: str, options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(kind, match=message):
        load_calibration_set(spec(**options), tmp_path, tiny)
