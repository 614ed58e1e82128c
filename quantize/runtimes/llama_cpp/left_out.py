"""Which tensors of a checkpoint llama.cpp's converter gives a place in its file, and why another has none.

In: a model of the converter before it writes, the checkpoint. Out: the names that it left out, with a reason. Heads
that predict several tokens ahead are left out where the converter does not know them; any other tensor that it does not
know is an error of its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from quantize.model.belonging import COMPUTED, prediction_tensors
from quantize.model.checkpoint import Checkpoint

UNKNOWN = "Can not map tensor"  # what the converter raises with
LEFT_OUT = ".left_out.json"
PREDICTS = "a head that predicts several tokens ahead (MTP), which llama.cpp's converter does not know here"
NO_PLACE = "llama.cpp's converter gives it no place"


class Followed:
    """Follows a model of the converter. It may split, merge or turn tensors: names alone say nothing."""

    def __init__(self, model: Any, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._taken: set[str] = set()
        self._names = model.tensor_map
        self._filter = model.filter_tensors
        self._ahead = frozenset(prediction_tensors(checkpoint))
        model.modify_tensors = self._followed(model.modify_tensors)

    def _followed(self, modify: Callable[..., Iterable[tuple[str, Any]]]) -> Callable[..., Iterable[tuple[str, Any]]]:
        def modify_tensors(data: Any, name: str, block: int | None) -> Iterable[tuple[str, Any]]:
            try:
                made = list(modify(data, name, block))
            except ValueError as exc:
                if name not in self._ahead or UNKNOWN not in str(exc):
                    raise
                return []
            if made or self._names.get_name(name, try_suffixes=(".weight", ".bias")) is not None:
                self._taken.add(name)
            return made

        return modify_tensors

    def places(self, shown_as: Callable[[str], str]) -> frozenset[str]:
        """The names, as the source has them, of the tensors that got a place. shown_as: what the converter was shown
        for a name that passed its filter.
        """
        passed = {name: self._filter((name, None)) for name in self._checkpoint.tensors}
        return frozenset(name for name, item in passed.items() if item and shown_as(item[0]) in self._taken)

    def left_out(self, made: int) -> dict[str, str]:
        """Tensors without a place, each with its reason, if there are fewer weights than the source has.

        made: weights of all tensors of the file.
        """
        computed = dict.fromkeys(self._checkpoint.computed, COMPUTED)
        if made >= self._checkpoint.parameters:
            return computed
        taken = {_plain(name) for name in self._taken}
        missing = [name for name in self._checkpoint.tensors if _plain(name) not in taken]
        if not missing:
            missing = [f"{self._checkpoint.parameters - made:,} weights that have no name"]
        return {**{name: PREDICTS if name in self._ahead else NO_PLACE for name in missing}, **computed}


def write_left_out(file: Path, left_out: Mapping[str, str]) -> None:
    """Keep beside a converted file what it does not hold. Raises OSError."""
    path = file.with_suffix(LEFT_OUT)
    if left_out:
        path.write_text(json.dumps(left_out, indent=2) + "\n", encoding="utf-8")
    else:
        path.unlink(missing_ok=True)


def read_left_out(file: Path) -> dict[str, str]:
    """What was kept beside a converted file; nothing where nothing was left out."""
    path = file.with_suffix(LEFT_OUT)
    found: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def _plain(name: str) -> str:
    """A tensor's name without what converters drop from it."""
    return (
        name.replace("language_model.", "")
        .removeprefix("model.")
        .replace("e_score_correction_bias", "e_score_correction.bias")
    )
