"""What the converter reads of how images are prepared, with the file named where a setting is not there.

In: a model's folder and the settings that the converter has joined of its processor's files. Out: the same settings,
which tell whose fault it is: a file that lacks what llama.cpp must know is refused; a model that came without such
files is converted without its towers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantize.errors import CheckpointError, PlanError
from quantize.model.folder_files import PROCESSOR_FILES, processor_files

AGAIN = "copy it from where the model was published; without it there is no mmproj file, which is said"


class ProcessorSettings(dict[str, Any]):
    """A mapping whose missing keys are errors that name the file. Raises CheckpointError: there is a file, and it
    lacks the key. PlanError: there is none.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        super().__init__(settings)
        self._files = processor_files(folder)

    def __missing__(self, key: str) -> Any:
        if not self._files:
            raise PlanError(f"there is no {PROCESSOR_FILES[0]}, which says `{key}`", hint=AGAIN)
        name = " and ".join(self._files)
        raise CheckpointError(f"{name}: no `{key}`, which llama.cpp takes from there", hint=AGAIN)
