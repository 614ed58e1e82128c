"""A toy artifact as a transformers model. Imports torch: load it in a worker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from quantize.runtimes.transformers.load import quiet
from quantize_toy.container import CODES, SCALES, ToyFile


class RowsLinear(torch.nn.Module):
    """A linear layer whose weights are codes, dequantized each time that they are used."""

    codes: Tensor
    scales: Tensor

    def __init__(self, codes: Tensor, scales: Tensor, bias: torch.nn.Parameter | None) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.bias = bias

    def forward(self, values: Tensor) -> Tensor:
        """values @ weights.T + bias"""
        return linear(values, (self.codes * self.scales[:, None]).to(values.dtype), self.bias)


def open_model(path: Path, device: str) -> Any:
    """The model, in float32. path: its rows.npz. Raises CheckpointError; what transformers and torch raise."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    file = ToyFile(path)
    config = AutoConfig.from_pretrained(path.parent, local_files_only=True, trust_remote_code=False)
    del config.quantization_config  # which transformers does not know
    with quiet():
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name in file.linears:
        parent, _, last = name.rpartition(".")
        module = model.get_submodule(parent)
        codes, scales = (torch.from_numpy(file.array(name + part)) for part in (CODES, SCALES))
        setattr(module, last, RowsLinear(codes, scales, getattr(module, last).bias))
    rest = {name: torch.from_numpy(file.array(name)) for name in file.others}
    left = model.load_state_dict(rest, strict=False)
    made = {name for name in left.missing_keys if not name.endswith((".codes", ".scales"))}
    if left.unexpected_keys or made - set(model._tied_weights_keys or ()):
        raise ValueError(f"not its model's tensors: {', '.join([*left.unexpected_keys, *sorted(made)][:3])}")
    model.tie_weights()
    if (path.parent / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path.parent, local_files_only=True)
    return model.to(device).eval()
