"""The routed experts of a block, computed one after the other from the weights that are on disk.

In: what transformers' own container of fused experts reads. Out: what it gives; on the way, who listens is told what
each expert reads and gives.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from quantize.model.layout import Experts


class RoutedExperts(nn.Module):
    """Experts with one weight each as on disk, in the place of transformers' fused ones.

    record: told each expert's tokens (their rows), what its projections read and what its down projection reads. watch:
    told its tokens and what its gate, up and down projections gave.
    """

    def __init__(self, experts: Experts, weights: dict[str, Tensor], act_fn: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weights = [
            tuple(weights[name.format(expert=expert)] for name in (experts.gate, experts.up, experts.down))
            for expert in range(experts.count)
        ]
        self.act_fn = act_fn
        self.width = int(self.weights[0][2].shape[1])
        self.record: Callable[[int, Tensor, Tensor, Tensor], None] | None = None
        self.watch: Callable[[int, Tensor, Tensor, Tensor, Tensor], None] | None = None

    def inner(self, expert: int, states: Tensor) -> Tensor:
        """What the expert's down projection reads."""
        return self._multiplied(*self._projected(expert, states))

    def _projected(self, expert: int, states: Tensor) -> tuple[Tensor, Tensor]:
        gate, up, _ = self.weights[expert]
        return nn.functional.linear(states, gate), nn.functional.linear(states, up)

    def _multiplied(self, gate: Tensor, up: Tensor) -> Tensor:
        product: Tensor = self.act_fn(gate) * up
        return product

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sum of each token's chosen experts, weighted by the router."""
        output = torch.zeros_like(hidden_states)
        chosen, choices = top_k_index.flatten(), top_k_index.shape[1]
        order = torch.argsort(chosen, stable=True)
        experts = torch.arange(len(self.weights), device=chosen.device)
        counts = (chosen[:, None] == experts).sum(0).cpu().tolist()  # the one time that the host waits
        for expert, places in enumerate(torch.split(order, counts)):
            if counts[expert] == 0:
                continue
            tokens, down = places // choices, self.weights[expert][2]
            states = hidden_states[tokens]
            gate_out, up_out = self._projected(expert, states)
            inner = self._multiplied(gate_out, up_out)
            if self.record is not None:
                self.record(expert, tokens, states, inner)
            down_out = nn.functional.linear(inner, down)
            if self.watch is not None:
                self.watch(expert, tokens, gate_out, up_out, down_out)
            result = down_out * top_k_weights.flatten()[places, None]
            output.index_add_(0, tokens, result.to(output.dtype))
        return output
