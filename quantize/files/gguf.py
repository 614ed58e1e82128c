"""GGUF files by their headers: key-values and tensor table.

In: paths. Out: plain data, or CheckpointError for a file that can't be trusted; nothing is written.
The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The gguf package's reader walks every token of
a vocabulary (2 s for 49,152); this one skips them (0.02 s), and a test holds it against that reader.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from quantize.errors import COMPILED_EXTRA, CheckpointError, first_line
from quantize.system.untrusted import open_regular

EXTRA = COMPILED_EXTRA  # of this program: what reads, writes and runs these files
READER = "gguf"  # the distribution that knows their types
TOWERS_START = "mmproj-"  # of the name of a file with towers, as llama.cpp and who publishes for it call it
UNQUANTIZED = ("F32", "F16", "BF16", "F64")
STRING, ARRAY = 8, 9
ALIGNMENT_KEY, ALIGNMENT = "general.alignment", 32
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
MAX_ARRAY = 1024
MAX_ELEMENTS = 1 << 60
MAX_HEADER_BYTES = 128 << 20
MAX_FIELDS = 65_536
MAX_VALUES = 1_000_000  # in arrays that are read
MAX_STRINGS = 5_000_000  # in arrays that are skipped
MAX_TENSORS = 100_000
LENGTH = struct.Struct("<Q")
CHUNK_BYTES = 1 << 20

# enum ggml_type -> (name, values a block, bytes a block), as in ggml.c and the gguf package's GGML_QUANT_SIZES.
TENSOR_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}  # fmt: skip


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: its ggml type, its shape with the input width first as GGUF has it, and its bytes.

    offset: of its first byte, from the start of the file. path: the file.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    size_bytes: int
    offset: int
    path: Path


@dataclass(frozen=True)
class GgufFile:
    """The header of a GGUF file. Array values are left as Python lists.

    spans: where each key-value stands in the file, from its key to the end of its value, in bytes.
    """

    path: Path
    fields: dict[str, Any]
    tensors: dict[str, GgufTensor]
    spans: dict[str, slice]

    @property
    def alignment(self) -> int:
        """What every tensor's offset is a multiple of."""
        found: int = self.fields.get(ALIGNMENT_KEY, ALIGNMENT)
        return found


def padded(size: int, step: int = ALIGNMENT) -> int:
    """The next multiple of the alignment, in bytes."""
    return -(-size // step) * step


def towers_beside(path: Path) -> list[Path]:
    """The file with towers that lies beside a model's, if there is one."""
    return sorted(path.parent.glob(f"{TOWERS_START}*.gguf"))[:1]


def read_gguf(path: Path) -> GgufFile:
    """Read key-values and tensor table; arrays longer than MAX_ARRAY are skipped (vocabularies).

    Of a model in several files it is this one alone: see gguf_split.read_model.
    Raises CheckpointError: can't be read, not a GGUF file, truncated, a name twice, tensors that overlap, or a length
    or type in it that can't be.
    """
    try:
        with open_regular(path) as file:
            return _Parser(path, file).parse()
    except OSError as exc:
        hint = "check the file and its permissions"
        raise CheckpointError(f"{path.name}: can't be read: {exc.strerror or exc}", hint=hint) from exc
    except ValueError as exc:
        hint = "download it again; GGUF version 2 and 3, little-endian, are read"
        raise CheckpointError(f"{path.name}: not a GGUF file that can be read ({first_line(exc)})", hint=hint) from exc


class _Parser:
    """One walk over a header. Every length is checked against the bytes that are left before it is believed.

    The header is read as the walk goes on, not mapped: a mapped file that becomes shorter ends the process.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file, self.data, self.at = path, file, bytearray(), 0
        self.size, self.values, self.skipped = os.fstat(file.fileno()).st_size, 0, 0

    def parse(self) -> GgufFile:
        self.need(4)
        if self.data[:4] != b"GGUF":
            raise ValueError("it does not start with GGUF")
        self.at = 4
        version, tensors, fields = self.unpack("<IQQ")
        if version not in (2, 3):
            raise ValueError(f"version {version}")
        self.bounded(fields, 12, MAX_FIELDS)
        self.bounded(tensors, 24, MAX_TENSORS)
        values: dict[str, Any] = {}
        spans: dict[str, slice] = {}
        for _ in range(fields):
            start, key = self.at, self.string()
            if key in values:
                raise ValueError(f"key {key[:60]!r} is there twice")
            values[key] = self.value(self.unpack("<I")[0])
            spans[key] = slice(start, self.at)
        table = [self.tensor() for _ in range(tensors)]
        alignment = values.get(ALIGNMENT_KEY, ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"alignment {alignment!r}")
        placed = self.placed(table, padded(self.at, alignment))
        return GgufFile(self.path, values, placed, spans)

    def placed(self, table: list[GgufTensor], start: int) -> dict[str, GgufTensor]:
        """The tensors by name, in the order of the table, with offsets from the start of the file."""
        found: dict[str, GgufTensor] = {}
        for tensor in table:
            if tensor.name in found:
                raise ValueError(f"tensor {tensor.name[:60]!r} is there twice")
            if start + tensor.offset + tensor.size_bytes > self.size:
                raise ValueError(f"truncated in tensor {tensor.name[:60]!r}")
            found[tensor.name] = replace(tensor, offset=start + tensor.offset)
        position = start
        for tensor in sorted(found.values(), key=lambda item: (item.offset, item.size_bytes)):
            if tensor.offset < position:
                raise ValueError(f"tensor {tensor.name[:60]!r} overlaps the one before it")
            position = tensor.offset + tensor.size_bytes
        return found

    def need(self, count: int) -> None:
        """Have the next `count` bytes of the header in memory."""
        end = self.at + count
        if end <= len(self.data):
            return
        if end > MAX_HEADER_BYTES:
            raise ValueError(f"a header of more than {MAX_HEADER_BYTES:,} bytes")
        self.data += self.file.read(max(end - len(self.data), CHUNK_BYTES))
        if end > len(self.data):
            raise ValueError(f"truncated at byte {len(self.data):,}")

    def unpack(self, layout: str) -> tuple[Any, ...]:
        size = struct.calcsize(layout)
        self.need(size)
        values = struct.unpack_from(layout, self.data, self.at)
        self.at += size
        return values

    def bounded(self, count: int, item_bytes: int, most: int | None = None) -> int:
        if count * item_bytes > self.size - self.at:
            raise ValueError(f"a length of {count:,} at byte {self.at:,} passes the end")
        if most is not None and count > most:
            raise ValueError(f"{count:,} entries are too many; at most {most:,} are read")
        return count

    def string(self) -> str:
        length = self.bounded(self.unpack("<Q")[0], 1)
        self.need(length)
        self.at += length
        return self.data[self.at - length : self.at].decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.unpack(_scalar(kind))[0]
        inner, count = self.unpack("<IQ")
        if inner == ARRAY:
            raise ValueError("an array of arrays")
        item_bytes = 8 if inner == STRING else struct.calcsize(_scalar(inner))
        self.bounded(count, item_bytes)
        if count <= MAX_ARRAY:
            self.values += count
            if self.values > MAX_VALUES:
                raise ValueError(f"more than {MAX_VALUES:,} values in arrays")
            return [self.value(inner) for _ in range(count)]
        if inner == STRING:
            self.skipped += count
            if self.skipped > MAX_STRINGS:
                raise ValueError(f"more than {MAX_STRINGS:,} strings in arrays")
            self.skip_strings(count)
        else:
            self.at += count * item_bytes
        return None

    def skip_strings(self, count: int) -> None:
        """Pass over strings: by itself, since a vocabulary has hundreds of thousands."""
        at, data, read = self.at, self.data, LENGTH.unpack_from
        for _ in range(count):
            if at + LENGTH.size > len(data):
                self.at = at
                self.need(LENGTH.size)
            (length,) = read(data, at)
            at += LENGTH.size
            if length > self.size - at:
                self.at = at
                self.bounded(length, 1)
            at += length
        self.at = at

    def tensor(self) -> GgufTensor:
        name = self.string()
        (dimensions,) = self.unpack("<I")
        if not 1 <= dimensions <= 4:
            raise ValueError(f"tensor {name[:60]!r} has {dimensions} dimensions")
        shape = self.unpack(f"<{dimensions}Q")
        kind, offset = self.unpack("<IQ")
        if kind not in TENSOR_TYPES:
            raise ValueError(f"tensor {name[:60]!r} has the unknown type {kind}")
        type_name, block, block_bytes = TENSOR_TYPES[kind]
        elements = math.prod(shape)
        if elements > MAX_ELEMENTS or shape[0] % block:
            raise ValueError(f"tensor {name[:60]!r} has the impossible shape {shape}")
        return GgufTensor(name, type_name, shape, elements // block * block_bytes, offset, self.path)


def _scalar(kind: int) -> str:
    if kind not in SCALARS:
        raise ValueError(f"the unknown type of value {kind}")
    return SCALARS[kind]
