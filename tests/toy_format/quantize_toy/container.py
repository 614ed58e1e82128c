"""The toy on disk: `rows.npz`, not compressed, beside config.json and the tokenizer.

A matrix of the blocks is two arrays in it, `<linear>/codes` (INT8, [out, in]) and `<linear>/scales` (float32, [out]);
every other tensor is one, by its own name. In: arrays, or a path. Out: a file, its exact size, or what its headers say.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from zipfile import ZIP_STORED, BadZipFile, ZipFile, ZipInfo

from quantize.errors import CheckpointError, VerifyError
from quantize.files.compare import StoredTensor, WeightFile
from quantize.formats.format import OnDisk
from quantize.model.checkpoint import read_chat_template, read_json
from quantize.model.shape import ModelShape

if TYPE_CHECKING:
    from numpy.typing import NDArray

NAME = "rows.npz"
CODES, SCALES = "/codes", "/scales"
MOST_BYTES = 2**31 - 1  # what a zip holds in its plain form
Table = dict[str, tuple[str, tuple[int, ...]]]  # array -> (dtype as numpy writes it, shape), in the order of the file


@dataclass(frozen=True)
class ToyLayout:
    """See Layout."""

    container: str = "npz"
    library: str | None = None

    def recognizes(self, path: Path) -> bool:
        """By the name of the one file."""
        return path.name == NAME and path.is_file() if not path.is_dir() else (path / NAME).is_file()

    def main_name(self, names: Iterable[str]) -> str | None:
        """See Layout."""
        return next(iter(self.weight_names(names)), None)

    def weight_names(self, names: Iterable[str]) -> tuple[str, ...]:
        """See Layout."""
        return tuple(name for name in names if name == NAME)

    def main_file(self, folder: Path) -> Path:
        """See Layout."""
        if not (folder / NAME).is_file():
            raise VerifyError(f"{folder}: no {NAME} in it", hint="build or pull it again")
        return folder / NAME

    def read(self, path: Path) -> WeightFile:
        """See Layout."""
        return WeightFile(path, stored(path))

    def measure(self, path: Path) -> OnDisk:
        """See Layout."""
        file = path / NAME if path.is_dir() else path
        weights = sum(item.size_bytes for item in stored(file).values())
        return OnDisk(ModelShape.from_config(read_json(file.parent / "config.json")), weights)

    def chat_template(self, path: Path) -> str | None:
        """See Layout."""
        return read_chat_template(path if path.is_dir() else path.parent)


def write(path: Path, arrays: Iterable[tuple[str, NDArray[Any]]]) -> None:
    """Write arrays as they come. A zip keeps times: here always those of its first day."""
    npy = _npy()
    with ZipFile(path, "w", ZIP_STORED) as archive:
        for name, array in arrays:
            with archive.open(ZipInfo(f"{name}.npy"), "w") as entry:
                npy.write_array(entry, array, version=(1, 0), allow_pickle=False)


def array_bytes(table: Table) -> int:
    """Of the values alone."""
    import numpy as np

    return sum(np.dtype(dtype).itemsize * prod(shape) for dtype, shape in table.values())


def file_bytes(table: Table) -> int:
    """Size of the file that holds these arrays: a zip's local and central headers, numpy's headers, the values."""
    names = sum(30 + 46 + 2 * len(f"{name}.npy") for name in table)
    return names + sum(len(_npy_header(*item)) for item in table.values()) + array_bytes(table) + 22


def _npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    header = io.BytesIO()
    _npy().write_array_header_1_0(header, {"descr": dtype, "fortran_order": False, "shape": shape})
    return header.getvalue()


def _npy() -> Any:
    """numpy's own reader and writer of headers; without types of its own."""
    from numpy.lib import format as npy

    return npy


def stored(path: Path) -> Mapping[str, StoredTensor]:
    """Where each array lies, from headers alone. Raises CheckpointError: not a file that `write` could have written."""
    try:
        with ZipFile(path) as archive, path.open("rb") as file:
            return dict(_entries(archive, file))
    except (OSError, BadZipFile, ValueError, KeyError, TypeError, struct.error) as exc:
        hint = "it is not whole: build or pull it again"
        raise CheckpointError(f"{path.name}: {exc or type(exc).__name__}", hint=hint) from exc


def _entries(archive: ZipFile, file: BinaryIO) -> Iterator[tuple[str, StoredTensor]]:
    import numpy as np

    npy = _npy()
    for item in archive.infolist():
        file.seek(item.header_offset + 26)
        start = item.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
        file.seek(start)
        npy.read_magic(file)
        shape, _, dtype = npy.read_array_header_1_0(file)
        offset, size = file.tell(), dtype.itemsize * prod(shape)
        if item.compress_type != ZIP_STORED or dtype.hasobject or offset - start + size != item.file_size:
            raise ValueError(f"{item.filename} is no plain array")

        def decode(raw: NDArray[np.uint8], kind: str = dtype.str) -> NDArray[np.float64]:
            return raw.view(kind).astype(np.float64)

        name = item.filename.removesuffix(".npy")
        yield name, StoredTensor(dtype.str, shape, offset, size, dtype.itemsize, decode)


class ToyFile:
    """The arrays of a file, one at a time. Raises CheckpointError, as `stored` does."""

    def __init__(self, path: Path) -> None:
        self._path, self._stored = path, stored(path)
        self.linears = tuple(name.removesuffix(CODES) for name in self._stored if name.endswith(CODES))
        self.others = tuple(name for name in self._stored if not name.endswith((CODES, SCALES)))

    def array(self, name: str) -> NDArray[Any]:
        """Its values, writable."""
        import numpy as np

        item = self._stored[name]
        with self._path.open("rb") as file:
            file.seek(item.offset)
            return np.frombuffer(bytearray(file.read(item.size_bytes)), item.type).reshape(item.shape)
