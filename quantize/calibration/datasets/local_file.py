"""A .txt, .jsonl or .parquet file of the user's, or one that comes with the package."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from quantize.calibration.datasets.base import Dataset, HeldOutPart, Row, no_column
from quantize.errors import MissingExtraError, RecipeError, first_line
from quantize.system.cache import hash_file
from quantize.system.lookup import find_path, is_path_text
from quantize.system.untrusted import open_regular, parse_json, read_limited

SUFFIXES = (".txt", ".jsonl", ".parquet")
MAX_LINE_BYTES = 16 << 20
MAX_TEXT_BYTES = 1 << 30


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
        """Hex sha256 of the file."""
        return hash_file(self.path)

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
        try:
            if path.suffix == ".txt":
                text = read_limited(path, MAX_TEXT_BYTES).decode("utf-8")
                yield from (part for part in text.split("\n\n") if part.strip())
            elif path.suffix == ".jsonl":
                yield from _jsonl_rows(path, self.spec.column)
            else:
                yield from _parquet_rows(path, self.spec.column)
        except UnicodeDecodeError as exc:
            raise RecipeError(f"{path}: not UTF-8 text (byte {exc.start})", hint="save the file as UTF-8") from exc
        except (OSError, ValueError) as exc:
            raise RecipeError(f"calibration: {path} can't be read ({first_line(exc)})", hint="check the file") from exc


def _parquet_rows(path: Path, column: str) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as exc:
        raise MissingExtraError("reading Parquet", "hub") from exc
    try:
        table = parquet.ParquetFile(path)
        if column not in table.schema_arrow.names:
            raise no_column(path.name, column, table.schema_arrow.names)
        for batch in table.iter_batches(columns=[column]):
            yield from batch.column(0).to_pylist()
    except pyarrow.ArrowException as exc:
        raise RecipeError(f"calibration: {path} can't be read ({first_line(exc)})", hint="check the file") from exc


def _jsonl_rows(path: Path, column: str) -> Iterator[Row]:
    with open_regular(path) as file:
        lines = iter(lambda: file.readline(MAX_LINE_BYTES + 1), b"")
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                if len(line) > MAX_LINE_BYTES:
                    raise ValueError(f"more than {MAX_LINE_BYTES:,} bytes")
                row = parse_json(line)
            except ValueError as exc:
                hint = "one object a line"
                raise RecipeError(f"{path}:{number}:1: not JSON ({first_line(exc, 80)})", hint=hint) from exc
            if not isinstance(row, dict) or column not in row:
                raise no_column(f"{path}:{number}:1", column, list(row) if isinstance(row, dict) else [])
            yield row[column]
