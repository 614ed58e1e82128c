"""What the full-precision source says of the windows: computed once, kept on disk, compared with many times.

In: a Runtime with the source, Windows. Out: a Baseline: for every prediction the source's likeliest tokens with their
log-probabilities, and what it gave the token that came. A small vocabulary is kept whole; of a large one the likeliest
1,024 and the mass of all others together. Comparing is left to measure.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.evaluate.text import Windows
from quantize.events import Reporter, progress
from quantize.runtimes.base import Runtime
from quantize.system.cache import Cache

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from quantize.runtimes.base import LogProbs

KIND = "baselines"
FORMAT = 3
LIKELIEST = 1024
FILE = "baseline.npz"
_LEAST_MASS = 1e-12  # float32 sums of probabilities are no finer


@dataclass(frozen=True)
class Compressed:
    """Distributions over a choice of tokens and all others together.

    chosen: float32 [rows, k] log-probabilities of the chosen tokens. others: float32 [rows], that of all other tokens
    together; -inf where the choice is the whole vocabulary.
    """

    chosen: NDArray[np.float32]
    others: NDArray[np.float32]


@dataclass(frozen=True)
class Baseline:
    """One row a prediction, windows one after the other. tokens: int32 [rows, k], the likeliest first."""

    tokens: NDArray[np.int32]
    distribution: Compressed
    target_log_probs: NDArray[np.float32]
    vocabulary: int
    windows_hash: str
    runtime: str
    version: str

    @property
    def is_whole(self) -> bool:
        """Whether every token of the vocabulary is kept, so that KL divergences are exact."""
        return int(self.tokens.shape[1]) == self.vocabulary


def compress(log_probs: LogProbs, tokens: Tensor) -> Compressed:
    """The log-probabilities [rows, vocabulary] of the given tokens [rows, k], and of all others together.

    Only what is chosen leaves the device.
    """
    import numpy as np

    chosen = log_probs.gather(1, tokens.to(log_probs.device).long()).cpu().numpy()
    if tokens.shape[1] == log_probs.shape[1]:
        return Compressed(chosen, np.full(len(chosen), -np.inf, np.float32))
    left = 1.0 - np.exp(chosen, dtype=np.float64).sum(axis=1)
    return Compressed(chosen, np.log(np.maximum(left, _LEAST_MASS)).astype(np.float32))


class Recorder:
    """Takes a source's log-probabilities block by block. keep: tokens to keep a prediction."""

    def __init__(self, runtime: Runtime, keep: int = LIKELIEST) -> None:
        self._runtime, self._keep = runtime, min(keep, runtime.vocabulary)
        self._tokens: list[NDArray[np.int32]] = []
        self._parts: list[Compressed] = []
        self._targets: list[NDArray[np.float32]] = []

    def add(self, block: LogProbs, following: NDArray[np.int64]) -> None:
        """The next rows [rows, vocabulary], and the tokens that came after them [rows]."""
        best = _likeliest(block, self._keep)
        self._tokens.append(best.int().cpu().numpy())
        self._parts.append(compress(block, best))
        self._targets.append(target_log_probs(block, following))

    def baseline(self, windows: Windows) -> Baseline:
        """What was taken, of all windows."""
        import numpy as np

        return Baseline(
            tokens=np.concatenate(self._tokens),
            distribution=Compressed(
                np.concatenate([part.chosen for part in self._parts]),
                np.concatenate([part.others for part in self._parts]),
            ),
            target_log_probs=np.concatenate(self._targets),
            vocabulary=self._runtime.vocabulary,
            windows_hash=windows.hash,
            runtime=self._runtime.name,
            version=self._runtime.version,
        )


def record(runtime: Runtime, windows: Windows, reporter: Reporter, *, keep: int = LIKELIEST) -> Baseline:
    """Run the source over the windows. Raises VerifyError."""
    recorder = Recorder(runtime, keep)
    for _, block, following in blocks(runtime, windows, reporter, "reading the held-out text with the source"):
        recorder.add(block, following)
    return recorder.baseline(windows)


def target_log_probs(block: LogProbs, following: NDArray[np.int64]) -> NDArray[np.float32]:
    """What the rows give the tokens that came, [rows]."""
    import torch

    tokens = torch.as_tensor(following).to(block.device)
    found: NDArray[np.float32] = block.gather(1, tokens[:, None])[:, 0].cpu().numpy()
    return found


def blocks(
    runtime: Runtime, windows: Windows, reporter: Reporter, text: str
) -> Iterator[tuple[int, LogProbs, NDArray[np.int64]]]:
    """(first row, log-probabilities [rows, vocabulary], the tokens that followed [rows]) over all windows in order.

    Only of tokens that count as predicted.
    """
    import numpy as np
    import torch

    row, total = 0, len(windows.token_ids)
    parts = zip(windows.token_ids, windows.starts, runtime.read(windows.token_ids), strict=True)
    for number, (ids, start, found) in enumerate(parts):
        progress(reporter, "", f"{text} (windows)", number, total)
        at = 0
        for block in found:
            skipped = max(0, start - 1 - at)
            at += len(block)
            if skipped >= len(block):
                continue
            counted = torch.as_tensor(block[skipped:])  # a runtime of a plugin may give arrays
            yield row, counted, np.asarray(ids[at - len(counted) + 1 : at + 1], dtype=np.int64)
            row += len(counted)
    progress(reporter, "", f"{text} (windows)", total, total)


def baseline_key(source_digest: str, windows: Windows, tools: Mapping[str, str], *, keep: int = LIKELIEST) -> str:
    """Hex sha256 that names a baseline: the source by content, the token ids, what is kept, and what it runs in.

    tools: the runtime's name and version, the kind of device and the type that it computes in: another one gives
    figures that differ by as much as the best artifacts do.
    """
    pinned = {"format": FORMAT, "source": source_digest, "windows": windows.hash, "tools": dict(tools), "keep": keep}
    return hashlib.sha256(json.dumps(pinned, sort_keys=True).encode()).hexdigest()


def save(baseline: Baseline, folder: Path) -> None:
    """Write a baseline into a folder."""
    import numpy as np

    about = {
        "vocabulary": baseline.vocabulary,
        "windows_hash": baseline.windows_hash,
        "runtime": baseline.runtime,
        "version": baseline.version,
    }
    np.savez(
        folder / FILE,
        tokens=baseline.tokens,
        chosen=baseline.distribution.chosen,
        others=baseline.distribution.others,
        targets=baseline.target_log_probs,
        about=np.frombuffer(json.dumps(about).encode(), dtype=np.uint8),
    )


def load(folder: Path) -> Baseline:
    """Read what save wrote. Raises ValueError, OSError, KeyError: the entry is damaged."""
    import numpy as np

    with np.load(folder / FILE, allow_pickle=False) as data:
        about: dict[str, Any] = json.loads(data["about"].tobytes())
        return Baseline(
            data["tokens"], Compressed(data["chosen"], data["others"]), data["targets"],
            int(about["vocabulary"]), str(about["windows_hash"]), str(about["runtime"]), str(about["version"]),
        )  # fmt: skip


def find(cache: Cache, key: str) -> Baseline | None:
    """The baseline in the cache; None, and the entry dropped, if it is not there or can't be read."""
    import zipfile

    folder = cache.entry(KIND, key)
    if not folder.is_dir():
        return None
    try:
        return load(folder)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        cache.remove(KIND, key)
        return None


def _likeliest(block: LogProbs, keep: int) -> Tensor:
    """Tokens int64 [rows, keep] by falling log-probability; of equal ones the lower id first."""
    import torch

    if keep < block.shape[1]:
        some = block.topk(keep, sorted=False).indices.sort(dim=1).values
    else:
        some = torch.arange(block.shape[1], device=block.device).expand(block.shape)
    order = block.gather(1, some).argsort(dim=1, descending=True, stable=True)
    return some.gather(1, order)
