"""GGUF models in several files, X-00001-of-00003.gguf and so on, as llama.cpp splits and loads them.

In: the first file of a model, or a whole one and a limit. Out: one GgufFile of all the model's tensors, each with the
file that it is in; or the files of a split, and their sizes before it. A model in one file is the usual case.
The names and the split.* keys: llama.cpp, tools/gguf-split and llama_model_loader.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from quantize.errors import BuildError, CheckpointError, disk_errors, some_of
from quantize.files.gguf import ALIGNMENT, TENSOR_TYPES, UNQUANTIZED, GgufFile, GgufTensor, padded, read_gguf
from quantize.system.cache import Cache
from quantize.system.files import write_all

NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
NUMBER, COUNT, TENSORS = "split.no", "split.count", "split.tensors.count"
UINT16, INT32 = 2, 5  # gguf_type
MAX_SHARDS = 65_535
VERSION = 3
CHUNK_BYTES = 8 << 20
TYPE_NUMBERS = {name: number for number, (name, _, _) in TENSOR_TYPES.items()}


@dataclass(frozen=True)
class GgufSummary:
    """What a source needs to know of a GGUF model: quantized_type is None where the weights are 16 or 32 bit."""

    name: str | None
    architecture: str | None
    license: str | None
    quantized_type: str | None
    size_bytes: int


@dataclass(frozen=True)
class PlannedTensor:
    """What a split needs to know of a tensor."""

    name: str
    dimensions: int
    size_bytes: int


def is_part(path: Path) -> bool:
    """Whether a file is by its name one of several that a model is in."""
    match = NAME.fullmatch(path.name)
    return match is not None and int(match["count"]) > 1


def first_shard(path: Path) -> Path:
    """The file that a model is opened by, from any of its files, by their names alone."""
    match = NAME.fullmatch(path.name)
    return path if match is None else path.with_name(shard_name(match["stem"], 1, int(match["count"])))


def shard_paths(path: Path) -> tuple[Path, ...]:
    """All files of the model that `path` begins, in order; each is there.

    Raises CheckpointError: it can't be read, is not the first, or names the ones that are missing.
    """
    return _paths(read_gguf(path))


def known_shards(path: Path, cache: Cache) -> tuple[Path, ...]:
    """As `shard_paths`; the header is read again only if the first file has changed. Raises CheckpointError."""
    if not path.is_file():
        return shard_paths(path)  # which says what is wrong
    stat = path.stat()
    key = f"gguf-parts:{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ino}"
    parts = tuple(path.with_name(name) for name in cache.fact(key, lambda: [part.name for part in shard_paths(path)]))
    return parts if all(part.is_file() for part in parts) else shard_paths(path)


def read_model(path: Path) -> GgufFile:
    """The fields of a model's first file and the tensors of all its files, from headers.

    Raises CheckpointError: as read_gguf and shard_paths do; a file that is another part than its name says.
    """
    first = read_gguf(path)
    paths = _paths(first)
    tensors = dict(first.tensors)
    for number, part in enumerate(paths[1:], 1):
        file = read_gguf(part)
        if file.fields.get(NUMBER) != number or file.fields.get(COUNT) != len(paths):
            raise _not_whole(part, f"is not the part that its name says: it has {NUMBER} {file.fields.get(NUMBER)}")
        if twice := next((name for name in file.tensors if name in tensors), None):
            raise _not_whole(part, f"has the tensor {twice[:60]!r}, which a file before it has too")
        tensors |= file.tensors
    wanted = first.fields.get(TENSORS)
    if len(paths) > 1 and wanted is not None and wanted != len(tensors):
        raise _not_whole(path, f"is of a model with {wanted} tensors, and its {len(paths)} files have {len(tensors)}")
    return replace(first, tensors=tensors)


def read_summary(path: Path) -> GgufSummary:
    """The few things about a GGUF source that cards and plans need. Raises CheckpointError."""
    file = read_model(path)
    sizes: dict[str, int] = {}
    for tensor in file.tensors.values():
        if len(tensor.shape) > 1:
            sizes[tensor.type] = sizes.get(tensor.type, 0) + tensor.size_bytes
    main = max(sorted(sizes), key=lambda name: sizes[name]) if sizes else "F32"
    return GgufSummary(
        _string(file.fields.get("general.name")),
        _string(file.fields.get("general.architecture")),
        _string(file.fields.get("general.license")),
        None if main in UNQUANTIZED else main,
        sum(tensor.size_bytes for tensor in file.tensors.values()),
    )


def _string(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _paths(first: GgufFile) -> tuple[Path, ...]:
    path, count = first.path, first.fields.get(COUNT, 0)
    if not isinstance(count, int) or count < 2:
        return (path,)
    match = NAME.fullmatch(path.name)
    if match is None or int(match["count"]) != count:
        hint = f"rename the files as they were published: NAME-00001-of-{count:05d}.gguf"
        raise CheckpointError(f"{path.name}: one of {count} files, which are found by their names", hint=hint)
    found = [path.with_name(shard_name(match["stem"], number, count)) for number in range(1, count + 1)]
    missing = [item.name for item in found if not item.is_file()]
    if missing:
        raise _not_whole(path, f"is one of {count} files, and {_named(missing)} missing from {path.absolute().parent}")
    if first.fields.get(NUMBER) != 0 or path.name != found[0].name:
        raise CheckpointError(f"{path.name}: not the first of {count} files", hint=f"name {found[0].name}")
    return tuple(found)


def _named(names: Sequence[str]) -> str:
    return f"{some_of(names, 3)} {'is' if len(names) == 1 else 'are'}"


def _not_whole(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path.name}: {what}", hint="download all files of the model into one folder")


# --- writing ----------------------------------------------------------------------------------------------------------


def shard_name(stem: str, number: int, count: int) -> str:
    """The name of a part, counted from 1."""
    return f"{stem}-{number:05d}-of-{count:05d}.gguf"


def fields_bytes(file: GgufFile) -> int:
    """Bytes of a file's key-values, without those of a split."""
    return sum(span.stop - span.start for key, span in file.spans.items() if key not in (NUMBER, COUNT, TENSORS))


def plan_split(tensors: Sequence[PlannedTensor], key_bytes: int, alignment: int, limit: int) -> list[list[int]]:
    """Indices of the tensors of each part: as many as make a file of at most `limit` bytes, header and all.

    A tensor that is larger than that gets a part of its own. key_bytes, alignment: of the whole file. Raises
    BuildError: too many parts.
    """
    parts: list[list[int]] = [[]]
    header, step, data = _keys_bytes(key_bytes), alignment, 0
    for index, item in enumerate(tensors):
        table, size = _entry_bytes(item), padded(item.size_bytes, step)
        if parts[-1] and padded(header + table, step) + data + size > limit:
            parts.append([])
            header, step, data = _keys_bytes(0), ALIGNMENT, 0
        parts[-1].append(index)
        header, data = header + table, data + padded(item.size_bytes, step)
    if len(parts) > MAX_SHARDS:
        raise BuildError(f"{len(parts):,} files are more than a GGUF model can have ({MAX_SHARDS:,})")
    return parts


def part_bytes(tensors: Sequence[PlannedTensor], key_bytes: int, alignment: int, first: bool) -> int:
    """Bytes of the file that holds these tensors: the first part has the model's key-values too."""
    step = alignment if first else ALIGNMENT
    header = _keys_bytes(key_bytes if first else 0) + sum(map(_entry_bytes, tensors))
    return padded(header, step) + sum(padded(item.size_bytes, step) for item in tensors)


def _keys_bytes(key_bytes: int) -> int:
    """Bytes of a header without its table of tensors."""
    return 24 + key_bytes + sum(map(len, _split_keys(0, 0, 0)))


def _entry_bytes(item: PlannedTensor) -> int:
    """Bytes of a tensor in the table."""
    return 24 + len(item.name.encode()) + 8 * item.dimensions


def split_file(path: Path, limit: int) -> tuple[Path, ...]:
    """Cut a GGUF file into parts of at most `limit` bytes beside it; one that is no larger stays as it is.

    The last part is written first and the file cut off behind it: both together take one part more than the file.
    Raises CheckpointError, BuildError, DiskFullError.
    """
    if path.stat().st_size <= limit:
        return (path,)
    file = read_gguf(path)
    ordered = sorted(file.tensors.values(), key=lambda item: item.offset)
    planned = [PlannedTensor(item.name, len(item.shape), item.size_bytes) for item in ordered]
    parts = plan_split(planned, fields_bytes(file), file.alignment, limit)
    if len(parts) == 1:
        return (path,)
    names = [path.with_name(shard_name(path.stem, number, len(parts))) for number in range(1, len(parts) + 1)]
    with disk_errors(path.parent):
        for number in reversed(range(len(parts))):
            tensors = [ordered[index] for index in parts[number]]
            _write_part(file, names[number], tensors, number, len(parts))
            os.truncate(path, tensors[0].offset)
        path.unlink()
    return tuple(names)


def _write_part(file: GgufFile, out: Path, tensors: Sequence[GgufTensor], number: int, count: int) -> None:
    step = file.alignment if number == 0 else ALIGNMENT
    with file.path.open("rb") as source, out.open("wb", buffering=0) as target:
        keys = [] if number else [key for key in file.spans if key not in (NUMBER, COUNT, TENSORS)]
        values = [*_spans(source.fileno(), file, keys), *_split_keys(number, count, len(file.tensors))]
        table, offset = b"", 0
        for item in tensors:
            name = item.name.encode()
            table += struct.pack("<Q", len(name)) + name + struct.pack("<I", len(item.shape))
            table += struct.pack(f"<{len(item.shape)}QIQ", *item.shape, TYPE_NUMBERS[item.type], offset)
            offset += padded(item.size_bytes, step)
        header = b"GGUF" + struct.pack("<IQQ", VERSION, len(tensors), len(values)) + b"".join(values) + table
        write_all(target, header.ljust(padded(len(header), step), b"\0"))
        for item in tensors:
            for chunk in _chunks(source.fileno(), item.offset, item.size_bytes):
                write_all(target, chunk)
            write_all(target, bytes(padded(item.size_bytes, step) - item.size_bytes))


def _spans(handle: int, file: GgufFile, keys: Sequence[str]) -> list[bytes]:
    return [b"".join(_chunks(handle, file.spans[key].start, file.spans[key].stop - file.spans[key].start))
            for key in keys]  # fmt: skip


def _chunks(handle: int, offset: int, size: int) -> Iterator[bytes]:
    while size:
        chunk = os.pread(handle, min(size, CHUNK_BYTES), offset)
        if not chunk:
            raise BuildError("a file became shorter while it was read")
        yield chunk
        offset, size = offset + len(chunk), size - len(chunk)


def _split_keys(number: int, count: int, tensors: int) -> list[bytes]:
    """The key-values that each part has, as they stand in a file."""
    values = ((NUMBER, UINT16, "<H", number), (COUNT, UINT16, "<H", count), (TENSORS, INT32, "<i", tensors))
    return [
        struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + struct.pack(layout, value)
        for key, kind, layout, value in values
    ]
