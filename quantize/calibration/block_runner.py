"""Runs one decoder block at a time with transformers' own layer code, and records what its linears read.

In: a checkpoint's config and one block's weights. Out: the block's output, and a Gram matrix for each distinct input.
Left to others: which blocks in which order, and where hidden states live (activations). The model is built on the meta
device, so rotary embeddings, masks, sliding windows and soft caps are those of transformers, and only the block that
runs has weights.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from quantize.calibration.attention import register
from quantize.calibration.experts import RoutedExperts
from quantize.model.anatomy.build import load_config
from quantize.model.anatomy.found import Anatomy
from quantize.model.anatomy.skeleton import Skeleton
from quantize.model.architecture import anatomy_of
from quantize.model.layout import BlockLayout, Experts
from quantize.numerics.constants import shares_on
from quantize.numerics.gram import Gram, GramAccumulator
from quantize.numerics.precision import settle_precision
from quantize.system.threads import on_threads, threads_on

STARVED_TOKENS = 256  # an expert that saw fewer is named
PRIOR_TOKENS = 256  # of those that any expert saw: so many count beside an expert's own
SURE_TOKENS = 16 * PRIOR_TOKENS  # an expert that saw as many is calibrated on its own alone
_KEPT_TOKENS = 2048  # of all experts, for what their down projections would read
ROUND_BATCHES = 32  # then the sums are added up, and two new ones begun


class _Stop(Exception):
    """Leaves a forward pass whose remainder nobody needs."""


class BlockRunner:
    """A model without weights, into which one block's weights are put at a time.

    precision "bfloat16" runs matrix products of the forward pass in that type (autocast); Gram matrices and the
    residual stream stay float32: Gram matrices summed from bfloat16 results took 0.6 of the time, needed ten times the
    damping, and cost GPTQ and AWQ 0.1 of perplexity on a model of 135M.

    model: transformers' own, for output_head.py, which runs what follows the blocks. hidden_size: of a token's states,
    all of them; width: of one of them.
    """

    def __init__(self, config: Mapping[str, Any], device: str, precision: str, *, fast: bool = True) -> None:
        """fast: with our kernel for attention, where transformers' own can be left out.

        Raises CheckpointError: the architecture can't be run block by block.
        """
        self.device = torch.device(device)
        self._autocast = precision == "bfloat16"
        settle_precision(self.device)
        if self.device.type == "cuda":
            torch.linalg.cholesky_ex(torch.eye(2, device=self.device))  # loads the library, which threads must not
        self.anatomy = found = anatomy_of(config)
        self._skeleton = _skeleton(load_config(config), found, self.device, fast)
        self.model = self._skeleton.model
        self.hidden_size = self._skeleton.hidden_size
        self.width = self._skeleton.width
        self.blocks = len(self._skeleton.blocks)

    def layer(self, index: int) -> nn.Module:
        """A block as transformers has it."""
        found: nn.Module = self._skeleton.blocks[index]
        return found

    def embed(self, read: Callable[[str], Tensor], sequences: list[Tensor]) -> Iterator[Tensor]:
        """The first block's input of each sequence, [length, hidden] float32, as the model's own forward makes it.

        read: a tensor by its name on disk, of any floating type: only the rows of the embedding in use are converted.
        """
        return self._skeleton.embed(read, dict(self.anatomy.entry), sequences)

    def load(self, layout: BlockLayout, weights: dict[str, Tensor]) -> None:
        """Put a block's float32 weights (full names) in place; in float32 they are shared, not copied."""
        of_experts = frozenset[str]()
        if layout.experts is not None:
            layer, path = self.layer(layout.index), layout.experts.module
            of_experts = frozenset(item.tensor for item in layout.linears if item.expert is not None)
            run = {name: self._as_run(weights[name]) for name in of_experts}
            fused: Any = layer.get_submodule(path)
            layer.set_submodule(path, RoutedExperts(layout.experts, run, fused.act_fn))
        left = {name: tensor for name, tensor in weights.items() if name not in of_experts}
        state = {layout.module_path(name): self._as_run(tensor) for name, tensor in left.items()}
        for path, parts in layout.joined:
            state[path] = torch.cat([state.pop(layout.module_path(layout.prefix + part)) for part in parts])
        self._skeleton.load(layout.index, state)

    def _as_run(self, weight: Tensor) -> Tensor:
        """What autocast would make of a linear's weight, once for all batches."""
        return weight.bfloat16() if self._autocast and weight.dim() == 2 else weight

    def unload(self, index: int) -> None:
        """Let go of a block's weights."""
        for module in self.layer(index).modules():
            if isinstance(module, RoutedExperts):
                module.weights.clear()
        self._skeleton.unload(index)

    def run(self, index: int, states: Tensor) -> Tensor:
        """One block over states [sequences, length, hidden]; the output has the same shape, float32."""
        if not self.anatomy.together and len(states) > 1:
            return torch.cat([self.run(index, states[place : place + 1]) for place in range(len(states))])
        with torch.no_grad(), self._computing():
            return self._skeleton.run(index, states).float()

    def back(self, index: int, states: Tensor, gradient: Tensor) -> Tensor:
        """The gradient before one block, float32, where it is `gradient` after it; both of the form of `states`."""
        before = states.detach().clone().requires_grad_()
        with torch.enable_grad(), self._computing():
            after = self._skeleton.run(index, before.clone()).float()  # a block may write into what it is given
        (found,) = torch.autograd.grad(after, before, gradient)
        return found

    def finish(self, states: Tensor, *, gradient: bool = False) -> Any:
        """What the model gives, with its logits, where its last block gives `states` [rows, hidden]; gradient: keep
        what a gradient in them takes.
        """
        start = torch.zeros(1, 1, self.width, device=self.device)  # what the blocks would have read
        return self._skeleton.finish(states[None], start, gradient=gradient)

    def put(self, path: str, value: Tensor) -> None:
        """Give a parameter outside of the blocks its value. Raises CheckpointError: it does not fit."""
        self._skeleton.put(path, value)

    @property
    def product_type(self) -> torch.dtype:
        """What matrix products are in."""
        return torch.bfloat16 if self._autocast else torch.float32

    def _computing(self) -> AbstractContextManager[object]:
        """The type that matrix products are in."""
        return torch.autocast(self.device.type, torch.bfloat16) if self._autocast else nullcontext()

    @contextmanager
    def watching(self, index: int, see: Callable[[Tensor], None]) -> Iterator[None]:
        """While open, `see` gets each floating tensor that a module without children in a block reads or gives."""

        def look(_module: nn.Module, inputs: tuple[Any, ...], outputs: Any) -> None:
            for value in (*inputs, *(outputs if isinstance(outputs, tuple) else (outputs,))):
                if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
                    see(value)

        routed = [module for module in self.layer(index).modules() if isinstance(module, RoutedExperts)]
        plain = [module for module in self.layer(index).modules() if not [*module.children()]]
        handles = [module.register_forward_hook(look) for module in dict.fromkeys((*plain, *routed))]
        for module in routed:
            module.record = lambda _expert, _rows, _states, inner: see(inner)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for module in routed:
                module.record = None

    @contextmanager
    def recording(self, layout: BlockLayout, *, output_needed: bool) -> Iterator[BlockRecorder]:
        """While open, run() of the yielded recorder also accumulates the inputs of every linear."""
        layer = self.layer(layout.index)
        recorder = BlockRecorder(self, layout, output_needed)
        handles = recorder.attach(layer)
        try:
            yield recorder
        finally:
            for handle in handles:
                handle.remove()

    def complete(self, layout: BlockLayout, total: ShareSums) -> dict[str, Gram]:
        """The Gram matrix of each input key from the sums of all shares; a block with experts must be loaded."""
        sums, experts = total.sums, layout.experts
        if experts is None:
            return self._finish(sums)
        shared = sums.pop(experts.input).finish()
        grams = {experts.input: shared}
        routed: Any = self.layer(layout.index).get_submodule(experts.module)
        kept = torch.cat(total.kept)[:_KEPT_TOKENS]
        counts = torch.cat(total.counts)[:_KEPT_TOKENS] if total.counts else None
        for expert in range(experts.count):
            keys = experts.expert_input.format(expert=expert), experts.output.format(expert=expert)
            own = [sums.pop(key, None) for key in keys]
            seen = 0 if own[0] is None else own[0].tokens
            if seen >= SURE_TOKENS:
                grams.update({key: part.finish() for key, part in zip(keys, own, strict=True) if part is not None})
                continue
            with torch.no_grad(), self._computing():
                inner = routed.inner(expert, kept)
            common = GramAccumulator(routed.width, self.device)
            common.add(inner, counts)
            note = f"expert saw {seen} tokens, fewer than {STARVED_TOKENS}" if seen < STARVED_TOKENS else ""
            for key, part, prior in zip(keys, own, (shared, common.finish()), strict=True):
                part = part or GramAccumulator(prior.matrix.shape[0], self.device)
                grams[key] = part.finish(note).with_prior(prior, PRIOR_TOKENS)
        return grams | self._finish(sums)

    def _finish(self, sums: dict[str, GramAccumulator]) -> dict[str, Gram]:
        """The Gram matrices of all that is left of the sums."""
        keys = list(sums)
        grams = on_threads([sums.pop(key).finish for key in keys], threads_on(self.device))
        return dict(zip(keys, grams, strict=True))


def _skeleton(settings: Any, found: Anatomy, device: torch.device, fast: bool) -> Skeleton:
    """The model, with the fast kernel where it computes the same with one that it does not know."""
    kernel = register() if fast and found.takes_kernels else found.attention
    return Skeleton(settings, found.blocks, kernel, found.outputs, device, lanes=found.lanes, wide=found.wide)


def share_of(batch_number: int, device: str) -> int:
    """The share whose sums a batch goes into: so many a round of batches, whoever computes them, and wherever."""
    shares = shares_on(device)
    return shares * (batch_number // ROUND_BATCHES) + batch_number % shares


class ShareSums:
    """What one share of the batches adds up. sums: by input key. kept: some tokens for starved experts; counts: what
    each of them counts, nothing where each counts 1.
    """

    def __init__(self) -> None:
        self.sums: dict[str, GramAccumulator] = {}
        self.kept: list[Tensor] = []
        self.counts: list[Tensor] = []
        self.pending: set[str] = set()

    def merge(self, other: ShareSums) -> None:
        """Add the next share's sums, which must not be used afterwards."""
        for key in list(other.sums):
            part = other.sums.pop(key)
            self.sums[key] = self.sums[key].merge(part) if key in self.sums else part
        self.kept += other.kept
        self.counts += other.counts


class BlockRecorder:
    """Accumulates the Gram matrices of one block over many batches, in shares that are added up in order.

    So batches of different shares can run at once, each on a thread or a machine of its own, and the order of all sums
    is the same however many do.
    """

    def __init__(self, runner: BlockRunner, layout: BlockLayout, output_needed: bool) -> None:
        self._runner, self._layout, self._output_needed = runner, layout, output_needed
        self._total = ShareSums()
        self._shares: dict[int, ShareSums] = {}
        self._thread = threading.local()
        self._keys = {key for key, readers in layout.inputs.items() if readers[0].expert is None}
        if layout.experts is not None:
            self._keys |= {layout.experts.input, "experts"}

    def run(self, states: Tensor, share: int, weights: Mapping[str, Tensor] | None = None) -> Tensor | None:
        """Run the block and add to a share's sums; None when nobody needs the output and the pass stopped early.

        weights: what each token of the batch counts, by input key; None: 1. Batches of one share must run one after the
        other, in order.
        """
        self._thread.share = self._shares.setdefault(share, ShareSums())
        self._thread.weights, size = weights, states.shape[1]
        if self._runner.anatomy.together:
            outputs = [self._run(states)]
        else:
            outputs = []
            for number, part in enumerate(torch.split(states, 1)):
                rows = slice(number * size, (number + 1) * size)
                self._thread.weights = None if weights is None else {key: own[rows] for key, own in weights.items()}
                outputs.append(self._run(part))
        return torch.cat(outputs) if self._output_needed else None

    def _run(self, states: Tensor) -> Tensor:
        self._share.pending = set(self._keys)
        try:
            return self._runner.run(self._layout.index, states)
        except _Stop:
            return states

    @property
    def _share(self) -> ShareSums:
        share: ShareSums = self._thread.share
        return share

    def attach(self, layer: nn.Module) -> list[Any]:
        """Put hooks on one linear of each input."""
        handles = []
        for key, readers in self._layout.inputs.items():
            if readers[0].expert is None:
                module = layer.get_submodule(self._layout.module_path(readers[0].tensor).removesuffix(".weight"))
                handles.append(module.register_forward_pre_hook(self._hook(key)))
        experts = self._layout.experts
        if experts is not None:
            routed = layer.get_submodule(experts.module)
            assert isinstance(routed, RoutedExperts)
            routed.record = self._record_expert
            handles.append(routed.register_forward_pre_hook(self._moe_hook(experts)))
            handles.append(routed.register_forward_hook(lambda *_: self._seen("experts")))
        return handles

    def take(self, share: int) -> ShareSums:
        """A share's sums; it is no longer part of this recorder's."""
        return self._shares.pop(share)

    def settle(self) -> None:
        """Add up the shares so far: their batches are done."""
        for share in sorted(self._shares):
            self._total.merge(self.take(share))

    def finish(self) -> dict[str, Gram]:
        """The Gram matrix of each input key. Starved experts take statistics of all experts' tokens, and say so."""
        self.settle()
        return self._runner.complete(self._layout, self._total)

    def _hook(self, key: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def record(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if key in self._share.pending:  # not yet recorded by routed experts that read the same tensor
                self._add(key, inputs[0], self._weights(key))
                self._seen(key)

        return record

    def _moe_hook(self, experts: Experts) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def record(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if experts.input in self._share.pending:  # not yet recorded by a shared expert that reads the same tensor
                self._add(experts.input, inputs[0], self._weights(experts.input))
                self._seen(experts.input)
            room = _KEPT_TOKENS - sum(states.shape[0] for states in self._share.kept)
            if room > 0:
                counts = self._weights(experts.input)
                self._share.kept.append(inputs[0][:room].clone())
                self._share.counts += [] if counts is None else [counts[:room]]

        return record

    def _record_expert(self, expert: int, rows: Tensor, states: Tensor, inner: Tensor) -> None:
        experts = self._layout.experts
        assert experts is not None
        for name, x in ((experts.expert_input, states), (experts.output, inner)):
            key = name.format(expert=expert)
            self._add(key, x, self._weights(key, rows))

    def _weights(self, key: str, rows: Tensor | None = None) -> Tensor | None:
        """What the tokens of the run count in an input's sums; of an expert's, those of the given rows.

        One that chose another expert in the backward pass, by its rounding, counts as the mean does.
        """
        weights: Mapping[str, Tensor] | None = self._thread.weights
        if weights is None:
            return None
        if rows is None:
            return weights[key]
        return weights[key][rows].nan_to_num(1.0) if key in weights else torch.ones(len(rows), device=rows.device)

    def _add(self, key: str, x: Tensor, weights: Tensor | None) -> None:
        sums = self._share.sums
        if key not in sums:
            sums[key] = GramAccumulator(x.shape[-1], self._runner.device)
        with torch.autocast(self._runner.device.type, enabled=False):
            sums[key].add(x, weights)

    def _seen(self, key: str) -> None:
        self._share.pending.discard(key)
        if not self._share.pending and not self._output_needed:
            raise _Stop
