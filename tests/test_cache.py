"""Cache entries: made once, held while in use, dropped when nobody needs them; and the 16-bit file of GGUF variants."""

from __future__ import annotations

import multiprocessing
import threading
import time
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from quantize.build.execution import RunOptions
from quantize.events import SilentReporter
from quantize.formats import option_models
from quantize.recipe.model import load_recipe
from quantize.store.store import Store
from quantize.store.workspace import Workspace
from quantize.system.cache import Cache
from quantize.testing import write_recipe
from tests.conftest import build


def fill(folder: Path) -> None:
    (folder / "file").write_text("x")


def hold(root: Path, held: Event, release: Event) -> None:
    with Cache(root).using("kind", "key", fill):
        held.set()
        release.wait(30)


def test_an_entry_in_use_by_another_process_is_not_dropped(cache: Cache) -> None:
    context = multiprocessing.get_context("spawn")
    held, release = context.Event(), context.Event()
    user = context.Process(target=hold, args=(cache.root, held, release))
    user.start()
    assert held.wait(60)
    with cache.using("kind", "key", fill) as folder:  # users share it
        assert (folder / "file").read_text() == "x"
    assert not cache.remove_unused("kind", "key")
    assert (cache.entry("kind", "key") / "file").is_file()
    release.set()
    user.join()
    assert cache.remove_unused("kind", "key")
    assert not cache.entry("kind", "key").exists()
    assert cache.remove_unused("kind", "key"), "what is not there is gone"


def test_users_and_removers_at_once_never_lose_a_file_in_use(cache: Cache) -> None:
    missing: list[str] = []
    removed, tries = 0, 0
    stop = threading.Event()

    def use() -> None:
        while not stop.wait(0.001):  # nobody holds it for a while, or a remover on a busy core might never get it
            with cache.using("kind", "key", fill) as folder:
                if not (folder / "file").is_file():
                    missing.append("gone while in use")

    threads = [threading.Thread(target=use) for _ in range(3)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 60
    while (tries < 300 or removed < 10) and time.monotonic() < deadline:
        removed += cache.remove_unused("kind", "key")
        tries += 1
    stop.set()
    for thread in threads:
        thread.join()
    assert missing == []
    assert removed >= 10


@pytest.mark.parametrize("keep", [False, True])
def test_the_16_bit_file_goes_when_its_variants_are_built(keep: bool, tiny: Path, tmp_path: Path, cache: Cache) -> None:
    path = write_recipe(tmp_path / "tiny.yaml", tiny, [{"format": "gguf", "types": ["Q8_0", "Q4_0"]}])
    workspace = Workspace(Store(tmp_path / "store"), cache, SilentReporter())
    run = RunOptions(keep_intermediates=keep)
    outcomes = build(load_recipe(path, option_models()), workspace, run, evaluate=False)
    assert [item.state for item in outcomes] == ["built", "built"]
    assert len([*(cache.root / "gguf").glob("*/*.gguf")]) == keep
