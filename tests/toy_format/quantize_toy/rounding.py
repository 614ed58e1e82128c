"""The toy's numerics: a matrix to INT8, with one scale a row. Arrays in, arrays out."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

LARGEST = 127
SHARES = (1.0, 0.98, 0.99, 1.01, 1.02, 1.03)  # of a row's range, that are tried

Array = NDArray[np.float32]
Rows = tuple[NDArray[np.int8], Array]  # codes [out, in], scales [out]


def round_rows(weight: Array, importance: NDArray[Any] | None = None) -> Rows:
    """Round to nearest. importance [in]: weigh errors by it, and take of each row's SHARES the one that errs least."""
    ranges = np.maximum(np.abs(weight).max(axis=1), np.float32(1e-30))
    best = _at(weight, ranges)
    if importance is None:
        return best
    least = _errors(weight, best, importance)
    for share in SHARES[1:]:
        found = _at(weight, ranges * np.float32(share))
        errors = _errors(weight, found, importance)
        better = errors < least
        best = np.where(better[:, None], found[0], best[0]), np.where(better, found[1], best[1])
        least = np.minimum(errors, least)
    return best


def _at(weight: Array, ranges: Array) -> Rows:
    scales = (ranges / LARGEST).astype(np.float32)
    return np.clip(np.rint(weight / scales[:, None]), -LARGEST, LARGEST).astype(np.int8), scales


def _errors(weight: Array, rows: Rows, importance: NDArray[Any]) -> NDArray[Any]:
    """Of each row. By a sum, whose order is one whatever the threads; a product's is not."""
    errors: NDArray[Any] = (np.square(rows[0] * rows[1][:, None] - weight) * importance).sum(axis=1)
    return errors
