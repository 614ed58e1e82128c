"""A size in a recipe: bytes, or text such as 4G."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, WithJsonSchema

from quantize.errors import UsageError
from quantize.system.sizes import parse_size

UNITS = (("g", 30), ("m", 20), ("k", 10))


def _file_size(value: object) -> object:
    """Bytes of "4G" and the like."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    if not isinstance(value, str):
        raise ValueError("must be a size || write it like 4G, 500MB or 800MiB")
    try:
        return parse_size(value)
    except UsageError as exc:
        raise ValueError(f"no size || {exc.hint}") from exc


SIZE_TEXT = {"type": "string", "pattern": r"^\s*\d+(\.\d+)?\s*([kKmMgGtT][iI]?)?[bB]?\s*$"}
SIZE_SCHEMA = {"anyOf": [SIZE_TEXT, {"type": "integer", "minimum": 1}]}
FileSize = Annotated[int, BeforeValidator(_file_size), WithJsonSchema(SIZE_SCHEMA)]


def short_size(size_bytes: int) -> str:
    """Bytes as a part of a name: 4g, 512m, 4000000000."""
    for unit, power in UNITS:
        if size_bytes % 2**power == 0:
            return f"{size_bytes >> power}{unit}"
    return str(size_bytes)
