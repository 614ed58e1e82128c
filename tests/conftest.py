"""What all tests share: a tiny checkpoint, one build of it, a command runner, and a store and cache of their own."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click.testing
import pytest

from quantize.build.execute import execute
from quantize.build.execution import RunOptions
from quantize.build.outcome import Outcome
from quantize.build.plan import make_plan
from quantize.cli import main
from quantize.events import ListReporter, SilentReporter
from quantize.formats import option_models
from quantize.recipe.model import Recipe, load_recipe
from quantize.store.store import Store
from quantize.store.workspace import Workspace
from quantize.system.cache import Cache
from quantize.system.processor import settle_products
from quantize.testing import FakeBuilder, installed_formats, make_checkpoint, plain_format, write_recipe
from tests.browser import browser as browser

if "PYTEST_XDIST_WORKER" in os.environ:  # threads of several workers that wait for each other by spinning slow all down
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw")) % len(cores)]})
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as behind a shell's &: processes started here would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
settle_products()  # as in a worker: some tests multiply in this process
os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub client is first imported: no test may fetch anything

BUILT_TYPES = ("Q4_K_M", "Q8_0", "F16", "Q5_K_S", "IQ4_XS", "Q4_0")


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test may see, or write into, the store and cache of whoever runs it."""
    monkeypatch.setenv("QUANTIZE_STORE", str(tmp_path / "artifacts"))
    monkeypatch.setenv("QUANTIZE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny FP16 checkpoint; not to be changed."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture
def own_tiny(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may damage."""
    return Path(shutil.copytree(tiny, tmp_path / "model"))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """The test's own store."""
    return Store(tmp_path / "artifacts")


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    """The test's own cache."""
    return Cache(tmp_path / "cache")


@pytest.fixture
def workspace(store: Store, cache: Cache) -> Workspace:
    """Both, and a reporter that says nothing."""
    return Workspace(store, cache, SilentReporter())


@pytest.fixture
def fake() -> Iterator[FakeBuilder]:
    """The fake format, installed as the only one."""
    builder = FakeBuilder()
    with installed_formats(plain_format(builder)):
        yield builder


def build(recipe: Recipe, workspace: Workspace, run: RunOptions | None = None, **choice: Any) -> list[Outcome]:
    """Plan a recipe and execute the plan. choice: only, force, evaluate."""
    return execute(make_plan(recipe, workspace, **choice), workspace, run)


class Built:
    """GGUF builds of the tiny checkpoint, made once; `copy` gives a test a store of its own to spoil."""

    def __init__(self, root: Path, recipe: Recipe, outcomes: list[Outcome]) -> None:
        self.root, self.recipe, self.outcomes = root, recipe, outcomes
        self.store, self.cache = Store(root / "artifacts"), Cache(root / "cache")

    def copy(self, to: Path) -> Store:
        """The store, copied to a folder that a test may change."""
        return Store(Path(shutil.copytree(self.store.root, to, symlinks=True)))


@pytest.fixture(scope="session")
def built(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Built]:
    """The tiny checkpoint in several GGUF types, built by the Python interface; its 16-bit file stays in the cache."""
    root = tmp_path_factory.mktemp("built")
    path = write_recipe(root / "tiny.yaml", tiny, [{"format": "gguf", "types": list(BUILT_TYPES)}])
    recipe = load_recipe(path, option_models())
    workspace = Workspace(Store(root / "artifacts"), Cache(root / "cache"), ListReporter())
    outcomes = build(recipe, workspace, RunOptions(keep_intermediates=True), evaluate=False)
    assert [item.error for item in outcomes if item.error] == []
    made = Built(root, recipe, outcomes)
    (entry,) = [path for path in (made.cache.root / "gguf").iterdir() if path.is_dir()]
    with made.cache.using("gguf", entry.name, lambda _: None):
        yield made


Run = Callable[..., click.testing.Result]


@pytest.fixture
def run() -> Run:
    """Call the command line in this process: run("build", path) -> exit_code, stdout, stderr."""

    def call(*args: object) -> click.testing.Result:
        return click.testing.CliRunner().invoke(main, [str(arg) for arg in args], prog_name="quantize")

    return call
