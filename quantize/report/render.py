"""Pages from templates: report.md, report.html, production_decision.md; and the chart by itself, as SVG and as PNG.

In: a store and a name. Out: texts, and files. The HTML needs nothing but itself: its policy forbids every request.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from quantize.bench.page import cell_text
from quantize.charts.comparison import comparison_file
from quantize.charts.image import png
from quantize.errors import MissingExtraError, UsageError, disk_full, is_disk_full
from quantize.evaluate.metrics import figures_data
from quantize.report.collect import PageSubject, collect
from quantize.report.decision_text import decision_text, headline
from quantize.report.production import Choice, judge
from quantize.report.views import TONES, page_of
from quantize.store.store import Store
from quantize.system.files import write_text

HTML, MARKDOWN, DECISION = "report.html", "report.md", "production_decision.md"
CHART, IMAGE = "quality.svg", "quality.png"


@dataclass(frozen=True)
class Written:
    """A report. files: what was written. note: what was not, and why; None where all was."""

    choice: Choice
    files: tuple[Path, ...]
    note: str | None


def render(subject: PageSubject, choice: Choice | None = None) -> dict[str, str]:
    """The text of each page, by file name; the same measurements give the same text. choice: if it is known."""
    choice = choice or judge(subject)
    values = {"page": page_of(subject, choice), "decision": decision_text(subject, choice)}
    return {name: _environment().get_template(f"{name}.jinja").render(values) for name in (HTML, MARKDOWN, DECISION)}


def write_report(store: Store, name: str | None, output: Path | None) -> Written:
    """Write the pages, and the chart where there are figures. output: a folder; None means reports/<name>/.

    Raises UsageError: nothing of that name, or the folder can't be written. DiskFullError.
    """
    subject = collect(store, name)
    choice = judge(subject)
    folder = output or Path("reports") / subject.name.partition("@")[0]
    texts = render(subject, choice)
    chart = comparison_file(choice.comparison, subject.source.name)
    if chart:
        texts[CHART] = chart
    image, note = _image(chart)
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for file, text in texts.items():
            write_text(folder / file, text)
        for old in {CHART, IMAGE} - set(texts):  # of figures that are no longer there
            (folder / old).unlink(missing_ok=True)
        if image:
            (folder / IMAGE).write_bytes(image)
    names = [*texts, *([IMAGE] if image else [])]
    return Written(choice, tuple(folder / file for file in names), note)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        if is_disk_full(exc):
            raise disk_full(exc, folder) from exc
        raise UsageError(
            f"the report can't be written to {folder}: {exc.strerror or exc}", hint="choose a folder with --output"
        ) from exc


def _image(chart: str) -> tuple[bytes, str | None]:
    """The chart as a PNG, or why there is none."""
    if not chart:
        return b"", None
    try:
        return png(chart), None
    except MissingExtraError as exc:
        return b"", f"no {IMAGE} was written: {exc}; {exc.hint}"


def choice_data(choice: Choice) -> dict[str, Any]:
    """The choice as plain data, for programs."""
    return {
        "serve": choice.serve.entry.artifact.ref if choice.serve else None,
        "fallback": choice.fallback.entry.artifact.ref if choice.fallback else None,
        "why": headline(choice)[2],
        "artifacts": [
            {
                "artifact": item.entry.artifact.ref,
                "verdict": item.word.value,
                "on_front": row.is_on_front,
                "beaten_by": row.beaten_by,
                "figures": {**figures_data(item.evidence), **item.evidence.figures.model_dump(mode="json")},
                "findings": [finding.model_dump(mode="json") for finding in item.decision.findings],
                "not_measured": list(item.not_measured),
            }
            for item, row in zip(choice.verdicts, choice.comparison.artifacts, strict=True)
        ],
    }


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("quantize.report"),
        autoescape=lambda name: bool(name and ".html" in name),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["svg"] = Markup  # charts.py escapes every name that it draws
    environment.filters["code"] = _code
    environment.filters["tone"] = TONES.__getitem__
    environment.filters["cell"] = cell_text
    environment.filters["quoted"] = _quoted
    return environment


def _code(text: str) -> Markup:
    """HTML of text in which `such` is code."""
    pieces = text.split("`")
    if len(pieces) % 2 == 0:
        return escape(text)
    return Markup("").join(
        Markup("<code>{}</code>").format(piece) if number % 2 else escape(piece) for number, piece in enumerate(pieces)
    )


def _quoted(text: str) -> str:
    """A block of code, so that nothing in an answer is taken for markup."""
    return "\n".join(f"    {line}" for line in (text or "(empty)").splitlines())
