"""What the tables of README and the documents show of a recipe's artifacts: a store -> plain data -> Markdown.

In: a store in which the recipe is built and measured. Out: `read`, a dict that JSON can hold (sizes in bytes,
divergences in nats), and the tables that are made of it and of nothing else.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from quantize.evaluate.decision import Verdict
from quantize.evaluate.gates import decide, gates, thresholds
from quantize.evaluate.metric import Detail, Metric
from quantize.evaluate.metrics import METRICS, golden_count, metric, metrics, readings
from quantize.evaluate.record import EvaluationRecord, GoldenCount, Quality, read_record, source_lines
from quantize.recipe.gates import GateLimits
from quantize.report.collect import collect
from quantize.report.decision_text import headline, listed
from quantize.report.production import judge
from quantize.store.artifact import Artifact
from quantize.store.store import Store
from quantize.system.sizes import size_text

Data = Mapping[str, Any]

WORST_OF = "mean_kl"
"""The figure that is shown on the worst kind of text too."""


def read(store: Store, name: str) -> dict[str, Any]:
    """The measured artifacts of a recipe by size, and what `quantize report` decides about them.

    Raises UsageError if there are none of that name; exits if one was not measured, or on other text or prompts than
    the rest: such figures must not stand in one table.
    """
    subject = collect(store, name)
    choice = judge(subject)
    items = [(verdict.entry.artifact, verdict.word) for verdict in choice.verdicts]
    records = [_record(item) for item, _ in items]
    qualities = [quality for _, quality in records]
    texts, asked = {item.windows_hash for item in qualities}, {item.golden and item.golden.hash for item, _ in records}
    for what, found in (("quality", texts), ("golden", asked)):
        if len(found) > 1:
            raise SystemExit(f"{name}: not all were measured on the same {what}: run `quantize eval` for each")
    golden = golden_count(records[0][0])
    return {
        "source": subject.source.name,
        "source_perplexity": round(qualities[0].source_perplexity, 4),
        "tokens": qualities[0].predictions,
        "golden": None if golden is None else {"source_passed": golden.source_passed, "prompts": golden.prompts},
        "tools": _tools(items, qualities),
        "decision": " ".join(headline(choice)[1:]),
        "artifacts": [_row(item, word, record) for (item, word), (record, _) in zip(items, records, strict=True)],
    }


def _record(item: Artifact) -> tuple[EvaluationRecord, Quality]:
    record = read_record(item.measurements())
    if record is None or record.quality is None:
        raise SystemExit(f"{item.ref} was not measured: build its recipe without --no-eval")
    return record, record.quality


def _row(item: Artifact, word: Verdict, record: EvaluationRecord) -> dict[str, Any]:
    manifest, golden = item.manifest, golden_count(record)
    found = readings(record, Detail.LIST)
    figures = {item.metric.key: item.value for item in found}
    intervals = {item.metric.key: item.interval for item in found if item.interval is not None}
    return {
        "variant": manifest.variant,
        "format": manifest.format,
        "size_bytes": manifest.size_bytes,
        "bits_per_weight": round(manifest.bits_per_weight, 4),
        **{key: round(value, 6) for key, value in figures.items() if isinstance(value, float)},
        **{_interval_key(key): [round(item.low, 6), round(item.high, 6)] for key, item in intervals.items()},
        **_worst_kind(record),
        "golden_passed": None if golden is None else golden.passed,
        "verdict": word.value,
        "passes_default_gates": decide(record, thresholds(GateLimits(), manifest.bits)).accepted,
    }


def _worst_kind(record: EvaluationRecord) -> dict[str, Any]:
    """The kind of text that the artifact lost most on, which its gates look at; {} where there are no several."""
    reading = metric(WORST_OF).reading(record)
    if reading is None or not reading.kinds:
        return {}
    worst = max(reading.kinds, key=lambda item: item.value)
    interval = [] if worst.interval is None else [round(worst.interval.low, 6), round(worst.interval.high, 6)]
    return {"worst_kind": worst.kind, "worst_kl": round(worst.value, 6), "worst_kl_interval": interval}


def _interval_key(key: str) -> str:
    return f"{key}_interval"


def _tools(items: Sequence[tuple[Artifact, Verdict]], qualities: Iterable[Quality]) -> dict[str, str]:
    """Every version that a figure hangs on: of what built the files, and of the runtimes that measured them."""
    versions: dict[str, str] = {}
    for item, _ in items:
        versions |= item.manifest.tools
    versions |= {quality.runtime: quality.runtime_version for quality in qualities}
    return dict(sorted(versions.items()))


def demo_block(data: Data) -> str:
    """README's table of the demo, and the sentences that hold figures of it."""
    golden = GoldenCount(0, **data["golden"])
    (line,) = source_lines([("", golden)])
    default = [f"`{row['variant']}`" for row in data["artifacts"] if row["passes_default_gates"]]
    text = (
        f"Each artifact ran in its own runtime, against the FP16 source (perplexity {data['source_perplexity']:.2f}), "
        f"on {data['tokens']:,} tokens that calibration never saw. The golden column counts the golden prompts passed; "
        f"{line}. The [default gates](docs/gates.md) accept {listed(default) or 'none of these'}; the demo recipe sets "
        "looser ones, and says why."
    )
    rows = [(*_figures(row), str(GoldenCount(row["golden_passed"], **data["golden"]))) for row in data["artifacts"]]
    return f"{_wrapped(text)}\n\n{_table((*_columns(data), metric('golden').short), rows)}"


def formats_table(data: Data, *, short: bool = False) -> str:
    """The formats on the dithered copy, the least divergence first. short: without format and size."""
    columns = _columns(data)
    rows = [_figures(row) for row in sorted(data["artifacts"], key=lambda row: row["mean_kl"])]
    if short:
        return _table((columns[0], *columns[3:]), [(row[0], *row[3:]) for row in rows], words=1)
    return _table(columns, rows)


def report_block(data: Data) -> str:
    """What `quantize report` says after the demo."""
    rows = [(f"`{row['variant']}`", row["verdict"], *_figures(row)[2:]) for row in data["artifacts"]]
    columns = ("artifact", "verdict", *_columns(data)[2:])
    return f"{_wrapped(data['decision'])}\n\n{_table(columns, rows)}"


def metrics_table() -> str:
    """What every figure is called, and its limit."""
    columns = ("figure", "in JSON", "unit", "better", "limit")
    rows = []
    for item in METRICS:
        limit = f"`{item.limit.key}`" if item.limit is not None else ""
        unit = "share" if item.is_share else item.unit
        rows.append((item.title, f"`{item.key}`", unit, item.better.value, limit))
    return _table(columns, rows, words=len(columns))


def limits_table() -> str:
    """The limits that a recipe may set, with their defaults."""
    rows = []
    for key, field in GateLimits.model_fields.items():
        default = "none" if field.default is None else f"{field.default:g}"
        rows.append((f"`{key}`", default, str(field.description)))
    return _table(("recipe key", "default", "what"), rows, words=3)


def gates_table() -> str:
    """The gates, and where each limit is by default."""
    rows = [(gate.title, gate.bound(thresholds(GateLimits(), None)), f"`{gate.key}`") for gate in gates()]
    return _table(("gate", "limit", "key in `gates`"), rows, words=3)


def _columns(data: Data) -> tuple[str, ...]:
    shown = [item.title for item in _shown(data["artifacts"][0])]
    worst = [f"{metric(WORST_OF).short}, worst kind of text"] if _has_kinds(data["artifacts"]) else []
    return ("variant", "format", "size", "bits/weight", *shown, *worst)


def _has_kinds(rows: Iterable[Data]) -> bool:
    return any("worst_kind" in row for row in rows)


def _figures(row: Data) -> tuple[str, ...]:
    return (
        f"`{row['variant']}`",
        row["format"],
        size_text(row["size_bytes"]),
        f"{row['bits_per_weight']:.2f}",
        *(_figure(item, row[item.key], row.get(_interval_key(item.key))) for item in _shown(row)),
        *_worst_cell(row),
    )


def _figure(shown: Metric, value: float, interval: Sequence[float] | None) -> str:
    """A figure with the half width of its interval, as all tables of the program show it."""
    half = f" ± {shown.number((interval[1] - interval[0]) / 2)}" if interval else ""
    return f"{shown.number(value)}{half}"


def _worst_cell(row: Data) -> list[str]:
    if "worst_kind" not in row:
        return []
    return [f"{_figure(metric(WORST_OF), row['worst_kl'], row['worst_kl_interval'])} ({row['worst_kind']})"]


def _shown(row: Data) -> list[Metric]:
    """The metrics of a list that the row has."""
    return [item for item in metrics(Detail.LIST) if item.key in row]


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], words: int = 2) -> str:
    """A Markdown table; the first columns are words, the others figures."""
    sides = "|".join("---" if place < words else "---:" for place in range(len(columns)))
    head, *body = (f"| {' | '.join(cells)} |" for cells in (columns, *rows))
    return "\n".join((head, f"|{sides}|", *body))
