"""The command, real servers for real artifacts, and the memory of their processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from quantize.bench import rss as memory
from quantize.bench import server
from quantize.bench.client import parse_endpoint
from quantize.bench.prompts import Shape
from quantize.bench.result import BenchResult
from quantize.bench.rss import MemoryWatch
from quantize.bench.server import choose, free_port, running
from quantize.bench.session import LoadSettings, bench_url
from quantize.errors import BenchError, UsageError
from quantize.events import ListReporter
from quantize.store.artifact import Artifact, commit, update_measurements
from quantize.store.store import Store
from quantize.system.gpus import Gpus
from tests.bench.servers import FakeServer, serving
from tests.conftest import Built, Run

QUICK = ("--shape", "40:6", "--requests", "4", "--concurrency", "1,2")


@pytest.fixture(scope="module")
def llama_server(built: Built) -> Iterator[server.Server]:
    """llama-cpp-python's own server with the tiny model in Q8_0."""
    artifact = built.store.find("tiny/q8_0")
    with running(artifact, "llama-cpp-python", context=256, threads=1, concurrency=1) as running_server:
        yield running_server


def test_a_real_server_gives_the_table(llama_server: server.Server, run: Run) -> None:
    result = run("bench", llama_server.endpoint.root, *QUICK, "--shape", "100:12")
    assert result.exit_code == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if " x " in line]
    assert [line.split()[:5] for line in lines] == [
        ["40:6", "40", lines[0].split()[2], "x", "1"],
        ["40:6", "40", lines[1].split()[2], "x", "2"],
        ["100:12", "100", lines[2].split()[2], "x", "1"],
        ["100:12", "100", lines[3].split()[2], "x", "2"],
    ]
    assert all("0.0%" in line for line in lines)
    assert "RAM" in result.stdout  # the process behind the port was found
    assert "tiny-Q8_0.gguf, uvicorn" in result.stdout


def test_a_real_server_measured(llama_server: server.Server) -> None:
    endpoint = parse_endpoint(llama_server.endpoint.root, headers={}, extra={})
    result = bench_url(endpoint, LoadSettings((Shape("a", 60, 6),), (1,), requests=4), ListReporter())
    cell = result.cells[0]
    assert (cell.errors, cell.succeeded, result.tokens_counted_by) == ({}, 4, "chunks")
    assert cell.first_token is not None
    assert cell.latency is not None
    assert 0 < cell.first_token.p50 <= cell.latency.p50 <= cell.latency.p95 <= cell.latency.p99
    assert cell.mean_output_tokens is not None
    assert 0 < cell.mean_output_tokens <= 6
    assert result.ram is not None
    resident = psutil.Process(llama_server.pid).memory_info().rss
    assert result.ram.before_load_bytes <= result.ram.peak_bytes
    assert result.ram.peak_bytes == pytest.approx(resident, rel=0.2)
    assert result.measured_with.gpus == [] or result.vram is not None


def test_an_artifact_is_served_measured_and_kept(built: Built, tmp_path: Path, run: Run) -> None:
    store = built.copy(tmp_path / "own")
    before = store.find("tiny/q8_0").measurements()
    children = set(psutil.Process().children(recursive=True))
    result = run("bench", "tiny/q8_0", *QUICK, "--server", "llama-cpp-python", "--store", store.root, "--json")
    assert result.exit_code == 0, result.stderr
    printed = json.loads(result.stdout)
    artifact = store.find("tiny/q8_0")
    kept = artifact.measurements()
    assert {key: value for key, value in kept.items() if key != "bench"} == before != {}
    bench = BenchResult.model_validate(kept["bench"])
    assert bench.as_json() == printed
    assert bench.ready_seconds
    assert bench.error_rate == 0
    assert (bench.measured_with.server, bench.measured_with.context) == ("llama_cpp.server", 256)
    assert bench.measured_with.runtime["llama-cpp-python"]
    assert str(tmp_path) not in json.dumps(kept["bench"])
    assert set(psutil.Process().children(recursive=True)) <= children  # its server is gone
    assert run("verify", "tiny/q8_0", "--store", store.root).exit_code == 0


def test_our_gateway_is_measured_too(built: Built, tmp_path: Path, run: Run) -> None:
    store = built.copy(tmp_path / "own")
    result = run("bench", "tiny/q8_0", *QUICK, "--server", "quantize", "--store", store.root)
    assert result.exit_code == 0, result.stderr
    kept = BenchResult.model_validate(store.find("tiny/q8_0").measurements()["bench"])
    assert (kept.error_rate, kept.tokens_counted_by) == (0, "usage")
    assert (kept.measured_with.server, kept.measured_with.concurrency) == ("quantize serve", 2)
    assert kept.ram is not None
    assert kept.cells[0].mean_prompt_tokens == pytest.approx(40, rel=0.2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_leaves_no_server(built: Built, number: signal.Signals) -> None:
    command = ["bench", "tiny/q8_0", "--server", "llama-cpp-python", "--requests", "100000", "--shape", "40:40"]
    arguments = [sys.executable, "-m", "quantize", *command, "--store", str(built.store.root)]
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while "warming up" not in process.stderr.readline():
            assert process.poll() is None
        (child,) = psutil.Process(process.pid).children()
        process.send_signal(number)
        assert process.wait(20) == 130
    assert not child.is_running()
    assert "bench" not in built.store.find("tiny/q8_0").measurements()


def test_measurements_are_replaced_whole(built: Built, tmp_path: Path) -> None:
    store = built.copy(tmp_path / "own")
    artifact = store.find("tiny/f16")
    names = sorted(item.name for item in artifact.folder.iterdir())
    update_measurements(store.root, artifact, {"bench": {"a": 1}})
    update_measurements(store.root, artifact, {"other": 2})
    assert artifact.measurements()["bench"] == {"a": 1}
    assert artifact.measurements()["other"] == 2
    assert sorted(item.name for item in artifact.folder.iterdir()) == names
    assert not (store.root / ".locks").exists()


def test_a_load_test_outlives_another_build_of_the_same_files(built: Built, tmp_path: Path) -> None:
    store = built.copy(tmp_path / "own")
    artifact = store.find("tiny/f16")
    again = Path(shutil.copytree(artifact.folder, store.root / "again"))
    update_measurements(store.root, artifact, {"bench": {"a": 1}})
    (again / "evaluation.md").write_text("Measured anew.")
    update_measurements(store.root, Artifact(again, artifact.manifest), {"build_seconds": 3})
    kept = commit(store.root, again, artifact.manifest)
    assert kept.folder == artifact.folder.resolve()
    assert kept.measurements()["bench"] == {"a": 1}
    assert kept.measurements()["build_seconds"] == 3
    assert not again.exists()


def test_a_server_that_does_not_start_says_why(built: Built, tmp_path: Path) -> None:
    store = built.copy(tmp_path / "own")
    artifact = store.find("tiny/f16")
    next(artifact.folder.glob("*.gguf")).write_bytes(b"GGUF, but nothing in it")
    with (
        pytest.raises(BenchError, match=r"llama_cpp.server ended with exit code 1(.|\n)*it said"),
        running(artifact, "llama-cpp-python", context=256, threads=1, concurrency=1),
    ):
        raise AssertionError("it can't have started")


def test_only_gguf_is_served_by_llama_cpp() -> None:
    assert choose("gguf", "llama-cpp-python") == "llama-cpp-python"
    assert choose("awq", "auto") == "quantize"
    with pytest.raises(UsageError, match="can't serve awq"):
        choose("awq", "llama-cpp-python")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["http://127.0.0.1:9"], 1, "no server at http://127.0.0.1:9/v1"),
        (["http://127.0.0.1:9/chat"], 1, "no server at http://127.0.0.1:9"),
        (["ftp://127.0.0.1"], 2, "is no URL of a server"),
        (["nothing/here"], 2, "no artifact or address 'nothing/here'"),
        (["http://127.0.0.1:9", "--concurrency", "0"], 2, "is no list of numbers above 0"),
        (["http://127.0.0.1:9", "--concurrency", ""], 2, "nothing to measure"),
        (["http://127.0.0.1:9", "--rate", "two"], 2, "is no list of numbers above 0"),
        (["http://127.0.0.1:9", "--shape", "huge"], 2, "'huge' is no shape"),
        (["http://127.0.0.1:9", "--requests", "0"], 2, "not in the range"),
        (["http://127.0.0.1:9", "--body", "[1]"], 2, "--body is no JSON object"),
        (["http://127.0.0.1:9", "--body", "{"], 2, "--body is no JSON"),
        (["http://127.0.0.1:9", "--api-key-env", "NO_SUCH_KEY"], 2, "the environment has no NO_SUCH_KEY"),
    ],
)
def test_wrong_use_is_said(arguments: list[str], code: int, message: str, run: Run) -> None:
    result = run("bench", *arguments)
    assert (result.exit_code, result.stdout) == (code, "")
    assert message in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("how", "message"),
    [("html", "no JSON"), ("401", "status 401.*\n.*--api-key-env"), ("503", "status 503"), ("drop", "Error")],
)
def test_a_server_of_something_else(how: str, message: str) -> None:
    class Other(FakeServer):
        async def _route(self, path, body, writer):  # type: ignore[no-untyped-def]
            return await self._answer(how, path, {}, writer)

    with serving(Other()) as other, pytest.raises(BenchError, match=message):
        bench_url(parse_endpoint(other.url, headers={}, extra={}), LoadSettings(timeout=1), ListReporter())


def test_nothing_but_failures_is_a_failure(run: Run) -> None:
    with serving(FakeServer(lambda _: "500")) as broken:
        result = run("bench", broken.url, *QUICK)
    assert result.exit_code == 1
    assert "100.0%" in result.stdout
    assert "no request succeeded: 8 x status 500" in result.stderr


def test_key_and_fields_are_sent(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUR_KEY", "secret-1")
    with serving(FakeServer()) as fake:
        extras = ("--api-key-env", "OUR_KEY", "--body", '{"ignore_eos": true}', "--model", "chosen")
        result = run("bench", fake.url, *QUICK, *extras)
    assert result.exit_code == 0, result.stderr
    assert all("authorization: bearer secret-1" in head.lower() for head in fake.headers)
    assert {(body["ignore_eos"], body["model"]) for body in fake.bodies} == {(True, "chosen")}
    assert "secret-1" not in result.stdout + result.stderr


def test_memory_of_a_process_and_its_children() -> None:
    code = "import subprocess, sys; block = bytearray(60_000_000); "
    child = f"{code} print('ready', flush=True); sys.stdin.read()"
    parent = f"{code} subprocess.run([sys.executable, '-c', {child!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == b"ready\n"
        with MemoryWatch(process.pid) as watch:
            watch.mark("after warm-up")
        process.stdin.close()
    use = watch.ram()
    assert use is not None
    assert 120e6 < use.peak_bytes < 200e6
    assert MemoryWatch(None).ram() is None


def test_gpu_memory_is_the_processes_or_else_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    class NvmlError(Exception):
        pass

    processes = [SimpleNamespace(pid=os.getpid(), usedGpuMemory=700), SimpleNamespace(pid=1, usedGpuMemory=50)]
    nvml = SimpleNamespace(
        NVMLError=NvmlError,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetComputeRunningProcesses=lambda handle: processes if handle == 0 else [],
        nvmlDeviceGetName=lambda handle: f"card {handle}",
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(total=8000, used=1000 + handle),
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    with MemoryWatch(os.getpid()) as watch:
        pass
    use = watch.vram()
    assert use is not None
    assert (use.scope, use.peak_bytes) == ("process", 700)
    processes.clear()  # as in a container, where the driver's process ids are other ones
    with MemoryWatch(os.getpid()) as watch:
        pass
    use = watch.vram()
    assert use is not None
    assert (use.scope, use.before_load_bytes) == ("device", 2001)

    def fail() -> None:
        raise NvmlError

    nvml.nvmlInit = fail
    assert not Gpus()


def test_where_a_server_is() -> None:
    with serving(FakeServer()) as fake:
        assert memory.listener(fake.port) == os.getpid()
    assert memory.listener(free_port()) is None
    assert memory.is_local("localhost")
    assert memory.is_local("127.0.0.5")
    assert not memory.is_local("192.0.2.1")


def test_without_the_extra_it_says_so() -> None:
    code = (
        "import sys; sys.modules['httpx2'] = None; from quantize.cli import main; main(['bench', 'http://127.0.0.1:9'])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 2
    assert "pip install 'quantize-models[bench]'" in result.stderr


def test_the_load_test_of_a_server_that_fails_on_purpose(run: Run) -> None:
    with serving(
        FakeServer(lambda number: "stall" if number % 20 == 0 else "drop" if number % 10 == 0 else "ok")
    ) as fake:
        options = ("--requests", "20", "--concurrency", "4", "--warm-up", "0", "--timeout", "1")
        result = run("bench", fake.url, "--shape", "30:4", *options)
    assert result.exit_code == 0, result.stderr
    (line,) = [line for line in result.stdout.splitlines() if " x 4 " in line]
    assert line.rstrip().endswith("10.0%   1 dropped, 1 stall")


def test_the_store_is_not_needed_for_a_url(run: Run, tmp_path: Path) -> None:
    with serving(FakeServer()) as fake:
        result = run("bench", fake.url, *QUICK, "--store", tmp_path / "none", "--json")
    assert json.loads(result.stdout)["error_rate"] == 0
    assert Store(tmp_path / "none").artifacts() == []
    assert not (tmp_path / "none").exists()
