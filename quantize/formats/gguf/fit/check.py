"""Which of two model files is nearer to the 16-bit one, on text that comes with the package.

In: GGUF files of one model. Out: the mean KL divergence of each, in nats a token. In llama.cpp, window by window, with
all of them open: memory holds the predictions for one window. Runs in a worker process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.errors import VerifyError
from quantize.events import Reporter, progress
from quantize.formats.gguf.try_out import predictions
from quantize.runtimes.llama_cpp.model import ModelSettings, OpenModel
from quantize.system.lookup import DATA, EVALUATION

TEXTS = ("prose", "code", "vietnamese")
WINDOWS = 6  # of each text, from its beginning
WINDOW_TOKENS = 192
UNREAD = 16  # tokens at the beginning of a window whose predictions are not counted
FEATURE = "measuring a GGUF file"


@dataclass(frozen=True)
class Nearness:
    """Mean KL divergences, in the order of the files; tokens: predictions that they are over."""

    kl: tuple[float, ...]
    tokens: int


def nearness(reporter: Reporter, exact: Path, files: Sequence[Path], variant: str, threads: int) -> Nearness:
    """Of each file to the 16-bit one. Raises VerifyError: one does not run, its logits are not finite."""
    import numpy as np

    sums, tokens = np.zeros(len(files)), 0
    with ExitStack() as opened:
        models = [opened.enter_context(closing(_open(path, threads))) for path in (exact, *files)]
        windows = list(_windows(models[0]))
        for number, window in enumerate(windows):
            source, *others = (_log_probs(model, window) for model in models)
            sums += [float((np.exp(source) * (source - other)).sum(axis=1).clip(0).sum()) for other in others]
            tokens += len(source)
            progress(reporter, variant, "measuring, windows", number + 1, len(windows))
    return Nearness(tuple(float(f"{value / tokens:.4g}") for value in sums), tokens)


def _open(path: Path, threads: int) -> OpenModel:
    return OpenModel(path, ModelSettings(WINDOW_TOKENS, threads=threads, flash_attention=False), feature=FEATURE)


def _windows(model: OpenModel) -> Iterator[list[int]]:
    """Token ids, each text in turn."""
    size = min(WINDOW_TOKENS, model.trained_context or WINDOW_TOKENS)
    found = 0
    for name in TEXTS:
        text = (DATA / EVALUATION / f"{name}.txt").read_text("utf-8")[: 12 * WINDOWS * size]
        ids = [token for token in model.tokenize(text, special=False, start=False) if 0 <= token < model.vocabulary]
        for start in range(0, min(len(ids), WINDOWS * size) - 2 * UNREAD, size):
            found += 1
            yield ids[start : start + size]
    if not found:
        raise VerifyError("the held-out text of the package has no tokens in this model")


def _log_probs(model: OpenModel, window: list[int]) -> Any:
    return predictions(model, "held-out text", [window])[UNREAD:]
