"""A model file whose types are chosen so that it fits: chosen, made, and held against llama.cpp's own type map.

In: a variant with `fit`, the 16-bit file, what the calibration pass left. Out: the file in staging, and beside it what
each type would have cost. The best stock map of no more bytes is made too and measured; the better one is taken.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.errors import BuildError, disk_errors
from quantize.events import Reporter, note, status
from quantize.formats.base import Context
from quantize.formats.gguf.fit.survey import Survey, nearest_kind, settings_for, survey, survey_jobs
from quantize.formats.gguf.fit.table import NAME, ChosenMap, CostTable, FitRecord, Measured, Point, record_text
from quantize.formats.gguf.making import MadeFile, make_file, settings_of
from quantize.formats.gguf.types import ELEMENT_TYPES
from quantize.model.shape import ModelShape
from quantize.system.files import write_text
from quantize.system.process import run_step

FITTED = "fitted"


@dataclass(frozen=True)
class Fitted:
    """The file that was taken, in staging; the record beside it; facts for measurements.json."""

    made: MadeFile
    record: FitRecord
    facts: dict[str, Any]


@dataclass(frozen=True)
class _Candidate:
    """A map, and the file that was made with it."""

    name: str
    types: Mapping[str, str]
    made: MadeFile
    folder: Path


def fit_file(context: Context, intermediate: Path, name: str, imatrix: Path, reporter: Reporter) -> Fitted:
    """Choose, make, measure, put what is taken into staging as `name`. Raises PlanError, BuildError, VerifyError."""
    options, variant = context.options, context.variant
    surveyed = _surveyed(context, intermediate, reporter)
    budget = surveyed.budget
    table, facts = _costs(context, intermediate, surveyed, reporter)
    chosen = table.choose(budget.file_bytes)
    note(reporter, variant, f"fit: {chosen.bytes:,} of {budget.file_bytes:,} bytes ({budget.words})")
    making = _Making(context, intermediate, imatrix, table, reporter)
    best = making.make(FITTED, chosen.types, chosen.bytes)
    stock = table.best_stock(budget.file_bytes)
    taken, measured = best, None
    if stock is not None and options.fit.check and dict(table.stock[stock].types) != dict(chosen.types):
        other = making.make(stock, table.stock[stock].types, table.stock[stock].bytes)
        measured = _measure(context, intermediate, best, other, reporter)
        taken = other if measured.is_stock_better else best
    _put(taken, context.staging, name)
    record = _record(context, surveyed, table, chosen, taken, stock, measured)
    with disk_errors(context.staging):
        write_text(context.staging / NAME, record_text(record))
    return Fitted(taken.made, record, facts | {"fit": _facts(record)})


def _surveyed(context: Context, intermediate: Path, reporter: Reporter) -> Survey:
    from quantize.runtimes.llama_cpp.quantize import dry_run

    jobs = survey_jobs(context.options, context.limits)
    found = run_step("sizing the types", reporter, dry_run, intermediate, jobs)
    return survey(context.options, found, ModelShape.from_config(context.checkpoint.config))


def _costs(
    context: Context, intermediate: Path, surveyed: Survey, reporter: Reporter
) -> tuple[CostTable, dict[str, Any]]:
    from quantize.formats.gguf.fit.costs import CostRequest, find_costs

    status(reporter, context.variant, "finding what each type costs in each matrix")
    request = CostRequest(
        intermediate, context.checkpoint, context.scratch, context.variant, surveyed.matrices, context.options.gptq,
        context.limits.threads,
    )  # fmt: skip
    found = run_step("finding what types cost", reporter, find_costs, request)
    table = surveyed.table(found.costs, unit=found.unit, solved=context.options.gptq)
    return table, {"fit_seconds": found.seconds, "fit_ratios": found.ratios}


@dataclass(frozen=True)
class _Making:
    """Makes files of one variant in scratch."""

    context: Context
    intermediate: Path
    imatrix: Path
    table: CostTable
    reporter: Reporter

    def make(self, name: str, types: Mapping[str, str], file_bytes: int) -> _Candidate:
        """With these types, of exactly so many bytes. Raises BuildError: llama.cpp did otherwise."""
        digest = hashlib.sha256(json.dumps(dict(types)).encode()).hexdigest()[:12]
        folder = self.context.scratch / f"map-{digest}"
        with disk_errors(self.context.scratch):
            folder.mkdir(exist_ok=True)
        kind = name if name in self.table.stock else nearest_kind(self.table, file_bytes)
        base = settings_of(self.context.options, self.context.limits, self.imatrix)
        settings = settings_for(types, base, kind)
        out = folder / "model.gguf"
        made = make_file(self.context, self.intermediate, out, settings, self.reporter, log=folder.name)
        found = {item.name: item.type for item in made.tensors}
        wrong = [f"{item} {found[item]}, not {kind}" for item, kind in types.items() if found[item] != kind]
        size = out.stat().st_size
        if wrong or size != file_bytes:
            what = f"llama.cpp gave {wrong[0]}" if wrong else f"the file has {size:,} bytes, not {file_bytes:,}"
            raise BuildError(f"{self.context.variant}: {what}", hint="this is a fault of quantize: please report it")
        return _Candidate(name, types, made, folder)


def _measure(
    context: Context, intermediate: Path, best: _Candidate, other: _Candidate, reporter: Reporter
) -> Measured:
    from quantize.formats.gguf.fit.check import nearness

    status(reporter, context.variant, f"measuring the chosen types against {other.name}")
    files = [item.folder / item.made.names[0] for item in (best, other)]
    found = run_step(
        "measuring two maps", reporter, nearness, intermediate, files, context.variant, context.limits.threads
    )  # fmt: skip
    kl = Measured(chosen_kl=found.kl[0], stock_kl=found.kl[1], tokens=found.tokens)
    verdict = f"{other.name} is better and is taken" if kl.is_stock_better else "the chosen types are taken"
    note(
        reporter, context.variant,
        f"fit: mean KL {kl.chosen_kl:.4g} with the chosen types, {kl.stock_kl:.4g} with {other.name}: {verdict}",
    )  # fmt: skip
    return kl


def _put(taken: _Candidate, staging: Path, name: str) -> None:
    """Move the file that is taken to where it is published from."""
    with disk_errors(staging):
        os.replace(taken.folder / taken.made.names[0], staging / name)


def _record(
    context: Context, surveyed: Survey, table: CostTable, chosen: ChosenMap, taken: _Candidate, stock: str | None,
    measured: Measured | None,
) -> FitRecord:  # fmt: skip
    is_stock = taken.name != FITTED
    point = table.stock_points()[taken.name] if is_stock else Point(bytes=chosen.bytes, loss=chosen.loss)
    return FitRecord(
        asked=context.options.fit.words, budget_bytes=surveyed.budget.file_bytes, taken=taken.name,
        types=dict(taken.types), point=point, bound=chosen.bound, against=stock, measured=measured, table=table,
    )  # fmt: skip


def _facts(record: FitRecord) -> dict[str, Any]:
    """What measurements.json has of it; fit.json has the rest."""
    counts: dict[str, int] = {}
    for kind in record.types.values():
        counts[kind] = counts.get(kind, 0) + 1
    data = record.model_dump(mode="json", exclude={"table", "types", "version"})
    by_bits = sorted(counts.items(), key=lambda item: ELEMENT_TYPES[item[0]])
    return {
        **data, "unit": record.table.unit, "types": dict(by_bits),
        "curve": [list(point.model_dump().values()) for point in record.table.curve()],
        "stock": {name: list(point.model_dump().values()) for name, point in record.table.stock_points().items()},
    }  # fmt: skip
