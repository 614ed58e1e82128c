"""The shards of an artifact that needs no calibration pass: one tensor of the source after another, in a worker."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from quantize.errors import disk_errors
from quantize.events import Reporter, note, progress
from quantize.files.shards import ShardWriter, Table
from quantize.store.staging import RESUME_NAME, read_json
from quantize.system.files import write_durable

if TYPE_CHECKING:
    from torch import Tensor

SAVE_BYTES = 256 << 20


def write_one_by_one(
    reporter: Reporter, staging: Path, scratch: Path, table: Table, tensors_of: Callable[[str], dict[str, Tensor]],
    text: str, variant: str,
) -> tuple[str, ...]:  # fmt: skip
    """Write every tensor of `table` in order; the names of the files. text: what is done, for whoever watches.

    tensors_of: all tensors that the source's tensor becomes of which one has this name; they follow one another in the
    table. What is written is recorded in `scratch` every SAVE_BYTES: a build that was stopped goes on there.
    """
    journal = scratch / RESUME_NAME
    pending: dict[str, Tensor] = {}
    with ShardWriter(staging, table) as writer:
        if writer.resume(read_json(journal).get("shards", {})) and writer.written:
            note(reporter, variant, f"goes on at tensor {writer.written + 1} of {len(table)}")
        for name in [*table][writer.written :]:
            if name not in pending:
                pending = tensors_of(name)
            writer.write(name, pending.pop(name))
            if writer.unsaved_bytes >= SAVE_BYTES:
                with disk_errors(scratch):
                    write_durable(journal, json.dumps({"shards": writer.state()}) + "\n")
            progress(reporter, variant, f"{text}, tensors", writer.written, len(table))
        return writer.finish()
