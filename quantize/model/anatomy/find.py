"""The anatomy of an architecture, found by building it tiny and running it.

In: a config.json as a dictionary. Out: an Anatomy, with a refusal that says why where blocks can't be run one at a
time. Takes about a second on a CPU; what it finds depends on the config and the installed transformers alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from quantize.errors import CheckpointError
from quantize.model.anatomy.build import check_causal, load_config, meta_model, random_model
from quantize.model.anatomy.doubles import doubles
from quantize.model.anatomy.feeds import Feed, FeedSearch
from quantize.model.anatomy.found import Anatomy, Template
from quantize.model.anatomy.gradient import no_gradient
from quantize.model.anatomy.names import BlockNames, block_names, saved
from quantize.model.anatomy.observe import Sight, look
from quantize.model.anatomy.outside import outside, rehearse
from quantize.model.anatomy.prove import Fold, mixture_folds, proved
from quantize.model.anatomy.real import check_parameters, template
from quantize.model.anatomy.shrink import VOCABULARY, shrink
from quantize.model.anatomy.skeleton import times_wide
from quantize.model.anatomy.watch import (
    BlockCall,
    Unknown,
    block_path,
    forward,
    forward_only,
    outputs_of,
    run_apart,
    same,
    watch_blocks,
)

LENGTH = 24  # tokens of each of two sequences
LEAST_BLOCKS = 3  # fewer would not show what happens between two of them
EAGER, SDPA, STRANGE = "eager", "sdpa", "sdpa_by_another_name"
Signature = tuple[Any, ...]


def find(config: Mapping[str, Any]) -> Anatomy:
    """What a config's architecture is made of. Raises CheckpointError: it is of no causal language model."""
    began = time.perf_counter()
    settings = load_config(config)
    check_causal(settings, config)
    try:
        found = _find(settings)
    except CheckpointError as exc:  # Unknown among them
        found = Anatomy(_name(config, settings), refusal=exc.message)
    return replace(found, seconds=round(time.perf_counter() - began, 2))


def _find(settings: Any) -> Anatomy:
    """With as few blocks as show every kind; where a class refuses so few, with all of them."""
    real = meta_model(settings)
    depth, first = _depths(real)
    failed: CheckpointError | None = None
    for layers in dict.fromkeys((min(depth, max(LEAST_BLOCKS, first)), min(depth, 2 * first + 2), depth)):
        try:
            return _found(settings, real, layers)
        except CheckpointError as exc:
            failed = failed or exc
    assert failed is not None
    raise failed


def _found(whole: Any, real: Any, layers: int) -> Anatomy:
    settings = load_config(shrink(whole.to_dict(), layers))
    with doubles():
        attention, takes_kernels, model = _right_attention(settings)
        ids = _ids()
        path = block_path(model, lambda: forward_only(model, ids[:1]))
        blocks: Any = model.get_submodule(path)
        calls = watch_blocks(blocks, lambda: forward_only(model, ids[:1]))
        together = run_apart(model, blocks, ids, calls)
        kinds = _Kinds(real.get_submodule(path), blocks)
        on_disk = saved(model)
        seen = _seen(kinds, calls)
        templates, prefix = _templates(kinds, seen, calls, on_disk, model, path)
        backward = _no_gradient(kinds, seen, calls)
        entry, leaving, apart = outside(model, on_disk, path, ids[:1])
        rehearse(settings, model, path, attention, calls, entry, ids[:1])
    states = calls[0].states
    return Anatomy(
        type(real).__name__, path, prefix, attention, takes_kernels, together, outputs_of(calls[0].output),
        tuple(states.shape[2:-1]), times_wide(model, states), kinds.of_real, templates, entry, leaving,
        type(real).__module__, no_gradient=backward, towers=apart,
    )  # fmt: skip


class _Kinds:
    """Which blocks are of one kind. of_real: of each real block. places: of the first tiny block of each kind.

    tiny: the tiny blocks of each kind; real: the first real one.
    """

    def __init__(self, real: Any, tiny: Any) -> None:
        signatures, ours = [_signature(block) for block in real], [_signature(block) for block in tiny]
        kinds = list(dict.fromkeys(signatures))
        if not set(kinds) <= set(ours):
            raise Unknown("a small one lacks a kind of block that the real one has")
        self.of_real = tuple(kinds.index(each) for each in signatures)
        self.places = [ours.index(kind) for kind in kinds]
        self.tiny = [[block for block, own in zip(tiny, ours, strict=True) if own == kind] for kind in kinds]
        self.real = [real[signatures.index(kind)] for kind in kinds]
        for mine, theirs in zip(self.tiny, self.real, strict=True):
            check_parameters(mine[0], theirs)


def _seen(kinds: _Kinds, calls: list[BlockCall]) -> list[Sight]:
    """What is seen of each kind of block."""
    parts = zip(kinds.tiny, kinds.places, kinds.real, strict=True)
    return [_see(blocks[0], calls[place], theirs) for blocks, place, theirs in parts]


def _no_gradient(kinds: _Kinds, seen: list[Sight], calls: list[BlockCall]) -> str:
    """Why a gradient does not get through a kind of block; "" where it gets through all."""
    parts = zip(kinds.tiny, kinds.places, seen, strict=True)
    return next(filter(None, (no_gradient(own[0], calls[place], sight.linears) for own, place, sight in parts)), "")


def _templates(
    kinds: _Kinds, seen: list[Sight], calls: list[BlockCall], on_disk: Mapping[str, Tensor], model: Any, path: str
) -> tuple[tuple[Template, ...], str]:
    """What is known of each kind of block, and how the names of a block's tensors begin on disk."""
    named = [
        block_names(model, on_disk, path, place, sight.mixture) for place, sight in zip(kinds.places, seen, strict=True)
    ]
    standing = _standing(kinds, seen, calls, lambda: forward(model, _ids()[:1]))
    templates = tuple(
        template(kinds.tiny[number][0], kinds.real[number], sight, *standing[number], named[number])
        for number, sight in enumerate(seen)
    )
    return templates, _prefix_pattern(named, kinds.places)


def _see(block: nn.Module, call: BlockCall, real: nn.Module) -> Sight:
    sight = look(block, call, real)
    if sight.transposed:
        kind = type(block.get_submodule(sight.transposed[0])).__name__
        raise Unknown(f"its linears are {kind}, whose weights lie [in, out]")
    if not sight.linears and sight.mixture is None:
        raise Unknown(f"a block of class {type(block).__name__} has no linears")
    return sight


def _standing(
    kinds: _Kinds, seen: list[Sight], calls: list[BlockCall], logits: Callable[[], Tensor]
) -> list[tuple[list[Feed | None], bool]]:
    """For each kind of block, what was proved to feed each input, and whether rows of experts take scales."""
    folds: list[Fold] = []
    for number, sight in enumerate(seen):
        trial = FeedSearch(kinds.tiny[number][0], calls[kinds.places[number]], sight)
        for place, item in enumerate(sight.inputs):
            feed = trial.feed(item)
            if feed is not None:
                folds.append(Fold(number, place, item, feed, sight.mixture))
    standing = {(fold.kind, fold.place): fold.feed for fold in proved(folds, kinds.tiny, logits)}
    return [
        (
            [standing.get((number, place)) for place in range(len(sight.inputs))],
            sight.mixture is not None and mixture_folds(sight.mixture, kinds.tiny[number], logits),
        )
        for number, sight in enumerate(seen)
    ]


def _right_attention(settings: Any) -> tuple[str, bool, Any]:
    """The kernel that computes what the class means, the fast one if it does; whether it computes the same with one of
    another name; and a model that has the first.
    """
    eager = random_model(settings, attn_implementation=EAGER)
    expected = forward(eager, _ids()[:1])

    def alike(kernel: str) -> Any:
        try:
            model = random_model(settings, attn_implementation=kernel)
            return model if same(forward(model, _ids()[:1]), expected) else None
        except CheckpointError:
            return None

    fast = alike(SDPA)
    return (EAGER, False, eager) if fast is None else (SDPA, alike(_strange_kernel()) is not None, fast)


def _strange_kernel() -> str:
    """The fast kernel, under a name that no class knows."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(STRANGE, sdpa_attention_forward)
    AttentionMaskInterface.register(STRANGE, sdpa_mask)
    return STRANGE


def _ids() -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(8, VOCABULARY - 8, (2, LENGTH), generator=generator)


def _depths(real: Any) -> tuple[int, int]:
    """How many blocks the real model has, and how many it takes for one of each kind."""
    lists = _lists(_decoder(real)) or _lists(real)
    if not lists:
        raise Unknown("no list of blocks was found in it")
    longest = max(lists, key=lambda each: sum(parameter.numel() for parameter in each.parameters()))
    signatures = [_signature(block) for block in longest]
    return len(longest), 1 + max(signatures.index(kind) for kind in signatures)


def _decoder(real: Any) -> Any:
    """The part that reads text, of a model that says which it is; a tower beside it may be the larger one."""
    try:
        return real.get_decoder()
    except (AttributeError, NotImplementedError):
        return real


def _lists(module: Any) -> list[nn.ModuleList]:
    found = [] if module is None else module.modules()
    return [each for each in found if isinstance(each, nn.ModuleList) and len(each)]


def _signature(block: nn.Module) -> Signature:
    """What blocks of one kind have in common: modules, by class and place, and the names of parameters."""
    modules = tuple((name, type(module).__name__) for name, module in block.named_modules() if not _in_list(name))
    return modules, tuple(name for name, _ in block.named_parameters() if not _in_list(name))


def _in_list(name: str) -> bool:
    """Whether a name is of a later one of things that are alike."""
    return any(part.isdigit() and int(part) > 0 for part in name.split("."))


def _prefix_pattern(named: list[BlockNames], places: list[int]) -> str:
    patterns = {
        names.prefix.removesuffix(f".{place}.") + ".{index}." for names, place in zip(named, places, strict=True)
    }
    if len(patterns) != 1:
        raise Unknown("its blocks are saved under several names")
    return patterns.pop()


def _name(config: Mapping[str, Any], settings: Any) -> str:
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else type(settings).__name__
