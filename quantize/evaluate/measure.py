"""What quantization cost: an artifact's log-probabilities against its source's Baseline -> Quality, by kind of text.

In: a Runtime with the artifact, Windows, a Baseline. Out: Quality, or Conversion, with intervals. How a figure is
called and shown is metrics.py's.

Kullback-Leibler divergence of source P and artifact Q, in nats, for each predicted token: sum P log(P / Q). Where only
the source's likeliest 1,024 tokens are kept, all others count as one: that is a lower bound (the log-sum inequality;
Cover and Thomas, "Elements of Information Theory", theorem 2.7.1). Measured on the demo model it is 2.4 % below the
whole sum over 49,152 tokens (Q8_0 0.00406 of 0.00415, Q4_K_M 0.0587 of 0.0601).
A model compared with its own Baseline gives 0 exactly: both sides go through the same rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quantize.errors import VerifyError
from quantize.evaluate import intervals
from quantize.evaluate.baseline import Baseline, Compressed, Recorder, blocks, compress, target_log_probs
from quantize.evaluate.record import Conversion, Interval, KindFigures, Quality, WindowFigures

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from quantize.evaluate.text import Windows
    from quantize.events import Reporter
    from quantize.runtimes.base import LogProbs, Runtime

READING = "reading the held-out text with the artifact"


@dataclass(frozen=True)
class Compared:
    """One row a prediction: KL divergence in nats, whether the likeliest token is the source's, log-probabilities of
    the token that came by artifact and source.
    """

    kl: NDArray[np.float64]
    same: NDArray[np.bool_]
    targets: NDArray[np.float32]
    source_targets: NDArray[np.float32]


def measure(runtime: Runtime, windows: Windows, baseline: Baseline, reporter: Reporter) -> Quality:
    """Run the artifact over the windows and compare.

    Raises VerifyError: the artifact's vocabulary is not the source's, or its logits are not finite.
    """
    found = compare(runtime, windows, baseline, reporter, READING)
    sums = window_sums(found, windows)
    return Quality(
        **_all_figures(found, sums, windows),
        per_window=WindowFigures(**vars(sums)),
        window_tokens=windows.length,
        kl_is_exact=baseline.is_whole,
        text_name=windows.text_name,
        text_hash=windows.text_hash,
        windows_hash=windows.hash,
        runtime=runtime.name,
        runtime_version=runtime.version,
        source_runtime=baseline.runtime,
        source_runtime_version=baseline.version,
    )


def convert_and_record(
    runtime: Runtime, windows: Windows, source: Baseline, reporter: Reporter
) -> tuple[Baseline, Conversion]:
    """Run the source in the artifact's runtime: the Baseline for the artifact, and what changing the runtime cost.

    Raises VerifyError as `measure` does.
    """
    recorder = Recorder(runtime)
    text = f"reading the held-out text with the source in {runtime.name}"
    found = compare(runtime, windows, source, reporter, text, recorder.add)
    figures = _all_figures(found, window_sums(found, windows), windows)
    return recorder.baseline(windows), Conversion(**figures, runtime=runtime.name, source_runtime=source.runtime)


def compare(
    runtime: Runtime, windows: Windows, baseline: Baseline, reporter: Reporter, text: str,
    also: Callable[[LogProbs, NDArray[np.int64]], None] = lambda _block, _following: None,
) -> Compared:  # fmt: skip
    """Row by row over all windows. text: for the user, what is done. also: is given every block too."""
    import numpy as np
    import torch

    problem = other_vocabulary(runtime.vocabulary, baseline.vocabulary, windows)
    if problem:
        raise VerifyError(problem)
    if baseline.windows_hash != windows.hash:
        raise VerifyError("the baseline was made from other text than is measured now")
    kl, same, targets = [], [], []
    for row, block, following in blocks(runtime, windows, reporter, text):
        rows = slice(row, row + len(block))
        tokens = baseline.tokens[rows]
        source = Compressed(baseline.distribution.chosen[rows], baseline.distribution.others[rows])
        shared = block[:, : baseline.vocabulary]
        kl.append(divergence(source, compress(shared, torch.as_tensor(tokens))))
        same.append(shared.argmax(dim=1).cpu().numpy() == tokens[:, 0])
        targets.append(target_log_probs(block, following))
        also(block, following)
    return Compared(np.concatenate(kl), np.concatenate(same), np.concatenate(targets), baseline.target_log_probs)


def window_sums(found: Compared, windows: Windows) -> intervals.Sums:
    """Sums over the predictions of each window; many windows are taken together by neighbors."""
    import numpy as np

    counts = windows.counts
    starts = np.cumsum([0, *counts[:-1]])

    def summed(rows: NDArray[Any]) -> list[float]:
        return [float(value) for value in np.add.reduceat(rows.astype(np.float64), starts)]

    kl, ours, theirs = summed(found.kl), summed(-found.targets), summed(-found.source_targets)
    return intervals.grouped(intervals.Sums(windows.kinds, counts, kl, ours, theirs))


def _all_figures(found: Compared, sums: intervals.Sums, windows: Windows) -> dict[str, Any]:
    """The fields of TextFigures, and `kinds`."""
    return {**_figures(found, sums, len(windows.token_ids)), "kinds": _by_kind(found, sums, windows)}


def _by_kind(found: Compared, sums: intervals.Sums, windows: Windows) -> tuple[KindFigures, ...]:
    """The figures of each kind of text; none where there is but one."""
    import numpy as np

    names = list(dict.fromkeys(windows.kinds))
    if len(names) < 2:
        return ()
    kinds = []
    of_rows = np.repeat(np.array(windows.kinds), windows.counts)
    for name in names:
        rows = of_rows == name
        part = Compared(found.kl[rows], found.same[rows], found.targets[rows], found.source_targets[rows])
        kinds.append(KindFigures(kind=name, **_figures(part, _only(sums, name), windows.kinds.count(name))))
    return tuple(kinds)


def _only(sums: intervals.Sums, kind: str) -> intervals.Sums:
    chosen = [row for row, name in enumerate(sums.kinds) if name == kind]
    return intervals.Sums(**{name: [values[row] for row in chosen] for name, values in vars(sums).items()})


def _figures(found: Compared, sums: intervals.Sums, windows: int) -> dict[str, Any]:
    """The fields of TextFigures."""
    import numpy as np

    ours, theirs = perplexity(found.targets), perplexity(found.source_targets)
    return {
        "perplexity": ours,
        "source_perplexity": theirs,
        "perplexity_ratio": ours / theirs,
        "perplexity_ratio_interval": _interval(intervals.perplexity_ratio_interval(sums)),
        "mean_kl": float(found.kl.mean()),
        "mean_kl_interval": _interval(intervals.mean_kl_interval(sums)),
        "p99_kl": float(np.quantile(found.kl, 0.99, method="inverted_cdf")),
        "max_kl": float(found.kl.max()),
        "top_token_agreement": float(found.same.mean()),
        "predictions": len(found.kl),
        "windows": windows,
    }


def _interval(found: tuple[float, float] | None) -> Interval | None:
    return None if found is None else Interval(low=found[0], high=found[1])


def perplexity(target_log_probs: NDArray[np.float32]) -> float:
    """exp of the mean negative log-probability of the tokens that came; inf where that is no float any more."""
    import numpy as np

    mean = -float(target_log_probs.mean(dtype=np.float64))
    return math.exp(mean) if mean < 700 else math.inf


def divergence(source: Compressed, artifact: Compressed) -> NDArray[np.float64]:
    """KL(source || artifact) in nats, [rows]; never below 0."""
    import numpy as np

    mine, other = source.chosen.astype(np.float64), artifact.chosen.astype(np.float64)
    possible = np.isfinite(mine)  # a token that can't come adds nothing; one that only the artifact rules out, infinity
    terms = np.where(possible, np.exp(mine) * (np.where(possible, mine, 0.0) - np.where(possible, other, 0.0)), 0.0)
    total: NDArray[np.float64] = terms.sum(axis=1)
    rest = np.isfinite(source.others)
    if rest.any():
        left, right = source.others[rest].astype(np.float64), artifact.others[rest].astype(np.float64)
        total[rest] += np.exp(left) * (left - right)
    return np.maximum(total, 0.0)


def other_vocabulary(artifact: int, source: int, windows: Windows) -> str:
    """What is wrong unless both models have as many tokens; the artifact's table may be padded. "" if nothing.

    Converters and packers round the vocabulary up for speed; a smaller one than the source's has lost tokens.
    """
    if source <= artifact <= source + max(512, source // 50):
        return ""
    used = max(max(ids) for ids in windows.token_ids)
    hint = "is this an artifact of another model?" if used < artifact else f"the text needs token {used}"
    return f"the artifact knows {artifact:,} tokens and its source {source:,}: {hint}"
