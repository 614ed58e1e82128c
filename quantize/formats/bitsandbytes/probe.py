"""bitsandbytes tried out. Nothing heavy is imported until it is."""

from __future__ import annotations

from quantize.runtimes.probe import Probe, check_alike


def try_bitsandbytes() -> str:
    """INT8 rows and an NF4 matrix, there and back."""
    import torch
    from bitsandbytes import functional

    values = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    codes, scales, _ = functional.int8_vectorwise_quant(values.half())
    check_alike(codes.float() * scales.float()[:, None] / 127, values, "INT8")
    product = functional.int8_linear_matmul(codes, codes)
    check_alike(product, codes.double() @ codes.double().T, "an INT8 matrix product")
    packed, state = functional.quantize_4bit(values, quant_type="nf4")
    check_alike(functional.dequantize_4bit(packed, state), values, "NF4")
    return "INT8 and NF4 there and back, a product in INT8"


BITSANDBYTES_PROBE = Probe("bitsandbytes", "bitsandbytes", try_bitsandbytes)
