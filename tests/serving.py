"""`quantize serve` in a process of its own, for tests that ask it over HTTP."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def serving(folder: Path, *arguments: str, seconds: float = 120) -> Iterator[str]:
    """`quantize serve` on a free port, ready within so many seconds, until the block ends; its address."""
    log = folder / "serve.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "quantize", "serve", "--port", "0", "--threads", "1", *arguments], stderr=output
        )
    try:
        give_up = time.monotonic() + seconds
        while time.monotonic() < give_up:
            assert process.poll() is None, log.read_text()
            started = [line for line in log.read_text().splitlines() if '"listening"' in line]
            if started and _ready(json.loads(started[0])["url"]):
                break
            time.sleep(0.1)
        else:
            raise AssertionError(f"not ready within {seconds:g} s: {log.read_text()}")
        yield json.loads(started[0])["url"]
    finally:
        process.terminate()
        process.wait(40)


def _ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def ask(url: str, model: str) -> Any:
    """Four tokens after a prompt, by /v1/completions."""
    return post(
        url, "/v1/completions", {"model": model, "prompt": "The quick brown", "max_tokens": 4, "temperature": 0}
    )


def post(url: str, path: str, body: dict[str, Any]) -> Any:
    """A request of its own; raises HTTPError for what is refused."""
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)
