"""llama.cpp through its Python package: size and quantize a 16-bit GGUF.

In: paths and settings. Out: GGUF files and plain facts about them. Every public function runs in a worker process.
The 16-bit file comes from runtimes/llama_cpp/convert.py; what to ask for is decided in formats/gguf/build.py.
"""

from __future__ import annotations

import ctypes
import errno
import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantize.errors import (
    BuildError,
    MissingExtraError,
    PlanError,
    QuantizeError,
    disk_full,
)
from quantize.events import Reporter
from quantize.files.gguf import EXTRA, GgufFile, padded
from quantize.runtimes.llama_cpp.convert import ConvertRequest
from quantize.runtimes.llama_cpp.log import keep_log, telling_line
from quantize.runtimes.llama_cpp.mmproj import convert_whole, mmproj_of
from quantize.system.files import removed_on_failure

LINE = re.compile(r"^\[\s*\d+/\s*\d+\]\s+(\S+)\s+-\s+\[([\d,\s]+)\], type =\s*(\S+), .*?(?:\((\w+)\))?\s*$")
FALLBACK = "tensor cols"
STREAM_ERROR = "iostream error"  # all that llama.cpp says of a file that can't be written
FULL_BYTES = 1 << 20  # with less than this free beside what was written so far, that is why
NEEDS_IMATRIX = ("require an imatrix", "without an importance matrix", "Missing importance matrix")


@dataclass(frozen=True)
class QuantizeSettings:
    """What llama_model_quantize is asked for. `overrides` are (regular expression, ggml type name)."""

    type: str
    overrides: tuple[tuple[str, str], ...] = ()
    output_type: str | None = None
    embedding_type: str | None = None
    pure: bool = False
    imatrix: Path | None = None
    imatrix_later: bool = False  # a dry run of what will have one
    split_bytes: int | None = None  # cut what is larger into files of at most so many bytes
    threads: int = 1


@dataclass(frozen=True)
class SizedFile:
    """What a quantization would write: total bytes of the file, and the ggml type of each tensor.

    source_bytes: size of the 16-bit file that it reads. shards: the bytes of each file, if it is cut into several.
    weights: of all tensors. towers_bytes: of the file beside it that has a model's towers; 0 if there is none.
    shapes: of tensors, as GGUF has them.
    """

    architecture: str
    file_bytes: int
    source_bytes: int
    tensors: tuple[tuple[str, str, int], ...]  # name, type, bytes
    shards: tuple[int, ...] = ()
    weights: int = 0
    towers_bytes: int = 0
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def header_bytes(self) -> int:
        """Of the file up to its first tensor, where it is not cut into several."""
        return self.file_bytes - sum(padded(size) for _, _, size in self.tensors)


def dry_run(reporter: Reporter, source: Path, jobs: Sequence[QuantizeSettings]) -> list[SizedFile | QuantizeError]:
    """The exact sizes that each job would have, by llama.cpp's own dry run. `source` may be header-only.

    A job that llama.cpp refuses, or that needs an importance matrix, gets its error in its place.
    """
    from quantize.files.gguf import read_gguf

    header = read_gguf(source)
    data_bytes = sum(padded(tensor.size_bytes) for tensor in header.tensors.values())
    header_bytes = source.stat().st_size - data_bytes
    weights = sum(math.prod(tensor.shape) for tensor in header.tensors.values())
    towers = mmproj_of(source).stat().st_size if mmproj_of(source).is_file() else 0
    results: list[SizedFile | QuantizeError] = []
    for job in jobs:
        try:
            tensors = _parse_log(_quantize(source, source.with_suffix(".dry"), job, dry=True))
        except QuantizeError as exc:
            results.append(exc)
            continue
        if len(tensors) != len(header.tensors):
            raise BuildError(f"llama.cpp's dry run named {len(tensors)} of {len(header.tensors)} tensors")
        size = header_bytes + sum(padded(item[2]) for item in tensors)
        shards = _shards(header, tensors, job.split_bytes) if job.split_bytes and size > job.split_bytes else ()
        results.append(
            SizedFile(
                str(header.fields["general.architecture"]), sum(shards) or size, source.stat().st_size, tuple(tensors),
                shards, weights, towers, {name: item.shape for name, item in header.tensors.items()},
            )
        )  # fmt: skip
    return results


def _shards(header: GgufFile, tensors: Sequence[tuple[str, str, int]], limit: int) -> tuple[int, ...]:
    """The bytes of each file that a model is cut into; () where it stays whole."""
    from quantize.files.gguf_split import PlannedTensor, fields_bytes, part_bytes, plan_split

    planned = [PlannedTensor(name, len(header.tensors[name].shape), size) for name, _, size in tensors]
    keys = fields_bytes(header)
    parts = plan_split(planned, keys, header.alignment, limit)
    sizes = (part_bytes([planned[item] for item in part], keys, header.alignment, part is parts[0]) for part in parts)
    return tuple(sizes) if len(parts) > 1 else ()


def convert_and_size(
    reporter: Reporter, request: ConvertRequest, out: Path, jobs: Sequence[QuantizeSettings]
) -> list[SizedFile | QuantizeError]:
    """For planning: convert headers only, then size every job; leaves nothing behind."""
    try:
        convert_whole(reporter, request, out, header_only=True)
        return dry_run(reporter, out, jobs)
    finally:
        for path in (out, mmproj_of(out)):
            path.unlink(missing_ok=True)


def quantize(
    reporter: Reporter, source: Path, out: Path, job: QuantizeSettings
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Quantize `source` into `out`, or into the parts that it is cut into beside it.

    Returns the names of the files, the first one first, and llama.cpp's warnings. Raises PlanError, BuildError.
    """
    from quantize.files.gguf_split import split_file

    with removed_on_failure(out):
        log = _quantize(source, out, job, dry=False)
        files = split_file(out, job.split_bytes) if job.split_bytes else (out,)
    warnings = tuple(line for line in log.splitlines() if "WARNING" in line or FALLBACK in line)
    return tuple(path.name for path in files), warnings


def _quantize(source: Path, out: Path, job: QuantizeSettings, *, dry: bool) -> str:
    llama_cpp, log = _library()
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_{_ftype_suffix(job.type)}")
    parameters.nthread = job.threads
    parameters.pure = job.pure
    parameters.dry_run = dry
    if job.output_type:
        parameters.output_tensor_type = _ggml_type(job.output_type)
    if job.embedding_type:
        parameters.token_embedding_type = _ggml_type(job.embedding_type)
    keep: list[Any] = []
    if job.overrides:
        rows = [(pattern.encode(), _ggml_type(name)) for pattern, name in job.overrides] + [(None, 0)]
        parameters.tt_overrides = (llama_cpp.llama_model_tensor_override * len(rows))(*rows)
    if job.imatrix is not None:
        parameters.imatrix = _imatrix(llama_cpp, job.imatrix, keep)
    code = llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(out), ctypes.byref(parameters))
    text = "".join(log)
    lacks_imatrix = any(words in text for words in NEEDS_IMATRIX)
    if lacks_imatrix and not job.imatrix_later:
        raise PlanError(f"{job.type} needs an importance matrix", hint="add `imatrix: true` to the variant")
    if code != 0:
        reason = _last_line(text)
        if STREAM_ERROR in reason and shutil.disk_usage(out.parent).free < FULL_BYTES:
            raise disk_full(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), out)
        raise BuildError(f"llama.cpp could not quantize to {job.type}: {reason}")
    return text


def _imatrix(llama_cpp: Any, path: Path, keep: list[Any]) -> Any:
    """The rows of an importance matrix file as llama.cpp wants them; `keep` holds the memory that they point to."""
    from quantize.files.imatrix import read_imatrix

    rows: list[tuple[Any, Any, int]] = []
    for name, values in read_imatrix(path).items():
        keep += [values, name.encode()]
        pointer = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        rows.append((keep[-1], pointer, len(values)))
    rows.append((None, None, 0))
    return (llama_cpp.llama_model_imatrix_data * len(rows))(*rows)


def _ftype_suffix(name: str) -> str:
    return "ALL_F32" if name == "F32" else f"MOSTLY_{name}"


def _ggml_type(name: str) -> int:
    import gguf

    return int(gguf.GGMLQuantizationType[name].value)


def _parse_log(log: str) -> list[tuple[str, str, int]]:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    names = {item.name.lower(): item for item in GGMLQuantizationType}
    tensors = []
    for line in log.splitlines():
        match = LINE.match(line)
        if match is None:
            continue
        kind = names[(match[4] or match[3]).lower()]
        elements = 1
        for number in match[2].split(","):
            elements *= int(number)
        block, block_bytes = GGML_QUANT_SIZES[kind]
        tensors.append((match[1], kind.name, elements // block * block_bytes))
    return tensors


def _library() -> tuple[Any, Iterable[str]]:
    """The llama_cpp package, and its log from now on."""
    try:
        import llama_cpp
    except ImportError as exc:
        raise MissingExtraError("the GGUF format", EXTRA) from exc
    return llama_cpp, keep_log(llama_cpp)


def _last_line(log: str) -> str:
    return telling_line(log.splitlines()) or "no message"
