"""Shapes of models that figures are computed for, and what one block of each costs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from quantize.build.spread.cost import BlockCost, block_costs


@dataclass(frozen=True)
class Shape:
    """A Llama's or Qwen2's. heads, kv_heads: of attention. vocabulary: tokens."""

    hidden: int
    intermediate: int
    blocks: int
    heads: int
    kv_heads: int
    vocabulary: int = 128256

    @property
    def inputs(self) -> list[tuple[int, int]]:
        """(width, rows that read it) of each input of a block."""
        narrow = self.hidden // self.heads * self.kv_heads
        return [
            (self.hidden, self.hidden + 2 * narrow),
            (self.hidden, self.hidden),
            (self.hidden, 2 * self.intermediate),
            (self.intermediate, self.hidden),
        ]

    @property
    def weights(self) -> int:
        """Of the linears of a block."""
        return sum(width * rows for width, rows in self.inputs)

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """The shape of each linear of one block, by name."""
        narrow = self.hidden // self.heads * self.kv_heads
        shapes = {"self_attn.q_proj": (self.hidden, self.hidden), "self_attn.o_proj": (self.hidden, self.hidden)}
        shapes |= {f"self_attn.{name}_proj": (narrow, self.hidden) for name in "kv"}
        shapes |= {f"mlp.{name}_proj": (self.intermediate, self.hidden) for name in ("gate", "up")}
        shapes["mlp.down_proj"] = (self.hidden, self.intermediate)
        return {f"model.layers.0.{name}.weight": shape for name, shape in shapes.items()}

    def config(self) -> dict[str, object]:
        """config.json of a model of one such block."""
        return {
            "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1, "hidden_size": self.hidden,
            "intermediate_size": self.intermediate, "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads, "vocab_size": self.vocabulary,
        }  # fmt: skip

    def cost(self, tokens: int) -> BlockCost:
        """Of one block."""
        return block_costs(self.config(), self.tensors(), tokens)[0]

    def stored_bytes(self) -> int:
        """Of the model in 16 bits, its embeddings and head among them."""
        block = sum(math.prod(shape) for shape in self.tensors().values())
        return 2 * (self.blocks * block + 2 * self.vocabulary * self.hidden)


SHAPES = {
    "135M": Shape(576, 1536, 30, 9, 3, 49152),
    "1.5B": Shape(1536, 8960, 28, 12, 2, 151936),
    "8B": Shape(4096, 14336, 32, 32, 8),
    "70B": Shape(8192, 28672, 80, 64, 8),
}
