"""How soon the gateway is ready, and what loading costs in memory: python benchmarks/serve_start.py [ARTIFACT]

First the engine alone says what it has when the weights are loaded, and when the context (KV cache, buffers: as large
as one asks for) is there too. Then `quantize serve` is started on a free port, by default and with the least context,
and asked for /health and /ready until they answer 200, the memory of the model's process read every two milliseconds.
The peer is the file itself: loading must not hold a second copy of it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

RUNS = 3
LEAST = ("--context", "256", "--concurrency", "1")


@dataclass
class Start:
    """Seconds from the command to the first good answer; bytes of the model's process."""

    healthy_seconds: float = 0.0
    ready_seconds: float = 0.0
    peak_bytes: int = 0
    peak_private_bytes: int = 0


def start(artifact: str, *options: str) -> Start:
    """Start the gateway, follow it until it is ready, end it."""
    found, began = Start(), time.perf_counter()
    command = [str(Path(sys.executable).with_name("quantize")), "serve", artifact, "--device", "cpu", "--port", "0"]
    process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        url = ""
        pid = 0
        for line in process.stderr:
            event = json.loads(line) if line.startswith("{") else {}
            url = event.get("url", url)
            pid = event.get("pid", pid)
            if url and pid:
                break
        else:
            raise SystemExit("the gateway does not start; run the command by hand")
        asked = 0.0
        while not found.ready_seconds:
            _sample(pid, found)
            if time.perf_counter() - asked > 0.02:
                asked = time.perf_counter()
                if not found.healthy_seconds and _good(f"{url}/health"):
                    found.healthy_seconds = time.perf_counter() - began
                if _good(f"{url}/ready"):
                    found.ready_seconds = time.perf_counter() - began
            time.sleep(0.002)
        _sample(pid, found)
    finally:
        process.terminate()
        process.communicate(timeout=30)
    return found


def _sample(pid: int, found: Start) -> None:
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return
    value = {name: int(size) * 1024 for name, size in re.findall(r"^(VmHWM|RssAnon):\s+(\d+) kB", text, re.M)}
    found.peak_bytes = max(found.peak_bytes, value.get("VmHWM", 0))
    found.peak_private_bytes = max(found.peak_private_bytes, value.get("RssAnon", 0))


def _good(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def weights(artifact: str) -> Path:
    """The artifact's GGUF file."""
    from quantize.serve.targets import LocalTarget, resolve
    from quantize.store.store import Store, default_store_root

    target = resolve(artifact, Store(default_store_root()))
    assert isinstance(target, LocalTarget)
    return target.path


STAGES = """
import sys
from pathlib import Path
import quantize.runtimes.llama_cpp.served as engine, quantize.serve.engines.child
from quantize.runtimes.llama_cpp.model import ModelSettings, OpenModel

def peak():
    print(open("/proc/self/status").read(), flush=True)

class Staged(OpenModel):
    def _open_context(self):
        peak()
        super()._open_context()

engine.import_bindings_only()
import llama_cpp.llama_cpp
peak()
Staged(Path(sys.argv[1]), ModelSettings(int(sys.argv[2]), flash_attention=False))
peak()
"""


def stages(path: Path, context: int) -> list[int]:
    """Peak memory of a process with llama.cpp's library and no model; with the weights; with a context too."""
    command = [sys.executable, "-c", STAGES, str(path), str(context)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [int(size) * 1024 for size in re.findall(r"VmHWM:\s+(\d+) kB", done.stdout)]


def main() -> None:
    """Print one line a run, and the ratios of the worst."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("artifact", nargs="?", default="smollm2-135m/q8_0")
    artifact = parser.parse_args().artifact
    path = weights(artifact)
    size = path.stat().st_size
    bare, loaded, ready = stages(path, 256)
    print(f"{artifact}: {size / 1e6:.1f} MB, {os.cpu_count()} cores; a process without a model: {bare / 1e6:.1f} MB")
    print(f"  weights loaded: {loaded / 1e6:.1f} MB, {loaded / size:.2f} x the file, {(loaded - bare) / size:.2f} x "
          f"added; with a context of 256 tokens too: {ready / 1e6:.1f} MB, {ready / size:.2f} x")  # fmt: skip
    for name, options in (("default options", ()), ("least context", LEAST)):
        runs = [start(artifact, *options) for _ in range(RUNS)]
        worst = Start(
            max(run.healthy_seconds for run in runs), max(run.ready_seconds for run in runs),
            max(run.peak_bytes for run in runs),
            max(run.peak_private_bytes for run in runs),
        )  # fmt: skip
        added = worst.peak_bytes - bare
        print(f"{name}: healthy after {worst.healthy_seconds:.2f} s, ready after {worst.ready_seconds:.2f} s "
              f"(the slowest of {RUNS})")  # fmt: skip
        print(f"  memory of the model's process until ready: {worst.peak_bytes / 1e6:.1f} MB, "
              f"{worst.peak_private_bytes / 1e6:.1f} MB of it private; {worst.peak_bytes / size:.2f} x the file, "
              f"{added / size:.2f} x added by loading")  # fmt: skip


if __name__ == "__main__":
    main()
