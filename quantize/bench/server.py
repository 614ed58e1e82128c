"""A server of our own for an artifact, on a loopback port, for as long as it is measured.

In: an artifact, context, threads. Out: a running Server (its endpoint and process id), stopped at the end whatever
happens. `quantize serve` serves every format; llama-cpp-python's own server serves GGUF files and nothing else.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Literal

import httpx2

from quantize.bench.client import Endpoint
from quantize.errors import BenchError, MissingExtraError, UsageError
from quantize.formats import find_format, runtime_kind
from quantize.runtimes.base import runtime_version
from quantize.runtimes.llama_cpp.kind import LLAMA_CPP
from quantize.store.artifact import Artifact
from quantize.store.manifest import tool_versions

Kind = Literal["auto", "quantize", "llama-cpp-python"]
KINDS: tuple[Kind, ...] = ("auto", "quantize", "llama-cpp-python")
LLAMA_SERVER_MODULES = ("llama_cpp", "uvicorn", "fastapi", "sse_starlette", "starlette_context", "pydantic_settings")
READY_SECONDS = 600.0
STOP_SECONDS = 15.0
POLL_SECONDS = 0.1
LOG_LINES = 12


@dataclass(frozen=True)
class Server:
    """A server that answers. name: what runs; runtime: versions; ready_seconds: from its start to its first answer."""

    endpoint: Endpoint
    pid: int
    name: str
    runtime: dict[str, str]
    context: int
    threads: int
    concurrency: int
    ready_seconds: float


@dataclass(frozen=True)
class _Plan:
    name: str
    command: list[str]
    ready_path: str
    runtime: dict[str, str]
    concurrency: int


@contextlib.contextmanager
def running(artifact: Artifact, kind: Kind, *, context: int, threads: int, concurrency: int) -> Iterator[Server]:
    """Start a server for an artifact and stop it at the end. concurrency: answers that it works on at once.

    Raises UsageError (a kind that can't serve this format), MissingExtraError, BenchError (it ends, or never answers).
    """
    port = free_port()
    plan = _plan(artifact, kind, port, context, threads, concurrency)
    with _terminable(), tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        start = time.perf_counter()
        process = subprocess.Popen(
            plan.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=os.name == "posix"
        )
        try:
            root = f"http://127.0.0.1:{port}"
            _wait(process, root + plan.ready_path, plan.name, log)
            ready = time.perf_counter() - start
            endpoint = Endpoint(f"{root}/v1", "openai")
            yield Server(endpoint, process.pid, plan.name, plan.runtime, context, threads, plan.concurrency, ready)
        finally:
            _stop(process)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end the block as Ctrl-C does, so that no server is left behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def free_port() -> int:
    """A TCP port on the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def choose(format: str, kind: Kind) -> Literal["quantize", "llama-cpp-python"]:
    """The server for a format. Raises UsageError or MissingExtraError."""
    in_llama_cpp = runtime_kind(format).name == LLAMA_CPP.name
    if kind == "llama-cpp-python" and not in_llama_cpp:
        raise UsageError(f"llama-cpp-python's server can't serve {format}", hint="use --server quantize")
    if kind != "auto":
        return kind
    gateway = _installed(("fastapi", "uvicorn"))
    if gateway or not in_llama_cpp:
        return "quantize"
    return "llama-cpp-python"


def _plan(artifact: Artifact, kind: Kind, port: int, context: int, threads: int, concurrency: int) -> _Plan:
    chosen = choose(artifact.manifest.format, kind)
    address = ["--host", "127.0.0.1", "--port", str(port)]
    if chosen == "llama-cpp-python":
        if not _installed(LLAMA_SERVER_MODULES):
            hint = "CMAKE_ARGS=-DGGML_NATIVE=OFF pip install 'llama-cpp-python[server]', or use --server quantize"
            raise UsageError("llama-cpp-python's server is not installed", hint=hint)
        model = [
            "--model",
            str(find_format(artifact.manifest.format).layout.main_file(artifact.folder)),
            "--n_ctx",
            str(context),
            "--n_threads",
            str(threads),
        ]
        options = ["--logits_all", "false", "--interrupt_requests", "false", "--verbose", "false"]
        command = [sys.executable, "-m", "llama_cpp.server", *address, *model, *options]
        return _Plan("llama_cpp.server", command, "/v1/models", _runtime(artifact.manifest.format), 1)
    if not _installed(("fastapi", "uvicorn")):
        raise MissingExtraError(f"a server for {artifact.manifest.format}", "serve")
    command = [sys.executable, "-m", "quantize", "serve", str(artifact.folder), *address]
    command += ["--context", str(context), "--threads", str(threads), "--concurrency", str(concurrency)]
    command += ["--queue", "1000", "--timeout", "3600", "--log-level", "warning"]
    return _Plan("quantize serve", command, "/ready", _runtime(artifact.manifest.format), concurrency)


def _runtime(format: str) -> dict[str, str]:
    """Package -> version of what answers."""
    kind = runtime_kind(format)
    runtime_version(kind, f"serving a {format} model")
    return tool_versions((*kind.packages, "uvicorn"))


def _installed(modules: tuple[str, ...]) -> bool:
    return all(importlib.util.find_spec(name) is not None for name in modules)


def _wait(process: subprocess.Popen[bytes], url: str, name: str, log: IO[str]) -> None:
    end = time.monotonic() + READY_SECONDS
    with httpx2.Client(trust_env=False, timeout=5.0) as client:
        while time.monotonic() < end:
            if process.poll() is not None:
                raise BenchError(f"{name} ended with exit code {process.returncode}", hint=_tail(log))
            with contextlib.suppress(httpx2.HTTPError):
                if client.get(url).status_code == 200:
                    return
            time.sleep(POLL_SECONDS)
    raise BenchError(f"{name} was not ready within {READY_SECONDS:.0f} s", hint=_tail(log))


def _tail(log: IO[str]) -> str:
    log.seek(0)
    lines = [line.rstrip() for line in log if line.strip()]
    return "\n  ".join(["it said:", *lines[-LOG_LINES:]]) if lines else "it said nothing"


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the server and what it started; kill what does not listen."""
    for number in (signal.SIGTERM, signal.SIGKILL if os.name == "posix" else signal.SIGTERM):
        if process.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.name == "posix":
                os.killpg(process.pid, number)
            else:
                process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
