"""The shape of the code: who may import whom, and how long a module may be."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "quantize"
MAX_LINES = 400

# Lowest first; a module imports from its own layer and from those below. A name stands for a module or a whole folder;
# the longest that fits decides. What belongs together is one layer.
LAYERS: list[set[str]] = [
    {"", "errors"},
    {"report", "untrusted", "resident", "locks", "deaths", "sizes"},
    {
        "numerics",
        "shape",
        "manifest",
        "cache",
        "worker",
        "parallel",
        "processor",
        "marked_yaml",
        "lookup",
        "containers",
        "folding",
        "architecture",
    },
    {
        "estimate",
        "hardware",
        "gpus",
        "cards",
        "recipe",
        "checkpoint",
        "staging",
        "cluster.spec",
        "cluster.schedule",
        "cluster.trace",
    },
    {"engines", "containers.shards"},
    {"fit", "source", "artifact", "memory"},
    {"attention", "block_runner", "hidden_states", "activations", "calibration", "resume"},
    {"store", "verify", "diff"},
    {"backends", "evaluate"},
    {"card", "provenance.licence"},
    {"cluster.session", "cluster.cost", "cluster.passwork", "cluster.pool", "cluster.watch", "cluster.spread"},
    {"disk", "plan", "reopen", "calibrated", "testing", "assemble", "gates"},
    {"workloads", "reevaluate", "lock", "rebuild"},
    {"build"},
    {"cluster"},
    {"provenance"},
    {"publish"},
    {"bench", "serve", "pages", "doctor", "trials", "api"},
    {"cli", "__main__"},
]


# Modules that import one another, by what is imported late or for types only. Nothing is added here.
CIRCLES = {
    ("disk", "plan"),  # disk's arithmetic is over plan's Job, as a type: Job wants a module below both
    # The door to the two runtimes is in the module that both take their protocol from.
    ("evaluate.runtime_llama_cpp", "evaluate.runtime_transformers", "evaluate.runtimes"),
}


def module_name(path: Path) -> str:
    """Dotted name inside the package; "" for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def layer(module: str) -> int:
    """Index of the layer that a module is in."""
    names = {name: index for index, layer_names in enumerate(LAYERS) for name in layer_names}
    fitting = [name for name in names if module == name or (name and module.startswith(name + "."))]
    assert fitting, f"{module} is in no layer: give it a place in tests/test_structure.py"
    return names[max(fitting, key=len)]


def imported(path: Path) -> set[str]:
    """Modules of the package that a file imports when it is imported; not what it imports for types, or later."""
    found: set[str] = set()

    def visit(nodes: list[ast.stmt]) -> None:
        for node in nodes:
            if isinstance(node, ast.If):
                visit([] if "TYPE_CHECKING" in ast.unparse(node.test) else node.body)
                visit(node.orelse)
            elif isinstance(node, ast.Try):
                visit(node.body)
            elif isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                found.update(
                    f"{base}.{alias.name}" if f"{base}.{alias.name}".removeprefix("quantize.") in MODULES else base
                    for alias in node.names
                )

    visit(ast.parse(path.read_text(encoding="utf-8")).body)
    return {name.removeprefix("quantize").removeprefix(".") for name in found if name.partition(".")[0] == "quantize"}


def later_imports(path: Path) -> set[str]:
    """Modules of the package that a file imports anywhere, in functions and for types too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner.removeprefix("quantize.") in MODULES else node.module)
    return {name.removeprefix("quantize").removeprefix(".") for name in found if name.partition(".")[0] == "quantize"}


def circles(graph: dict[str, set[str]]) -> list[tuple[str, ...]]:
    """The groups of modules that import one another, each sorted: Tarjan's strongly connected components."""
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    open_: list[str] = []
    found: list[tuple[str, ...]] = []

    def visit(name: str) -> None:
        number[name] = low[name] = len(number)
        open_.append(name)
        for other in sorted(graph.get(name, ())):
            if other not in number:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in open_:
                low[name] = min(low[name], number[other])
        if low[name] == number[name]:
            group = open_[open_.index(name) :]
            del open_[open_.index(name) :]
            if len(group) > 1:
                found.append(tuple(sorted(group)))

    for name in sorted(graph):
        if name not in number:
            visit(name)
    return sorted(found)


@pytest.mark.parametrize("module", [name for name in MODULES if name])
def test_imports_go_down(module: str) -> None:
    own = layer(module)
    up = {name for name in imported(MODULES[module]) if layer(name) > own}
    assert up == set(), f"{module} may not import what is above it"


@pytest.mark.parametrize("module", [name for name in MODULES if name])
def test_late_imports_go_down_too(module: str) -> None:
    """An import inside a function saves time; it is no way round the order."""
    own = layer(module)
    up = {name for name in later_imports(MODULES[module]) if layer(name) > own}
    assert up == set(), f"{module} may not import what is above it"


def test_nothing_imports_in_a_circle() -> None:
    """Not even inside a layer."""
    assert circles({name: imported(path) - {name} for name, path in MODULES.items()}) == []


def test_late_and_type_imports_close_no_circle_but_those_that_are_known() -> None:
    """CIRCLES may only get shorter."""
    assert circles({name: later_imports(path) - {name} for name, path in MODULES.items()}) == sorted(CIRCLES)


def test_circles_are_found() -> None:
    graph = {"a": {"b"}, "b": {"c", "d"}, "c": {"a"}, "d": {"e"}, "e": {"d"}, "f": {"a", "g"}, "g": set()}
    assert circles(graph) == [("a", "b", "c"), ("d", "e")]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize("module", list(MODULES))
def test_no_module_is_too_long(module: str) -> None:
    assert len(MODULES[module].read_text(encoding="utf-8").splitlines()) <= MAX_LINES


@pytest.mark.parametrize("module", list(MODULES))
def test_every_module_says_what_it_is_for(module: str) -> None:
    text = MODULES[module].read_text(encoding="utf-8")
    assert not text.strip() or ast.get_docstring(ast.parse(text)), "open with what comes in and what goes out"


def test_the_layers_name_nothing_that_is_not_there() -> None:
    names = {name for names in LAYERS for name in names if name}
    folders = {name.rpartition(".")[0] for name in MODULES}
    assert {name for name in names if name not in MODULES and name not in folders} == set()
