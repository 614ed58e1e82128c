"""Every command's tables on a terminal of 80 columns: nothing wider, no figure cut, what is left out is said."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import quantize.cli.eval
import quantize.cli.table as module
from quantize.build.settle import Settled
from quantize.cli.table import GAP, Column, fitted, print_table, wrap
from quantize.evaluate.record import read_record
from quantize.store.artifact import commit
from quantize.store.store import Store
from quantize.testing import write_recipe
from tests.bench.servers import FakeServer, serving
from tests.conftest import Built, Run
from tests.pages.measured import bench, evaluation, keep

WIDTH = 80
LONG_NAME = "a-model-with-a-long-name-1.7b-instruct"
LONG_VARIANT = "q4_k_m-imatrix-with-a-name-that-somebody-gave-it"


@pytest.fixture
def store(built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Measured artifacts, one of them with names as long as people make them."""
    found = built.copy(tmp_path / "artifacts")
    for number, name in enumerate(("q8_0", "q4_k_m", "f16")):
        artifact = found.find(f"tiny/{name}")
        keep(found, artifact, found=evaluation(kl=0.0123 * (number + 1)), load=bench())
    source = built.copy(tmp_path / "more").find("tiny/q4_0")
    manifest = source.manifest.model_copy(update={"name": LONG_NAME, "variant": LONG_VARIANT}).sealed()
    keep(found, commit(found.root, source.folder, manifest), found=evaluation(), load=bench())
    monkeypatch.setenv("QUANTIZE_STORE", str(found.root))
    monkeypatch.setattr("quantize.system.machine.nvidia_gpus", lambda: ())
    monkeypatch.chdir(tmp_path)
    return found


class Recorder:
    """The tables that a command prints on a terminal of WIDTH columns, as they were asked for and as they came out."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tables: list[tuple[Sequence[Column], Sequence[Sequence[str]], list[int], list[int]]] = []
        plain = module.fitted

        def record(
            columns: Sequence[Column], rows: Sequence[Sequence[str]], room: int | None
        ) -> tuple[list[int], list[int]]:  # fmt: skip
            chosen, widths = plain(columns, rows, room)
            self.tables.append((columns, rows, chosen, widths))
            return chosen, widths

        monkeypatch.setattr(module, "fitted", record)
        monkeypatch.setattr(module, "terminal_columns", lambda: WIDTH)

    def check(self, stdout: str, count: int) -> None:
        assert len(self.tables) >= count
        for columns, rows, chosen, widths in self.tables:
            titles = [column.title for column in columns]
            assert sum(widths) + GAP * (len(widths) - 1) <= WIDTH, titles
            lines = stdout.splitlines()
            for index, width in zip(chosen, widths, strict=True):
                for text in (titles[index], *(row[index] for row in rows)):
                    if columns[index].may_wrap:
                        pieces = [piece.strip() for piece in wrap(text, width)]
                    else:
                        pieces = [text]
                        assert len(text) <= width, (titles[index], text)
                    assert all(any(piece in line for line in lines) for piece in pieces), (titles[index], text)
                    figures = re.findall(r"\d[\d,.]*\d", text)
                    kept = " ".join(wrap(text, width))
                    assert [item for item in figures if len(item) <= module.LEAST and item not in kept] == []
            left_out = [title for index, title in enumerate(titles) if index not in chosen]
            assert not left_out or f"not shown: {', '.join(left_out)} (--wide)" in stdout
        assert "…" not in stdout


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return Recorder(monkeypatch)


@pytest.mark.parametrize(
    ("words", "count"),
    [
        (("list", "artifacts"), 1),
        (("list", "artifacts", "--all"), 1),
        (("list", "recipes"), 1),
        (("list", "formats"), 1),
        (("show", f"{LONG_NAME}/{LONG_VARIANT}"), 4),
        (("show", "tiny/q8_0"), 4),
        (("diff", "tiny/q8_0", "tiny/q4_k_m"), 1),
        (("diff", "tiny/q8_0", f"{LONG_NAME}/{LONG_VARIANT}"), 1),
        (("estimate", "tiny/q8_0", "--vram", "8GiB"), 1),
        (("doctor", "--quick"), 2),
        (("report", "tiny"), 1),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, tuple) else "",
)
def test_at_80_columns(words: tuple[str, ...], count: int, store: Store, narrow: Recorder, run: Run) -> None:
    result = run(*words)
    assert result.exit_code == 0, result.stderr
    narrow.check(result.stdout, count)


def test_plan_and_build_at_80_columns(
    store: Store, narrow: Recorder, built: Built, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANTIZE_CACHE", str(built.cache.root))
    source = Path(str(built.recipe.source.model))
    variants = [{"format": "gguf", "type": "Q8_0"}, {"format": "gguf", "type": "Q4_K_M", "name": LONG_VARIANT}]
    recipe = write_recipe(tmp_path / "tiny.yaml", source, variants)
    result = run("plan", recipe)
    assert result.exit_code == 0, result.stderr
    narrow.check(result.stdout, 1)
    narrow.tables.clear()
    result = run("build", recipe, "--only", "q8_0", "--no-eval")
    assert result.exit_code == 0, result.stderr
    narrow.check(result.stdout, 1)


def test_bench_at_80_columns(store: Store, narrow: Recorder, run: Run) -> None:
    with serving(FakeServer(lambda number: "drop" if number % 3 == 0 else "ok")) as fake:
        options = ("--requests", "6", "--concurrency", "1,4", "--warm-up", "0", "--shape", "40:6")
        result = run("bench", fake.url, *options)
    assert result.exit_code == 0, result.stderr
    narrow.check(result.stdout, 2)


def test_gc_at_80_columns(store: Store, narrow: Recorder, run: Run) -> None:
    (store.root / "tiny" / "q8_0" / ("0" * 12)).mkdir()
    result = run("gc")
    assert result.exit_code == 0, result.stderr
    narrow.check(result.stdout, 1)


def test_eval_at_80_columns(store: Store, narrow: Recorder, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table, of figures that are there; measuring takes minutes and is tested elsewhere."""

    def known(target: object, *_: object) -> Settled:
        artifact = target.artifact  # type: ignore[attr-defined]
        record = read_record(artifact.measurements())
        return Settled(artifact, record)

    monkeypatch.setattr(quantize.cli.eval, "reevaluate", known)
    result = run("eval", "tiny/q8_0", f"{LONG_NAME}/{LONG_VARIANT}")
    assert result.exit_code == 0, result.stderr
    narrow.check(result.stdout, 1)


def on_a_terminal(*words: str) -> list[str]:
    """What a real terminal of WIDTH columns gets."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, WIDTH, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    command = [sys.executable, "-m", "quantize", *words]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=subprocess.DEVNULL, env=environment)
    os.close(theirs)
    text = b""
    with contextlib.suppress(OSError):  # the end of a terminal
        while data := os.read(ours, 1 << 16):
            text += data
    os.close(ours)
    assert process.wait(60) == 0
    return text.decode().splitlines()


def test_a_real_terminal_and_wide(store: Store) -> None:
    """shutil asks the terminal; --wide, a pipe and a file have everything, on lines as long as they are."""
    at_80 = on_a_terminal("list", "artifacts")
    (place,) = [number for number, line in enumerate(at_80) if line.startswith("not shown: ")]
    assert at_80[place] == "not shown: FORMAT, BITS/WEIGHT, VRAM 4K, DIGEST, BUILT (--wide)"
    assert max(map(len, at_80[:place])) <= WIDTH
    wide = "\n".join(on_a_terminal("list", "artifacts", "--wide"))
    assert "not shown: " not in wide
    assert f"{LONG_NAME}   {LONG_VARIANT}" in wide


TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc", "Zl", "Zp"]), max_size=40)


@given(
    st.lists(
        st.tuples(st.sampled_from(["left", "right"]), st.integers(0, 5), st.lists(TEXTS, min_size=2, max_size=2)),
        min_size=1, max_size=9,
    ),
    st.integers(20, 120),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_whatever_is_in_it_no_figure_is_cut_and_it_fits_where_it_can(
    found: list[tuple[str, int, list[str]]], room: int
) -> None:
    columns = [Column(f"T{index}", side, rank) for index, (side, rank, _) in enumerate(found)]  # type: ignore[arg-type]
    rows = [[cells[number] for _, _, cells in found] for number in range(2)]
    chosen, widths = fitted(columns, rows, room)
    assert chosen
    total = sum(widths) + GAP * (len(widths) - 1)
    if total > room:
        gone = all(columns[index].rank == 0 for index in chosen) or len(chosen) == 1
        assert gone, "all that may go has gone"
    for index, width in zip(chosen, widths, strict=True):
        for row in rows:
            lines = wrap(row[index], width)
            if not columns[index].may_wrap:
                assert module._width(row[index]) <= width
            else:
                assert all(module._width(line) <= max(width, 2) for line in lines)
            assert "".join("".join(lines).split()) == "".join(row[index].split())


def test_cells_are_text(capsys: pytest.CaptureFixture[str]) -> None:
    """Brackets are not markup, wide characters count as two, and a table of no rows is a sentence."""
    print_table([Column("A"), Column("B", "right")], [["[bold]x[/]", "1"], ["日本", "22"]], empty="none")
    assert capsys.readouterr().out.splitlines()[1:5] == [
        "A             B", "───────────────", "[bold]x[/]    1", "日本         22",
    ]  # fmt: skip
    print_table([Column("A")], [], empty="none")
    assert capsys.readouterr().out == "none\n"


def test_there_is_one_renderer() -> None:
    root = Path(module.__file__).parents[1]
    assert [path.name for path in root.rglob("*.py") if "rich.table" in path.read_text(encoding="utf-8")] == []
