"""Serving and measuring on a GPU of llama.cpp's that is there without any: Vulkan, on Mesa's lavapipe (ci/lavapipe).

Held: where layers are, partly and wholly; what is said of it; a device that is too small. Not: a kernel of CUDA's, a
driver, a speed. QUANTIZE_LAVAPIPE is the folder `site` that ci/lavapipe makes; without it, these are skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Built
from tests.serve.rewritten import rewritten

ROOT = Path(__file__).parent.parent.parent
SITE = os.environ.get("QUANTIZE_LAVAPIPE", "")
BLOCKS = 30

pytestmark = [pytest.mark.lavapipe, pytest.mark.skipif(not SITE, reason="QUANTIZE_LAVAPIPE names no llama.cpp")]

MEASURE = """
import sys
from pathlib import Path
import numpy as np
from quantize.runtimes.devices import DevicePlace
from quantize.runtimes.llama_cpp.model import BatchToken, ModelSettings, OpenModel
rows = []
for place in (DevicePlace(), DevicePlace("vulkan:0"), DevicePlace("vulkan:0", 10)):
    model = OpenModel(Path(sys.argv[1]), ModelSettings(64, threads=1, flash_attention=False, place=place))
    model.decode(BatchToken(token, index, 0, True) for index, token in enumerate(range(5, 37)))
    scores = model.logits(32).astype(np.float64)
    scores -= scores.max(axis=1, keepdims=True)
    rows.append(scores - np.log(np.exp(scores).sum(axis=1, keepdims=True)))
    model.close()
for other in rows[1:]:
    print(float((np.exp(rows[0]) * (rows[0] - other)).sum(axis=1).mean()))
"""


def environment(**more: str) -> dict[str, str]:
    """With the other llama.cpp in front, and a device that ggml leaves out unless it is named, being a processor."""
    return {**os.environ, "PYTHONPATH": f"{SITE}:{ROOT}", "GGML_VK_VISIBLE_DEVICES": "0", **more}


@pytest.fixture(scope="module")
def weights(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with thirty blocks: 31 layers, the output among them."""
    return rewritten(weights, tmp_path_factory.mktemp("deep") / "deep.gguf", blocks=BLOCKS)


class Served:
    """`quantize serve` in a process of its own, with its log so far."""

    def __init__(self, weights: Path, *options: str, **variables: str) -> None:
        command = [sys.executable, "-m", "quantize", "serve", f"deep={weights}", "--port", "0", "--context", "64"]
        self.process = subprocess.Popen(
            [*command, "--concurrency", "1", *options],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            env=environment(**variables),
        )
        self.log: list[Any] = []
        self.url = self.until("listening")["url"]

    def until(self, *events: str) -> dict[str, Any]:
        """The next line of one of these events."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(json.loads(line) if line.startswith("{") else line.rstrip())
            if isinstance(self.log[-1], dict) and self.log[-1]["event"] in events:
                found: dict[str, Any] = self.log[-1]
                return found
            if isinstance(self.log[-1], dict) and self.log[-1]["event"] == "engine_failed":
                break
        pytest.fail("\n".join(map(str, self.log)))

    def ask(self, path: str, body: Any = None) -> tuple[int, Any]:
        """Status and JSON."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}{path}", data, {"content-type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as exc:
            return exc.code, json.load(exc)


@pytest.fixture
def serve(weights: Path) -> Iterator[Callable[..., Served]]:
    """serve(options…, NAME=value…) starts one; all end together, and leave with 0."""
    running: list[Served] = []

    def run(*options: str, **variables: str) -> Served:
        running.append(Served(weights, *options, **variables))
        return running[-1]

    yield run
    for item in running:
        item.process.terminate()
        item.process.communicate(timeout=60)
        assert item.process.returncode == 0


def answers(served: Served) -> None:
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 3, "temperature": 0}
    status, answer = served.ask("/v1/chat/completions", body)
    assert status == 200
    assert answer["usage"]["completion_tokens"] >= 1


@pytest.mark.parametrize(
    ("options", "layers"),
    [((), {"Vulkan0": BLOCKS + 1}), (("--gpu-layers", "10"), {"CPU": BLOCKS - 9, "Vulkan0": 10})],
    ids=["all", "ten of thirty"],
)
def test_layers_are_where_they_were_asked_to_be(
    serve: Callable[..., Served], options: tuple[str, ...], layers: dict[str, int]
) -> None:
    served = serve("--device", "vulkan:0", *options)
    served.until("engine_ready")
    status, told = served.ask("/ready")
    model = told["models"]["deep"]
    assert (status, model["device"], model["devices"], model["warnings"]) == (200, "vulkan:0", layers, [])
    answers(served)
    status, health = served.ask("/health")
    assert status == 200
    assert "llvmpipe" in health["memory"]
    served.process.terminate()
    assert served.process.stderr is not None
    served.log += [json.loads(line) if line.startswith("{") else line.rstrip() for line in served.process.stderr]
    assert not [line for line in served.log if isinstance(line, dict) and line["event"] == "engine_warning"]


def test_auto_takes_it(serve: Callable[..., Served]) -> None:
    served = serve()
    served.until("engine_ready")
    assert served.ask("/ready")[1]["models"]["deep"]["devices"] == {"Vulkan0": BLOCKS + 1}


def test_a_device_that_is_too_small(serve: Callable[..., Served]) -> None:
    """The device gives no buffer of more than 16 KiB: the model is not loaded, the gateway runs on and says why."""
    limit = {"GGML_VK_FORCE_MAX_BUFFER_SIZE": "16384", "GGML_VK_FORCE_MAX_ALLOCATION_SIZE": "16384"}
    served = serve("--device", "vulkan:0", **limit)
    served.until("engine_failed")
    status, told = served.ask("/ready")
    assert status == 503
    assert told["models"]["deep"]["state"] == "failed"
    assert served.ask("/health")[0] == 200


def test_an_artifact_is_verified_on_it(built: Built) -> None:
    """Every check that a build must pass, by the kernels of that device."""
    words = ["verify", "tiny/q8_0", "--device", "vulkan:0", "--json", "--store", str(built.store.root)]
    command = [sys.executable, "-m", "quantize", *words]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (facts,) = json.loads(done.stdout)
    assert (facts["device"], facts["divergence"] < facts["divergence_elsewhere"]) == ("vulkan:0", True)


def test_an_offloaded_file_answers_as_on_the_processor(weights: Path) -> None:
    command = [sys.executable, "-c", MEASURE, str(weights)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    wholly, partly = map(float, done.stdout.split())
    assert 0 <= wholly < 0.01
    assert 0 <= partly < 0.01
