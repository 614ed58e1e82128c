"""What the tables of README and the documents show of a recipe's artifacts: a store -> plain data -> Markdown.

In: a store in which the recipe is built and measured. Out: `read`, a dict that JSON can hold (sizes in bytes,
divergences in nats), and the tables that are made of it and of nothing else.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from quantize.evaluate.gates import GateThresholds, decide
from quantize.evaluate.record import GoldenCount, figures_of, read_record, source_lines
from quantize.report.collect import collect
from quantize.report.decision_text import headline, listed
from quantize.report.production import judge
from quantize.store.artifact import Artifact
from quantize.store.store import Store
from quantize.system.sizes import size_text

Data = Mapping[str, Any]


def read(store: Store, name: str) -> dict[str, Any]:
    """The measured artifacts of a recipe by size, and what `quantize report` decides about them.

    Raises UsageError if there are none of that name; exits if one was not measured, or on other text or prompts than
    the rest: such figures must not stand in one table.
    """
    subject = collect(store, name)
    choice = judge(subject)
    items = [(verdict.entry.artifact, verdict.word) for verdict in choice.verdicts]
    records = [_record(item) for item, _ in items]
    for part, key in (("quality", "windows_hash"), ("golden", "hash")):
        if len({(record[part] or {}).get(key) for record in records}) > 1:
            raise SystemExit(f"{name}: not all were measured on the same {part}: run `quantize eval` for each")
    quality, golden = records[0]["quality"], GoldenCount.of(records[0]["golden"])
    return {
        "source": subject.source.name,
        "source_perplexity": round(quality["source_perplexity"], 4),
        "tokens": quality["predictions"],
        "golden": None if golden is None else {"source_passed": golden.source_passed, "prompts": golden.prompts},
        "tools": _tools(items, records),
        "decision": " ".join(headline(choice)[1:]),
        "artifacts": [_row(item, word, record) for (item, word), record in zip(items, records, strict=True)],
    }


def _record(item: Artifact) -> dict[str, Any]:
    record = read_record(item.measurements())
    if record is None or not record["quality"]:
        raise SystemExit(f"{item.ref} was not measured: build its recipe without --no-eval")
    return record


def _row(item: Artifact, word: str, record: Data) -> dict[str, Any]:
    manifest, quality, golden = item.manifest, record["quality"], GoldenCount.of(record["golden"])
    return {
        "variant": manifest.variant,
        "format": manifest.format,
        "size_bytes": manifest.size_bytes,
        "bits_per_weight": round(manifest.bits_per_weight, 4),
        "perplexity_ratio": round(float(quality["perplexity_ratio"]), 6),
        "mean_kl": round(float(quality["mean_kl"]), 6),
        "golden_passed": None if golden is None else golden.passed,
        "verdict": word,
        "passes_default_gates": decide(figures_of(record), GateThresholds()).accepted,
    }


def _tools(items: Sequence[tuple[Artifact, str]], records: Iterable[Data]) -> dict[str, str]:
    """Every version that a figure hangs on: of what built the files, and of the runtimes that measured them."""
    versions: dict[str, str] = {}
    for item, _ in items:
        versions |= item.manifest.tools
    for record in records:
        quality = record["quality"]
        versions[quality["runtime"]] = quality["runtime_version"]
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
    columns = ("variant", "format", "size", "bits/weight", "perplexity ratio", "KL divergence", "golden")
    rows = [(*_figures(row), str(GoldenCount(row["golden_passed"], **data["golden"]))) for row in data["artifacts"]]
    return f"{_wrapped(text)}\n\n{_table(columns, rows)}"


def formats_table(data: Data, *, short: bool = False) -> str:
    """The formats on the dithered copy, the least divergence first. short: without format and size."""
    columns = ("variant", "format", "size", "bits/weight", "perplexity ratio", "KL divergence")
    rows = [_figures(row) for row in sorted(data["artifacts"], key=lambda row: row["mean_kl"])]
    if short:
        return _table((columns[0], *columns[3:]), [(row[0], *row[3:]) for row in rows], words=1)
    return _table(columns, rows)


def report_block(data: Data) -> str:
    """What `quantize report` says after the demo."""
    rows = [(f"`{row['variant']}`", row["verdict"], *_figures(row)[2:]) for row in data["artifacts"]]
    columns = ("artifact", "verdict", "size", "bits/weight", "perplexity ratio", "KL divergence")
    return f"{_wrapped(data['decision'])}\n\n{_table(columns, rows)}"


def _figures(row: Data) -> tuple[str, ...]:
    return (
        f"`{row['variant']}`",
        row["format"],
        size_text(row["size_bytes"]),
        f"{row['bits_per_weight']:.2f}",
        f"{row['perplexity_ratio']:.4f}",
        f"{row['mean_kl']:.4f}",
    )


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], words: int = 2) -> str:
    """A Markdown table; the first columns are words, the others figures."""
    sides = "|".join("---" if place < words else "---:" for place in range(len(columns)))
    head, *body = (f"| {' | '.join(cells)} |" for cells in (columns, *rows))
    return "\n".join((head, f"|{sides}|", *body))
