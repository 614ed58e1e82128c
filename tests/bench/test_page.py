"""results.md: what it says of a run, that it is written unasked, and that it never takes another file's place."""

from __future__ import annotations

from pathlib import Path

from quantize.bench.page import TITLE, page_text
from quantize.bench.result import MemoryUse
from tests.bench.servers import FakeServer, serving
from tests.conftest import Run
from tests.pages.measured import bench


def table(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_every_figure_is_in_its_place() -> None:
    run = bench(latency=0.25, errors=3)
    device = MemoryUse(scope="device", before_load_bytes=0, after_warm_up_bytes=0, peak_bytes=3 << 30)
    run = run.model_copy(update={"vram": device, "requests_per_cell": 24})
    text = page_text(run)
    assert text.startswith(f"{TITLE}\n")
    rows = {row[0]: row[1:] for row in table(text)}
    assert rows["config"] == ["p50", "p95", "p99", "requests/s", "error rate", "RAM peak", "VRAM peak", "note"]
    note = "3 x dropped; 20 of 24 requests: 60 s were over; VRAM is of the whole GPU"
    cell = run.cells[1]
    assert rows["short (64:8) x 4"] == [
        "0.250 s", "0.250 s", "0.250 s", f"{cell.requests_per_second:.2f}", "15.0%", "400 MiB", "3,072 MiB", note,
    ]  # fmt: skip
    assert rows["server"] == ["llama_cpp.server llama-cpp-python 0.3.36"]
    assert "24 requests a row, 5 warm-up requests" in rows["load"][0]
    assert page_text(run) == text


def test_what_was_not_measured_is_said() -> None:
    run = bench().model_copy(update={"ram": None})
    lost = run.cells[0].model_copy(update={"latency": None})
    rows = {row[0]: row[1:] for row in table(page_text(run.model_copy(update={"cells": [lost]})))}
    assert rows["short (64:8) x 1"][:3] == ["-", "-", "-"]
    assert rows["short (64:8) x 1"][5:7] == ["not seen", "not seen"]


def test_names_stay_in_their_cells() -> None:
    run = bench()
    hostile = run.measured_with.model_copy(update={"model": "a | b <script>\nc"})
    assert "| model | a \\| b &lt;script> c |" in page_text(run.model_copy(update={"measured_with": hostile}))


def test_it_is_written_unasked_at_one_four_and_eight(run: Run, tmp_path: Path) -> None:
    with serving(FakeServer()) as fake:
        done = run("bench", fake.url, "--shape", "8:2", "--requests", "2", "--warm-up", "0")
    assert done.exit_code == 0, done.stderr
    assert "results are in results.md" in done.stderr
    configs = [row[0] for row in table((tmp_path / "results.md").read_text())]
    assert [text for text in configs if "8:2 (8:2)" in text] == [f"8:2 (8:2) x {n}" for n in (1, 4, 8)]


def test_another_file_of_that_name_is_left_alone(run: Run, tmp_path: Path) -> None:
    mine = tmp_path / "results.md"
    mine.write_text("# My own results\n")
    with serving(FakeServer()) as fake:
        done = run("bench", fake.url, "--shape", "8:2", "--requests", "1")
        assert (done.exit_code, fake.requests) == (2, 0)
        assert "results.md is there, and is not a page of results" in done.stderr
        quick = ("--shape", "8:2", "--requests", "1", "--concurrency", "1", "--warm-up", "0")
        assert run("bench", fake.url, *quick, "--results", tmp_path / "r.md").exit_code == 0
        assert run("bench", fake.url, *quick, "--results", tmp_path / "r.md").exit_code == 0  # its own is replaced
        assert run("bench", fake.url, *quick, "--no-results").exit_code == 0
    assert mine.read_text() == "# My own results\n"
    assert (tmp_path / "r.md").read_text().startswith(TITLE)
