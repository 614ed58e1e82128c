"""Our own loop over llama.cpp beside llama.cpp's own server, at 1, 4 and 16 clients, in one run.

    python benchmarks/serving_engines.py MODEL.gguf [--rounds 3] [--threads 1]

llama.cpp's server runs through xllamacpp, a binding with prebuilt wheels, in an environment below the cache; ours is
`quantize serve`. Both have 16 sequences of 512 tokens, the same threads, flash attention off, greedy sampling. Each
client asks for 48 tokens after a prompt that was never there before (their server keeps old prompts in memory), again
and again; rounds take turns between the two. Prints JSON:
tokens of answers a second of the clock, and of the processor time of all the server's processes (a busy machine does
little to that one), the median over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from quantize.bench.server import free_port

XLLAMACPP = "2026.10.11549"
CLIENTS = (1, 4, 16)
SEQUENCES, CONTEXT, ANSWER, ASKED = 16, 512, 48, 32  # ASKED: answers of one round, shared among the clients
WORDS = "river stone lamp winter carpet engine yellow mountain paper violin harbor candle forest window copper bridge"
THEIRS = """
import sys, time, xllamacpp as x
model, port, threads, sequences, context = sys.argv[1], *map(int, sys.argv[2:6])
p = x.CommonParams()
p.model.path, p.port, p.n_parallel, p.n_ctx = model, port, sequences, sequences * context
p.cpuparams.n_threads = p.cpuparams_batch.n_threads = threads
p.flash_attn_type = x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
p.use_jinja = True
server = x.Server(p)
print(server.listening_address, flush=True)
time.sleep(1e6)
"""


def their_python(home: Path) -> str:
    """An interpreter that has xllamacpp."""
    python = home / f"xllamacpp-{XLLAMACPP}" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", python.parent.parent], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", f"xllamacpp=={XLLAMACPP}"], check=True)
    return str(python)


@contextmanager
def running(command: list[str], port: int) -> Iterator[psutil.Process]:
    """A server that answers, until the block is left."""
    with open(os.devnull, "wb") as nowhere:
        process = psutil.Popen(command, stdout=nowhere, stderr=nowhere)
    try:
        for _ in range(600):
            try:
                ask(port, "hello", 1)
                break
            except OSError:
                time.sleep(0.1)
        yield process
    finally:
        process.terminate()
        process.wait(60)


def ask(port: int, prompt: str, tokens: int) -> int:
    """Tokens of one answer."""
    body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": tokens, "temperature": 0}
    url, kind = f"http://127.0.0.1:{port}/v1/chat/completions", {"content-type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), kind), timeout=600) as answer:
        return int(json.load(answer)["usage"]["completion_tokens"])


def processor_seconds(process: psutil.Process) -> float:
    """Of a process and its children so far."""
    times = [item.cpu_times() for item in (process, *process.children(recursive=True))]
    return sum(item.user + item.system for item in times)


def one_round(process: psutil.Process, port: int, clients: int, number: int) -> tuple[float, float]:
    """Tokens a second of the clock, and of processor time."""
    words = WORDS.split()
    prompts = [
        f"{number}, {clients}, {item}: tell a long story about "
        + " and ".join(words[(item * 7 + k) % 16] for k in range(12))
        for item in range(ASKED)
    ]
    began, used = time.perf_counter(), processor_seconds(process)
    with ThreadPoolExecutor(clients) as pool:
        tokens = sum(pool.map(lambda prompt: ask(port, prompt, ANSWER), prompts))
    return tokens / (time.perf_counter() - began), tokens / (processor_seconds(process) - used)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--home", type=Path, default=Path.home() / ".cache" / "quantize-benchmarks")
    options = parser.parse_args()
    ours, theirs = free_port(), free_port()
    common = [str(options.threads), str(SEQUENCES), str(CONTEXT)]
    sizes = ["--threads", common[0], "--concurrency", common[1], "--context", common[2]]
    commands = {
        "quantize serve": [sys.executable, "-m", "quantize", "serve", f"m={options.model}", "--port", str(ours),
                           "--device", "cpu", *sizes],
        "llama.cpp's server": [their_python(options.home), "-c", THEIRS, str(options.model), str(theirs), *common],
    }  # fmt: skip
    found: dict[str, dict[int, list[tuple[float, float]]]] = {name: {n: [] for n in CLIENTS} for name in commands}
    with (
        running(commands["quantize serve"], ours) as first,
        running(commands["llama.cpp's server"], theirs) as second,
    ):
        for number in range(options.rounds):
            for clients in CLIENTS:
                for name, process, port in (("quantize serve", first, ours), ("llama.cpp's server", second, theirs)):
                    found[name][clients].append(one_round(process, port, clients, number))
    figures: dict[str, Any] = {"threads": options.threads, "rounds": options.rounds, "xllamacpp": XLLAMACPP}
    for name, by_clients in found.items():
        figures[name] = {
            str(clients): {
                "tokens_per_second": round(median(clock for clock, _ in rounds), 1),
                "tokens_per_processor_second": round(median(processor for _, processor in rounds), 1),
            }
            for clients, rounds in by_clients.items()
        }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
