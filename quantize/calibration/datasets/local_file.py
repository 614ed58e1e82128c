"""A .txt, .jsonl, .json or .parquet file of the user's, or one that comes with the package."""

from __future__ import annotations

import hashlib
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE, BOM_UTF32_BE, BOM_UTF32_LE
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from quantize.calibration.datasets.base import Dataset, HeldOutPart, Row, no_column
from quantize.calibration.datasets.records import columns_of, row_of
from quantize.errors import MissingExtraError, RecipeError, first_line
from quantize.system.cache import hash_file
from quantize.system.lookup import find_path, is_path_text
from quantize.system.untrusted import open_regular, parse_json, read_limited

SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
MAX_LINE_BYTES = 16 << 20
MAX_TEXT_BYTES = 1 << 30
PARQUET_ROWS = 256  # held as objects at once


class LocalFile(Dataset):
    """Paragraphs of a text file, or one column of a table; pinned by the file's hash, wherever it lies."""

    is_users_file: ClassVar[bool] = True

    def knows(self) -> bool:
        """What is written as a path, and what is there."""
        return is_path_text(self.spec.dataset) or find_path(self.spec.dataset, self.base) is not None

    @property
    def path(self) -> Path:
        """Where it lies. Raises RecipeError: it is not there, or of no kind that can be read."""
        found = self._found()
        if found is None and (folder := find_path(self.spec.dataset, self.base)) is not None and folder.is_dir():
            names = sorted(item.name for item in folder.iterdir() if item.suffix in SUFFIXES)
            hint = f"name a file of it: {', '.join(names[:5])}" if names else f"it has no {' or '.join(SUFFIXES)}"
            raise RecipeError(f"calibration: {self.spec.dataset} is a folder", hint=hint)
        if found is None:
            hint = "check the path, or name a hub dataset"
            raise RecipeError(f"calibration: no such file: {self.spec.dataset}", hint=hint)
        if found.suffix not in SUFFIXES:
            raise RecipeError(f"{found.name} is none of {', '.join(SUFFIXES)}", hint="name a file of text")
        return found

    def stated(self) -> dict[str, Any]:
        """The spec with the file's name for its path."""
        return {**super().stated(), "dataset": Path(self.spec.dataset).name}

    def content(self) -> str:
        """Hex sha256 of the file; of a text with a byte order mark or Windows line ends, of what is read of it."""
        path = self.path
        with _read_errors(path):
            _check_encoding(path)
        if path.suffix == ".txt" and _is_of_windows(path):
            with _read_errors(path):
                return hashlib.sha256(_text(path).encode()).hexdigest()
        return hash_file(path)

    def held_out(self) -> HeldOutPart | None:
        """All of it, end to end; None where it is not there."""
        if self._found() is None:
            return None
        path = self.path
        return HeldOutPart(path.name, str(path.absolute()), path, self._rows(path), stream=True)

    def rows(self, model: Path) -> Iterator[Row]:
        """What is between empty lines of a text, or the column row after row."""
        return self._rows(self.path)

    def _found(self) -> Path | None:
        found = find_path(self.spec.dataset, self.base)
        return found if found is not None and found.is_file() else None

    def _rows(self, path: Path) -> Iterator[Row]:
        with _read_errors(path):
            _check_encoding(path)
            if path.suffix == ".txt":
                yield from (part for part in _text(path).split("\n\n") if part.strip())
            elif path.suffix == ".parquet":
                yield from _parquet_rows(path, self.spec.column)
            elif path.suffix == ".json" and _first_byte(path) == b"[":
                yield from _array_rows(path, self.spec.column)
            else:
                yield from _line_rows(path, self.spec.column)


@contextmanager
def _read_errors(path: Path) -> Iterator[None]:
    """What keeps a file from being read, as an error of this program."""
    try:
        yield
    except UnicodeDecodeError as exc:
        raise RecipeError(f"{path}: not UTF-8 text (byte {exc.start})", hint="save the file as UTF-8") from exc
    except (OSError, ValueError) as exc:
        raise RecipeError(f"calibration: {path} can't be read ({first_line(exc)})", hint="check the file") from exc


def _text(path: Path) -> str:
    """The text of a file, with line ends as everywhere but on Windows, and no byte order mark."""
    text = read_limited(path, MAX_TEXT_BYTES).decode("utf-8-sig")
    return text.replace("\r\n", "\n")


def _is_of_windows(path: Path) -> bool:
    try:
        raw = read_limited(path, MAX_TEXT_BYTES)
    except OSError:
        return False
    return raw.startswith(BOM_UTF8) or b"\r\n" in raw


def _check_encoding(path: Path) -> None:
    """Raises RecipeError: the file begins with a mark of UTF-16 or UTF-32, as some editors save text."""
    with open_regular(path) as file:
        start = file.read(4)
    if path.suffix != ".parquet" and start.startswith((BOM_UTF16_LE, BOM_UTF16_BE, BOM_UTF32_BE)):
        kind = "UTF-32" if start in (BOM_UTF32_LE, BOM_UTF32_BE) else "UTF-16"
        hint = f"save it as UTF-8, or: iconv -f {kind} -t UTF-8 {path.name}"
        raise RecipeError(f"{path}: the text is {kind}, and UTF-8 is read", hint=hint)


def _first_byte(path: Path) -> bytes:
    """The first byte that is neither space nor byte order mark."""
    with open_regular(path) as file:
        return file.read(4096).removeprefix(BOM_UTF8).lstrip()[:1]


def _parquet_rows(path: Path, column: str) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as exc:
        raise MissingExtraError("reading Parquet", "hub") from exc
    try:
        table = parquet.ParquetFile(path)
        names = columns_of(table.schema_arrow.names, column)
        if not names:
            raise no_column(path.name, column, table.schema_arrow.names)
        number = 0
        for batch in table.iter_batches(batch_size=PARQUET_ROWS, columns=names):
            for record in batch.to_pylist():
                number += 1
                yield row_of(record, column, f"{path.name} row {number}")
    except pyarrow.ArrowException as exc:
        raise RecipeError(f"calibration: {path} can't be read ({first_line(exc)})", hint="check the file") from exc


def _array_rows(path: Path, column: str) -> Iterator[Row]:
    try:
        records = parse_json(read_limited(path, MAX_TEXT_BYTES))
    except ValueError as exc:
        hint = "an array of objects, or one object a line"
        raise RecipeError(f"{path}: not JSON ({first_line(exc, 80)})", hint=hint) from exc
    for number, record in enumerate(records, 1):
        yield row_of(record, column, f"{path} row {number}")


def _line_rows(path: Path, column: str) -> Iterator[Row]:
    with open_regular(path) as file:
        lines = iter(lambda: file.readline(MAX_LINE_BYTES + 1), b"")
        for number, line in enumerate(lines, 1):
            if not line.removeprefix(BOM_UTF8).strip():
                continue
            try:
                if len(line) > MAX_LINE_BYTES:
                    raise ValueError(f"more than {MAX_LINE_BYTES:,} bytes")
                record = parse_json(line)
            except ValueError as exc:
                hint = "one object a line"
                raise RecipeError(f"{path}:{number}:1: not JSON ({first_line(exc, 80)})", hint=hint) from exc
            yield row_of(record, column, f"{path}:{number}:1")
