"""The small parts by themselves: stop sequences, keys, rates, slots, the router, the log's thread."""

from __future__ import annotations

import asyncio
import io
import re
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantize.runtimes.chat_template import ChatTemplate
from quantize.runtimes.detokenizer import BytePieces
from quantize.runtimes.llama_cpp.placement import Placed
from quantize.runtimes.served import Refused
from quantize.serve.engines.text import StopFilter
from quantize.serve.failures import Failure
from quantize.serve.limits import Rates, Slots
from quantize.serve.logs import LogWriter, where
from quantize.serve.monitoring import memory_line
from quantize.serve.protocol import ChatRequest, parse
from quantize.system.machine import ram

TEXTS = st.text("abc é漢", max_size=20)


@given(st.lists(TEXTS, max_size=8), st.lists(st.text("abc é", min_size=1, max_size=4), max_size=3))
def test_text_is_cut_at_the_first_stop_however_it_comes(pieces: list[str], stops: list[str]) -> None:
    stop_filter, sent = StopFilter(stops), ""
    for piece in pieces:
        sent += stop_filter.add(piece)
        if stop_filter.stopped:
            break
    sent += stop_filter.flush()
    whole = "".join(pieces)
    first = min((whole.find(stop) for stop in stops if stop in whole), default=None)
    if first is None:
        assert sent == whole
    else:
        assert stop_filter.stopped
        assert not any(stop in sent for stop in stops)
        assert whole.startswith(sent)


@given(TEXTS, st.integers(1, 5))
def test_characters_are_whole_however_bytes_come(text: str, size: int) -> None:
    raw = text.encode()
    parts = [raw[at : at + size] for at in range(0, len(raw), size)]
    pieces = BytePieces(lambda number: parts[number])
    sent = [pieces.add(number) for number in range(len(parts))] + [pieces.flush()]
    assert "".join(sent) == text
    assert "\ufffd" not in "".join(sent)


def test_a_rate_fills_again_with_time() -> None:
    rates = Rates(60)
    for _ in range(60):
        rates.spend("a", now=100.0)
    with pytest.raises(Failure, match="more than 60 requests a minute") as caught:
        rates.spend("a", now=100.0)
    assert caught.value.retry_after == 1
    rates.spend("b", now=100.0)
    rates.spend("a", now=101.0)
    with pytest.raises(Failure, match="more than 60"):
        rates.spend("a", now=101.0)


def in_loop(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(work())


def test_slots_go_round_in_order_and_survive_those_who_leave() -> None:
    async def work() -> None:
        slots, order = Slots(1, 3), []

        async def take(name: str) -> None:
            await slots.acquire()
            order.append(name)
            await asyncio.sleep(0)
            slots.release(0.1)

        await slots.acquire()
        tasks = [asyncio.create_task(take(name)) for name in "abc"]
        await asyncio.sleep(0)
        assert (slots.active, slots.waiting) == (1, 3)
        with pytest.raises(Failure, match="1 requests are running and 3 are waiting") as caught:
            await slots.acquire()
        assert caught.value.retry_after is not None
        tasks[1].cancel()
        await asyncio.sleep(0)
        slots.release(0.1)
        await asyncio.gather(*tasks, return_exceptions=True)
        assert order == ["a", "c"]
        assert (slots.active, slots.waiting) == (0, 0)

    in_loop(work)


def test_a_slot_that_was_given_to_one_who_leaves_is_not_lost() -> None:
    async def work() -> None:
        slots = Slots(1, 3)
        await slots.acquire()
        task = asyncio.create_task(slots.acquire())
        await asyncio.sleep(0)
        slots.release(0.1)  # the turn is set, the task has not run yet
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert slots.active == 0
        await asyncio.wait_for(slots.acquire(), 1)

    in_loop(work)


def test_a_disk_that_hangs_holds_up_nobody() -> None:
    class Stuck(io.BytesIO):
        def __init__(self) -> None:
            super().__init__()
            self.go = threading.Event()

        def write(self, data: Any) -> int:
            self.go.wait(10)
            return super().write(data)

    stream = Stuck()
    writer = LogWriter(stream)
    for number in range(20_500):
        writer.msg(b"%d" % number)
    assert writer.dropped > 0
    stream.go.set()
    writer.close()
    assert len(stream.getvalue().splitlines()) + writer.dropped >= 20_500


def test_an_exception_is_told_without_its_message() -> None:
    try:
        raise ValueError("the prompt was: secret")
    except ValueError as exc:
        told = where(exc)
    assert told.startswith("ValueError at test_an_exception")
    assert "secret" not in told


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        ("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{{ eos_token }}", "[user]hi</s>"),
        ("{% generation %}x{% endgeneration %}{{ messages | tojson }}", 'x[{"role": "user", "content": "hi"}]'),
        ("{% for m in messages %}{% if loop.first %}{% break %}{% endif %}{% endfor %}a", "a"),
    ],
)
def test_templates_as_models_write_them(template: str, wanted: str) -> None:
    made = ChatTemplate(template, {"eos_token": "</s>", "bos_token": "<s>"})
    assert made.render([{"role": "user", "content": "hi"}]) == wanted


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ raise_exception('only one system message') }}", "only one system message"),
        ("{{ messages[5].content.x }}", "does not understand"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "does not understand"),
    ],
)
def test_a_template_that_refuses_is_a_422(template: str, why: str) -> None:
    with pytest.raises(Refused, match=why) as caught:
        ChatTemplate(template, {}).render([{"role": "user", "content": "hi"}])
    assert caught.value.fields["status"] == 422


def test_an_error_names_the_field_and_not_its_value() -> None:
    body = b'{"messages": [{"role": "user", "content": {"secret": "secret"}}], "temperature": "secret"}'
    with pytest.raises(Failure, match=r"messages|temperature") as caught:
        parse(ChatRequest, body)
    assert "secret" not in caught.value.message


def test_buffers_are_added_up_by_device() -> None:
    log = """
load_tensors:        CUDA0 model buffer size =  1918.25 MiB
load_tensors:   CPU_Mapped model buffer size =   308.25 MiB
llama_kv_cache:      CUDA0 KV buffer size =   448.00 MiB
llama_context:  CUDA_Host  output buffer size =     0.50 MiB
sched_reserve:      CUDA0 compute buffer size =   256.50 MiB
sched_reserve:        CPU compute buffer size =    12.00 MiB
"""
    placed = Placed()
    for line in log.splitlines():
        placed.line(line)
    assert placed.buffer_bytes["CUDA0"] == placed.gpu_bytes == int(2622.75 * 2**20)
    assert {name for name in placed.buffer_bytes if not name.startswith("CPU")} == {"CUDA0"}


def test_the_memory_line_with_a_card_and_without() -> None:
    """In GB, of 10^9 bytes."""
    gpu = {"gpu": "RTX 4060", "vram_allocated": 2 * 10**9, "vram_reserved": 2_504_000_000}
    told = memory_line("After model load", gpu)
    assert f" GB/{ram()[0] / 1e9:.2f} GB (" in told
    assert told.startswith("[After model load] GPU: RTX 4060 - VRAM: 2.00 GB (allocated) / 2.50 GB (reserved) | RAM: ")
    assert re.fullmatch(r"\[Now\] GPU: none \| RAM: [\d.]+ GB/[\d.]+ GB \(\d+%\)", memory_line("Now", {"gpu": None}))
