"""The parts of gpu_acceptance that run finished models: on a GPU, or in rehearsal on a CPU.

formats: one variant of each format, built on the device, opened there in its own runtime, once as evaluation does and
once as the gateway does; its log-probabilities against those of our dequantized weights in float32 on the CPU. serving:
a GGUF and an AWQ variant behind `quantize serve`, alone and with eight clients at once, and its memory against the
estimate. kill: the model's process is killed while it answers; the gateway says so, starts another, and that one
answers as before, in no more memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import quantize
from quantize.events import ListReporter
from quantize.formats import find_format
from quantize.runtimes.base import ModelRef
from quantize.runtimes.devices import CPU, check_name
from quantize.runtimes.looking import find_gpus
from quantize.runtimes.served import Serving
from quantize.serve.preflight import place
from quantize.serve.targets import LocalTarget, resolve
from quantize.store.artifact import Artifact
from quantize.store.store import Store
from quantize.system.gpus import Gpus
from quantize.system.machine import detect, resident_bytes
from quantize.system.process import run_step
from quantize.testing import TinyModel, make_checkpoint, write_recipe
from tests.contract_steps import compute
from tests.serving import post, serving
from tools.acceptance_lines import Line

PARTS = ("formats", "serving", "kill")
VARIANTS: tuple[dict[str, Any], ...] = (
    {"format": "gguf", "type": "Q4_K_M"},
    {"format": "gguf", "type": "Q8_0"},
    {"format": "awq", "group_size": 64},
    {"format": "gptq", "group_size": 64},
    {"format": "bitsandbytes", "type": "nf4"},
    {"format": "bitsandbytes", "type": "int8"},
)
SERVED = VARIANTS[1:3]
CALIBRATION = {"dataset": "text.txt", "samples": 8, "sequence_length": 64, "minimum_tokens": 16}
MOST_OF_THE_WAY, LEAST_NATS = 0.1, 4e-3  # 8 bits are so near that the runtime's own numbers (bfloat16, int8) are more
CLIENTS, ROUNDS, ANSWER = 8, 3, 48
LOAD_SECONDS = 400  # with gptqmodel's kernels compiled for the first time
BACK_SECONDS = 120
MORE_BYTES = 256 << 20  # of a second process, than of the first


def run_part(part: str, device: str, model: Path | None) -> list[Line]:
    """One of PARTS, in a folder that is removed afterwards. model: a checkpoint's folder; None makes a small one."""
    device = check_name(device)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        source = model or make_checkpoint(root / "model", TinyModel(512, 1024, 4, 8, 4))
        variants = VARIANTS if part == "formats" else SERVED
        store = built(root, source, variants, device)
        if part == "formats":
            return formats(store, source, device)
        return (serve_many if part == "serving" else kill)(store, root, device)


def built(root: Path, source: Path, variants: Sequence[dict[str, Any]], device: str) -> Store:
    """A store with these variants of a checkpoint."""
    paragraphs = [f"Paragraph {number}: the quick brown fox jumps over the lazy dog. " * 3 for number in range(12)]
    (root / "text.txt").write_text("\n\n".join(paragraphs), encoding="utf-8")
    recipe = write_recipe(root / "recipe.yaml", source, variants, calibration=CALIBRATION)
    made = quantize.build(
        recipe, store=root / "store", cache=root / "cache", evaluate=False, device=device, reporter=ListReporter()
    )
    failed = [f"{item.variant}: {item.error}" for item in made if item.error is not None]
    if failed:
        raise SystemExit("; ".join(failed))
    return Store(root / "store")


# --- formats ----------------------------------------------------------------------------------------------------------


def formats(store: Store, source: Path, device: str) -> list[Line]:
    """Each artifact in its runtime on the device."""
    return [line for artifact in store.artifacts() for line in computed(artifact, source, device)]


def computed(artifact: Artifact, source: Path, device: str) -> Iterator[Line]:
    """How near one artifact comes to its own weights, and whether both ways to run it answer alike."""
    variant, kind = artifact.manifest.variant, find_format(artifact.manifest.format)
    main = kind.layout.main_file(artifact.folder)
    model = ModelRef(artifact.folder, kind.name, main.name if main else None)
    started = time.perf_counter()
    try:
        found = run_step(f"computing {variant}", ListReporter(), compute, model, source, device)
    except quantize.errors.QuantizeError as exc:
        yield Line(f"{variant}: loads", exc.message, "loads", False)
        return
    seconds = time.perf_counter() - started
    name = f"{found.runtime[0]}{f', {found.kernel}' if found.kernel else ''}"
    yield Line(f"{variant}: loads", f"{name}, twice in {seconds:.1f} s", "loads", True)
    most = max(MOST_OF_THE_WAY * found.from_source, LEAST_NATS)
    near = f"{found.from_weights:.2e} (from the source {found.from_source:.2e})"
    yield Line(f"{variant}: KL from our weights", near, f"< {most:.2e}", found.from_weights < most)
    alike = found.answered == found.served
    yield Line(f"{variant}: measured and served", "answer alike" if alike else "answer otherwise", "alike", alike)
    if found.vram_bytes is not None:
        least = artifact.manifest.weights_bytes
        yield Line(
            f"{variant}: memory of the card", f"{found.vram_bytes / 1e6:.0f} MB", f"{least / 1e6:.0f} MB of weights",
            found.vram_bytes >= 0.5 * least,
        )  # fmt: skip


# --- serving ----------------------------------------------------------------------------------------------------------


def serve_many(store: Store, root: Path, device: str) -> list[Line]:
    """Each artifact alone behind a gateway."""
    return [line for artifact in store.artifacts() for line in served(artifact, store, root, device)]


def served(artifact: Artifact, store: Store, root: Path, device: str) -> Iterator[Line]:
    """Requests one after the other, then eight at once."""
    variant = artifact.manifest.variant
    prompts = [f"Client {number} asks for a story about a fox." for number in range(CLIENTS)]
    before, loading = gpu_bytes(), time.perf_counter()
    with gateway(artifact, store, root, device) as url:
        loading = time.perf_counter() - loading
        started = time.perf_counter()
        alone = [complete(url, prompt) for prompt in prompts]
        single = time.perf_counter() - started
        started = time.perf_counter()
        with ThreadPoolExecutor(CLIENTS) as pool:
            together = [*pool.map(lambda prompt: complete(url, prompt), prompts * ROUNDS)]
        several = time.perf_counter() - started
        taken = resident_bytes(model_process(root)) if device == CPU else gpu_bytes() - before
    yield Line(f"{variant}: ready", f"after {loading:.1f} s")
    whole = sum(item is not None for item in (*alone, *together))
    expected = CLIENTS * (1 + ROUNDS)
    yield Line(f"{variant}: whole answers", f"{whole} of {expected}", f"{expected}", whole == expected)
    same = sum(one == other for one, other in zip(together, alone * ROUNDS, strict=True))
    yield Line(f"{variant}: the same text as alone", f"{same} of {len(together)}", "batches may change bits")
    rates = (tokens_of(alone) / single, tokens_of(together) / several)
    yield Line(f"{variant}: one client", f"{rates[0]:.0f} tokens/s")
    yield Line(f"{variant}: {CLIENTS} clients at once", f"{rates[1]:.0f} tokens/s, {rates[1] / rates[0]:.1f} times")
    fit = estimated(artifact, store, device)
    yield Line(
        f"{variant}: memory", f"{taken / 1e6:.0f} MB",
        f"{fit.expected_bytes / 1e6:.0f} MB, {fit.upper_bytes / 1e6:.0f} at most", taken <= fit.upper_bytes,
    )  # fmt: skip


def estimated(artifact: Artifact, store: Store, device: str) -> Any:
    """What the preflight of the gateway says of it."""
    target = resolve(artifact.ref, store)
    assert isinstance(target, LocalTarget)
    wanted = Serving(context_of(artifact), CLIENTS, device)
    gpus = find_gpus(target.kind, device)
    return place(target, wanted, detect(), gpus, store, force=True).verdict


def context_of(artifact: Artifact) -> int:
    """Tokens of a sequence."""
    kind = find_format(artifact.manifest.format)
    return min(1024, kind.layout.measure(kind.model_path(artifact.folder)).shape.max_context)


@contextlib.contextmanager
def gateway(artifact: Artifact, store: Store, root: Path, device: str) -> Iterator[str]:
    """`quantize serve` with one artifact, ready; its address."""
    options = {"store": store.root, "device": device, "context": context_of(artifact), "concurrency": CLIENTS,
               "queue": 4 * CLIENTS}  # fmt: skip
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    with serving(root, f"m={artifact.ref}", *words, seconds=LOAD_SECONDS) as url:
        yield url


def complete(url: str, prompt: str) -> dict[str, Any] | None:
    """The text and the number of tokens of one greedy answer; None where there is none."""
    body = {"model": "m", "prompt": prompt, "max_tokens": ANSWER, "temperature": 0}
    try:
        answer = post(url, "/v1/completions", body)
    except (OSError, ValueError):
        return None
    return {"text": answer["choices"][0]["text"], "tokens": answer["usage"]["completion_tokens"]}


def tokens_of(answers: Sequence[dict[str, Any] | None]) -> int:
    """Of all answers together."""
    return sum(item["tokens"] for item in answers if item is not None)


def gpu_bytes() -> int:
    """In use on all GPUs that are seen, by their driver."""
    return sum(gpu.used_bytes for gpu in Gpus().found())


def model_process(root: Path) -> int:
    """Of the model that was started last, by the gateway's log."""
    lines = (root / "serve.log").read_text(encoding="utf-8").splitlines()
    started = [data for line in lines if line.startswith("{") and (data := json.loads(line)).get("pid")]
    return int([data for data in started if data.get("event") == "engine_starting"][-1]["pid"])


# --- kill -------------------------------------------------------------------------------------------------------------


def kill(store: Store, root: Path, device: str) -> list[Line]:
    """Each artifact alone behind a gateway."""
    return [line for artifact in store.artifacts() for line in killed(artifact, store, root, device)]


def killed(artifact: Artifact, store: Store, root: Path, device: str) -> Iterator[Line]:
    """The model's process ends by SIGKILL while it answers."""
    variant, prompt = artifact.manifest.variant, "Tell of a fox."

    def memory() -> int:
        return resident_bytes(model_process(root)) if device == CPU else gpu_bytes()

    with gateway(artifact, store, root, device) as url:
        expected, before, first = complete(url, prompt), memory(), model_process(root)
        with ThreadPoolExecutor(CLIENTS) as pool:
            asked = [pool.submit(complete, url, f"{number} {prompt}") for number in range(CLIENTS)]
            time.sleep(0.05)
            os.kill(first, signal.SIGKILL)
            noticed = until(lambda: not is_ready(url))
            lost = sum(item.result() is None for item in asked)
        back = until(lambda: is_ready(url))
        again, after, second = complete(url, prompt), memory(), model_process(root)
    yield Line(f"{variant}: not ready", f"after {noticed:.2f} s", "2 s at most", noticed < 2)
    yield Line(f"{variant}: answers lost", f"{lost} of {CLIENTS}")
    yield Line(f"{variant}: ready again", f"after {back:.1f} s", f"{BACK_SECONDS} s at most", back < BACK_SECONDS)
    yield Line(f"{variant}: in another process", str(second != first), "True", second != first)
    same = again == expected and again is not None
    yield Line(f"{variant}: answers as before", str(same), "True", same)
    yield Line(
        f"{variant}: memory of the second", f"{after / 1e6:.0f} MB", f"{(before + MORE_BYTES) / 1e6:.0f} MB at most",
        after <= before + MORE_BYTES,
    )  # fmt: skip


def is_ready(url: str) -> bool:
    """Whether /ready says so."""
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=5) as answer:
            return bool(answer.status == 200)
    except urllib.error.URLError:
        return False


def until(check: Any, seconds: float = BACK_SECONDS) -> float:
    """How long it takes until a check holds; `seconds` where it does not."""
    started = time.perf_counter()
    while not check() and time.perf_counter() - started < seconds:
        time.sleep(0.02)
    return time.perf_counter() - started
