"""How much the calibration pass and its solvers take at once: what they do, and what plans and cost models count with.

Known without loading torch.
"""

from __future__ import annotations

BATCH_TOKENS = 512  # of a forward pass on a CPU: what fits caches between one operation and the next
GPU_BATCH_TOKENS = 8192  # on a GPU: what fills it, and few enough batches for one round of sums
LOGIT_BYTES = 32 << 20  # of logits in float32 that are there at once where a gradient is taken in them
SHARES = 2  # sums that the batches of a round are dealt out to in turn, on a CPU
SOLVED_ROWS = 1024  # output rows solved at a time: bounds memory; rows don't depend on one another
GPU_SOLVED_VALUES = (
    2**26
)  # weights solved at a time on a GPU: a sweep launches as many kernels for many rows as for few
SEARCHED_ROWS = 1024  # output rows that AWQ's ratio search looks at, for each Gram matrix
RATIOS = tuple(step / 10 for step in range(10))  # exponents of the inputs that it tries
WEIGHT_RATIOS = (0.15, 0.3, 0.45, 0.6)  # of the weights, at the best of these
INT8_LOGGER = "bitsandbytes.autograd._functions"  # says of each INT8 product that it rounds its inputs
REFINEMENT = (-0.1, -0.05, 0.05, 0.1)  # steps of the ratio around the best so far
NF4_BLOCK = 64  # weights that share an absolute maximum


def batch_tokens(device: str) -> int:
    """Tokens of a forward pass, which the bits of sums depend on."""
    return BATCH_TOKENS if device == "cpu" else GPU_BATCH_TOKENS


def shares_on(device: str) -> int:
    """How many sums the batches of a round go into: a GPU has one, as it runs one batch after the other."""
    return SHARES if device == "cpu" else 1


def folded_shape(width: int) -> tuple[int, int]:
    """The shape of a symmetric matrix [width, width] that gram.fold has folded."""
    return -(-width // 2), width + 1
