"""What the gateway adds to a streaming upstream, beside LiteLLM's proxy in the same run: python benchmarks/gateway.py

A mock upstream streams; a load generator asks it directly, through `quantize serve`, and through LiteLLM, all on this
machine's cores, with API keys, metrics and logs on. First each proxy's most requests a second (closed loop), then, at
the highest rate that both sustain, the latency that each adds (open loop, in turns), then what each adds with
1, 4, 16 and 64 clients that ask one request after the other. Every stream must be whole.
LiteLLM is installed into an environment of its own under the temporary folder.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from quantize.bench.server import free_port

LITELLM = "1.106.2"
KEY = "sk-0123456789abcdef0123456789abcdef"
CHUNKS = 16
FIRST_SECONDS, GAP_SECONDS = 0.010, 0.002
CLOSED_CLIENTS = 16
CLIENTS = (1, 4, 16, 64)
SHARE = 0.7  # of the slower one's most requests a second: queues must not be what is measured
ROUNDS = 3
BODY = json.dumps(
    {"model": "mock", "stream": True, "messages": [{"role": "user", "content": "Say something about benchmarks."}]}
).encode()


@dataclass
class Sample:
    """Seconds to the first event and to the end of each stream, and how many were not whole."""

    first: list[float] = field(default_factory=list)
    total: list[float] = field(default_factory=list)
    dropped: int = 0
    seconds: float = 0.0

    def percentile(self, percent: float, *, first: bool = False) -> float:
        """Milliseconds."""
        values = sorted(self.first if first else self.total)
        return 1000 * values[min(len(values) - 1, int(len(values) * percent / 100))]


async def upstream(port: int) -> None:
    """The mock: an OpenAI-compatible server that streams CHUNKS tokens with gaps; no framework on the way."""

    def event(data: dict[str, object]) -> bytes:
        text = b"data: " + json.dumps(data).encode() + b"\n\n"
        return f"{len(text):x}\r\n".encode() + text + b"\r\n"

    head = {"id": "chatcmpl-mock", "object": "chat.completion.chunk", "created": 1, "model": "mock"}
    chunks = [
        event({**head, "choices": [{"index": 0, "delta": {"content": f"word{i} "}, "finish_reason": None}]})
        for i in range(CHUNKS)
    ]
    last = event({**head, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    counts = {"prompt_tokens": 9, "completion_tokens": CHUNKS, "total_tokens": 9 + CHUNKS}
    usage = event({**head, "choices": [], "usage": counts})
    done = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
    models = json.dumps({"object": "list", "data": [{"id": "mock", "object": "model"}]}).encode()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                request = await reader.readuntil(b"\r\n\r\n")
                if request.startswith(b"GET"):
                    length = f"content-length: {len(models)}\r\n\r\n".encode()
                    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n" + length + models)
                    continue
                size = next(
                    line for line in request.lower().split(b"\r\n") if line.startswith(b"content-length:")
                ).split(b":")[1]
                body = await reader.readexactly(int(size))
                writer.write(
                    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
                )
                await asyncio.sleep(FIRST_SECONDS)
                for chunk in chunks:
                    writer.write(chunk)
                    await asyncio.sleep(GAP_SECONDS)
                writer.write(last + (usage if b"include_usage" in body else b"") + done)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


class Client:
    """Keeps connections open and asks over them; checks that each stream is whole."""

    def __init__(self, port: int, path: str) -> None:
        self._port = port
        self._request = (
            f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
            f"authorization: Bearer {KEY}\r\ncontent-length: {len(BODY)}\r\n\r\n"
        ).encode() + BODY
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def ask(self, sample: Sample, at: float) -> None:
        """One request, timed from when it was due."""
        try:
            connection = self._idle.pop() if self._idle else await asyncio.open_connection("127.0.0.1", self._port)
            reader, writer = connection
            writer.write(self._request)
            head = await reader.readuntil(b"\r\n\r\n")
            received, first = b"", 0.0
            while not received.endswith(b"0\r\n\r\n"):
                piece = await reader.read(65536)
                if not piece:
                    raise ConnectionError
                first = first or time.perf_counter()
                received += piece
        except (OSError, asyncio.IncompleteReadError):
            sample.dropped += 1
            return
        whole = head.startswith(b"HTTP/1.1 200") and b"[DONE]" in received
        if not whole or any(f"word{i} ".encode() not in received for i in range(CHUNKS)):
            sample.dropped += 1
        sample.first.append(first - at)
        sample.total.append(time.perf_counter() - at)
        self._idle.append(connection)

    def close(self) -> None:
        for _, writer in self._idle:
            writer.close()


async def closed_loop(port: int, path: str, seconds: float, clients: int) -> Sample:
    """As many requests as `clients` get done one after the other."""
    client, sample = Client(port, path), Sample()
    started = time.perf_counter()

    async def work() -> None:
        while time.perf_counter() - started < seconds:
            await client.ask(sample, time.perf_counter())

    await asyncio.gather(*(work() for _ in range(clients)))
    sample.seconds = time.perf_counter() - started
    client.close()
    return sample


async def open_loop(port: int, path: str, seconds: float, rate: float) -> Sample:
    """Requests at a fixed rate, whether or not the ones before are done."""
    client, sample = Client(port, path), Sample()
    started = time.perf_counter()
    tasks = []
    for number in range(int(seconds * rate)):
        due = started + number / rate
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(client.ask(sample, due)))
    await asyncio.gather(*tasks)
    sample.seconds = time.perf_counter() - started
    client.close()
    return sample


@contextmanager
def running(command: Sequence[str], url: str, log: Path, seconds: float = 120) -> Iterator[None]:
    """A server until the block ends; it must answer at `url` first."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, cwd=log.parent)
        try:
            give_up = time.monotonic() + seconds
            while True:
                try:
                    urllib.request.urlopen(url, timeout=2).close()
                    break
                except urllib.error.HTTPError as exc:
                    exc.close()
                    if exc.code in (401, 404):
                        break
                except OSError:
                    pass
                if process.poll() is not None or time.monotonic() > give_up:
                    raise SystemExit(f"{command[0]} does not start:\n{log.read_text()[-2000:]}")
                time.sleep(0.1)
            yield
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def litellm_command(folder: Path, upstream_port: int, port: int) -> list[str]:
    """LiteLLM's proxy: a key, JSON logs, Prometheus metrics; one worker, as the gateway has."""
    home = Path(tempfile.gettempdir()) / f"quantize-litellm-{LITELLM}"
    if not (home / "bin" / "litellm").exists():
        print(f"installing LiteLLM {LITELLM} into {home} …", file=sys.stderr)
        shutil.rmtree(home, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", home], check=True)
        pip = [home / "bin" / "pip", "install", "--quiet", f"litellm[proxy]=={LITELLM}", "prometheus-client"]
        subprocess.run(pip, check=True)
    config = {
        "model_list": [
            {
                "model_name": "mock",
                "litellm_params": {
                    "model": "openai/mock",
                    "api_base": f"http://127.0.0.1:{upstream_port}/v1",
                    "api_key": "none",
                },
            }
        ],
        "litellm_settings": {"callbacks": ["prometheus"], "json_logs": True, "telemetry": False},
        "general_settings": {"master_key": KEY},
    }
    path = folder / "litellm.yaml"
    path.write_text(json.dumps(config))  # JSON is YAML
    return [str(home / "bin" / "litellm"), "--config", str(path), "--host", "127.0.0.1", "--port", str(port)]


def quantize_command(folder: Path, upstream_port: int, port: int) -> list[str]:
    """The gateway with a key, logs and metrics."""
    from quantize.serve.limits import key_line

    keys = folder / "keys"
    keys.write_text(key_line("bench", KEY) + "\n")
    return [
        str(Path(sys.executable).with_name("quantize")), "serve", f"mock=http://127.0.0.1:{upstream_port}/v1#mock",
        "--port", str(port), "--keys", str(keys), "--concurrency", "512", "--queue", "512",
    ]  # fmt: skip


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    options.add_argument("--seconds", type=float, default=10, help="of each measurement  [10]")
    options.add_argument("--upstream", type=int, help=argparse.SUPPRESS)
    options.add_argument("--json", type=Path, help="write the figures here, too")
    chosen = options.parse_args()
    if chosen.upstream:
        run(upstream(chosen.upstream))
        return
    with tempfile.TemporaryDirectory(prefix="quantize-gateway-") as name:
        folder = Path(name)
        figures = measure(folder, chosen.seconds)
    report(figures)
    if chosen.json:
        chosen.json.write_text(json.dumps(figures, indent=2) + "\n")


def run(work: object) -> Sample:
    """A coroutine on uvloop."""
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)  # type: ignore[arg-type, no-any-return]


def measure(folder: Path, seconds: float) -> dict[str, object]:
    """All figures."""
    mock, own, other = free_port(), free_port(), free_port()
    os.environ["LITELLM_TELEMETRY"] = "False"
    commands = {
        "quantize": quantize_command(folder, mock, own),
        "litellm": litellm_command(folder, mock, other),
    }
    script = [sys.executable, __file__, "--upstream", str(mock)]
    path = "/v1/chat/completions"
    ports = {"direct": mock, "quantize": own, "litellm": other}
    with (
        running(script, f"http://127.0.0.1:{mock}/v1/models", folder / "upstream.log"),
        running(commands["quantize"], f"http://127.0.0.1:{own}/ready", folder / "quantize.log"),
        running(commands["litellm"], f"http://127.0.0.1:{other}/health/liveliness", folder / "litellm.log"),
    ):
        best: dict[str, Sample] = {}
        for who in ("quantize", "litellm"):
            run(closed_loop(ports[who], path, 3, CLOSED_CLIENTS))  # connections, caches, first imports
            best[who] = run(closed_loop(ports[who], path, seconds, CLOSED_CLIENTS))
        most = {who: len(sample.total) / sample.seconds for who, sample in best.items()}
        rate = SHARE * min(most.values())
        samples = {who: Sample() for who in ports}
        for _ in range(ROUNDS):
            for who, sample in samples.items():
                part = run(open_loop(ports[who], path, seconds, rate))
                sample.first += part.first
                sample.total += part.total
                sample.dropped += part.dropped
        crowds = {
            clients: {who: run(closed_loop(port, path, seconds, clients)) for who, port in ports.items()}
            for clients in CLIENTS
        }
    return {
        "cores": os.cpu_count(),
        "most_requests_per_second": {who: round(value, 1) for who, value in most.items()},
        "rate": round(rate, 1),
        "requests": {who: len(sample.total) for who, sample in samples.items()},
        "dropped": {who: samples[who].dropped + (best[who].dropped if who in best else 0) for who in samples},
        "milliseconds": {
            who: {
                f"{kind} p{percent}": round(sample.percentile(percent, first=kind == "first"), 3)
                for kind in ("total", "first")
                for percent in (50, 95, 99)
            }
            for who, sample in samples.items()
        },
        "clients": {
            clients: {
                who: {
                    "requests_per_second": round(len(sample.total) / sample.seconds, 1),
                    "p50": round(sample.percentile(50), 3),
                    "p99": round(sample.percentile(99), 3),
                    "dropped": sample.dropped,
                }
                for who, sample in crowd.items()
            }
            for clients, crowd in crowds.items()
        },
    }


def report(figures: dict[str, object]) -> None:
    """A table, and the ratios."""
    most, times = figures["most_requests_per_second"], figures["milliseconds"]
    assert isinstance(most, dict)
    assert isinstance(times, dict)
    print(f"streams of {CHUNKS} tokens, {figures['cores']} cores; latency at {figures['rate']} requests/s")
    print(f"most requests/s: quantize {most['quantize']}, litellm {most['litellm']}: "
          f"{most['quantize'] / most['litellm']:.1f} x")  # fmt: skip
    print(f"streams that were not whole: {figures['dropped']}")
    print(f"{'ms':<12}{'direct':>10}{'quantize':>10}{'litellm':>10}{'+quantize':>11}{'+litellm':>10}{'ratio':>8}")
    for row in times["direct"]:
        direct, own, other = (times[who][row] for who in ("direct", "quantize", "litellm"))
        ratio = (own - direct) / (other - direct)
        print(f"{row:<12}{direct:>10.2f}{own:>10.2f}{other:>10.2f}{own - direct:>11.2f}{other - direct:>10.2f}"
              f"{ratio:>8.2f}")  # fmt: skip
    crowds = figures["clients"]
    assert isinstance(crowds, dict)
    print(f"\n{'clients':<9}{'direct p50':>11}{'p99':>8}", end="")
    print("".join(f"{f'+{who} p50':>15}{'p99':>8}{'req/s':>8}" for who in ("quantize", "litellm")))
    for clients, found in crowds.items():
        direct = found["direct"]
        print(f"{clients:<9}{direct['p50']:>11.2f}{direct['p99']:>8.2f}", end="")
        for who in ("quantize", "litellm"):
            other = found[who]
            print(f"{other['p50'] - direct['p50']:>15.2f}{other['p99'] - direct['p99']:>8.2f}"
                  f"{other['requests_per_second']:>8.1f}", end="")  # fmt: skip
        print(f"   dropped {sum(item['dropped'] for item in found.values())}")


if __name__ == "__main__":
    main()
