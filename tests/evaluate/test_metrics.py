"""Perplexity and KL divergence on models small enough to compute by hand; the baseline on disk."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantize.errors import VerifyError
from quantize.evaluate.baseline import KIND, Baseline, baseline_key, find, load, record, save
from quantize.evaluate.measure import convert_and_record, measure, perplexity
from quantize.evaluate.text import HeldOutText, Windows, joined
from quantize.events import SilentReporter
from quantize.runtimes.base import OneWindowAtATime, Prompted, log_softmax
from quantize.system.cache import Cache

QUIET = SilentReporter()


class TableRuntime(OneWindowAtATime):
    """A model whose next-token distribution depends on the last token alone."""

    name, version = "table", "1"

    def __init__(self, logits: Any, rows: int = 3) -> None:
        self.table = np.asarray(logits, dtype=np.float32)
        self.vocabulary = self.table.shape[1]
        self.rows = rows

    def log_probs(self, window: Sequence[int]) -> Iterator[Any]:
        for start in range(0, len(window) - 1, self.rows):
            yield log_softmax(self.table[list(window[start : min(start + self.rows, len(window) - 1)])], "table")

    def answer(self, requests: Sequence[Prompted]) -> list[list[int]]:
        return [[] for _ in requests]

    def close(self) -> None:
        pass


def windows_of(*rows: Sequence[int]) -> Windows:
    return Windows.of_one_kind(rows, max(map(len, rows)), HeldOutText("text", (), stream=True))


def random_model(seed: int, vocabulary: int, scale: float = 2.0) -> TableRuntime:
    return TableRuntime(np.random.default_rng(seed).standard_normal((vocabulary, vocabulary)) * scale)


def random_windows(seed: int, vocabulary: int) -> Windows:
    return windows_of(*np.random.default_rng(seed).integers(0, vocabulary, (4, 9)).tolist())


def exact_kl(source: TableRuntime, artifact: TableRuntime, windows: Windows) -> float:
    values = []
    for ids in windows.token_ids:
        for token in ids[:-1]:
            p, q = (np.exp(m.table[token].astype(np.float64)) for m in (source, artifact))
            p, q = p / p.sum(), q / q.sum()
            values.append(float((p * np.log(p / q)).sum()))
    return float(np.mean(values))


def test_perplexity_by_hand() -> None:
    fair_coin = TableRuntime([[0.0, 0.0], [0.0, 0.0]])
    windows = windows_of([0, 1, 0, 1, 1])
    baseline = record(fair_coin, windows, QUIET)
    quality = measure(TableRuntime(np.log([[0.25, 0.75], [0.25, 0.75]])), windows, baseline, QUIET)
    assert quality.source_perplexity == pytest.approx(2)
    assert quality.perplexity == pytest.approx((0.75**-3 * 0.25**-1) ** 0.25)
    assert quality.mean_kl == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert quality.kl_is_exact
    assert quality.predictions == 4


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(2, 40))
def test_kl_is_the_sum_over_the_vocabulary(one: int, other: int, vocabulary: int) -> None:
    source, artifact = random_model(one, vocabulary), random_model(other, vocabulary)
    windows = random_windows(one, vocabulary)
    quality = measure(artifact, windows, record(source, windows, QUIET), QUIET)
    assert quality.mean_kl == pytest.approx(exact_kl(source, artifact, windows), rel=1e-4, abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(1, 20))
def test_a_few_likeliest_tokens_give_a_lower_bound_near_the_truth(one: int, other: int, keep: int) -> None:
    source, artifact, windows = random_model(one, 60), random_model(other, 60), random_windows(one, 60)
    bounds = [measure(artifact, windows, record(source, windows, QUIET, keep=k), QUIET) for k in (keep, 59)]
    truth = exact_kl(source, artifact, windows)
    assert 0 <= bounds[0].mean_kl <= truth + 1e-5
    assert bounds[1].mean_kl == pytest.approx(truth, rel=0.02)
    assert not bounds[0].kl_is_exact


@pytest.mark.parametrize("keep", [1, 8, 50])
def test_a_model_does_not_diverge_from_itself(keep: int, tmp_path: Path) -> None:
    model, windows = random_model(7, 50), random_windows(7, 50)
    save(record(model, windows, QUIET, keep=keep), tmp_path)
    quality = measure(model, windows, load(tmp_path), QUIET)
    assert (quality.mean_kl, quality.max_kl, quality.perplexity_ratio, quality.top_token_agreement) == (0, 0, 1, 1)


def test_blocks_do_not_matter() -> None:
    model, windows = random_model(3, 20), random_windows(3, 20)
    whole = record(TableRuntime(model.table, rows=100), windows, QUIET)
    pieces = record(TableRuntime(model.table, rows=1), windows, QUIET)
    assert np.array_equal(whole.tokens, pieces.tokens)
    assert np.allclose(whole.target_log_probs, pieces.target_log_probs)


def test_a_baseline_survives_the_disk(tmp_path: Path) -> None:
    model, windows = random_model(1, 30), random_windows(1, 30)
    made = record(model, windows, QUIET, keep=5)
    save(made, tmp_path)
    found = load(tmp_path)
    for item in dataclasses.fields(Baseline):
        if item.name == "distribution":
            assert np.array_equal(made.distribution.chosen, found.distribution.chosen)
            assert np.array_equal(made.distribution.others, found.distribution.others)
        else:
            assert np.array_equal(getattr(made, item.name), getattr(found, item.name))


def test_a_damaged_baseline_is_dropped(tmp_path: Path) -> None:
    cache, model, windows = Cache(tmp_path), random_model(1, 30), random_windows(1, 30)
    made = record(model, windows, QUIET)
    folder = cache.make(KIND, "key", lambda scratch: save(made, scratch))
    assert find(cache, "key") is not None
    (folder / "baseline.npz").write_bytes(b"PK damaged")
    assert find(cache, "key") is None
    assert not folder.exists()
    assert find(cache, "another") is None


def test_the_key_follows_source_text_and_tools() -> None:
    one, two = random_windows(1, 30), random_windows(2, 30)
    keys = {
        baseline_key("a", one, {"torch": "1"}),
        baseline_key("b", one, {"torch": "1"}),
        baseline_key("a", two, {"torch": "1"}),
        baseline_key("a", one, {"torch": "2"}),
    }
    assert len(keys) == 4


def test_a_padded_vocabulary_is_compared_over_the_source_s() -> None:
    model, windows = random_model(5, 20), random_windows(5, 20)
    padded = TableRuntime(np.pad(model.table, ((0, 0), (0, 12)), constant_values=-1e4))
    quality = measure(padded, windows, record(model, windows, QUIET), QUIET)
    assert quality.mean_kl == pytest.approx(0, abs=1e-6)


def test_another_vocabulary_is_refused() -> None:
    windows = random_windows(5, 20)
    baseline = record(random_model(5, 200), windows, QUIET)
    with pytest.raises(VerifyError, match="knows 20 tokens and its source 200") as caught:
        measure(random_model(5, 20), windows, baseline, QUIET)
    assert "another model" in str(caught.value)


def test_another_text_than_the_baseline_s_is_refused() -> None:
    model = random_model(5, 20)
    baseline = record(model, random_windows(5, 20), QUIET)
    with pytest.raises(VerifyError, match="other text"):
        measure(model, random_windows(6, 20), baseline, QUIET)


def test_logits_that_are_not_finite_are_refused() -> None:
    windows = windows_of([0, 1, 0])
    for bad in (np.nan, np.inf):
        with pytest.raises(VerifyError, match="not finite"):
            record(TableRuntime([[0.0, bad], [0.0, 0.0]]), windows, QUIET)


def test_a_token_that_can_not_come_is_allowed() -> None:
    windows, never = windows_of([0, 0, 0]), TableRuntime([[0.0, -np.inf]])
    assert measure(never, windows, record(never, windows, QUIET), QUIET).mean_kl == 0
    quality = measure(never, windows, record(TableRuntime([[0.0, -5.0]]), windows, QUIET), QUIET)
    assert quality.mean_kl == quality.p99_kl == math.inf


def test_hopeless_perplexity_is_infinite() -> None:
    assert perplexity(np.array([-1e4], np.float32)) == math.inf


# --- kinds of text ----------------------------------------------------------------------------------------------------


def kinds_of(windows: Windows, *kinds: str) -> Windows:
    return dataclasses.replace(windows, kinds=kinds)


def test_kinds_are_measured_apart() -> None:
    source, artifact, windows = random_model(1, 20), random_model(2, 20), random_windows(5, 20)
    both = kinds_of(windows, "prose", "prose", "code", "code")
    quality = measure(artifact, both, record(source, both, QUIET), QUIET)
    assert [item.kind for item in quality.kinds] == ["prose", "code"]
    for item, rows in zip(quality.kinds, (slice(0, 2), slice(2, 4)), strict=True):
        alone = windows_of(*windows.token_ids[rows])
        assert item.mean_kl == pytest.approx(exact_kl(source, artifact, alone), rel=1e-4)
        assert (item.predictions, item.windows) == (16, 2)
    assert quality.mean_kl == pytest.approx(np.mean([item.mean_kl for item in quality.kinds]), rel=1e-6)


def test_one_kind_is_not_told_apart() -> None:
    model, windows = random_model(1, 20), random_windows(5, 20)
    assert measure(model, windows, record(model, windows, QUIET), QUIET).kinds == ()


@pytest.mark.parametrize("rows", [1, 2, 3, 100])
def test_what_is_given_is_not_predicted(rows: int) -> None:
    """Only the answer counts: as much as the whole less the question."""
    source, artifact = random_model(1, 20), TableRuntime(random_model(2, 20).table, rows)
    windows = windows_of([3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8])
    answers = dataclasses.replace(windows, starts=(5, 4))
    quality = measure(artifact, answers, record(source, answers, QUIET), QUIET)
    assert quality.predictions == answers.predictions == 5
    expected = [exact_kl(source, artifact, windows_of(pair)) for pair in ([5, 9], [9, 2], [2, 6], [8, 2], [2, 8])]
    assert quality.mean_kl == pytest.approx(np.mean(expected), rel=1e-4)


def test_sums_of_windows_add_up_to_the_figures() -> None:
    source, artifact, windows = random_model(1, 20), random_model(2, 20), random_windows(5, 20)
    quality = measure(artifact, windows, record(source, windows, QUIET), QUIET)
    found = quality.per_window
    assert found is not None
    assert found.predictions == (8, 8, 8, 8)
    assert math.fsum(found.kl) / 32 == pytest.approx(quality.mean_kl)
    assert math.exp(math.fsum(found.log_loss) / 32) == pytest.approx(quality.perplexity, rel=1e-6)
    assert math.exp(math.fsum(found.source_log_loss) / 32) == pytest.approx(quality.source_perplexity, rel=1e-6)
    assert quality.mean_kl_interval is not None
    assert quality.mean_kl_interval.low < quality.mean_kl < quality.mean_kl_interval.high


def test_converting_is_measured_apart_from_quantizing() -> None:
    """An artifact is compared with the source in its own runtime; what that runtime costs is its own figure."""
    source, converted, artifact = random_model(1, 20), random_model(2, 20), random_model(3, 20)
    windows = random_windows(5, 20)
    reference, conversion = convert_and_record(converted, windows, record(source, windows, QUIET), QUIET)
    assert conversion.mean_kl == pytest.approx(exact_kl(source, converted, windows), rel=1e-4)
    assert measure(converted, windows, reference, QUIET).mean_kl == 0
    measured = measure(artifact, windows, reference, QUIET)
    assert measured.mean_kl == pytest.approx(exact_kl(converted, artifact, windows), rel=1e-4)
    assert conversion.mean_kl_interval is not None


def test_texts_are_joined_in_order() -> None:
    one = kinds_of(windows_of([1, 2]), "a")
    other = dataclasses.replace(windows_of([3, 4, 5]), kinds=("b",), starts=(2,))
    both = joined([one, other], "all")
    assert (both.token_ids, both.kinds, both.starts, both.length) == (((1, 2), (3, 4, 5)), ("a", "b"), (1, 2), 3)
    assert both.predictions == 2
    assert joined([one], "all") is one
