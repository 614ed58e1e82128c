"""The tables of docs/anatomy.md: every class that writes text on, causal or of images too, and what is proved of it.

In: nothing. Out: rows by model type; run as a module, it looks at every class of the installed transformers, a few
minutes long, and writes the tables: `python -m tests.anatomy_page [MODEL_TYPE ...]`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from quantize.errors import CheckpointError
from quantize.model.anatomy.find import find
from quantize.model.anatomy.found import Anatomy
from tests.anatomy_configs import config_of, image_types, model_types

PAGE = Path(__file__).parent.parent / "docs" / "anatomy.md"
HEADING = "| Model type | Class | GPTQ | AWQ | Why not, or what goes without scales | Seconds |"
IMAGES_HEADING = HEADING.replace("| Class |", "| Class that reads images too |")
RULE = "| --- | --- | --- | --- | --- | ---: |"


@dataclass(frozen=True)
class Row:
    """A model type, and what was found of its class."""

    kind: str
    found: Anatomy

    def cells(self) -> list[str]:
        """The cells of its row."""
        found = self.found
        name = found.architecture
        if found.refusal:
            why = found.refusal.replace("|", "/").strip()
            return [self.kind, name, "refused", "refused", why, f"{found.seconds:.1f}"]
        folded, groups = found.folds
        awq = f"proved, {folded} of {groups}" if folded else "no fold"
        without = [
            group.linears[0].module if group.linears else group.name
            for template in found.templates for group in template.groups if group.source is None
        ]  # fmt: skip
        rest = f"without scales: {', '.join(dict.fromkeys(without))}" if without else ""
        return [self.kind, name, "proved", awq, rest, f"{found.seconds:.1f}"]


@cache
def row_of(kind: str, name: str | None = None) -> Row:
    """What is found of a model type's class: the causal one, or the one that is named."""
    name = name or model_types()[kind]
    try:
        config = config_of(kind, name)
    except Exception as exc:  # noqa: BLE001 - a class may refuse its own defaults in any way
        said = " ".join(str(exc).split())
        return Row(kind, Anatomy(name, refusal=f"its class refuses its own defaults: {said}"))
    try:
        return Row(kind, find(config))
    except CheckpointError as exc:
        return Row(kind, Anatomy(name, refusal=exc.message))


def cells_of(page: str, heading: str = HEADING) -> dict[str, list[str]]:
    """The cells of each row of one of the page's tables, by model type."""
    _, table, _ = _parted(page, heading)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]
    return {row[0].strip("`"): [row[0].strip("`"), *row[1:]] for row in rows}


def _parted(page: str, heading: str) -> tuple[str, list[str], str]:
    """A page before a table, the table's lines, and what follows."""
    before, _, rest = page.partition(f"{heading}\n")
    lines = rest.splitlines()
    count = next((place for place, line in enumerate(lines) if not line.startswith("|")), len(lines))
    return before, [heading, *lines[:count]], "\n".join(lines[count:])


def write(wanted: list[str]) -> None:
    """Look at every class, or at those of the model types that are wanted, and write the tables; the rest stays."""
    page = PAGE.read_text(encoding="utf-8")
    for heading, types in ((HEADING, model_types()), (IMAGES_HEADING, image_types())):
        known = cells_of(page, heading)
        lines = [heading, RULE]
        for kind in sorted(types):
            is_kept = wanted and kind not in wanted and kind in known
            first, *others = known[kind] if is_kept else row_of(kind, types[kind]).cells()
            lines.append(f"| `{first}` | {' | '.join(others)} |")
            print(lines[-1], file=sys.stderr, flush=True)
        before, _, after = _parted(page, heading)
        page = before + "\n".join(lines) + "\n" + (f"{after}\n" if after.strip() else "")
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    write(sys.argv[1:])
