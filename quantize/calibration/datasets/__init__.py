"""What `dataset:` names in a recipe -> the kind of dataset that it is: a module here and a line in KINDS each.

Here and not in recipe: a dataset of the hub is pinned by the hub's client, and `self` is written by the model.
"""

from __future__ import annotations

from pathlib import Path

from quantize.calibration.datasets.base import Dataset, HeldOutPart, Row
from quantize.calibration.datasets.hub_dataset import HubDataset
from quantize.calibration.datasets.local_file import LocalFile
from quantize.calibration.datasets.own_chat import OwnChat
from quantize.calibration.datasets.own_writing import OwnWriting
from quantize.calibration.datasets.python_docs import PythonDocs
from quantize.recipe.calibration import CalibrationSpec
from quantize.runtimes.devices import CPU

__all__ = ["KINDS", "Dataset", "HeldOutPart", "Row", "find_dataset", "find_held_out"]

# the first that knows the spec has it
KINDS: tuple[type[Dataset], ...] = (PythonDocs, OwnWriting, OwnChat, LocalFile, HubDataset)


def find_dataset(spec: CalibrationSpec, base: Path, device: str = CPU) -> Dataset:
    """The dataset of a spec. base: the folder where its relative paths start, the recipe's. device: see Dataset."""
    return next(found for kind in KINDS if (found := kind(spec, base, device)).knows())


def find_held_out(name: str, base: Path, column: str = "text") -> HeldOutPart | None:
    """The text to measure on that a recipe's `evaluation` names; None: there is none of that name. Raises RecipeError.

    column: of a table. base: the folder where relative paths start.
    """
    return find_dataset(CalibrationSpec.model_validate({"dataset": name, "column": column}), base).held_out()
