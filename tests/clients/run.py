"""Four clients, each in an environment of its own, ask `quantize serve` of a real small model twenty things and more.

    python -m tests.clients.run [ARTIFACT] [--only CLIENT] [--home FOLDER]

ARTIFACT is a GGUF artifact or file; by default the demo recipe's q8_0 is built first. It is served twice: as it is, and
as a copy whose chat template knows tools (SmolLM2-135M's does not), for the calls with tools. Environments are made
once, from PyPI and npm, below the cache. Prints a table and what failed; exit code 1 if anything did.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
MODEL = "smollm2-135m/q8_0"
TEMPLATE = HERE / "tools.jinja"


@dataclass(frozen=True)
class Client:
    """A client's script, and what its environment has."""

    name: str
    script: str
    packages: tuple[str, ...]


# litellm asks for mcp as soon as a request has tools, and does not install it.
CLIENTS = (
    Client("openai-python", "openai_python.py", ("openai==3.57.0",)),
    Client("openai-js", "openai_js.mjs", ("openai@7.59.0",)),
    Client("langchain", "langchain_client.py", ("langchain-openai==1.7.4",)),
    Client("litellm", "litellm_client.py", ("litellm==1.106.2", "mcp==2.3.0")),
)


def environment_of(client: Client, home: Path) -> Path:
    """The folder of a client's packages; made if it is not there."""
    folder = home / "-".join((client.name, *client.packages)).replace("/", "_")
    done = folder / ".done"
    if not done.is_file():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if client.script.endswith(".mjs"):
            (folder / "package.json").write_text('{"private": true}')
            subprocess.run(
                ["npm", "install", "--silent", "--no-fund", "--no-audit", *client.packages], cwd=folder, check=True
            )
        else:
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
            subprocess.run([folder / "bin" / "pip", "install", "--quiet", *client.packages], check=True)
        done.touch()
    return folder


def ask(client: Client, home: Path, plain: str, tools: str) -> dict[str, Any]:
    """What a client's script reports."""
    folder = environment_of(client, home)
    command = [folder / "bin" / "python", HERE / client.script]
    if client.script.endswith(".mjs"):
        command = [Path(shutil.which("node") or "node"), HERE / client.script]
    given = {"PLAIN_URL": plain, "TOOLS_URL": tools, "CLIENT_MODEL": MODEL, "CLIENT_HOME": str(folder)}
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OPENAI_", "PYTHONPATH"))}
    done = subprocess.run(command, env={**kept, **given}, capture_output=True, text=True, timeout=900, check=False)
    last = done.stdout.strip().rpartition("\n")[2]
    if not last.startswith("{"):
        sys.exit(f"{client.name} ended without a report (exit {done.returncode}):\n{done.stdout}\n{done.stderr}")
    report: dict[str, Any] = json.loads(last)
    return report


@contextmanager
def serving(path: Path | str, folder: Path) -> Iterator[str]:
    """The address of a gateway that is ready."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    options = ["--port", str(port), "--device", "cpu", "--context", "1024", "--concurrency", "4"]
    with open(folder / f"serve-{port}.log", "wb") as log:
        command = [sys.executable, "-m", "quantize", "serve", f"{MODEL}={path}", *options]
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    try:
        for _ in range(1200):
            if process.poll() is not None:
                sys.exit(f"quantize serve {path} ended: see {folder}")
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5).close()
                break
            except OSError:
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


def weights_of(artifact: str | None, folder: Path) -> Path:
    """The GGUF file to serve."""
    if artifact is not None and Path(artifact).is_file():
        return Path(artifact)
    from quantize.store.store import Store

    store = Store(Path(os.environ.get("QUANTIZE_STORE", "artifacts")))
    if artifact is None:
        store = Store(folder / "artifacts")
        words = ["--only", "q8_0", "--no-eval", "--quiet", "--store", str(store.root)]
        command = [sys.executable, "-m", "quantize", "build", str(ROOT / "recipes" / "smollm2-135m.yaml"), *words]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (path,) = store.find(artifact or MODEL).folder.glob("*.gguf")
    return path


def with_tools(weights: Path, folder: Path) -> Path:
    """A copy of a GGUF file whose chat template knows tools."""
    target = folder / "with-tools.gguf"
    target.unlink(missing_ok=True)
    tool = Path(sys.executable).parent / "gguf-new-metadata"
    command = [tool, "--chat-template", TEMPLATE.read_text(), weights, target]
    subprocess.run(command, check=True, capture_output=True)
    return target


def run(artifact: str | None, home: Path, only: str | None = None) -> list[dict[str, Any]]:
    """What each client reports."""
    home.mkdir(parents=True, exist_ok=True)
    weights = weights_of(artifact, home)
    with ExitStack() as stack:
        plain = stack.enter_context(serving(weights, home))
        tools = stack.enter_context(serving(with_tools(weights, home), home))
        return [ask(client, home, plain, tools) for client in CLIENTS if only in (None, client.name)]


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", nargs="?")
    parser.add_argument("--only", choices=[client.name for client in CLIENTS])
    parser.add_argument("--home", type=Path, default=Path.home() / ".cache" / "quantize-clients")
    options = parser.parse_args()
    reports = run(options.artifact, options.home, options.only)
    failed = 0
    for report in reports:
        good = sum(item["ok"] for item in report["calls"])
        failed += len(report["calls"]) - good
        print(f"{report['client']:<32} {good} of {len(report['calls'])} calls")
        for item in report["calls"]:
            if not item["ok"]:
                print(f"  {item['call']}: {item['said']}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
