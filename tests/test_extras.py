"""Every extra that a hint or a page tells to install is one that there is."""

from __future__ import annotations

import ast
import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from quantize.errors import MissingExtraError
from quantize.formats import formats, runtime_kind
from quantize.runtimes.base import runtime_version

ROOT = Path(__file__).parent.parent
EXTRAS = set(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"])
NAMED = re.compile(r"\bquantize-models\[([\w,\s-]+)\]")
FOLDERS = ("quantize", "docs", "deploy", "ci", "benchmarks", "recipes", ".github")
SUFFIXES = {".py", ".md", ".toml", ".yaml", ".yml", ".sh", ".html", ".jinja", ""}


def pages() -> list[Path]:
    """Every text of the project that may tell somebody what to install."""
    inside = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES]
    here = [path for path in ROOT.iterdir() if path.suffix in SUFFIXES]
    return sorted(path for path in (*inside, *here) if path.is_file() and "__pycache__" not in path.parts)


def test_extras_in_texts() -> None:
    found = {
        (str(path.relative_to(ROOT)), extra.strip())
        for path in pages()
        for names in NAMED.findall(path.read_text(encoding="utf-8", errors="replace"))
        for extra in names.split(",")
    }
    assert {("README.md", "bnb"), ("README.md", "all"), ("deploy/slurm.sh", "ray")} <= found, "they are looked for"
    assert {item for item in found if item[1] not in EXTRAS} == set()


def test_extras_in_hints() -> None:
    """Second arguments of MissingExtraError that are written out."""
    calls = [
        node
        for path in (ROOT / "quantize").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "MissingExtraError" and len(node.args) > 1
    ]
    found = {call.args[1].value for call in calls if isinstance(call.args[1], ast.Constant)}
    assert {"serve", "hub", "torch"} <= found
    assert found <= EXTRAS


@pytest.mark.parametrize("format", [*formats()])
def test_extras_of_runtimes_that_are_not_installed(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_name: str) -> str:
        raise metadata.PackageNotFoundError

    monkeypatch.setattr("quantize.runtimes.base.version", missing)
    with pytest.raises(MissingExtraError) as caught:
        runtime_version(runtime_kind(format), "evaluating a model")
    (extra,) = NAMED.findall(str(caught.value.hint))
    assert extra in EXTRAS


def test_extras_of_formats() -> None:
    assert {item.extra for item in formats().values()} <= EXTRAS
