"""A kind of dataset is a class and a line in KINDS: what it is pinned by stays what it was, and a new one works."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from quantize.build.judge import Judge
from quantize.build.plan import identify_jobs, make_plan
from quantize.calibration import datasets
from quantize.calibration.datasets import KINDS, Dataset, HeldOutPart, find_dataset
from quantize.calibration.datasets.hub_dataset import HubDataset
from quantize.calibration.datasets.local_file import LocalFile
from quantize.calibration.datasets.own_writing import OwnWriting
from quantize.calibration.datasets.python_docs import PythonDocs
from quantize.calibration.text import load_calibration_set
from quantize.errors import UsageError
from quantize.evaluate.text import load_text
from quantize.events import ListReporter, Reporter
from quantize.formats import option_models
from quantize.formats.base import RunLimits
from quantize.model.source import pin_source
from quantize.recipe.calibration import CalibrationSpec
from quantize.recipe.model import load_recipe
from quantize.store.store import Store
from quantize.store.workspace import Workspace
from quantize.system.cache import Cache
from quantize.system.digest import canonical_hash
from quantize.testing import write_recipe

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers warns on import

IMATRIX = [{"format": "gguf", "type": "Q4_K_M", "imatrix": True}]


def spec(dataset: str, **values: Any) -> CalibrationSpec:
    return CalibrationSpec.model_validate({"dataset": dataset, **values})


@pytest.mark.parametrize(
    ("values", "kind", "identity", "stated"),
    [
        ({"dataset": "python-docs"}, PythonDocs, "1dd7678121ec", "3669df32370387"),
        ({"dataset": "self"}, OwnWriting, "6a9b989204df90", "6c792aa28f95b1"),
        ({"dataset": "./rows.jsonl"}, LocalFile, "391385207396c1", "952aaa28b866ca"),
        (
            {"dataset": "org/set", "revision": "a" * 40, "split": "test"},
            HubDataset,
            "9a24bf1ace90ff",
            "9a24bf1ace90ff",
        ),
    ],
    ids=["python-docs", "self", "file", "hub"],
)
def test_what_enters_build_keys_and_manifests_is_what_it_was(
    values: dict[str, Any],
    kind: type[Dataset],
    identity: str,
    stated: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The values are kept from before there were kinds: another one would build all calibrated artifacts again."""
    (tmp_path / "rows.jsonl").write_text('{"text": "One two three."}\n')
    (tmp_path / "topics.py").write_text("topics = {}\n")
    monkeypatch.setattr("quantize.calibration.datasets.python_docs.topics_file", lambda: tmp_path / "topics.py")
    found = find_dataset(spec(**values), tmp_path)
    assert type(found) is kind
    assert canonical_hash(found.identify()).startswith(identity)
    assert canonical_hash(found.stated()).startswith(stated)


class Numbers(Dataset):
    """`numbers:7`: sentences that count from there. A whole kind, as a user would add it."""

    def knows(self) -> bool:
        """By its prefix."""
        return self.spec.dataset.startswith("numbers:")

    def pin(self, reporter: Reporter) -> CalibrationSpec:
        """What was asked for is written out."""
        return self.spec.model_copy(update={"revision": "counted"})

    def content(self) -> str:
        """What it counts from."""
        return self.spec.dataset.partition(":")[2]

    def rows(self, model: Path) -> Iterator[str]:
        """Even ones."""
        return self._count(0)

    def held_out(self) -> HeldOutPart:
        """Odd ones."""
        name = self.spec.dataset
        return HeldOutPart(name, name, Path(__file__), self._count(1), stream=False)

    def _count(self, first: int) -> Iterator[str]:
        for number in range(first, 40, 2):
            yield " ".join(f"number {number} and {int(self.content()) + step}" for step in range(20))


def test_a_kind_that_is_registered_is_known_everywhere(
    tiny: Path, store: Store, cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibration = {"dataset": "numbers:7", "samples": 4, "sequence_length": 32}
    path = write_recipe(
        tmp_path / "r.yaml", tiny, IMATRIX, calibration=calibration, evaluation={"text": "numbers:7", "golden": []}
    )
    recipe, reporter = load_recipe(path, option_models()), ListReporter()
    source = pin_source(recipe, cache, reporter)
    with pytest.raises(UsageError, match="no such text: numbers:7"):
        Judge(recipe, source, cache, RunLimits())
    monkeypatch.setattr(datasets, "KINDS", (Numbers, *KINDS))

    plan = make_plan(recipe, Workspace(store, cache, reporter))
    (job,) = plan.jobs
    pinned = {**recipe.calibration.model_dump(mode="json"), "revision": "counted", "content": "7"}
    assert (job.refusal, job.inputs["calibration"]) == (None, pinned)
    other = write_recipe(tmp_path / "o.yaml", tiny, IMATRIX, calibration={**calibration, "dataset": "numbers:8"})
    changed_recipe = load_recipe(other, option_models())
    (changed,) = identify_jobs(changed_recipe, source, changed_recipe.variants)
    assert changed.build_key != job.build_key

    found = load_calibration_set(plan.recipe.calibration, tmp_path, tiny)
    assert [len(ids) for ids in found.token_ids] == [32] * 4

    Judge(recipe, source, cache, RunLimits())
    text = load_text("numbers:7", tmp_path)
    assert (text.name, len(text.documents)) == ("numbers:7", 20)
    assert text.documents[0].startswith("number 1 and 7")


def test_rows_that_are_token_ids_are_cut_like_others(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Counted(Numbers):
        """Tokens instead of text."""

        def rows(self, model: Path) -> Iterator[tuple[int, ...]]:  # type: ignore[override]
            """Longer than a sequence, and too short."""
            return iter([tuple(range(40)), (1, 2), tuple(range(20))])

    monkeypatch.setattr(datasets, "KINDS", (Counted, *KINDS))
    found = load_calibration_set(spec("numbers:1", sequence_length=32), tmp_path, tiny)
    assert [len(ids) for ids in found.token_ids] == [32, 20]
    assert found.skipped_rows == 1


@pytest.mark.parametrize("name", ["self", "org/set", "nowhere.txt", "."])
def test_what_has_nothing_to_measure_on(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such text"):
        load_text(name, tmp_path)


def test_a_file_is_held_out_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By an address that leads to it from any folder, as a worker may stand in another."""
    (tmp_path / "own.jsonl").write_text(json.dumps({"text": "x"}))
    found = find_dataset(spec("own.jsonl"), tmp_path).held_out()
    assert found is not None
    monkeypatch.chdir(tmp_path.parent)
    assert load_text(found.address, Path()).documents == ("x",)
    assert (found.name, found.stream) == ("own.jsonl", True)
