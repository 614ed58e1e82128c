"""How much each token of an input matters: its weight in the Gram matrix, from gradients of the model's own loss.

In: logits, gradients at the outputs of linears. Out: labels drawn from the model, the gradient of the loss, weights of
tokens. Left to others: running the model forward and back (calibration), Gram matrices (gram).
The Hessian of the loss in a linear's weights is, for labels drawn from the model itself, E[x xᵀ ⊗ g gᵀ] (the Fisher
information; Martens and Grosse 2015, "Optimizing neural networks with Kronecker-factored approximate curvature"). A
Gram matrix takes g gᵀ for the same of every token. Here a token has one number for it: the mean square of g over the
outputs of all linears that read the input, to the power 1/2. Measured on GPTQ in 4 bits (docs/calibration.md), that is
better than the power 1, which has a few tokens outweigh all others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

POWER = 0.5  # of the mean square gradient


def uniform_draws(tokens: int, seed: int) -> Tensor:
    """A number in [0, 1) for each token, float32 [tokens]: what its label is drawn with, whoever runs it and when."""
    return torch.rand(tokens, generator=torch.Generator().manual_seed(seed))


def draw_labels(probabilities: Tensor, draws: Tensor) -> Tensor:
    """A label for each row of probabilities [rows, vocabulary], int64 [rows], by the inverse of the distribution.

    draws: [rows], in [0, 1).
    """
    sums = probabilities.cumsum(-1)
    found = torch.searchsorted(sums, (draws * sums[:, -1])[:, None], right=True)[:, 0]
    return found.clamp_max_(probabilities.shape[-1] - 1)


def loss_gradient(logits: Tensor, draws: Tensor) -> Tensor:
    """Gradient of the summed cross-entropy, with labels drawn from the model, in the logits [rows, vocabulary]."""
    gradient = torch.softmax(logits, -1)
    labels = draw_labels(gradient, draws)
    gradient[torch.arange(len(labels), device=labels.device), labels] -= 1
    return gradient


def sum_of_squares(gradient: Tensor) -> Tensor:
    """Of each row of a gradient [..., out], float32 [rows]."""
    rows = gradient.reshape(-1, gradient.shape[-1]).float()
    squares: Tensor = torch.linalg.vector_norm(rows, dim=-1).square()
    return squares


def squares_by_output(gradient: Tensor) -> Tensor:
    """Of each output of a gradient [..., out], the sum over its rows, float64 [out]."""
    rows = gradient.reshape(-1, gradient.shape[-1]).float()
    return rows.square().sum(0).double()


def raw_weights(squares: Tensor) -> Tensor:
    """Weights before they have a mean of 1, of sums of squares over the same outputs for each token."""
    weights: Tensor = squares.float() ** POWER
    return weights


def mean_of(sums: Iterable[float], count: int) -> float:
    """The mean of all weights, from sums of parts of them: the same in whatever order the parts come. 0 for none."""
    return math.fsum(sums) / count if count else 0.0


def sum_exactly(weights: NDArray[np.float32]) -> float:
    """A sum in float64, in an order that no number of threads changes."""
    return float(weights.sum(dtype=np.float64))
