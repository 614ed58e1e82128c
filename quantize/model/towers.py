"""The parts of a model that text does not pass: towers for images or sound, and what joins them to the decoder.

In: a checkpoint. Out: their tensors, by name, and the modules that hold nothing else, as transformers and as the files
call them. Which they are is found by running the model with text (anatomy); nothing is told by names.
"""

from __future__ import annotations

from collections.abc import Iterable

from quantize.events import Reporter, note
from quantize.model.architecture import anatomy_of
from quantize.model.belonging import HEAD, prediction_tensors
from quantize.model.checkpoint import Checkpoint
from quantize.model.config import reads_more_than_text

APART = "a part that text does not pass (images, sound)"  # how what is said of such a tensor begins
NOT_CARRIED = "no mmproj file"  # and where no file holds it
TEXT_ALONE = "its text part is quantized and measured, on text alone; the other parts are carried over as they are"


def tower_tensors(checkpoint: Checkpoint) -> frozenset[str]:
    """The tensors of such parts; none in a model that reads text alone.

    Raises CheckpointError: an architecture whose blocks are not known.
    """
    anatomy = anatomy_of(checkpoint.config)
    if not anatomy.towers:
        return frozenset()
    passed = {name for name, _ in (*anatomy.entry, *anatomy.leaving)} | set(prediction_tensors(checkpoint))
    return frozenset(
        name for name in checkpoint.tensors
        if name not in passed and anatomy.block_of(name) is None and not f".{name}".endswith(f".{HEAD}")
    )  # fmt: skip


def tower_modules(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The outermost modules of such parts, by every name that a loader may have for them. Raises CheckpointError."""
    apart = tower_tensors(checkpoint)
    if not apart:
        return ()
    others = [name for name in checkpoint.tensors if name not in apart]
    roots = [*outermost(apart, others), *anatomy_of(checkpoint.config).towers]
    short = [root.rpartition(".")[2] for root in roots]
    taken = [each for each in short if not any(each in name for name in others)]
    return tuple(dict.fromkeys([*roots, *taken]))


def say_text_alone(checkpoint: Checkpoint, reporter: Reporter) -> None:
    """That of a model which reads more than text the rest stays as it is, and is not measured; of others nothing."""
    if reads_more_than_text(checkpoint.config):
        note(reporter, "", f"{checkpoint.architecture} reads more than text: {TEXT_ALONE}")


def outermost(names: Iterable[str], others: Iterable[str]) -> tuple[str, ...]:
    """The shortest paths above `names` that none of `others` lies under; no path is the whole name of a tensor."""
    shared = {parent for name in others for parent in _parents(name)}
    found = (next((path for path in _parents(name) if path not in shared), "") for name in sorted(names))
    return tuple(dict.fromkeys(path for path in found if path))


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]
