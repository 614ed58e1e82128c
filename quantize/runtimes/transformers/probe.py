"""torch and transformers tried out. Nothing heavy is imported until they are."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from quantize.errors import VerifyError
from quantize.runtimes.probe import Probe, check_alike

WORDS = 48


def try_torch() -> str:
    """A matrix product and a factorization in float32, a product in bfloat16, on the CPU and each GPU."""
    import torch

    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 256, 256, generator=generator, dtype=torch.float64)
    wanted = left @ right
    _check_architectures(torch)
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    for device in devices:
        for dtype in (torch.float32, torch.bfloat16):
            product = left.to(device, dtype) @ right.to(device, dtype)
            check_alike(product.double().cpu(), wanted, f"a matrix product in {dtype} on {device}")
        square = (left @ left.T).to(device, torch.float32) + torch.eye(256, device=device)
        factor = torch.linalg.cholesky(square)
        check_alike((factor @ factor.T).cpu(), square.cpu(), f"a Cholesky factorization on {device}")
    return f"products in float32 and bfloat16, a factorization on {', '.join(devices)}"


def _check_architectures(torch: Any) -> None:
    """Raises VerifyError: torch's build has no code for a GPU that it sees."""
    built = [tuple(divmod(int("".join(filter(str.isdigit, name))), 10)) for name in torch.cuda.get_arch_list()]
    for index in range(torch.cuda.device_count() if built else 0):
        major, minor = torch.cuda.get_device_capability(index)
        if not any(found[0] == major and found[1] <= minor for found in built) and (major, minor) < max(built):
            raise VerifyError(
                f"torch {torch.__version__} has no code for the {torch.cuda.get_device_name(index)} "
                f"(compute capability {major}.{minor}; it has {', '.join(torch.cuda.get_arch_list())})",
                hint="use --device cpu, or an older torch, for an older CUDA",
            )


def try_transformers() -> str:
    """Its import, and the machine code under it: text through tokenizers, an array through safetensors."""
    import numpy as np
    import transformers
    from safetensors.numpy import load_file, save_file
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[UNK]", *(f"w{index}" for index in range(WORDS))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ids = np.array(tokenizer.encode(" ".join(words[1:])).ids)
    file = Path(tempfile.mkdtemp()) / "tiny.safetensors"
    save_file({"ids": ids}, file)
    check_alike(load_file(file)["ids"], np.arange(1, len(words)), "text to tokens to a file")
    return f"imported, as version {transformers.__version__}; tokenizers and safetensors"


TORCH_PROBES = (Probe("torch", "torch", try_torch), Probe("transformers", "transformers", try_transformers))
