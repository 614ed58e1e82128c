"""Disks that are full, read-only or closed to us: what is said, and that nothing is lost.

fill_disk.py fills the disk of a real build at as many points as one likes, on any recipe.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from quantize.build.disk import Needs, Room, disk_short, rooms, temporary_root
from quantize.errors import DiskFullError, StoreError, disk_errors
from quantize.system.cache import Cache
from quantize.testing import FakeBuilder, TinyModel, make_checkpoint, write_recipe
from tests.conftest import Run
from tools.small_disk import SmallDisk, small_disk, why_not

ROOT = Path(__file__).parent.parent
INT8, BOTH = [{"format": "fake"}], [{"format": "fake"}, {"format": "fake", "bits": 4}]
VARIANTS: list[dict[str, Any]] = [
    {"format": "gptq", "group_size": 64},
    {"format": "awq", "group_size": 64},
    {"format": "gguf", "type": "Q4_K_M", "imatrix": True},
    {"format": "gguf", "type": "Q8_0"},
    {"format": "bitsandbytes", "type": "int8"},
]

needs_mount = pytest.mark.skipif(bool(why_not()), reason=why_not() or "can mount")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """A file system of 64 MiB."""
    with small_disk(tmp_path / "disk", 64 << 20) as mounted:
        yield mounted


@pytest.fixture
def on_disk(disk: SmallDisk, monkeypatch: pytest.MonkeyPatch) -> SmallDisk:
    """The same, with store and cache on it."""
    monkeypatch.setenv("QUANTIZE_STORE", str(disk.folder / "artifacts"))
    monkeypatch.setenv("QUANTIZE_CACHE", str(disk.folder / "cache"))
    return disk


# --- a real build, in every format ------------------------------------------------------------------------------------


@needs_mount
def test_a_disk_that_fills_up_at_twelve_points_and_the_planned_peak(tmp_path: Path) -> None:
    """One process for all, in which the steps run: libraries are loaded once, and patch nothing here."""
    checkpoint = make_checkpoint(tmp_path / "tiny", TinyModel(hidden=512, intermediate=1536))
    text = [f"Paragraph {index}: the quick brown fox jumps over the lazy dog. " * 3 for index in range(12)]
    (tmp_path / "text.txt").write_text("\n\n".join(text))
    calibration = {"dataset": "text.txt", "samples": 8, "sequence_length": 64, "minimum_tokens": 16}
    recipe = write_recipe(tmp_path / "tiny.yaml", checkpoint, VARIANTS, calibration=calibration)
    command = [sys.executable, "-W", "ignore", "-m", "tools.fill_disk", str(recipe), "--inline", "--points", "12"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--", "--no-eval", "--threads", "1"], cwd=ROOT, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "12 of 12 points" in done.stdout
    assert float(done.stdout.partition("ratio ")[2].split()[0]) == pytest.approx(1, abs=0.02), done.stdout
    assert "digests equal: True, left: (), 0 wrong" in done.stdout


# --- before a build ---------------------------------------------------------------------------------------------------


@needs_mount
@pytest.mark.usefixtures("fake")
def test_a_build_that_would_fill_the_disk_is_refused_and_writes_nothing(
    tiny: Path, tmp_path: Path, run: Run, on_disk: SmallDisk
) -> None:
    on_disk.resize(2 << 20)
    path = write_recipe(tmp_path / "demo.yaml", tiny, BOTH)
    planned, built = run("plan", path), run("build", path, "--no-eval")
    assert (planned.exit_code, built.exit_code) == (3, 3)
    assert "missing" in planned.stdout
    assert "the disk is too small for the store and cache: 3.0 MB are needed at the peak" in built.stderr
    assert not (on_disk.folder / "artifacts").exists()
    on_disk.resize(64 << 20)
    assert run("build", path, "--no-eval").exit_code == 0


@needs_mount
def test_store_and_cache_on_two_disks_are_held_against_each(tmp_path: Path, disk: SmallDisk) -> None:
    needed = Needs(source=5, baseline=7, states=100, passed=40, before_last=30, artifacts=1 << 40, intermediates=11)
    together = rooms(needed, tmp_path / "a", tmp_path / "b", "demo", ())
    assert [(room.needed_bytes, room.what) for room in together] == [(12 + (1 << 40) + 11, "store and cache")]
    store, cache = rooms(needed, tmp_path / "a", disk.folder / "b", "demo", ())
    assert (store.needed_bytes, store.missing_bytes > 0) == (1 << 40, True)
    assert (cache.needed_bytes, cache.missing_bytes, cache.free_bytes) == (23, 0, 64 << 20)


def test_what_a_stopped_build_left_counts_as_free(tmp_path: Path) -> None:
    before = rooms(Needs(), tmp_path, tmp_path, "demo", ("int8",))[0].free_bytes
    folder = tmp_path / ".staging" / "demo--int8.work"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(os.urandom(8 << 20))
    mine = rooms(Needs(), tmp_path, tmp_path, "demo", ("int8",))[0].free_bytes
    others = rooms(Needs(), tmp_path, tmp_path, "demo", ("int4",))[0].free_bytes
    assert mine - others == pytest.approx(8 << 20, abs=1 << 20)
    assert before - others < 1 << 30


def test_the_peak_is_that_of_the_pass_where_it_is_higher() -> None:
    assert Needs(states=100, passed=40, before_last=30, artifacts=50).peak_bytes == 230
    assert Needs(states=10, passed=400, before_last=380, artifacts=405).peak_bytes == 410
    assert Needs(states=10, passed=40, before_last=30, artifacts=50, intermediates=90, source=1).peak_bytes == 141
    assert Room("store", Path(), 7, 9).missing_bytes == 0
    assert disk_short(3_000_000_000, 1_000_000_000).message.endswith("2,000,000,000 bytes are missing")


# --- in the middle ----------------------------------------------------------------------------------------------------


@needs_mount
@pytest.mark.parametrize("library", ["safetensors", "numpy", "tokenizers"])
def test_whatever_a_library_says_of_a_full_disk_is_one_error(library: str, disk: SmallDisk) -> None:
    import numpy as np
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, models

    disk.resize(0)
    vocabulary = {str(number): number for number in range(9999)}
    write: dict[str, Callable[[Path], object]] = {
        "safetensors": lambda path: save_file({"a": np.zeros(1 << 16)}, path),
        "numpy": lambda path: np.zeros(1 << 16).tofile(path),
        "tokenizers": lambda path: Tokenizer(models.BPE(vocabulary, [])).save(str(path)),
    }
    with pytest.raises(DiskFullError, match="No space left on device"), disk_errors(disk.folder):
        write[library](disk.folder / "file")


@needs_mount
def test_a_cache_entry_that_does_not_fit_is_an_error_and_leaves_nothing(disk: SmallDisk) -> None:
    cache = Cache(disk.folder / "cache")

    def fill(folder: Path) -> None:
        disk.resize(0)
        (folder / "file").write_bytes(bytes(1 << 20))

    with pytest.raises(DiskFullError, match="No space left on device"):
        cache.make("kind", "key", fill)
    assert [path for path in (cache.root / "kind").iterdir() if path.is_dir()] == []


@needs_mount
def test_what_is_remembered_of_a_file_is_not_worth_an_error(disk: SmallDisk) -> None:
    cache = Cache(disk.folder / "cache")
    disk.resize(0)
    assert cache.fact("never", lambda: 1) == 1
    disk.resize(64 << 20)
    assert cache.fact("first", lambda: 1) == 1
    disk.set_read_only(True)
    assert cache.fact("second", lambda: "x" * 100_000) == "x" * 100_000
    assert cache.sha256(Path(__file__)) == cache.sha256(Path(__file__))


# --- read-only, closed, too long, no room for temporary files ---------------------------------------------------------


@needs_mount
def test_a_read_only_store_is_read_and_not_written(
    tiny: Path, tmp_path: Path, run: Run, on_disk: SmallDisk, fake: FakeBuilder
) -> None:
    path = write_recipe(tmp_path / "demo.yaml", tiny, INT8)
    assert run("build", path, "--no-eval").exit_code == 0
    on_disk.set_read_only(True)
    assert run("build", path, "--no-eval").exit_code == 0, "it is built"
    assert run("verify", "demo/int8").exit_code == 0
    write_recipe(path, tiny, BOTH)
    result = run("build", path, "--no-eval")
    assert result.exit_code == 1
    assert "Read-only file system" in result.stderr
    assert "choose another with --store" in result.stderr
    on_disk.set_read_only(False)
    assert run("build", path, "--no-eval").exit_code == 0
    assert fake.built == ["int8", "int4"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user to whom a folder is closed")
@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("closed", ["artifacts", "cache"])
def test_a_folder_that_we_may_not_write_to(
    closed: str, tiny: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_recipe(tmp_path / "demo.yaml", tiny, INT8)
    assert run("build", path, "--no-eval").exit_code == 0, "all is imported then"
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        root.chmod(0o755)
        for name in ("artifacts", "cache"):
            (root / name).mkdir()
            (root / name).chmod(0o755 if name == closed else 0o777)
        monkeypatch.setenv("QUANTIZE_STORE", str(root / "artifacts"))
        monkeypatch.setenv("QUANTIZE_CACHE", str(root / "cache"))
        model = make_checkpoint(root / "tiny")
        (root / "text.txt").write_text("Python's own text may lie in a folder that is closed as well. " * 99)
        path = write_recipe(root / "demo.yaml", model, INT8, evaluation={"text": "./text.txt"})
        monkeypatch.chdir(root)
        os.seteuid(65534)
        try:
            result = run("build", path, "--no-eval")
        finally:
            os.seteuid(0)
        assert result.exit_code == 1, result.stderr
        assert closed in result.stderr
        assert "permission" in result.stderr or "QUANTIZE_CACHE" in result.stderr
        assert "internal error" not in result.stderr


@pytest.mark.usefixtures("fake")
def test_a_name_that_is_too_long_for_the_file_system(tiny: Path, tmp_path: Path, run: Run) -> None:
    path = write_recipe(tmp_path / "demo.yaml", tiny, INT8)
    path.write_text(path.read_text().replace("name: demo", f"name: {'n' * 252}"))
    result = run("build", path, "--no-eval")
    assert result.exit_code != 0
    assert "internal error" not in result.stderr
    assert "name" in result.stderr


@needs_mount
def test_temporary_files_go_where_there_is_room(disk: SmallDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(disk.folder))
    assert temporary_root() == Path("/dev/shm")
    monkeypatch.setattr("quantize.build.disk.MEMORY_FOLDER", disk.folder)
    with pytest.raises(DiskFullError, match="no room for temporary files") as caught:
        temporary_root()
    assert "TMPDIR" in str(caught.value.hint)


def test_a_cache_that_is_no_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cache"):
        Cache(tmp_path / "file").make("kind", "key", lambda _: None)
