"""What is logged: JSON lines with sizes and times; never a prompt, an answer or a key, whatever goes wrong."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quantize.serve.limits import KEYS_VARIABLE
from quantize.serve.logs import LogWriter, make_log
from quantize.serve.monitoring import Metrics, Watcher, memory_line, on_gpus
from quantize.system.gpus import LocalGpu
from tests.serve.conftest import Start, fakes, keys_of

KEY = "marked-key-5f1c9a7e"
PROMPT = "Marked-Prompt-8d2b"


def test_neither_prompts_nor_keys_are_in_the_log(start: Start, tmp_path_factory: pytest.TempPathFactory) -> None:
    gateway = start(fakes(), keys=keys_of(tmp_path_factory.mktemp("keys"), alice=KEY))
    good, wrong = {"authorization": f"Bearer {KEY}"}, {"authorization": f"Bearer {KEY}-wrong"}
    marked = {"messages": [{"role": "user", "content": PROMPT}]}
    for headers in (good, wrong):
        gateway.ask("POST", "/v1/chat/completions", marked, headers)
        gateway.ask("POST", "/v1/chat/completions", {**marked, "stream": True, "stop": [PROMPT]}, headers)
        gateway.ask("POST", "/v1/chat/completions", {**marked, PROMPT: PROMPT, "temperature": PROMPT}, headers)
        gateway.ask("POST", "/v1/chat/completions", {**marked, "model": PROMPT}, headers)
        gateway.ask("POST", "/chat", f'{{"message": "{PROMPT}'.encode(), headers)
        gateway.ask("POST", "/chat", {"message": f"{PROMPT} oom!"}, headers)
        gateway.ask("GET", f"/v1/{PROMPT}?key={KEY}", headers=headers)
        gateway.ask("GET", f"/{PROMPT}", headers={"x-request-id": f"<{PROMPT}>", **headers})
    gateway.wait(lambda: sum(line["event"] == "request" for line in gateway.lines()) == 16)
    text = gateway.log.getvalue().decode()
    assert PROMPT not in text
    assert KEY not in text
    assert "alice" in text


def test_a_line_has_what_one_needs(start: Start) -> None:
    gateway = start(fakes())
    answer = gateway.chat("one two three", stream=True)
    (line,) = [line for line in gateway.lines() if line["event"] == "request"]
    assert line["trace_id"] == answer.headers["x-request-id"]
    assert (line["method"], line["route"], line["status"], line["model"]) == (
        "POST", "/v1/chat/completions", 200, "fake",
    )  # fmt: skip
    assert (line["prompt_tokens"], line["completion_tokens"]) == (3, 3)
    assert line["bytes_out"] == len(answer.body)
    assert 0 < line["first_token_seconds"] <= line["seconds"]
    told = [line["event"] for line in gateway.lines()]
    for moment in (
        "[Before model load] GPU: none | RAM: ",
        "[After model load] GPU: none | RAM: ",
        "[Before generation] GPU: ",
        "[After generation] GPU: ",
    ):
        assert any(event.startswith(moment) for event in told)


def test_the_lines_on_memory_as_text(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the letter, with a card and without one; other lines beside them, all of them one line whatever is in them."""
    monkeypatch.setattr("quantize.serve.monitoring.nvidia_gpus", lambda: (LocalGpu("NVIDIA H200", 10**11, 0),))
    stream = io.BytesIO()
    writer = LogWriter(stream)
    tell = Watcher(make_log(writer, "info", "text"), Metrics()).about("m")
    tell("engine_starting", {"pid": 7, "device": "cuda:0"})
    card = {"gpu": "NVIDIA H200", "vram_allocated": 1_234_000_000, "vram_reserved": 2_000_000_000}
    tell("engine_ready", {"memory": card, "load_seconds": 1.5, "warnings": ["two words\nand a line"]})
    tell("generation_started", {"memory": card, "trace_id": "t"})
    tell("generation_ended", {"memory": {"gpu": None}, "trace_id": "t"})
    writer.close()
    lines = stream.getvalue().decode().splitlines()
    time, ram = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", r"RAM: \d+\.\d\d GB/\d+\.\d\d GB \(\d+%\)"
    none = r"GPU: NVIDIA H200 - VRAM: 0\.00 GB \(allocated\) / 0\.00 GB \(reserved\)"
    used = r"GPU: NVIDIA H200 - VRAM: 1\.23 GB \(allocated\) / 2\.00 GB \(reserved\)"
    expected = [
        rf"{time} \| engine_starting model=m pid=7 device=cuda:0",
        rf"{time} \| \[Before model load\] {none} \| {ram}",
        rf"{time} \| engine_ready model=m load_seconds=1\.5",
        rf"{time} \| \[After model load\] {used} \| {ram}",
        rf'{time} \| WARNING engine_warning model=m warning="two words\\nand a line"',
        rf"{time} \| \[Before generation\] {used} \| {ram}",
        rf"{time} \| \[After generation\] GPU: none \| {ram}",
    ]
    assert [line for line, wanted in zip(lines, expected, strict=True) if not re.fullmatch(wanted, line)] == []


@pytest.mark.parametrize("form", ["json", "text"])
def test_the_whole_command_in_a_process_of_its_own(form: str, tmp_path: Path) -> None:
    """stdout stays empty, stderr is JSON or text but for the line on memory, and SIGTERM ends it with 0."""
    import os
    import signal

    environment = {**os.environ, KEYS_VARIABLE: KEY}
    command = [sys.executable, "-m", "quantize", "serve", "http://127.0.0.1:9/v1#none", "--port", "0"]
    command += ["--log-format", form] if form == "text" else []
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, cwd=tmp_path, text=True
    )
    assert process.stderr is not None
    first = process.stderr.readline()
    if form == "text":
        assert re.fullmatch(
            r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \| listening url=http://127\.0\.0\.1:\d+ keys=true\n", first
        )
    else:
        assert (json.loads(first)["event"], json.loads(first)["keys"]) == ("listening", True)
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=20)
    assert process.returncode == 0
    assert stdout == ""
    last = stderr.splitlines()[-1]
    assert last.endswith("| stopped") if form == "text" else json.loads(last)["event"] == "stopped"
    assert KEY not in stderr


def test_health_and_metrics_say_which_gpu_and_how_much_of_it(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantize.serve.monitoring.nvidia_gpus", lambda: (LocalGpu("RTX 4060", 8 * 10**9, 10**9),))
    gateway = start(fakes())
    assert "GPU: none | RAM: " in gateway.ask("GET", "/health").json["memory"]
    text = gateway.ask("GET", "/metrics").body.decode()
    assert 'quantize_vram_used_bytes{gpu="0",name="RTX 4060"} 1e+09' in text
    assert 'quantize_vram_bytes{gpu="0",name="RTX 4060"} 8e+09' in text
    card = {"gpu": "RTX 4060", "vram_allocated": 2 * 10**9, "vram_reserved": 3 * 10**9}
    told: list[Any] = [SimpleNamespace(status=SimpleNamespace(details={"memory": memory}))
                       for memory in (card, card, {"gpu": None}, None)]  # fmt: skip
    line = memory_line("Now", on_gpus(told))
    assert "GPU: RTX 4060 - VRAM: 4.00 GB (allocated) / 6.00 GB (reserved)" in line
