"""What the documents say of the gateway is what it does: README's curl lines run, docs name every route and option."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.serve.conftest import Running

ROOT = Path(__file__).parent.parent.parent
CURL = shutil.which("curl")


def curl_lines() -> list[str]:
    """Every curl command of README, continued lines joined."""
    (block,) = re.findall(r"```sh\n(curl.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return [line for line in block.replace("\\\n", " ").splitlines() if line]


def run_line(line: str, port: int) -> str:
    """What a line prints, asked of a gateway on another port."""
    here = line.replace("127.0.0.1:8000", f"127.0.0.1:{port}").replace("curl ", "curl --fail-with-body ", 1)
    done = subprocess.run(["bash", "-c", here], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout
    return done.stdout


def check_lines(port: int) -> None:
    """Each line gets the answer that its address promises."""
    lines = curl_lines()
    assert len(lines) == 6
    for line in lines:
        text = run_line(line, port)
        if '"stream": true' in line:
            assert text.endswith("data: [DONE]\n\n")
            continue
        answer = json.loads(text)
        if "/v1/chat/completions" in line:
            assert answer["choices"][0]["message"]["content"]
        elif "/chat" in line or "/v1/generate" in line:
            assert answer["answer"]
            assert set(answer) == {"answer", "model", "runtime", "latency_ms", "memory_rss_mb", "trace_id"}
        else:
            assert answer.get("status") == "ready" or answer["object"] == "list"


@pytest.mark.skipif(CURL is None, reason="curl is not installed")
def test_the_readmes_curl_lines_run(gateway: Running) -> None:
    check_lines(gateway.port)


def test_the_page_of_the_gateway_names_every_route(gateway: Running) -> None:
    text = (ROOT / "docs" / "gateway.md").read_text()
    for path in gateway.ask("GET", "/openapi.json").json["paths"]:
        assert f" {path}`" in text, path


def test_every_option_it_names_is_there() -> None:
    from quantize.cli.serve import command

    options = {name for parameter in command.params for name in parameter.opts}
    printed = (ROOT / "quantize" / "serve" / "handover.py").read_text()
    options |= set(re.findall(r'"(--[a-z-]+)"', printed))  # of the programs that --print writes for
    named = set(re.findall(r"--[a-z][a-z-]+", (ROOT / "docs" / "gateway.md").read_text()))
    assert named <= options
