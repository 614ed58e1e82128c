"""Where a model writes its own calibration text: on the GPU of the pass where it fits, else on the CPU, said.

In: the text that is wanted, the checkpoint, the device of the pass. Out: a CalibrationSet, or what pins it. What the
model writes is sampling.py's; here it is placed, by what it takes and what is free.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from quantize.calibration.budget import FLOAT_BYTES
from quantize.calibration.mix import CalibrationText
from quantize.calibration.text import CalibrationSet, load_calibration_set
from quantize.errors import QuantizeError, first_line, is_out_of_memory
from quantize.events import Reporter, note, status, warn
from quantize.model.checkpoint import Checkpoint
from quantize.model.config import number_or
from quantize.model.shape import ModelShape
from quantize.recipe.calibration import Calibration
from quantize.runtimes.devices import CPU
from quantize.runtimes.sampling import rows_at_once
from quantize.system.memory import free_gpu_bytes, give_back_gpu
from quantize.system.process import run_step
from quantize.system.sizes import mebibytes_text

WORK_BYTES = 512 << 20  # what libraries take of a card, and the tensors of a step
SCORES = 4  # copies of a step's scores in float32: as they are, their chances, what is drawn with


def read_text(
    spec: Calibration, base: Path, checkpoint: Checkpoint, device: str, reporter: Reporter
) -> CalibrationSet:
    """The text, tokenized; what the model writes of it is written on `device` where there is room, else on the CPU.

    base: where relative paths start. Raises as load_calibration_set does.
    """
    text = CalibrationText(spec, base)
    device = writing_device(text, checkpoint, device, reporter)
    try:
        return load_calibration_set(spec, base, checkpoint.folder, device)
    except (RuntimeError, QuantizeError) as exc:
        if device == CPU or not is_out_of_memory(exc):
            raise
        warn(reporter, "", f"the model writes its text on the CPU: out of the GPU's memory ({first_line(exc)})")
    finally:
        if device != CPU:
            give_back_gpu()
    return load_calibration_set(spec, base, checkpoint.folder, CPU)


@dataclass(frozen=True)
class TokenSummary:
    """What pins a calibration set: its hash over all token ids, and how much there is."""

    hash: str
    sequences: int
    tokens: int


def summarize_tokens(
    spec: Calibration, base: Path, checkpoint: Checkpoint, device: str, reporter: Reporter
) -> TokenSummary:
    """Read and tokenize in a worker, keeping no tokens. Raises as load_calibration_set does."""
    status(reporter, "", "reading the calibration text")
    return run_step("reading the calibration text", reporter, _summary, spec, base, checkpoint, device)


def _summary(reporter: Reporter, spec: Calibration, base: Path, checkpoint: Checkpoint, device: str) -> TokenSummary:
    found = read_text(spec, base, checkpoint, device, reporter)
    return TokenSummary(found.hash, len(found.token_ids), found.tokens)


def writing_device(text: CalibrationText, checkpoint: Checkpoint, device: str, reporter: Reporter) -> str:
    """The device that a model writes on. device: of the pass; a text that no model writes needs none."""
    if device == CPU or not text.is_written_by(checkpoint):
        return CPU
    need, free = gpu_writing_bytes(checkpoint, text.spec.sequence_length), free_gpu_bytes(device)
    if need > free:
        why = f"it takes {mebibytes_text(need)}, and {mebibytes_text(free)} are free on {device}"
        warn(reporter, "", f"the model writes its text on the CPU: {why}")
        return CPU
    note(reporter, "", f"the model writes its text on {device}")
    return device


def gpu_writing_bytes(checkpoint: Checkpoint, length: int) -> int:
    """Of a GPU's memory: the weights as they are stored, keys and values of the rows at hand, their scores."""
    rows, stored = rows_at_once(on_gpu=True), max(2, checkpoint.weights_bytes // max(1, checkpoint.parameters))
    a_token = sum(layer.expanded_values for layer in ModelShape.from_config(checkpoint.config).kv_layers)
    scores = SCORES * FLOAT_BYTES * rows * number_or(checkpoint.config, "vocab_size", 0)
    return WORK_BYTES + checkpoint.weights_bytes + stored * a_token * rows * length + scores
