"""make for quantized models: a recipe and a checkpoint go in; pinned, verified, measured artifacts come out."""

__version__ = "0.1.0"
DISTRIBUTION = "quantize-models"  # what pip installs: `quantize` is another project on PyPI
