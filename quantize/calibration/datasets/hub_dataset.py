"""A dataset of the Hugging Face hub, `org/name`, at a commit; its rows are streamed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from quantize.calibration.datasets.base import Dataset, Row
from quantize.calibration.datasets.records import row_of
from quantize.errors import CheckpointError, MissingExtraError, first_line
from quantize.events import Reporter
from quantize.model.source import hub_commit
from quantize.recipe.calibration import CalibrationSpec


class HubDataset(Dataset):
    """One column of one split; the commit pins it."""

    def knows(self) -> bool:
        """Whatever no other kind knows."""
        return True

    def pin(self, reporter: Reporter) -> CalibrationSpec:
        """The spec with its revision, a branch or a tag, resolved to the commit that it is now."""
        commit = hub_commit("dataset", self.spec.dataset, self.spec.revision or "main", reporter)
        return self.spec.model_copy(update={"revision": commit})

    def rows(self, model: Path) -> Iterator[Row]:
        """The column, row after row as the hub sends them."""
        spec = self.spec
        try:
            from datasets import load_dataset
        except ImportError as exc:
            raise MissingExtraError(f"the hub dataset {spec.dataset}", "hub") from exc
        try:
            rows = load_dataset(spec.dataset, spec.subset, split=spec.split, revision=spec.revision, streaming=True)
            for number, record in enumerate(rows, 1):
                yield row_of(record, spec.column, f"{spec.dataset} row {number}")
        except (OSError, ValueError, RuntimeError) as exc:
            hint = "check the name, subset, split and network; `dataset: python-docs` or `self` need none"
            what = f"calibration dataset {spec.dataset}: can't be read ({first_line(exc)})"
            raise CheckpointError(what, hint=hint) from exc
