"""What would be built so that it fits, without building: from headers, and from what an earlier build found out.

In: a variant's options, what must fit, folders of artifacts of the same source. Out: a FitAnswer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from quantize.errors import StoreError, UsageError
from quantize.events import Reporter
from quantize.formats.base import Context
from quantize.formats.format import CurvePoint, FitAnswer
from quantize.formats.gguf.build import GgufBuilder
from quantize.formats.gguf.fit.survey import Survey
from quantize.formats.gguf.fit.table import NAME, CostTable, FitRecord, read_record
from quantize.formats.gguf.options import GgufOptions
from quantize.formats.gguf.types import ELEMENT_TYPES

NO_STATISTICS = "no variant with `fit` is built yet: what types cost is known after one was"


class GgufFitter:
    """See Fitter."""

    def options(self, asked: Mapping[str, Any], beside: Sequence[GgufOptions]) -> GgufOptions:
        """See Fitter; solved where one beside it is."""
        try:
            return GgufOptions.model_validate({"fit": dict(asked), "gptq": any(item.gptq for item in beside)})
        except ValidationError as exc:
            message, _, hint = exc.errors()[0]["msg"].removeprefix("Value error, ").partition(" || ")
            raise UsageError(f"fit: {message}", hint=hint or None) from exc

    def answer(self, context: Context, built: Sequence[Path], reporter: Reporter) -> FitAnswer:
        """See Fitter."""
        surveyed = GgufBuilder().survey(context, reporter)
        budget, records = surveyed.budget, _records(built, surveyed)
        if not records:
            points = surveyed.sizes.stock_points()
            stock = tuple(CurvePoint(name, point.bytes, None) for name, point in points.items())
            return FitAnswer(
                budget.words, budget.file_bytes, surveyed.sizes.least_bytes, stock, None, {}, "", (), NO_STATISTICS,
                _written(context.options),
            )  # fmt: skip
        solved = context.options.gptq
        table = next((item.table for item in records if item.table.solved == solved), records[0].table)
        chosen = table.choose(budget.file_bytes)
        counts: dict[str, int] = {}
        for kind in chosen.types.values():
            counts[kind] = counts.get(kind, 0) + 1
        return FitAnswer(
            budget.words, budget.file_bytes, table.least_bytes,
            tuple(CurvePoint(name, point.bytes, point.loss) for name, point in table.stock_points().items()),
            CurvePoint("fitted", chosen.bytes, chosen.loss),
            dict(sorted(counts.items(), key=lambda item: ELEMENT_TYPES[item[0]])), table.unit,
            tuple(CurvePoint("", point.bytes, point.loss) for point in table.curve()), _basis(table),
            _written(context.options),
        )  # fmt: skip


def _records(built: Sequence[Path], surveyed: Survey) -> list[FitRecord]:
    """Those that are about the same matrices, and can be read."""
    found = []
    for folder in built:
        try:
            record = read_record(folder / NAME)
        except StoreError:
            continue
        same = {name: item.elements for name, item in record.table.matrices.items()} == {
            name: item.elements for name, item in surveyed.matrices.items()
        }
        found += [record] if same and record.table.other_bytes == surveyed.other_bytes else []
    return found


def _written(options: GgufOptions) -> str:
    data = options.model_dump(mode="json")
    fit = ", ".join(f"{key}: {value}" for key, value in data["fit"].items() if key != "check")
    return f"{{format: gguf, fit: {{{fit}}}{', gptq: true' if options.gptq else ''}}}"


def _basis(table: CostTable) -> str:
    made = "solved" if table.solved else "as llama.cpp rounds"
    unit = "nats a token, from gradients" if table.unit == "nats" else "share of the outputs' energy, without gradients"
    return f"predicted for matrices {made}: {unit}"
