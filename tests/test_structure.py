"""The shape of the code: a folder is a layer, imports go down, nothing goes in a circle, no module is long."""

from __future__ import annotations

import ast
import re
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "quantize"
MAX_LINES = 400
MAX_TOP_MODULES = 8
# From the ground up: folders, and the modules at the top. Each imports from itself and from those before it, whether
# at the top of a module, in a function, for types, or by a name in a string. CONTRIBUTING shows the same list.
ORDER = (
    "errors",
    "events",
    "system",
    "files",
    "numerics",
    "recipe",
    "model",
    "store",
    "runtimes",
    "estimate",
    "calibration",
    "formats",
    "targets",
    "evaluate",
    "bench",
    "charts",
    "provenance",
    "build",
    "publish",
    "cluster",
    "report",
    "serve",
    "api",
    "testing",
    "cli",
    "__main__",
)
NAMED = re.compile(r"quantize((?:\.\w+)+)(?::\w+)?\.?")


def module_name(path: Path) -> str:
    """Dotted name inside the package; "" for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


TEXTS = {module_name(path): path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}


def owner(dotted: str, modules: frozenset[str]) -> str:
    """The module that a dotted name is, or is in; "" for the package itself."""
    parts = dotted.split(".")
    ends = range(len(parts), 0, -1)
    return next((".".join(parts[:end]) for end in ends if ".".join(parts[:end]) in modules), "")


@cache
def imported(text: str, modules: frozenset[str], *, named: bool) -> frozenset[str]:
    """Modules of the package that a text imports anywhere. named: or has in a string, as importlib reads it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute, so that they can be searched for"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif named and isinstance(node, ast.Constant) and isinstance(node.value, str) and NAMED.fullmatch(node.value):
            found.add(node.value.partition(":")[0].removesuffix("."))
    ours = {name.removeprefix("quantize.") for name in found if name.startswith("quantize.")}
    return frozenset(owner(name, modules) for name in ours) - {""}


def graph(texts: dict[str, str], *, named: bool) -> dict[str, set[str]]:
    """Module -> the other modules that it imports."""
    modules = frozenset(texts)
    return {name: set(imported(text, modules, named=named)) - {name} for name, text in texts.items()}


def layer(module: str) -> str:
    """The folder at the top, or the module at the top."""
    return module.partition(".")[0]


def going_up(texts: dict[str, str]) -> list[str]:
    """Imports of what does not come before, and layers without a place."""
    place = {name: index for index, name in enumerate(ORDER)}
    homeless = {layer(name) for name in texts if name} - set(place)
    if homeless:
        return [f"{name} has no place in ORDER" for name in sorted(homeless)]
    return [
        f"{name} imports {other}"
        for name, others in sorted(graph(texts, named=True).items())
        for other in sorted(others)
        if name and place[layer(other)] > place[layer(name)]
    ]


def circles(texts: dict[str, str]) -> list[str]:
    """The first circle of modules that import one another. A circle of layers would be an import that goes up.

    A class that is named in a string is chosen at run time, among several: that is held to the order, and closes none.
    """
    try:
        TopologicalSorter(graph(texts, named=False)).prepare()
    except CycleError as exc:
        return [" <- ".join(exc.args[1])]
    return []


def top_modules(texts: dict[str, str]) -> list[str]:
    """Modules at the top of the package, the package itself among them."""
    folders = {name.rpartition(".")[0] for name in texts if "." in name}
    return [name for name in texts if "." not in name and name not in folders - {""}]


def test_imports_go_down() -> None:
    assert going_up(TEXTS) == []


def test_nothing_imports_in_a_circle() -> None:
    assert circles(TEXTS) == []


def test_few_modules_are_at_the_top() -> None:
    assert len(top_modules(TEXTS)) <= MAX_TOP_MODULES, "a folder is a layer: give the new one a place in a folder"


def test_the_order_names_nothing_that_is_not_there() -> None:
    assert set(ORDER) == {layer(name) for name in TEXTS if name}
    assert len(set(ORDER)) == len(ORDER)


def test_contributing_shows_the_order() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    block = text.partition("from the ground up")[2].partition("```")[2].partition("```")[0]
    shown = [line.split()[0] for line in block.splitlines()[1:] if line.strip()]
    assert shown == list(ORDER)


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("files.gguf", "from quantize.formats.base import Builder"),
        ("files.gguf", "import quantize.store.store"),
        ("files.gguf", "from quantize import serve"),
        ("numerics.gram", "def late():\n    from quantize.model.shape import ModelShape"),
        ("numerics.gram", "if TYPE_CHECKING:\n    from quantize.model.shape import ModelShape"),
        ("system.cache", "importlib.import_module('quantize.recipe.model')"),
        ("system.cache", "ENGINE = 'quantize.serve.engines.fake:FakeModel'"),
    ],
)
def test_an_import_that_goes_up_is_seen(module: str, line: str) -> None:
    planted = going_up({**TEXTS, module: f"{TEXTS[module]}\n{line}\n"})
    assert len(planted) == 1
    assert planted[0].startswith(f"{module} imports ")


def test_a_circle_inside_a_folder_is_seen() -> None:
    texts = {**TEXTS, "store.manifest": f"{TEXTS['store.manifest']}\ndef late():\n    import quantize.store.store\n"}
    assert going_up(texts) == []
    assert "store.manifest" in circles(texts)[0]


def test_a_module_without_a_place_is_seen() -> None:
    assert going_up({**TEXTS, "helpers": ""}) == ["helpers has no place in ORDER"]
    more = {**TEXTS, **{f"helpers{number}": "" for number in range(MAX_TOP_MODULES)}}
    assert len(top_modules(more)) == len(top_modules(TEXTS)) + MAX_TOP_MODULES


@pytest.mark.parametrize("module", list(TEXTS))
def test_no_module_is_too_long(module: str) -> None:
    assert len(TEXTS[module].splitlines()) <= MAX_LINES


@pytest.mark.parametrize("module", list(TEXTS))
def test_every_module_says_what_it_is_for(module: str) -> None:
    text = TEXTS[module]
    assert not text.strip() or ast.get_docstring(ast.parse(text)), "open with what comes in and what goes out"


# --- one word a thing; a format is a folder ---------------------------------------------------------------------------

FORMATS = frozenset({"gguf", "awq", "gptq", "bitsandbytes"})
# Where a word that is also a format's is something else: the name of a distribution, or of an extra.
OTHER_WORDS = {
    "errors": "the extra whose llama.cpp is compiled",
    "files.gguf": "the distribution that knows GGUF's types",
    "system.deaths": "distributions, and where to report what they did",
}


def doubled_classes(texts: dict[str, str]) -> dict[str, list[str]]:
    """Class name -> the modules that define it, where there are several."""
    places: dict[str, list[str]] = {}
    for name, text in texts.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(name)
    return {name: found for name, found in places.items() if len(found) > 1}


def format_literals(texts: dict[str, str]) -> list[str]:
    """Places outside formats/ where a string is the name of a format."""
    return [
        f"{name}:{node.lineno} {node.value}"
        for name, text in texts.items()
        if name.partition(".")[0] != "formats" and name not in OTHER_WORDS
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in FORMATS
    ]


def test_no_class_name_stands_for_two() -> None:
    assert doubled_classes(TEXTS) == {}


def test_a_doubled_class_is_found() -> None:
    planted = TEXTS | {"serve.limits": TEXTS["serve.limits"] + "\n\nclass Store:\n    pass\n"}
    assert doubled_classes(planted) == {"Store": ["serve.limits", "store.store"]}


def test_no_format_is_named_outside_its_folder() -> None:
    assert format_literals(TEXTS) == []


def test_a_named_format_is_found() -> None:
    planted = TEXTS | {"publish.pack": TEXTS["publish.pack"] + '\nKNOWN = ("safetensors", "gguf")\n'}
    assert [item.rpartition(" ")[2] for item in format_literals(planted)] == ["gguf"]


def test_words_that_are_allowed_are_used() -> None:
    used = {name for name in OTHER_WORDS if format_literals({f"x.{name}": TEXTS[name]})}
    assert used == set(OTHER_WORDS)


# --- how a digest is written stands in one room -----------------------------------------------------------------------

DIGEST_HOME = "system.digest"
NO_DIGESTS = {"serve.limits": "lines of API keys, `name:sha256:hash`"}


def digest_literals(texts: dict[str, str]) -> list[str]:
    """Places outside its module where a string of code, not of documentation, writes a digest's prefix."""
    found = []
    for name, text in texts.items():
        if name == DIGEST_HOME or name in NO_DIGESTS:
            continue
        tree = ast.parse(text)
        told = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        found += [
            f"{name}:{node.lineno}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in told
            if "sha256:" in node.value
        ]
    return found


def test_the_text_of_a_digest_is_written_in_one_room() -> None:
    assert digest_literals(TEXTS) == []


def test_a_digest_that_is_written_by_hand_is_found() -> None:
    for line in ('NAME = text.removeprefix("sha256:")[:12]', 'NAME = f"sha256:{text}"'):
        assert len(digest_literals(TEXTS | {"publish.pack": f"{TEXTS['publish.pack']}\n{line}\n"})) == 1
