"""evaluation.md: what an evaluation found, for people.

In: the record that measurements.json keeps. Out: Markdown: the verdict and why, the figures and what they were measured
with, and the golden answers that changed, side by side.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantize.evaluate.record import GoldenCount

CHANGED = ("lost", "gained")


def render_page(record: Mapping[str, Any], title: str) -> str:
    """The text of evaluation.md; the same record gives the same text."""
    parts = [f"# {title}: {record['verdict']}", _findings(record)]
    if record.get("quality"):
        parts += [_quality(record["quality"]), _measured(record)]
    if record.get("golden"):
        parts += [_golden(record["golden"])]
    return "\n\n".join(part for part in parts if part) + "\n"


def _findings(record: Mapping[str, Any]) -> str:
    rows = [f"| {item['gate']} | {item['outcome']} | {_cell(item['reason'])} |" for item in record["findings"]]
    return "\n".join(["| gate | outcome | why |", "|---|---|---|", *rows])


def _quality(measured: Mapping[str, Any]) -> str:
    quality = {key: float(value) if value in ("inf", "nan") else value for key, value in measured.items()}
    bound = "" if quality["kl_is_exact"] else " (a lower bound)"
    rows = [
        f"| perplexity | {quality['perplexity']:.4f} |",
        f"| perplexity of the source | {quality['source_perplexity']:.4f} |",
        f"| ratio | {quality['perplexity_ratio']:.4f} |",
        f"| KL divergence, mean{bound} | {quality['mean_kl']:.5f} nats |",
        f"| KL divergence, 99th percentile | {quality['p99_kl']:.4f} nats |",
        f"| same likeliest token | {quality['top_token_agreement']:.1%} |",
    ]
    return "\n".join(["## Figures", "", "| what | value |", "|---|---:|", *rows])


def _measured(record: Mapping[str, Any]) -> str:
    quality, machine = record["quality"], record["machine"]
    lines = [
        f"- artifact: {record['artifact']['name']}, {record['artifact'].get('format')}, in {quality['runtime']} "
        f"({quality['runtime_version']})",
        f"- source: {record['source'].get('uri')}, in {quality['source_runtime']} "
        f"({quality['source_runtime_version']})",
        f"- text: {quality['text_name']}, {quality['predictions']:,} predicted tokens in {quality['windows']} windows "
        f"of at most {quality['window_tokens']}, sha256 `{quality['text_hash'][:16]}…`",
        f"- calibration text: {record['held_out']}",
        f"- machine: {machine['processor']}, {machine['cores']} cores" + "".join(f", {gpu}" for gpu in machine["gpus"]),
    ]
    return "## Measured with\n\n" + "\n".join(lines)


def _golden(golden: Mapping[str, Any]) -> str:
    changed, count = [item for item in golden["results"] if item["change"] in CHANGED], GoldenCount.of(golden)
    assert count is not None
    head = (
        f"## Golden prompts\n\nThe artifact passes {count}, the source passes {count.source}; {golden['lost']} lost. "
        f"Context {golden['context']:,} tokens."
    )
    return "\n\n".join([head, *(_answers(item) for item in changed)])


def _answers(item: Mapping[str, Any]) -> str:
    return "\n\n".join(
        [
            f"### {item['change']}: {item['key']}",
            _quoted(item["prompt"]),
            "Source:" + _reason(item["source"]),
            _quoted(item["source"]["text"]),
            "Artifact:" + _reason(item["artifact"]),
            _quoted(item["artifact"]["text"]),
        ]
    )


def _reason(answer: Mapping[str, Any]) -> str:
    return "" if answer["passed"] else f" ({answer['reason']})"


def _quoted(text: str) -> str:
    """As a block of code, so that nothing in an answer is taken for markup."""
    return "\n".join(f"    {line}" for line in (text or "(empty)").splitlines())


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
