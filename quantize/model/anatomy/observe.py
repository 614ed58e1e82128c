"""What happens in a block: its linears, who reads the same tensor, its mixture of experts.

In: a block of a tiny model and the call that it was run with. Out: a Sight: every module with weights of its own, what
it read and what it gave; the linears among them, told by F.linear giving the same. Left to others: names on disk
(names), what feeds an input (feeds).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from quantize.model.anatomy.watch import BlockCall, Unknown, first, same

FEW_ROWS = 64  # fewer outputs than that, of many times as many inputs, are gates and steps of a recurrence
MANY_TIMES = 8
FUSED, DOWN = "gate_up_proj", "down_proj"


@dataclass
class Use:
    """A module with weights of its own, as it ran: what it read, [rows, in], and what it gave, [rows, out]."""

    path: str
    module: nn.Module
    read: Tensor
    gave: Tensor
    order: int
    times: int = 1


@dataclass
class Mixture:
    """Routed experts: fused weights [experts, 2 x inner, hidden] and [experts, hidden, inner], and their router."""

    path: str
    module: nn.Module
    read: Tensor
    router: str


@dataclass
class Input:
    """A tensor that linears read. readers: paths of linears; passengers: parameters that read it and are kept."""

    value: Tensor
    readers: list[str] = field(default_factory=list)
    passengers: list[str] = field(default_factory=list)
    mixture: bool = False
    order: int = 0


@dataclass
class Sight:
    """A block, seen. transposed: linears whose weights lie [in, out]. kept: parameters that stay, with the reason."""

    uses: dict[str, Use]
    linears: list[str]
    inputs: list[Input]
    mixture: Mixture | None
    kept: dict[str, str]
    transposed: list[str]


def run_watched(block: nn.Module, call: BlockCall, modules: Sequence[str] | None = None) -> dict[str, Use]:
    """Run a block again and keep what modules with weights of their own read and gave, in order, by path."""
    named = dict(block.named_modules())
    wanted = [path for path, each in named.items() if [*each.parameters(recurse=False)]] if modules is None else modules
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def keep(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given = next((item for item in (*args, *kwargs.values()) if isinstance(item, Tensor)), None)
            gave = first(output)
            if given is not None and isinstance(gave, Tensor) and given.dim() and gave.dim():
                found.setdefault(path, []).append((_flat(given).clone(), _flat(gave).clone()))

        return hook

    handles = [named[path].register_forward_hook(keep(path), with_kwargs=True) for path in wanted]
    try:
        block(call.states, *call.args, **call.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    uses = {}
    for place, (path, pairs) in enumerate(found.items()):
        read, gave = (_joined([pair[side] for pair in pairs]) for side in (0, 1))
        uses[path] = Use(path, named[path], read, gave, place, len(pairs))
    return uses


def look(block: nn.Module, call: BlockCall, real: nn.Module) -> Sight:
    """What a block is made of. real: the block whose small copy it is.

    Raises Unknown: it has experts of a form that is not known.
    """
    uses = run_watched(block, call)
    mixture = _mixture(block, uses, call)
    inner = f"{mixture.path}." if mixture else "\0"
    linears, kept, transposed = [], dict[str, str](), []
    for path, module in block.named_modules():
        weight = getattr(module, "weight", None)
        if path.startswith(inner) or not isinstance(weight, nn.Parameter) or weight.dim() != 2:
            continue
        use, name = uses.get(path), f"{path}.weight"
        if isinstance(module, nn.Embedding):
            kept[name] = "embeddings inside of blocks stay unquantized"
        elif use is None:
            kept[name] = "it does not run as a linear of its own"
        elif use.times > 1:
            raise Unknown(f"{path} runs {use.times} times in one pass over its block")
        elif not _is_linear(use):
            transposed += [path] if _is_transposed(use) else []
            kept[name] = "it is no plain linear"
        elif mixture is not None and path == mixture.router:
            kept[name] = ROUTER
        elif _is_few(real.get_parameter(name)):
            is_gate = mixture is not None and weight.shape[0] == 1  # of a shared expert
            kept[name] = ROUTER if is_gate else "it has few weights, and they steer the others"
        else:
            linears.append(path)
    if mixture is not None and mixture.router and mixture.router in linears:
        linears.remove(mixture.router)
    for name, parameter in block.named_parameters():
        path = name.rpartition(".")[0]
        if parameter.dim() > 1 and path not in linears and name not in kept and not name.startswith(inner):
            is_router = mixture is not None and path == mixture.router
            kept[name] = ROUTER if is_router else "it is no linear: convolution, state or table"
    _check_most(block, linears, mixture, kept, transposed)
    order = sorted((path for path in linears), key=lambda path: uses[path].order)
    return Sight(uses, order, _inputs(uses, order, kept, mixture), mixture, kept, transposed)


def _check_most(
    block: nn.Module, linears: list[str], mixture: Mixture | None, kept: dict[str, str], transposed: list[str]
) -> None:
    """Raises Unknown: most of a block's weights would stay as they are."""
    taken = sum(block.get_parameter(f"{path}.weight").numel() for path in linears)
    taken += 0 if mixture is None else sum(each.numel() for each in mixture.module.parameters())
    left = {name: block.get_parameter(name).numel() for name in kept}
    if sum(left.values()) > taken and not transposed:
        most = max(left, key=lambda name: left[name])
        raise Unknown(f"most weights of a block are of a form that is not taken apart, {most} among them")


ROUTER = "routers stay unquantized: their few weights decide which expert runs"


def _inputs(uses: dict[str, Use], linears: list[str], kept: dict[str, str], mixture: Mixture | None) -> list[Input]:
    """Distinct inputs in the order in which they are read, each with all its readers."""
    inputs: list[Input] = []
    for path in linears:
        use = uses[path]
        found = next((item for item in inputs if same(item.value, use.read)), None)
        if found is None:
            inputs.append(found := Input(use.read, order=use.order))
        found.readers.append(path)
    if mixture is not None:
        found = next((item for item in inputs if same(item.value, mixture.read)), None)
        if found is None:
            place = uses[mixture.path].order if mixture.path in uses else len(uses)
            inputs.append(found := Input(mixture.read, order=place))
            inputs.sort(key=lambda item: item.order)
        found.mixture = True
    for item in inputs:
        for name in kept:
            path, _, leaf = name.rpartition(".")
            parameter = getattr(uses[path].module, leaf) if path in uses else None
            reads = parameter is not None and parameter.dim() == 2 and parameter.shape[-1] == item.value.shape[-1]
            if reads and same(uses[path].read, item.value):
                item.passengers.append(name)
    return inputs


def _mixture(block: nn.Module, uses: dict[str, Use], call: BlockCall) -> Mixture | None:
    found = [
        (path, module) for path, module in block.named_modules()
        if any(each.dim() == 3 for _, each in module.named_parameters(recurse=False)) and not _convolves(module)
    ]  # fmt: skip
    lists = [path for path, each in block.named_modules() if isinstance(each, nn.ModuleList) and len(each) > 1]
    alike = [path for path in lists if "expert" in path]
    if alike:
        raise Unknown(f"the experts of {alike[0]} are modules of their own, of which one may see no token")
    plain = [(path, module) for path, module in found if _is_plain_mixture(module)]
    if len(plain) > 1:
        raise Unknown(f"a block has several mixtures of experts: {', '.join(path for path, _ in plain)}")
    if not plain:
        return None
    path, module = plain[0]
    read, chosen, weights, gave = _routed(block, module, call)
    if not same(plain_experts(module, read, chosen, weights), gave):
        raise Unknown(f"experts of {type(module).__name__} compute otherwise than act(gate) * up")
    count = getattr(module, FUSED).shape[0]
    routers = [use.path for use in uses.values() if use.path != path and _routes(use, read, int(count))]
    return Mixture(path, module, read, routers[0] if routers else "")


def _routes(use: Use, read: Tensor, experts: int) -> bool:
    weight = getattr(use.module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 2 and len(weight) == experts and same(use.read, read)


def _convolves(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv1d | nn.ConvTranspose1d)


def _is_plain_mixture(module: nn.Module) -> bool:
    names = {name for name, _ in module.named_parameters()}
    fused, down = getattr(module, FUSED, None), getattr(module, DOWN, None)
    if names != {FUSED, DOWN} or not hasattr(module, "act_fn"):
        return False
    assert isinstance(fused, Tensor)
    assert isinstance(down, Tensor)
    if fused.dim() != 3 or down.dim() != 3 or len(fused) != len(down):
        return False
    return fused.shape[1] == 2 * down.shape[2] and fused.shape[2] == down.shape[1]


def _routed(block: nn.Module, module: nn.Module, call: BlockCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kept: list[tuple[Any, ...]] = []

    def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        kept.append((*args, *kwargs.values(), output))

    handle = module.register_forward_hook(keep, with_kwargs=True)
    try:
        block(call.states, *call.args, **call.kwargs)
    finally:
        handle.remove()
    if len(kept) != 1 or len(kept[0]) != 4 or not all(isinstance(item, Tensor) for item in kept[0]):
        raise Unknown(f"experts of {type(module).__name__} are called in a way that is not known")
    states, chosen, weights, gave = kept[0]
    if states.dim() != 2 or chosen.dim() != 2 or chosen.is_floating_point() or chosen.shape != weights.shape:
        raise Unknown(f"experts of {type(module).__name__} are called in a way that is not known")
    return states, chosen, weights, gave


def plain_experts(module: Any, states: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """What the usual mixture gives: the sum of each token's experts down(act(gate) * up), weighted."""
    output = torch.zeros_like(states)
    for expert in range(getattr(module, FUSED).shape[0]):
        token, place = torch.where(chosen == expert)
        gate, up = linear(states[token], getattr(module, FUSED)[expert]).chunk(2, -1)
        result = linear(module.act_fn(gate) * up, getattr(module, DOWN)[expert])
        output.index_add_(0, token, result * weights[token, place, None])
    return output


def _is_few(weight: Tensor) -> bool:
    return weight.shape[0] < FEW_ROWS and weight.shape[0] * MANY_TIMES <= weight.shape[1]


def _is_linear(use: Use) -> bool:
    weight, bias = use.module.weight, getattr(use.module, "bias", None)
    if not isinstance(weight, Tensor) or weight.shape[1] != use.read.shape[1]:
        return False
    return same(linear(use.read, weight, bias if isinstance(bias, Tensor) else None), use.gave)


def _is_transposed(use: Use) -> bool:
    weight, bias = use.module.weight, getattr(use.module, "bias", None)
    if not isinstance(weight, Tensor) or weight.shape[0] != use.read.shape[1]:
        return False
    return same(linear(use.read, weight.T, bias if isinstance(bias, Tensor) else None), use.gave)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _joined(parts: list[Tensor]) -> Tensor:
    widths = {part.shape[-1] for part in parts}
    return torch.cat(parts) if len(widths) == 1 else parts[0]
