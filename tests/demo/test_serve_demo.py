"""The gateway with the demo's artifacts, as a user runs it: every engine, crashes, load, README's curl lines.

Slow, so it only runs where it is asked for: pytest -m demo. `make demo` must have built the artifacts before.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

from tests.serve.test_docs import check_lines

pytestmark = pytest.mark.demo

ROOT = Path(__file__).parent.parent.parent
STORE = ROOT / "artifacts"
if not (STORE / "smollm2-135m").is_dir():
    pytest.skip("make demo has not been run", allow_module_level=True)

VARIANTS = ("q8_0", "awq-int4-g64", "gptq-int4-g64", "bnb-int8")
QUESTION = "What is the capital of France?"


class Gateway:
    """A `quantize serve` that runs; its log is read by a thread of the system, into a file."""

    def __init__(self, url: str, log: Path) -> None:
        self.url = url
        self._log = log

    def get(self, path: str) -> tuple[int, Any]:
        try:
            with urllib.request.urlopen(self.url + path, timeout=10) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as exc:
            with exc:
                return exc.code, json.load(exc)

    def wait(self, status: int, seconds: float = 120) -> Any:
        """Until /ready has this status; what it says then."""
        give_up = time.monotonic() + seconds
        while time.monotonic() < give_up:
            found, data = self.get("/ready")
            if found == status:
                return data
            time.sleep(0.05)
        raise AssertionError(f"/ready never was {status}: {data}")

    def events(self, name: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self._log.read_text().splitlines() if line.startswith("{")]
        return [line for line in lines if line["event"] == name]

    def memory_bytes(self) -> int:
        return int(self.get("/health")[1]["memory_rss_mb"] * 1e6)


@contextmanager
def serve(folder: Path, *arguments: str) -> Iterator[Gateway]:
    """Run the command on a free port until the block ends; it must end with 0 then."""
    log = folder / "log"
    with log.open("wb") as output:
        command = [sys.executable, "-m", "quantize", "serve", *arguments, "--port", "0", "--store", str(STORE)]
        process = subprocess.Popen(command, stderr=output)
        try:
            gateway = Gateway("", log)
            while not gateway.events("listening"):
                assert process.poll() is None, log.read_text()
                time.sleep(0.05)
            gateway.url = gateway.events("listening")[0]["url"]
            yield gateway
        finally:
            process.terminate()
            process.wait(40)
        assert process.returncode == 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_engine_answers_the_openai_client(variant: str, tmp_path: Path) -> None:
    with serve(tmp_path, f"smollm2-135m/{variant}") as gateway:
        assert gateway.get("/health")[0] == 200
        assert sum(gateway.wait(200)["models"][f"smollm2-135m/{variant}"]["devices"].values()) >= 30
        client = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0)
        assert [model.id for model in client.models.list()] == [f"smollm2-135m/{variant}"]
        messages: list[Any] = [{"role": "user", "content": QUESTION}]
        fields: dict[str, Any] = {"model": f"smollm2-135m/{variant}", "messages": messages, "temperature": 0}
        answer = client.chat.completions.create(**fields, max_tokens=32)
        assert "Paris" in answer.choices[0].message.content
        assert answer.usage.prompt_tokens > 5
        chunks = client.chat.completions.create(**fields, max_tokens=32, stream=True)
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert streamed == answer.choices[0].message.content
        check_lines(int(gateway.url.rpartition(":")[2]))


def test_another_server_behind_the_gateway(tmp_path: Path) -> None:
    """llama-cpp-python's own server as the upstream."""
    pytest.importorskip("llama_cpp.server.app")
    (weights,) = (STORE / "smollm2-135m" / "q8_0" / "current").glob("*.gguf")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "llama_cpp.server", "--model", str(weights), "--port", str(port), "--n_ctx", "512"]
    behind = subprocess.Popen([*command, "--model_alias", "smol"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with serve(tmp_path, f"up=http://127.0.0.1:{port}/v1") as gateway:
            gateway.wait(200)
            client = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0)
            messages: list[Any] = [{"role": "user", "content": QUESTION}]
            answer = client.chat.completions.create(model="up", messages=messages, temperature=0, max_tokens=32)
            assert "Paris" in (answer.choices[0].message.content or "")
            chunks = list(client.chat.completions.create(model="up", messages=messages, max_tokens=8, stream=True))
            assert {chunk.model for chunk in chunks} == {"up"}
            behind.kill()
            behind.wait()
            assert "does not answer" in gateway.wait(503, 2)["reason"]
    finally:
        behind.kill()
        behind.wait()


def test_a_plain_16_bit_folder_is_served(tiny: Path, tmp_path: Path) -> None:
    with serve(tmp_path, f"tiny={tiny}") as gateway:
        told = gateway.wait(200)["models"]["tiny"]
        assert told["runtime"].startswith("transformers")
        assert told["devices"] == {"cpu": 2}


def test_ready_is_honest_before_and_after_a_kill(tmp_path: Path) -> None:
    with serve(tmp_path, "smollm2-135m/q8_0") as gateway:
        gateway.wait(200)
        os.kill(gateway.events("engine_starting")[0]["pid"], signal.SIGKILL)
        killed = time.monotonic()
        assert "SIGKILL" in gateway.wait(503, 2)["reason"]
        assert time.monotonic() - killed < 2
        gateway.wait(200)
        assert len(gateway.events("engine_died")) == 1


def test_fifty_clients_get_an_answer_or_a_429_and_memory_comes_back(tmp_path: Path) -> None:
    with serve(tmp_path, "smollm2-135m/q8_0", "--concurrency", "2", "--queue", "8") as gateway:
        gateway.wait(200)
        asyncio.run(load(gateway.url, clients=8, requests=4))
        before = gateway.memory_bytes()
        seen = asyncio.run(load(gateway.url, clients=50, requests=20))
        after = gateway.memory_bytes()
        assert sum(seen.values()) == 1000
        assert set(seen) <= {200, 429}
        assert seen[200] >= 50
        assert abs(after - before) <= before * 0.05
        health = gateway.get("/health")[1]
        assert (health["active_requests"], health["waiting_requests"]) == (0, 0)
        print(f"answers {dict(seen)}, memory {before / 1e6:.1f} -> {after / 1e6:.1f} MB")


async def load(url: str, clients: int, requests: int) -> Counter[int]:
    """Every client asks one request after the other; a 429 is waited out as it says, at most a tenth of a second."""
    seen: Counter[int] = Counter()
    timeout = aiohttp.ClientTimeout(total=60)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:

        async def work(number: int) -> None:
            body = {"messages": [{"role": "user", "content": f"Count from {number}."}], "max_tokens": 6}
            for _ in range(requests):
                async with session.post(f"{url}/v1/chat/completions", json=body) as answer:
                    data = await answer.json()
                    seen[answer.status] += 1
                    if answer.status == 429:
                        assert int(answer.headers["retry-after"]) >= 1
                        await asyncio.sleep(0.1)
                    else:
                        assert data["choices"][0]["message"]["role"] == "assistant"

        await asyncio.gather(*(work(number) for number in range(clients)))
    return seen


def test_the_logs_of_a_real_run_have_no_prompt_and_no_key(tmp_path: Path) -> None:
    key = "sk-marked-key-00112233"
    environment = pytest.MonkeyPatch()
    environment.setenv("QUANTIZE_API_KEYS", key)
    try:
        with serve(tmp_path, "smollm2-135m/q8_0") as gateway:
            gateway.wait(200)
            client = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=key, max_retries=0)
            messages: list[Any] = [{"role": "user", "content": "Marked-Prompt-0a1b: say Marked-Answer"}]
            client.chat.completions.create(model="smollm2-135m/q8_0", messages=messages, max_tokens=16)
            with pytest.raises(openai.NotFoundError):
                client.chat.completions.create(model="Marked-Prompt-0a1b", messages=messages)
    finally:
        environment.undo()
    text = (tmp_path / "log").read_text()
    assert "Marked" not in text
    assert key not in text
    assert text.count("[After generation]") == 1
