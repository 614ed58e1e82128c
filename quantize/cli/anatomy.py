"""What the blocks of a model are made of, for people: what `quantize plan -v` shows below the table.

In: a source's folder. Out: lines. Left to others: finding it out (model/anatomy).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from quantize.errors import CheckpointError
from quantize.model.anatomy.found import Anatomy, Template
from quantize.model.architecture import anatomy_of
from quantize.model.checkpoint import read_json
from quantize.model.layout import FoldGroup, NormSource, RowsSource


def anatomy_lines(location: Path) -> list[str]:
    """Each kind of block, its linears by what they read, and what their scales can be folded into.

    location: a folder with config.json; of another file only that it has none is said.
    """
    if not (location / "config.json").is_file():
        return ["blocks  are looked at when the source has a config.json: of a GGUF file one is made when it is built"]
    try:
        found = anatomy_of(read_json(location / "config.json"))
    except CheckpointError as exc:
        return [f"blocks  {exc.message}"]
    folded, groups = found.folds
    lines = [
        f"blocks  {len(found.kinds)} of {found.architecture} at {found.blocks}, attention by {found.attention}; "
        f"{folded} of {groups} inputs take scales",
    ]
    for number, template in enumerate(found.templates):
        lines += _kind_lines(found, number, template)
    return lines


def _kind_lines(found: Anatomy, number: int, template: Template) -> Iterator[str]:
    members = [index for index, kind in enumerate(found.kinds) if kind == number]
    yield f"        blocks {_ranges(members)}:"
    for group in template.groups:
        readers = [linear.module for linear in group.linears]
        if template.experts is not None and group.name == template.experts.input:
            readers.append(f"{template.experts.count} experts of {template.experts.module}")
        yield f"          {', '.join(readers)}  <- {_fed(group)}"
    if template.experts is not None:
        fed = "rows of its up projection" if template.expert_rows else "nothing that takes scales"
        yield f"          the down projection of each expert  <- {fed}"
    for name, reason in template.kept:
        yield f"          {name} stays: {reason}"


def _fed(group: FoldGroup) -> str:
    source = group.source
    if isinstance(source, NormSource):
        return f"{source.tensor}, which multiplies by {'1 + w' if source.offset else 'w'}"
    if isinstance(source, RowsSource):
        shared = f", each head for {source.repeats}" if source.repeats > 1 else ""
        return f"rows {source.start}:{source.stop} of {source.tensor}{shared}"
    return "nothing that takes scales"


def _ranges(numbers: list[int]) -> str:
    """0 to 3, 5, 7 to 9."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{part[0]} to {part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)
