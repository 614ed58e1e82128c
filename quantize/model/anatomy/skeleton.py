"""A model without weights, whose blocks get theirs one at a time and are run by transformers' own code.

In: a config's class, where its blocks are, tensors by name. Out: the first block's input, as the model's own forward
makes it of tokens; what each block is called with; a block's output. Memory holds what is loaded, and nothing else.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quantize.errors import CheckpointError
from quantize.model.anatomy.build import meta_model
from quantize.model.anatomy.watch import Arguments, first, forward_only, intercept, replaced

Read = Callable[[str], Tensor]


def times_wide(model: Any, states: Tensor) -> int:
    """How many times a model's width its hidden states are."""
    return max(1, int(states.shape[-1]) // int(model.config.get_text_config().hidden_size))


class Skeleton:
    """See above. outputs: what a block gives, as watch.outputs_of says. lanes: how many hidden states a token has; here
    they are one, as wide as all. wide: how many times the model's width each is. dtype: of all that is loaded.

    model: transformers' own; blocks: its decoder blocks.
    """

    def __init__(
        self, settings: Any, blocks: str, kernel: str, outputs: int, device: torch.device,
        dtype: torch.dtype = torch.float32, lanes: tuple[int, ...] = (), wide: int = 1,
    ) -> None:  # fmt: skip
        """Raises CheckpointError: transformers can't build it."""
        self.device, self._dtype, self._outputs = device, dtype, outputs
        self._lanes, self._wide = lanes, wide
        self.model = meta_model(settings, attn_implementation=kernel, dtype=dtype)
        self.blocks: Any = self.model.get_submodule(blocks)
        inside = {id(module) for block in self.blocks for module in block.modules()}
        for module in self.model.modules():
            if id(module) not in inside:
                self._compute_buffers(module)
        self._arguments: dict[int, list[Arguments]] = {}

    @property
    def hidden_size(self) -> int:
        """Width of a token's hidden states, all lanes side by side."""
        return math.prod(self._lanes) * self._wide * self.width

    @property
    def width(self) -> int:
        """The model's own width, which its embedding and its head have."""
        return int(self.model.config.get_text_config().hidden_size)

    def embed(self, read: Read, entry: Mapping[str, str], sequences: list[Tensor]) -> Iterator[Tensor]:
        """The first block's input of each sequence, [length, hidden], as the model's own forward makes it.

        entry: names on disk -> of the parameters that it takes. Of a table of tokens only the rows in use are
        converted. Raises CheckpointError: a tensor does not fit.
        """
        table = self._table(entry)
        loaded = [(name, path) for name, path in entry.items() if path != f"{table}.weight"]
        for name, path in loaded:
            self.put(path, read(name).to(self.device, self._dtype))
        looked_up = self.model.get_submodule(table) if table else None
        if looked_up is not None:
            name = next(name for name, path in entry.items() if path == f"{table}.weight")
            used = torch.unique(torch.cat(sequences))
            _look_up(looked_up, used.to(self.device), read(name)[used].to(self.device, self._dtype))
        try:
            for sequence in sequences:
                start, arguments = self.intercept(sequence.to(self.device)[None])
                self._arguments.setdefault(len(sequence), arguments)
                yield start[0].flatten(1)
        finally:
            if looked_up is not None:
                del looked_up.forward
                looked_up.weight = nn.Parameter(looked_up.weight.to("meta"), requires_grad=False)
            for _, path in loaded:
                self.put(path, torch.empty(0), meta=True)

    def intercept(self, ids: Tensor) -> tuple[Tensor, list[Arguments]]:
        """The first block's input for ids [1, length], and what else each block is called with."""
        with torch.no_grad():
            return intercept(self.blocks, lambda: forward_only(self.model, ids), self._outputs)

    def load(self, index: int, state: Mapping[str, Tensor]) -> None:
        """Put a block's parameters, by path inside of it, in place. Raises CheckpointError: they don't fit."""
        block = self.blocks[index]
        computed = [self._compute_buffers(module) for module in block.modules()]
        if any(computed):
            self._compute_from_above()
        try:
            block.load_state_dict(state, strict=True, assign=True)
        except RuntimeError as exc:
            raise CheckpointError(f"block {index}: tensors don't fit the architecture: {exc}") from exc

    def unload(self, index: int) -> None:
        """Let go of a block's weights."""
        self.blocks[index].to_empty(device="meta")

    def run(self, index: int, states: Tensor) -> Tensor:
        """One block over states [sequences, length, hidden]; the output has the same shape."""
        args, kwargs = self._arguments[states.shape[1]][index]
        result: Tensor = first(self.blocks[index](self._apart(states), *args, **kwargs))
        return result.flatten(2)

    def _apart(self, states: Tensor) -> Tensor:
        """States [sequences, length, hidden] with their lanes as dimensions."""
        return states.reshape(*states.shape[:2], *self._lanes, -1) if self._lanes else states

    def finish(self, states: Tensor, start: Tensor, *, gradient: bool = False) -> Any:
        """What the model gives where its last block gives `states` [1, rows, hidden]; start: looked at nowhere.

        gradient: keep what a gradient in the states takes.
        """

        def give(_number: int) -> Callable[..., Any]:
            found, outputs = self._apart(states), self._outputs
            return lambda *_args, **_kwargs: (found, *[None] * (outputs - 1)) if outputs else found

        with replaced(self.blocks, give), torch.set_grad_enabled(gradient):
            return self.model(inputs_embeds=start, use_cache=False)

    def _table(self, entry: Mapping[str, str]) -> str:
        """The path of the table of tokens, if it does nothing but look rows up."""
        found = self.model.get_input_embeddings()
        for path, module in self.model.named_modules():
            takes = [*inspect.signature(type(module).forward).parameters]
            if module is found and isinstance(module, nn.Embedding) and len(takes) == 2:
                return path if f"{path}.weight" in entry.values() else ""
        return ""

    def put(self, path: str, value: Tensor, *, meta: bool = False) -> None:
        """Give a parameter outside of the blocks its value; meta: take it away. Raises CheckpointError."""
        owner, _, leaf = path.rpartition(".")
        module = self.model.get_submodule(owner)
        old = getattr(module, leaf)
        if meta:
            value = old.to("meta")
        elif old.shape != value.shape:
            raise CheckpointError(f"{path} is {list(value.shape)}; the architecture has {list(old.shape)}")
        setattr(module, leaf, nn.Parameter(value, requires_grad=False) if isinstance(old, nn.Parameter) else value)

    def _compute_buffers(self, module: nn.Module) -> bool:
        """Give what is computed, not stored (rotary frequencies, masks), real values, as loading a model does.

        Returns whether there was something.
        """
        if not module._non_persistent_buffers_set:
            return False
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers[name]
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device=self.device)
        with torch.no_grad():
            self.model._init_weights(module)
        return True

    def _compute_from_above(self) -> None:
        """Some models compute what lies in their blocks."""
        for module in self.model.modules():
            above = any(child is self.blocks for child in module.children())
            if above and not [*module.parameters(recurse=False)]:
                with torch.no_grad():
                    self.model._init_weights(module)


def _look_up(module: Any, used: Tensor, rows: Tensor) -> None:
    """Have an embedding hold those rows that are used, and no others. used: their numbers, in order."""

    module.padding_idx = None  # a row's number, of which there are fewer now
    module.weight = nn.Parameter(rows, requires_grad=False)

    def forward(ids: Tensor) -> Tensor:
        found: Tensor = type(module).forward(module, torch.searchsorted(used, ids))
        return found

    module.forward = forward
