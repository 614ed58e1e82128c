"""What a schema is refused with: where in it, and why. The path is the client's own, cut to a length."""

from __future__ import annotations

Path = tuple[str, ...]
MAX_PATH = 160


class SchemaRefused(Exception):
    """A schema that is none, that nothing fits, or that a grammar can't hold."""

    def __init__(self, path: Path, why: str) -> None:
        shown = ".".join(("schema", *(step[:40] for step in path)))
        if len(shown) > MAX_PATH:
            shown = f"{shown[: MAX_PATH // 2]}…{shown[-MAX_PATH // 2 :]}"
        super().__init__(f"{shown}: {why}")
