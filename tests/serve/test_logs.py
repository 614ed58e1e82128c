"""What is logged: JSON lines with sizes and times; never a prompt, an answer or a key, whatever goes wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from quantize.serve.limits import KEYS_VARIABLE
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
    for moment in ("[After model load] GPU: none | RAM: ", "[Before generation] GPU: ", "[After generation] GPU: "):
        assert any(event.startswith(moment) for event in told)


def test_the_whole_command_in_a_process_of_its_own(tmp_path: Path) -> None:
    """stdout stays empty, stderr is JSON but for the line on memory, and SIGTERM ends it with 0."""
    import os
    import signal

    environment = {**os.environ, KEYS_VARIABLE: KEY}
    command = [sys.executable, "-m", "quantize", "serve", "http://127.0.0.1:9/v1#none", "--port", "0"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, cwd=tmp_path, text=True
    )
    assert process.stderr is not None
    line = json.loads(process.stderr.readline())
    assert line["event"] == "listening"
    assert line["keys"] is True
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=20)
    assert process.returncode == 0
    assert stdout == ""
    assert [json.loads(line)["event"] for line in stderr.splitlines()][-1] == "stopped"
    assert KEY not in stderr
