"""The towers of a model that reads more than text, in an artifact: a file beside the variant's, the same for all.

In: the 16-bit file that was converted, beside which its towers lie. Out: their file in staging, and what it holds.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from quantize.errors import disk_errors
from quantize.files.gguf import read_gguf
from quantize.formats.base import KeptTensor
from quantize.model.towers import APART
from quantize.runtimes.llama_cpp.mmproj import mmproj_of, read_towers

FILE_TYPES = {0: "F32", 1: "F16", 32: "BF16"}  # enum llama_ftype


def copy_towers(intermediate: Path, staging: Path) -> tuple[list[str], tuple[KeptTensor, ...]]:
    """The names of the files that were copied, one or none, and the source's tensors in it. Raises DiskFullError."""
    file = mmproj_of(intermediate)
    if not file.is_file():
        return [], ()
    with disk_errors(staging):
        shutil.copyfile(file, staging / file.name)
    stored = FILE_TYPES.get(read_gguf(file).fields.get("general.file_type", 1), "F16")
    reason = f"{APART}: carried over in {file.name}"
    return [file.name], tuple(KeptTensor(name, stored, reason) for name in read_towers(intermediate).taken)
