"""What an artifact's files must be, whatever they measure: all quantized that was meant to be, and near the source.

In: an artifact's folder, the source's folder, what was intended. Out: checks by name, with what is wrong ("" holds). A
wrong scale in one group of weights among a million hardly moves a perplexity; here it has a name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.errors import CheckpointError, some_of
from quantize.evaluate.decision import NEAR, QUANTIZED, TEMPLATE
from quantize.evaluate.pairs import Pair, matrices, pairs
from quantize.events import Reporter, note, progress
from quantize.formats import find_format
from quantize.formats.format import Weights
from quantize.model.checkpoint import Checkpoint, open_checkpoint
from quantize.runtimes.base import ModelRef

if TYPE_CHECKING:
    from torch import Tensor

MAX_NAMED = 3
SMALLEST_SHARE = 0.01  # of the mean group's energy: under that a group is next to nothing
# What a group of weights may be as a multiple of the source's, in the direction of the source's. Measured on the demo
# model: 8 bit 0.96 to 1.03; 4 bit 0.45 (GPTQ, whose scales are searched) to 1.44 (AWQ); Q2_K 0.87 to 1.11.
GAINS_8_BIT, GAINS_FEWER_BITS = (0.8, 1.25), (0.25, 1.8)
GROUP = 32  # of weights, where the format names none
ROUNDS = 4  # of taking factors of columns and of rows out: each is measured with what the other has left


@dataclass(frozen=True)
class Intended:
    """What the recipe asked for: bits a weight, weights that share a scale (None where the format says), options."""

    bits: int | None
    group_size: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_quantized(self) -> bool:
        """Whether fewer than 16 bits were asked for."""
        return self.bits is not None and self.bits < 16


def check_structure(reporter: Reporter, artifact: ModelRef, source: Path, intended: Intended) -> dict[str, str]:
    """All checks that can be made; those of an architecture whose blocks are not known are left out, with a note.

    Raises CheckpointError, VerifyError: a file can't be read.
    """
    checkpoint = open_checkpoint(source)
    checks = {TEMPLATE: _template(artifact, checkpoint)}
    weights = find_format(artifact.format).weights
    if weights is None:
        note(reporter, "", f"weights are not compared with the source's: {artifact.format} does not show them")
        return checks
    try:
        names = matrices(checkpoint)
    except CheckpointError as exc:
        note(reporter, "", f"weights are not compared with the source's: {exc.message}")
        return checks
    if intended.is_quantized:
        checks[QUANTIZED] = _told("left unquantized:", weights.left(artifact.path, names, intended.options))
    found = pairs(weights.reader(artifact.path, checkpoint), checkpoint)
    usual = GAINS_FEWER_BITS if intended.is_quantized and (intended.bits or 0) < 8 else GAINS_8_BIT
    between = find_format(artifact.format).gains(intended.options) or usual
    checks[NEAR] = _told("not the source's:", list(_far(reporter, weights, found, intended, between, len(names))))
    return checks


def _told(what: str, found: list[str]) -> str:
    return f"{what} {some_of(found, MAX_NAMED)}" if found else ""


def _template(artifact: ModelRef, checkpoint: Checkpoint) -> str:
    found = find_format(artifact.format).layout.chat_template(artifact.path)
    if checkpoint.chat_template is None or found == checkpoint.chat_template:
        return ""
    return "it is lost" if found is None else "it differs from the source's"


def _far(
    reporter: Reporter, weights: Weights, found: Iterable[Pair], intended: Intended, between: tuple[float, float],
    total: int,
) -> Iterator[str]:  # fmt: skip
    """Matrices with a group of weights that no rounding explains."""
    low, high = between
    group = intended.group_size or GROUP
    for done, pair in enumerate(found, start=1):
        progress(reporter, "", "comparing weights with the source's, matrices", done, total)
        gains = _gains(pair, group, folded=weights.folded)
        least, most = float(gains.min()), float(gains.max())
        if not low <= least <= most <= high:
            worst = least if low - least > most - high else most
            yield f"{pair.tensor} has a group of {group} weights at {worst:.2f} times the source's"


def _gains(pair: Pair, group: int, *, folded: bool) -> Tensor:
    """For each group of weights along the input, the projection on the source's as a multiple of it.

    folded: take out a factor of each column first, and then of each row: AWQ's scales.
    """
    artifact, source = pair.artifact, pair.source
    if source.shape[1] % group:
        group = source.shape[1]
    for axis in (0, 1) * ROUNDS if folded else ():
        energy = (source * source).sum(axis, keepdim=True).clamp(min=1e-20)
        source = source * ((artifact * source).sum(axis, keepdim=True) / energy)
    groups = source.reshape(source.shape[0], -1, group)
    energy = (groups * groups).sum(-1)
    gains = (artifact.reshape(groups.shape) * groups).sum(-1) / energy.clamp(min=1e-20)
    return gains[energy > SMALLEST_SHARE * energy.mean()]
