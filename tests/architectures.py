"""A tiny random model of every architecture in the table, made with transformers and saved as a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

_COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_QWEN_MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "mlp_only_layers": [1],
    "decoder_sparse_step": 1,
}
# What each config adds to the common one: the parts in which architectures differ, small enough to be felt.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "LlamaForCausalLM": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "MistralForCausalLM": ("MistralConfig", {"sliding_window": 8, "head_dim": 16}),
    "Qwen2ForCausalLM": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "Qwen3ForCausalLM": ("Qwen3Config", {"head_dim": 32}),
    "Gemma2ForCausalLM": (
        "Gemma2Config",
        {"head_dim": 16, "sliding_window": 8, "attn_logit_softcapping": 1.0, "final_logit_softcapping": 1.0},
    ),
    "Gemma3ForCausalLM": ("Gemma3TextConfig", {"head_dim": 16, "sliding_window": 8, "sliding_window_pattern": 2}),
    "Phi3ForCausalLM": ("Phi3Config", {}),
    "MixtralForCausalLM": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Qwen2MoeForCausalLM": ("Qwen2MoeConfig", {**_QWEN_MOE, "shared_expert_intermediate_size": 96}),
    "Qwen3MoeForCausalLM": ("Qwen3MoeConfig", {**_QWEN_MOE, "head_dim": 16}),
}


def tiny_model(name: str, *, seed: int = 0, tied: bool = False) -> Any:
    """A seeded random model, float32, with norms and biases away from their initial ones and zeros."""
    import transformers

    config_name, extra = CONFIGS[name]
    config = getattr(transformers, config_name)(**{**_COMMON, **extra, "tie_word_embeddings": tied})
    torch.manual_seed(seed)
    model = getattr(transformers, name)(config).float().eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
            elif "embed" not in key:
                parameter.mul_(4)
    return model


@dataclass(frozen=True)
class SavedCheckpoint:
    """The least that the pass asks of a checkpoint: one safetensors file in a folder."""

    folder: Path

    @property
    def config(self) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads((self.folder / "config.json").read_text())
        return loaded

    @property
    def tensors(self) -> Mapping[str, None]:
        with self._open() as file:
            return dict.fromkeys(file.keys())

    def read(self, name: str) -> Tensor:
        with self._open() as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    @contextmanager
    def _open(self) -> Iterator[Any]:
        with safe_open(str(self.folder / "model.safetensors"), "pt") as file:
            yield file


def save(model: Any, folder: Path) -> SavedCheckpoint:
    """Write a model as transformers does, and open it."""
    model.save_pretrained(folder)
    return SavedCheckpoint(folder)


def token_ids(lengths: tuple[int, ...] = (24, 17, 24, 31), *, seed: int = 0) -> list[list[int]]:
    """Random sequences of given lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 96, (length,), generator=generator).tolist() for length in lengths]
