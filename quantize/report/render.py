"""Pages from templates: report.md, report.html, production_decision.md.

In: a store and a name. Out: texts, and files. The HTML needs nothing but itself: its policy forbids every request.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from quantize.bench.page import cell_text
from quantize.evaluate.metrics import figures_data
from quantize.report.collect import PageSubject, collect
from quantize.report.decision_text import decision_text, headline
from quantize.report.production import Choice, judge
from quantize.report.views import TONES, page_of
from quantize.store.staging import store_errors
from quantize.store.store import Store
from quantize.system.files import write_text

HTML, MARKDOWN, DECISION = "report.html", "report.md", "production_decision.md"


def render(subject: PageSubject) -> dict[str, str]:
    """The text of each page, by file name; the same measurements give the same text."""
    choice = judge(subject)
    values = {"page": page_of(subject, choice), "decision": decision_text(subject, choice)}
    return {name: _environment().get_template(f"{name}.jinja").render(values) for name in (HTML, MARKDOWN, DECISION)}


def write_report(store: Store, name: str | None, output: Path | None) -> tuple[Choice, list[Path]]:
    """Write the pages and return their paths. output: a folder; None means reports/<name>/.

    Raises UsageError (nothing of that name) and StoreError (the folder can't be written).
    """
    subject = collect(store, name)
    folder = output or Path("reports") / subject.name.partition("@")[0]
    texts = render(subject)
    with store_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for file, text in texts.items():
            write_text(folder / file, text)
    return judge(subject), [folder / file for file in texts]


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
                "figures": {**figures_data(item.evidence), **item.evidence.figures.model_dump(mode="json")},
                "findings": [finding.model_dump(mode="json") for finding in item.decision.findings],
                "not_measured": list(item.not_measured),
            }
            for item in choice.verdicts
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
