"""Runs a GGUF file in llama.cpp and says whether it is what its source is: every check that a build must pass.

In: a file, an Expected. Out: plain facts for measurements.json, or VerifyError. Runs in a worker process. What is
compared with what is in formats/gguf/check.py; here are the calls into llama.cpp.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from quantize.errors import CheckpointError, VerifyError
from quantize.events import Reporter
from quantize.files.gguf import GgufFile
from quantize.files.gguf_split import read_model
from quantize.formats.gguf import check as gguf_check
from quantize.formats.gguf.source import PROBE_TOKENS, Expected, load_tokenizer
from quantize.model.checkpoint import Checkpoint
from quantize.runtimes.devices import ON_CPU, DevicePlace
from quantize.runtimes.llama_cpp.model import BatchToken, ModelSettings, OpenModel
from quantize.runtimes.llama_cpp.vocabulary import source_ends

CONTEXT = 256
FEATURE = "verifying a GGUF file"
PROMPT = "The capital of France is Paris. " * 12
PROMPT_TOKENS = 48  # as real ones, long enough for the kernels of whole batches, which begin at 32
STEPS = 16  # of the probe's tokens, the last ones, are run one by one too
MOST_STEP_DIVERGENCE = 0.02  # of that between other places: batches and single tokens round otherwise, no more
LARGE_BYTES = 1 << 30  # below it one thread is fast enough, and never waits on a busy machine's other cores


def try_out(
    reporter: Reporter, path: Path, tokens: int, threads: int, checkpoint: Checkpoint | None = None,
    expected: Expected | None = None, place: DevicePlace = ON_CPU,
) -> dict[str, Any]:  # fmt: skip
    """Load a GGUF file with every tensor checked, hold it against its source, and generate greedily twice.

    place: where its layers are; llama.cpp's kernels of that device are then those that must compute the same.

    Returns {"tokens": [ids], "load_seconds": s} and what was compared. Raises VerifyError: does not load, does not run,
    logits not finite, two runs differ, single tokens and batches differ, or it is not what the source is.
    """
    file = _header(path)
    start = time.perf_counter()
    trained = file.fields.get(f"{file.fields.get('general.architecture')}.context_length")
    room = min(CONTEXT, trained) if isinstance(trained, int) and trained > 0 else CONTEXT
    size = sum(tensor.size_bytes for tensor in file.tensors.values())
    settings = ModelSettings(
        room, threads=threads if size > LARGE_BYTES else 1, flash_attention=False, place=place,
        check_tensors=expected is None or gguf_check.is_finite(expected),
    )  # fmt: skip
    model = OpenModel(path, settings, feature=FEATURE)
    facts: dict[str, Any] = {"load_seconds": round(time.perf_counter() - start, 3)}
    try:
        if checkpoint is not None and expected is not None:
            gguf_check.compare_values(file, expected.tensors)
            gguf_check.compare_towers(path, expected)
            facts |= _compare(model, file, checkpoint, expected)
        first, second = (generate(model, path.name, min(tokens, room // 2)) for _ in range(2))
    finally:
        model.close()
    if first != second:
        raise VerifyError(f"{path.name}: two greedy runs differ ({first[:8]} and {second[:8]})")
    return {"tokens": first, **facts}


def _header(path: Path) -> GgufFile:
    """The header. Raises VerifyError, in the words of llama.cpp where it does not load the file either."""
    try:
        return read_model(path)
    except CheckpointError as exc:
        OpenModel(path, ModelSettings(16, threads=1), feature=FEATURE).close()
        raise VerifyError(exc.message, hint=exc.hint) from exc


def _compare(model: OpenModel, file: GgufFile, checkpoint: Checkpoint, expected: Expected) -> dict[str, Any]:
    name = file.path.name
    found = [model.tokenize(line, special=True, start=False) for line in expected.lines]
    rules = file.fields.get("tokenizer.ggml.pre")
    facts = gguf_check.compare_tokens(name, rules, expected, found, _decoder(checkpoint))
    ends = (number for number in source_ends(checkpoint.folder) if 0 <= number < model.vocabulary)
    facts |= gguf_check.compare_ends(file, checkpoint, frozenset(number for number in ends if model.ends(number)))
    facts |= _compare_probe(model, file, expected)
    return facts | ({"left_out": list(expected.left_out)} if expected.left_out else {})


def _decoder(checkpoint: Checkpoint) -> Callable[[Sequence[int]], str]:
    """Gives the text of token ids by the source's own tokenizer, which is loaded when it is first asked."""
    tokenizer = cache(lambda: load_tokenizer(checkpoint.folder))
    return lambda ids: str(tokenizer().decode(list(ids), clean_up_tokenization_spaces=False))


def _compare_probe(model: OpenModel, file: GgufFile, expected: Expected) -> dict[str, Any]:
    """The predictions for the probe: as one batch, its end token by token, and in the source."""
    name, probe = file.path.name, expected.probe[: min(PROBE_TOKENS, model.size)]
    batch = predictions(model, name, [probe])
    cut = max(0, len(probe) - STEPS)
    steps = predictions(model, name, [probe[:cut], *([token] for token in probe[cut:])])
    apart = gguf_check.median_divergence(batch[cut:], steps[cut:])
    if not apart <= MOST_STEP_DIVERGENCE * gguf_check.between_places(batch):
        raise VerifyError(
            f"{name}: llama.cpp computes {len(probe)} tokens at once otherwise than one by one ({apart:.3g} nats)",
            hint="this is a fault of llama.cpp on this processor: another llama-cpp-python, or another format, may do",
        )
    if expected.log_probs is None:
        return {"unmeasured": expected.unmeasured}
    return gguf_check.compare_predictions(name, gguf_check.lowest_bits(file), expected.log_probs[: len(probe)], batch)


def predictions(model: OpenModel, name: str, parts: Sequence[Sequence[int]]) -> Any:
    """float32 [tokens, vocabulary]: log-probabilities of a sequence run in parts. Raises VerifyError: not finite."""
    import numpy as np

    model.forget()
    rows, position = [], 0
    for part in filter(len, parts):
        model.decode(BatchToken(token, position + index, 0, True) for index, token in enumerate(part))
        logits = model.logits(len(part)).astype(np.float32)
        if not bool(np.isfinite(logits).all()):
            raise VerifyError(f"{name}: the logits are not finite", hint="a tensor is damaged")
        logits -= logits.max(axis=1, keepdims=True)
        rows.append(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))
        position += len(part)
    return np.concatenate(rows)


def generate(model: OpenModel, name: str, count: int) -> list[int]:
    """The likeliest `count` tokens after a prompt. Raises VerifyError: can't run, logits not finite."""
    import numpy as np

    model.forget()
    ids = [token for token in model.tokenize(PROMPT, special=False, start=True) if 0 <= token < model.vocabulary]
    pending, position, chosen = ids[: min(PROMPT_TOKENS, model.size // 2)] or [0], 0, []
    for _ in range(count):
        model.decode(
            BatchToken(token, position + index, 0, index == len(pending) - 1) for index, token in enumerate(pending)
        )
        position += len(pending)
        logits = model.logits(1)[0]
        if not bool(np.isfinite(logits).all()):
            raise VerifyError(f"{name}: the logits are not finite", hint="a tensor is damaged")
        pending = [int(logits.argmax())]
        chosen += pending
    return chosen
