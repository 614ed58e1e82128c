"""Held-out text: what it is cut into, what pins it, what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantize.calibration.datasets.python_docs import help_topics
from quantize.errors import RecipeError, RefusedError, UsageError
from quantize.evaluate.text import HeldOutText, check_disjoint, cut_windows, load_text


def encode(text: str) -> list[int]:
    return list(text.encode())


def stream(text: str) -> HeldOutText:
    return HeldOutText("file.txt", (text,), stream=True)


def test_python_docs_gives_one_window_a_topic() -> None:
    text = load_text("python-docs", Path())
    windows = cut_windows(text, encode)
    assert len(windows.token_ids) == len(text.documents) > 0
    assert all(len(ids) == 512 for ids in windows.token_ids)
    assert windows.predictions == 511 * len(windows.token_ids)


def test_python_docs_shares_nothing_with_its_calibration_part() -> None:
    windows = cut_windows(load_text("python-docs", Path()), encode)
    check_disjoint(windows, [encode(text)[:512] for text in help_topics()])


@given(st.text(min_size=40, max_size=400), st.integers(4, 40), st.lists(st.integers(300, 310), max_size=2))
def test_a_stream_is_cut_end_to_end(text: str, window: int, prefix: list[int]) -> None:
    windows = cut_windows(stream(text), encode, prefix=prefix, window=window)
    assert all(len(ids) == window and list(ids[: len(prefix)]) == prefix for ids in windows.token_ids)
    joined = [token for ids in windows.token_ids for token in ids[len(prefix) :]]
    assert joined == encode(text)[: len(joined)]
    assert len(encode(text)) - len(joined) < window


def test_rows_of_a_file_are_one_stream(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"body": "first"}\n\n{"body": "second"}\n')
    text = load_text("rows.jsonl", tmp_path, column="body")
    (window,) = cut_windows(text, encode, window=13).token_ids
    assert bytes(window) == b"first\n\nsecond"


def test_the_first_windows_can_be_taken_alone() -> None:
    assert len(cut_windows(stream("x" * 100), encode, window=10, limit=3).token_ids) == 3


def test_hashes_tell_texts_and_windows_apart() -> None:
    one, two = HeldOutText("a", ("ab", "c"), True), HeldOutText("a", ("a", "bc"), True)
    assert one.hash != two.hash
    cuts = [cut_windows(stream("x" * 100), encode, window=window).hash for window in (10, 20, 10)]
    assert cuts[0] != cuts[1]
    assert cuts[0] == cuts[2]


@pytest.mark.parametrize("content", ["", " \n\n \n"])
def test_empty_text_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(content)
    with pytest.raises(UsageError, match=r"empty\.txt: no text to measure on"):
        load_text("empty.txt", tmp_path)


def test_text_shorter_than_a_window_is_refused() -> None:
    with pytest.raises(UsageError, match="11 tokens are less than one window of 512"):
        cut_windows(stream("hello world"), encode)
    with pytest.raises(UsageError, match="5 tokens are less than one window"):
        cut_windows(HeldOutText("docs", ("short",), stream=False), encode)


def test_a_window_must_predict_something() -> None:
    with pytest.raises(UsageError, match="a window of 2 tokens predicts nothing"):
        cut_windows(stream("x" * 100), encode, prefix=[1], window=2)


def test_files_that_are_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere\.txt: no such text file"):
        load_text("nowhere.txt", tmp_path)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UsageError, match="not UTF-8"):
        load_text("latin.txt", tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(RecipeError, match="no column `body`"):
        load_text("rows.jsonl", tmp_path, column="body")


def test_text_that_was_calibrated_on_is_refused() -> None:
    text = " ".join(f"sentence number {index} says {index * 7919}." for index in range(200))
    windows = cut_windows(stream(text), encode, window=256)
    with pytest.raises(RefusedError, match=r"100% of the held-out text was calibrated on"):
        check_disjoint(windows, [encode(text)])
    with pytest.raises(RefusedError, match=r"file\.txt: \d+% of the held-out text"):
        check_disjoint(windows, [encode("Another beginning. " + text[1000:1600])])
    check_disjoint(windows, [encode(text.replace("says", "tells").replace("number", "No"))])
    check_disjoint(windows, [])
