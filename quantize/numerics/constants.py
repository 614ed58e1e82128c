"""How much the calibration pass and its solvers take at once: what they do, and what plans and cost models count with.

Known without loading torch.
"""

from __future__ import annotations

BATCH_TOKENS = 512  # of a forward pass: what fits caches between one operation and the next
SHARES = 2  # sums that the batches of a round are dealt out to in turn
SOLVED_ROWS = 1024  # output rows solved at a time: bounds memory; rows don't depend on one another
SEARCHED_ROWS = 1024  # output rows that AWQ's ratio search looks at, for each Gram matrix
RATIOS = tuple(step / 10 for step in range(10))  # exponents of the inputs that it tries
WEIGHT_RATIOS = (0.15, 0.3, 0.45, 0.6)  # of the weights, at the best of these
REFINEMENT = (-0.1, -0.05, 0.05, 0.1)  # steps of the ratio around the best so far
