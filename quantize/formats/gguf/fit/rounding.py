"""What rounding to a type, and solving after it, leaves of a matrix: on some of its rows, under its Gram matrix.

In: rows, a Gram matrix, weights of outputs. Out: RoundingErrors, and the share of the loss that solving leaves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quantize.formats.gguf.vocabulary import ROWS_AT_ONCE, VocabularyLoss

if TYPE_CHECKING:
    from torch import Tensor

    from quantize.numerics.kquants import Grid


@dataclass(frozen=True)
class RoundingError:
    """error: of the weights, as a share of their squares. share: of the output's energy. nats: half of the squared
    error of the outputs, each weighted by how much it matters.
    """

    error: float
    share: float = 0.0
    nats: float = 0.0


def rounding_error(rows: Tensor, gram: Tensor | None, outputs: Tensor | None, kind: str) -> RoundingError:
    """Of llama.cpp's rounding of float32 rows [rows, in] with the importance matrix of a Gram matrix [in, in].

    gram, outputs: None where they are not known; outputs: how much each row's output matters, [rows].
    """
    import numpy as np
    import torch

    from quantize.numerics.gptq import row_losses
    from quantize.runtimes.llama_cpp.rounding import round_rows

    importance = None if gram is None else importance_of(gram)
    data = round_rows(kind, rows.numpy(), None if importance is None else importance.numpy().astype(np.float32))
    delta = torch.from_numpy(_values(kind, data)) - rows
    error = float(delta.double().square().sum() / rows.double().square().sum().clamp_min(1e-30))
    if gram is None:
        return RoundingError(error)
    losses, energy = row_losses(delta, gram).double(), float(row_losses(rows, gram).double().sum())
    share = float(losses.sum()) / energy if energy > 0 else 0.0
    nats = 0.0 if outputs is None else 0.5 * float((losses * outputs.double()).sum())
    return RoundingError(error, share, max(0.0, nats))


def vocabulary_error(rows: Tensor, loss: VocabularyLoss, places: slice, kind: str) -> RoundingError:
    """Of llama.cpp's rounding without an importance matrix, which has none of these two."""
    import torch

    from quantize.runtimes.llama_cpp.rounding import round_rows

    squares = [0.0, 0.0]

    def errors() -> Iterator[Tensor]:
        for part in torch.split(rows, ROWS_AT_ONCE):
            exact = part.float().contiguous()
            delta = torch.from_numpy(_values(kind, round_rows(kind, exact.numpy(), None))) - exact
            squares[0] += float(delta.double().square().sum())
            squares[1] += float(exact.double().square().sum())
            yield delta

    nats = loss.of(errors(), places)
    return RoundingError(squares[0] / max(squares[1], 1e-30), nats=nats)


def importance_of(gram: Tensor) -> Tensor:
    """The diagonal, as an importance matrix has it; ones where nothing came."""
    diagonal = gram.diagonal().float()
    total = float(diagonal.sum())
    return diagonal / (total / len(diagonal)) if total > 0 else diagonal.new_ones(len(diagonal))


def _values(kind: str, data: Any) -> Any:
    """float32 [rows, in] of the bytes of rows."""
    import gguf
    import numpy as np

    if kind in ("F16", "F32"):
        return data.view("<f2" if kind == "F16" else "<f4").astype(np.float32)
    return gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind]).astype(np.float32, copy=False)


def factor_of(gram: Tensor, grid: Grid) -> Any:
    """What rows are solved with into a type's grid. Raises BuildError: the matrix is not finite."""
    from quantize.numerics.grid_solver import factor_for

    return factor_for(gram, grid)


def solved_ratio(rows: Tensor, factor: Any, gram: Tensor, grid: Grid) -> float:
    """What solving leaves of llama.cpp's loss over float32 rows [rows, in]."""
    from quantize.numerics.grid_solver import solve_rows
    from quantize.runtimes.llama_cpp.rounding import round_rows

    data = round_rows(grid.name, rows.numpy(), importance_of(gram).numpy())
    loss, nearest, _ = solve_rows(rows, factor, grid, data).figures.sum(1).tolist()
    return short(loss / nearest) if nearest > 0 else 1.0


def short(value: float) -> float:
    """As many digits as no order of additions changes."""
    return float(f"{value:.5g}")
