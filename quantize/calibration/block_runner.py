"""Runs one decoder block at a time with transformers' own layer code, and records what its linears read.

In: a checkpoint's config and one block's weights. Out: the block's output, and a Gram matrix for each distinct input.
Left to others: which blocks in which order, and where hidden states live (activations). The model is built on the meta
device, so rotary embeddings, masks, sliding windows and soft caps are those of transformers, and only the block that
runs has weights.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantize.calibration.attention import register
from quantize.errors import CheckpointError
from quantize.model.architecture import BlockLayout, Experts, architecture_of
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

    model: transformers' own, for output_head.py, which runs what follows the blocks.
    """

    def __init__(self, folder: Path, config: dict[str, Any], device: str, precision: str) -> None:
        self.device = torch.device(device)
        self._autocast = precision == "bfloat16"
        settle_precision(self.device)
        if self.device.type == "cuda":
            torch.linalg.cholesky_ex(torch.eye(2, device=self.device))  # loads the library, which threads must not
        self.model = _meta_model(folder, architecture_of(config).attention)
        self._base: Any = self.model.model
        for module in self.model.modules():
            if module._non_persistent_buffers_set:
                _materialize(self.model, module, self.device)
        self.hidden_size = int(self.model.config.hidden_size)
        self.blocks = len(self._base.layers)
        self._arguments: dict[int, list[dict[str, Any]]] = {}

    def embed(self, embedding: Tensor, sequences: list[Tensor]) -> Iterator[Tensor]:
        """The first block's input of each sequence, [length, hidden] float32, as the model's own forward makes it.

        embedding [vocabulary, hidden] may be of any floating type: only the rows in use are converted.
        """
        used, positions = torch.unique(torch.cat(sequences), return_inverse=True)
        table = self._base.embed_tokens
        table.weight = nn.Parameter(embedding[used].to(self.device, torch.float32), requires_grad=False)
        start = 0
        for sequence in sequences:
            ids = positions[start : start + len(sequence)].to(self.device)[None]
            start += len(sequence)
            states, arguments = self._intercept(ids)
            self._arguments.setdefault(len(sequence), arguments)
            yield states[0]
        table.weight = nn.Parameter(table.weight.to("meta"), requires_grad=False)

    def load(self, layout: BlockLayout, weights: dict[str, Tensor]) -> None:
        """Put a block's float32 weights (full names) in place; in float32 they are shared, not copied."""
        layer = self._base.layers[layout.index]
        state = {layout.module_path(name): self._as_run(tensor) for name, tensor in weights.items()}
        if layout.experts is not None:
            run = {name: self._as_run(tensor) for name, tensor in weights.items() if ".experts." in name}
            layer.mlp.experts = _RoutedExperts(layout.experts, run, layer.mlp.experts.act_fn)
            state = {name: tensor for name, tensor in state.items() if ".experts." not in name}
        try:
            layer.load_state_dict(state, strict=True, assign=True)
        except RuntimeError as exc:
            raise CheckpointError(f"block {layout.index}: tensors don't fit the architecture: {exc}") from exc

    def _as_run(self, weight: Tensor) -> Tensor:
        """What autocast would make of a linear's weight, once for all batches."""
        return weight.bfloat16() if self._autocast and weight.dim() == 2 else weight

    def unload(self, index: int) -> None:
        """Let go of a block's weights."""
        layer = self._base.layers[index]
        for module in layer.modules():
            if isinstance(module, _RoutedExperts):
                module.weights.clear()
        layer.to_empty(device="meta")

    def run(self, index: int, states: Tensor) -> Tensor:
        """One block over states [sequences, length, hidden]; the output has the same shape, float32."""
        arguments = self._arguments[states.shape[1]][index]
        with torch.no_grad(), self._computing():
            output = self._base.layers[index](states, **arguments)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result.float()

    def _computing(self) -> AbstractContextManager[object]:
        """The type that matrix products are in."""
        return torch.autocast(self.device.type, torch.bfloat16) if self._autocast else nullcontext()

    @contextmanager
    def recording(self, layout: BlockLayout, *, output_needed: bool) -> Iterator[BlockRecorder]:
        """While open, run() of the yielded recorder also accumulates the inputs of every linear."""
        layer = self._base.layers[layout.index]
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
        routed = self._base.layers[layout.index].get_submodule(experts.module)
        kept = torch.cat(total.kept)[:_KEPT_TOKENS]
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
            common.add(inner)
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

    def _intercept(self, ids: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        found: list[Tensor] = []
        arguments: list[dict[str, Any]] = []
        layers = self._base.layers

        def record(states: Tensor, **kwargs: Any) -> Tensor:
            if not found:
                found.append(states)
            arguments.append(kwargs)
            if len(arguments) == len(layers):
                raise _Stop
            return states

        for layer in layers:
            layer.forward = record
        try:
            with torch.no_grad():
                self._base(input_ids=ids, use_cache=False)
        except _Stop:
            pass
        finally:
            for layer in layers:
                del layer.forward
        return found[0], arguments


def share_of(batch_number: int, device: str) -> int:
    """The share whose sums a batch goes into: so many a round of batches, whoever computes them, and wherever."""
    shares = shares_on(device)
    return shares * (batch_number // ROUND_BATCHES) + batch_number % shares


class ShareSums:
    """What one share of the batches adds up. sums: by input key. kept: some tokens for starved experts."""

    def __init__(self) -> None:
        self.sums: dict[str, GramAccumulator] = {}
        self.kept: list[Tensor] = []
        self.pending: set[str] = set()

    def merge(self, other: ShareSums) -> None:
        """Add the next share's sums, which must not be used afterwards."""
        for key in list(other.sums):
            part = other.sums.pop(key)
            self.sums[key] = self.sums[key].merge(part) if key in self.sums else part
        self.kept += other.kept


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

    def run(self, states: Tensor, share: int) -> Tensor | None:
        """Run the block and add to a share's sums; None when nobody needs the output and the pass stopped early.

        Batches of one share must run one after the other, in order.
        """
        self._thread.share = self._shares.setdefault(share, ShareSums())
        self._share.pending = set(self._keys)
        try:
            return self._runner.run(self._layout.index, states)
        except _Stop:
            return None

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
            assert isinstance(routed, _RoutedExperts)
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
            self._add(key, inputs[0])
            self._seen(key)

        return record

    def _moe_hook(self, experts: Experts) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def record(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if experts.input in self._share.pending:  # not yet recorded by a shared expert that reads the same tensor
                self._add(experts.input, inputs[0])
                self._seen(experts.input)
            kept = sum(states.shape[0] for states in self._share.kept)
            if kept < _KEPT_TOKENS:
                self._share.kept.append(inputs[0][: _KEPT_TOKENS - kept].clone())

        return record

    def _record_expert(self, expert: int, states: Tensor, inner: Tensor) -> None:
        experts = self._layout.experts
        assert experts is not None
        self._add(experts.expert_input.format(expert=expert), states)
        self._add(experts.output.format(expert=expert), inner)

    def _add(self, key: str, x: Tensor) -> None:
        sums = self._share.sums
        if key not in sums:
            sums[key] = GramAccumulator(x.shape[-1], self._runner.device)
        with torch.autocast(self._runner.device.type, enabled=False):
            sums[key].add(x)

    def _seen(self, key: str) -> None:
        self._share.pending.discard(key)
        if not self._share.pending and not self._output_needed:
            raise _Stop


class _RoutedExperts(nn.Module):
    """Experts with one weight each as on disk, in the place of transformers' fused ones."""

    def __init__(self, experts: Experts, weights: dict[str, Tensor], act_fn: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weights = [
            tuple(weights[name.format(expert=expert)] for name in (experts.gate, experts.up, experts.down))
            for expert in range(experts.count)
        ]
        self.act_fn = act_fn
        self.width = int(self.weights[0][2].shape[1])
        self.record: Callable[[int, Tensor, Tensor], None] | None = None

    def inner(self, expert: int, states: Tensor) -> Tensor:
        """What the expert's down projection reads."""
        gate, up, _ = self.weights[expert]
        product: Tensor = self.act_fn(nn.functional.linear(states, gate)) * nn.functional.linear(states, up)
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
            inner = self.inner(expert, states)
            if self.record is not None:
                self.record(expert, states, inner)
            result = nn.functional.linear(inner, down) * top_k_weights.flatten()[places, None]
            output.index_add_(0, tokens, result.to(output.dtype))
        return output


def _meta_model(folder: Path, attention: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder)
        vars(config).pop("quantization_config", None)  # an artifact's: what is put in are floating-point weights
        kernel = register() if attention == "sdpa" else attention
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, attn_implementation=kernel, dtype=torch.float32)
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise CheckpointError(f"{folder}: transformers can't build this model: {exc}") from exc
    return model.eval()


def _materialize(model: Any, module: nn.Module, device: torch.device) -> None:
    """Give a module's computed buffers (rotary frequencies, embedding scale) real values, as loading a model does."""
    for name in module._non_persistent_buffers_set:
        buffer = module._buffers[name]
        if buffer is not None:
            module._buffers[name] = torch.empty_like(buffer, device=device)
    model._init_weights(module)
