"""Whether mlx works here, for doctor."""

from __future__ import annotations

from importlib.metadata import version

from quantize.runtimes.mlx.load import EXTRA, check_installed
from quantize.runtimes.probe import Probe


def try_mlx() -> str:
    """Its import, and a product that is computed."""
    check_installed("the MLX format")
    import mlx.core as mx

    product = mx.ones((2, 2)) @ mx.ones((2, 2))
    mx.eval(product)
    return f"computes, as version {version('mlx')}"


MLX_PROBE = Probe("mlx", EXTRA, try_mlx)
