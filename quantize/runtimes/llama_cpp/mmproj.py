"""The towers of a model that reads more than text, as llama.cpp takes them: a file of their own beside the model's.

In: a checkpoint that was converted, whose file lacks them. Out: the mmproj file, which tensors of the source it holds;
or none, and why: the converter does not know the tower, or fails on it. Runs in a worker process.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quantize.errors import PlanError
from quantize.events import Reporter
from quantize.files.gguf import TOWERS_START
from quantize.model.checkpoint import Checkpoint, open_checkpoint
from quantize.model.config import reads_more_than_text
from quantize.model.towers import NOT_CARRIED
from quantize.runtimes.llama_cpp.convert import ConvertRequest, convert, opened_converter, write_converted
from quantize.runtimes.llama_cpp.left_out import NO_PLACE, Followed, read_left_out, write_left_out
from quantize.runtimes.llama_cpp.tensors import published_tower

TAKEN = ".towers.json"


@dataclass(frozen=True)
class Towers:
    """What became of a model's towers. taken: tensors of the source that the mmproj file holds.

    refusal: why there is no such file; "" where there is one, or the model has no towers.
    """

    taken: tuple[str, ...] = ()
    refusal: str = ""

    def left_out(self, missing: Mapping[str, str]) -> dict[str, str]:
        """What neither file holds, and why. missing: what the model's own file does not."""
        reason = f"{NOT_CARRIED}: {self.refusal}"
        return {
            name: reason if self.refusal and why == NO_PLACE else why
            for name, why in missing.items() if name not in self.taken
        }  # fmt: skip


def mmproj_of(file: Path) -> Path:
    """Where the towers of a converted model lie, beside it."""
    return file.with_name(TOWERS_START + file.name)


def convert_whole(reporter: Reporter, request: ConvertRequest, out: Path, *, header_only: bool = False) -> None:
    """Convert a checkpoint, and its towers into a file of their own, if it has any. Raises as `convert` does.

    What the files do not hold, and why, is kept beside them.
    """
    convert(reporter, request, out, header_only=header_only)
    missing, checkpoint = read_left_out(out), open_checkpoint(request.folder)
    if not has_towers(checkpoint, missing):
        return

    def write(model: Any) -> None:
        write_converted(model, mmproj_of(out), request, reporter, header_only=header_only)

    towers = convert_towers(request, checkpoint, missing, mmproj_of(out), write)
    write_left_out(out, towers.left_out(missing))
    data = {"taken": list(towers.taken), "refusal": towers.refusal}
    mmproj_of(out).with_suffix(TAKEN).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def read_towers(file: Path) -> Towers:
    """What became of the towers of a converted model."""
    path = mmproj_of(file).with_suffix(TAKEN)
    if not path.is_file():
        return Towers()
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return Towers(tuple(found["taken"]), str(found["refusal"]))


def has_towers(checkpoint: Checkpoint, missing: Mapping[str, str]) -> bool:
    """Whether what a converted file does not hold are towers, or among it. missing: tensors, and why."""
    return NO_PLACE in missing.values() and reads_more_than_text(checkpoint.config)


def convert_towers(
    request: ConvertRequest, checkpoint: Checkpoint, missing: Mapping[str, str], out: Path, use: Callable[[Any], object]
) -> Towers:
    """Convert the towers. use: is given the converter's model, its tensors made but not written.

    missing: what the model's own file does not hold, and why. Raises what `use` raises, but for a PlanError.
    """
    taken: tuple[str, ...] = ()
    try:
        with opened_converter(replace(request, towers=True, pre_tokenizer=None), out) as model:
            followed = Followed(model, checkpoint)
            model.prepare_tensors()
            model.prepare_metadata(vocab_only=False)
            taken = tuple(sorted(followed.places(published_tower) & set(missing)))
            if taken:
                use(model)
    except PlanError as exc:
        return Towers(refusal=exc.message)
    refusal = "" if taken else f"llama.cpp's converter knows no tensor of a {checkpoint.architecture}'s towers"
    return Towers(taken, refusal)
