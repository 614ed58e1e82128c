"""Which workers may take part, how many blocks are under way, what a pass costs; no cluster is needed for these."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from benchmarks.scale import overlap_seconds
from quantize.build.spread.cluster import Node
from quantize.build.spread.cost import block_costs
from quantize.build.spread.passwork import deal
from quantize.build.spread.pool import Pool, PoolWorker, WorkerMachine
from quantize.build.spread.run import MOST_IN_FLIGHT, SpreadPass
from quantize.build.spread.trace import Span, check_trace, read_trace, write_trace
from quantize.calibration.block_runner import ROUND_BATCHES
from quantize.calibration.spread import PassSpread
from quantize.errors import BuildError, PlanError, UsageError
from quantize.events import EventKind, ListReporter, SilentReporter
from quantize.model.checkpoint import open_checkpoint
from quantize.testing import TinyModel

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers warns on import

MACHINE = WorkerMachine("cpu AVX512", "bfloat16", ("torch 2.13.0",), "a" * 56, "10.0.0.1", 1, True)


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    cluster = MagicMock()
    cluster.call.side_effect = lambda *_: (object(),)
    return Pool(cluster, PassSpread("10.0.0.1:6379", 1, 1), "cpu", tmp_path, ListReporter())


def worker(name: str) -> PoolWorker:
    return PoolWorker(name, MagicMock())


@pytest.mark.parametrize("differs", [{"device": "cpu AVX2"}, {"versions": ("torch 2.14.0",)}])
def test_a_node_whose_bits_could_differ_takes_no_part(pool: Pool, differs: dict[str, str]) -> None:
    pool._welcome(worker("w0"), MACHINE)
    pool._welcome(worker("w1"), replace(MACHINE, node="b" * 56))
    assert len(pool) == 2
    pool._welcome(worker("w2"), replace(MACHINE, **differs))
    assert len(pool) == 2
    assert isinstance(pool._reporter, ListReporter)
    warning = pool._reporter.events[-1]
    assert (warning.kind, "takes no part" in warning.text) == ("warning", True)


def test_a_node_that_does_not_see_the_store_is_named(pool: Pool, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=f"node 10.0.0.1 does not see {tmp_path}"):
        pool._welcome(worker("w0"), replace(MACHINE, sees=False))


@pytest.mark.parametrize(("store_bytes", "blocks"), [(16_000, 2), (8_000, 1), (7_999, None), (10**9, MOST_IN_FLIGHT)])
def test_blocks_under_way_fit_half_of_the_object_stores(pool: Pool, store_bytes: int, blocks: int | None) -> None:
    cluster = MagicMock()
    cluster.nodes.return_value = [Node("n", "10.0.0.1", 1, 0, 0, store_bytes)] * 2
    found = SpreadPass(cluster, pool, PassSpread("", 2, 1), ListReporter())
    found._shares = deal([[1] * 10] * 3, "cpu")
    if blocks is None:
        with pytest.raises(BuildError, match="object stores"):
            found._in_flight(4_000)
    else:
        assert found._in_flight(4_000) == blocks


def test_shares_hold_every_sequence_once_in_the_order_of_their_batches() -> None:
    lengths = [*[512] * 70, 100, 100, 300]
    shares = deal([[index] * length for index, length in enumerate(lengths)], "cpu")
    assert len(shares) == 2 * -(-72 // ROUND_BATCHES)  # 70 batches, one of two short sequences, one of one
    found = [int(ids[0]) for share in shares for ids in share.sequences]
    assert sorted(found) == [*range(len(lengths))]
    assert [int(ids[0]) for ids in shares[0].sequences][:3] == [0, 2, 4]
    assert int(shares[2].sequences[0][0]) == ROUND_BATCHES
    for share in shares:
        starts = [batch.start for batch in share.batches]
        assert starts == [sum(batch.rows for batch in share.batches[:index]) for index in range(len(starts))]


def test_the_cost_of_a_dense_block_is_that_of_its_weights(tiny: Path) -> None:
    checkpoint, tokens = open_checkpoint(tiny), 1000
    costs = block_costs(checkpoint.config, {name: item.shape for name, item in checkpoint.tensors.items()}, tokens)
    model = TinyModel()
    kv = model.hidden // model.heads * model.kv_heads
    weights = model.hidden * (2 * model.hidden + 2 * kv + 3 * model.intermediate)
    assert [cost.forward for cost in costs] == [2 * weights * tokens] * model.blocks
    assert costs[0].gram_bytes == 4 * (3 * model.hidden**2 + model.intermediate**2)
    assert costs[0].clip_weights == weights


def test_overlap_is_the_time_in_which_both_kinds_run(tmp_path: Path) -> None:
    def span(kind: str, start: float, end: float) -> Span:
        return Span("n", "w", kind, kind, start, end)

    forward, solve = [span("forward", 0, 2), span("forward", 1, 4)], [span("solve", 3, 6), span("solve", 3.5, 3.7)]
    assert overlap_seconds(forward, solve) == pytest.approx(1)
    assert overlap_seconds(forward[:1], solve) == 0
    write_trace(tmp_path / "t.json", [*forward, *solve], SilentReporter())
    assert read_trace(tmp_path / "t.json") == sorted([*forward, *solve], key=lambda item: item.start)


def test_a_trace_that_cannot_be_written_is_refused_before_the_work_and_costs_nothing_after_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    check_trace(tmp_path / "folder" / "trace.json")
    assert not [*(tmp_path / "folder").iterdir()]
    with pytest.raises(UsageError, match=r"--trace .*trace\.json: .*file'"):
        check_trace(tmp_path / "file" / "trace.json")
    reporter = ListReporter()
    write_trace(tmp_path / "file" / "trace.json", [], reporter)
    assert [event.kind for event in reporter.events] == [EventKind.WARNING]
