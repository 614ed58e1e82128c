"""What lies outside of the blocks, and a rehearsal of the pass: built without weights, given them block by block.

In: a tiny model in float64, where its blocks are. Out: which parameters run before the blocks and which after, with
their names on disk, and which modules text never passes; Unknown where a skeleton does not compute what the model does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quantize.errors import first_line
from quantize.model.anatomy.build import take_plain_experts
from quantize.model.anatomy.names import disk_names
from quantize.model.anatomy.skeleton import Skeleton
from quantize.model.anatomy.watch import BlockCall, Unknown, forward_only, outputs_of, same

Pairs = tuple[tuple[str, str], ...]


def outside(model: Any, on_disk: Mapping[str, Tensor], path: str, ids: Tensor) -> tuple[Pairs, Pairs, tuple[str, ...]]:
    """(Name on disk, path) of what runs before the blocks, and of what runs after them; the outermost modules that do
    not run: towers for images or sound, and what joins them to the rest. ids: [1, length].

    Raises Unknown: a parameter is saved otherwise than as it is.
    """
    blocks: Any = model.get_submodule(path)
    order = _order(model, ids)
    last = max(place for place, module in enumerate(order) if module is blocks[-1])
    inside = {id(module) for block in blocks for module in block.modules()}
    ran = {id(module) for module in order}
    later = {id(module) for module in order[last:]} - {id(module) for module in order[:last]}
    names = dict(disk_names(model, on_disk, path))
    entry: list[tuple[str, str]] = []
    leaving: list[tuple[str, str]] = []
    for owner, module in model.named_modules():
        if id(module) in inside or id(module) not in ran:
            continue
        for leaf in _leaves(module):
            full = f"{owner}.{leaf}" if owner else leaf
            if full not in names:
                raise Unknown(f"{full} is saved in another arrangement")
            (leaving if id(module) in later else entry).append((names[full], full))
    return tuple(entry), tuple(leaving), _still(model, ran | inside)


def _still(model: Any, used: set[int]) -> tuple[str, ...]:
    """The paths of the outermost modules with parameters in which nothing is used."""
    found: list[str] = []
    for path, module in model.named_modules():
        if path.startswith(tuple(f"{each}." for each in found)) or not any(True for _ in module.parameters()):
            continue
        if not any(id(each) in used for each in module.modules()):
            found.append(path)
    return tuple(found)


def _order(model: Any, ids: Tensor) -> list[nn.Module]:
    """Modules in the order in which they begin to run."""
    order: list[nn.Module] = []
    handles = [module.register_forward_pre_hook(lambda module, _: order.append(module)) for module in model.modules()]
    try:
        forward_only(model, ids)
    finally:
        for handle in handles:
            handle.remove()
    return order


def _leaves(module: nn.Module) -> list[str]:
    """Names of the parameters and the stored buffers that a module has itself."""
    hidden = module._non_persistent_buffers_set
    buffers = [name for name, _ in module.named_buffers(recurse=False) if name not in hidden]
    return [name for name, _ in module.named_parameters(recurse=False)] + buffers


def rehearse(
    settings: Any, model: Any, path: str, attention: str, calls: list[BlockCall], entry: Pairs, ids: Tensor
) -> None:
    """Run the tiny model as the pass will. calls: of the whole model on ids [1, length]. Raises Unknown: it differs."""
    state, modules = dict(model.state_dict()), dict(entry)
    try:
        outputs, lanes = outputs_of(calls[0].output), tuple(calls[0].states.shape[2:-1])
        skeleton = Skeleton(settings, path, attention, outputs, torch.device("cpu"), torch.float64, lanes)
        take_plain_experts(skeleton.model)
        (start,) = skeleton.embed(lambda name: state[modules[name]], modules, [ids[0]])
        states = start[None]
        for index in range(len(calls)):
            inside = f"{path}.{index}."
            own = {name.removeprefix(inside): each for name, each in state.items() if name.startswith(inside)}
            skeleton.load(index, own)
            states = skeleton.run(index, states)
            skeleton.unload(index)
    except Exception as exc:
        raise Unknown(f"built without weights it does not run: {type(exc).__name__}: {first_line(exc)}") from exc
    if not same(states, calls[-1].result.flatten(2)):
        raise Unknown("built without weights, and given them block by block, it computes something else")
