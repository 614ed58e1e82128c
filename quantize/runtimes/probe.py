"""Something tiny that shows whether an engine works here: what formats name, and `quantize doctor` runs.

In: two results of one computation. Out: nothing, or VerifyError. What is computed is left to the engines' own probes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from quantize.errors import VerifyError

ALIKE = 0.99  # correlation of the logits of a batch with those of its tokens one by one


@dataclass(frozen=True)
class Probe:
    """engine: what is tried, of which distribution (package). run: in a process of its own; gives what it did."""

    engine: str
    package: str
    run: Callable[[], str]


def check_alike(together: Any, alone: Any, what: str) -> None:
    """Two arrays of one shape that ought to be equal but for rounding. Raises VerifyError: they are not."""
    import numpy as np

    first, second = (np.asarray(values, dtype=np.float64).reshape(-1) for values in (together, alone))
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise VerifyError(f"{what}: the results are not finite numbers")
    size = np.linalg.norm(first) * np.linalg.norm(second)
    if not size or first @ second / size < ALIKE:
        raise VerifyError(f"{what}: one computation in two ways gives two results")
