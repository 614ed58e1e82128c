"""Tensors that llama.cpp's converter must be shown otherwise than a checkpoint has them.

In: a model of the converter, before it writes. Out: the same model, that is given its tensors one by one as it knows
them: experts that are stacked in one tensor are taken apart, heads of which only a part is rotated are put in order.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Loader = Callable[[], "Tensor"]
STACKED = re.compile(r"^(?P<module>.*\.(?:mlp|feed_forward)\.experts)\.(?P<kind>gate_up_proj|down_proj)$")
# What an architecture calls its experts' gate, up and down, and the module that they are in, in the checkpoints that it
# was published with. Of the others it is as in DEFAULT.
DEFAULT = ("gate_proj", "up_proj", "down_proj", "mlp")
PUBLISHED = {
    **dict.fromkeys(
        ("MixtralForCausalLM", "MiniMaxM2ForCausalLM", "PhimoeForCausalLM", "PhiMoEForCausalLM"),
        ("w1", "w3", "w2", "block_sparse_moe"),
    ),
    "JambaForCausalLM": ("gate_proj", "up_proj", "down_proj", "feed_forward"),
    "Lfm2MoeForCausalLM": ("w1", "w3", "w2", "feed_forward"),
}
# Architectures that were published with their experts stacked, and under which names.
STACKED_TOO: dict[str, tuple[tuple[str, str], ...]] = {
    **dict.fromkeys(
        ("GraniteMoeForCausalLM", "GraniteMoeHybridForCausalLM", "GraniteMoeSharedForCausalLM"),
        (
            (".experts.gate_up_proj", ".input_linear.weight"),
            (".experts.down_proj", ".output_linear.weight"),
            (".router.weight", ".router.layer.weight"),
        ),
    ),
    **dict.fromkeys(
        ("GptOssForCausalLM", "Llama4ForCausalLM", "Gemma4ForCausalLM", "Gemma4ForConditionalGeneration"), ()
    ),
}
RENAMED = {"Ernie4_5_MoeForCausalLM": ((".mlp.gate.moe_statics.", ".mlp.moe_statics."),)}


# Towers that transformers saves without the name of the model which they are the body of.
BODIES = re.compile(r"^(?P<start>(model\.)?vision_tower\.)(?P<rest>(encoder|embeddings|post_layernorm|pre_layrnorm)\.)")


def show_towers_as_published(model: Any) -> None:
    """Change the names of the towers' tensors that `model` will read."""
    model.model_tensors = {published_tower(name): load for name, load in model.model_tensors.items()}


def published_tower(name: str) -> str:
    """What a tower's tensor was called where it was published."""
    return BODIES.sub(r"\g<start>vision_model.\g<rest>", name)


def show_as_published(model: Any, architecture: str) -> None:
    """Change the tensors that `model` will read, and how it is handed them."""
    model.model_tensors = _renamed(model.model_tensors, STACKED_TOO.get(architecture, RENAMED.get(architecture, ())))
    if architecture not in STACKED_TOO:
        model.model_tensors = dict(_apart(model.model_tensors, architecture))
    if architecture == "BambaForCausalLM":
        _order_heads(model)


def _renamed(tensors: dict[str, Loader], names: tuple[tuple[str, str], ...]) -> dict[str, Loader]:
    renamed = {}
    for name, load in tensors.items():
        for old, new in names:
            name = name.replace(old, new)
        renamed[name] = load
    return renamed


def _apart(tensors: dict[str, Loader], architecture: str) -> Iterator[tuple[str, Loader]]:
    gate, up, down, module = PUBLISHED.get(architecture, DEFAULT)
    for name, load in tensors.items():
        match = STACKED.match(name)
        if match is None:
            yield name, load
            continue
        block = match["module"].split(".")[:-2]
        count = load().shape[0]
        for expert in range(count):
            stem = ".".join([*block, module, "experts", str(expert)])
            if match["kind"] == "down_proj":
                yield f"{stem}.{down}.weight", _part(load, expert, None)
            else:
                yield f"{stem}.{gate}.weight", _part(load, expert, 0)
                yield f"{stem}.{up}.weight", _part(load, expert, 1)


def _part(load: Loader, expert: int, half: int | None) -> Loader:
    """One expert of a stack [experts, rows, columns]; half: 0 or 1 where the rows are those of gate, and then of up."""

    def part() -> Tensor:
        matrix = load()[expert]
        rows = matrix.shape[0] // 2
        return matrix if half is None else matrix[half * rows : (half + 1) * rows]

    return part


def _order_heads(model: Any) -> None:
    """Undo what the converter does to a head as a whole, and do it to the rotated part alone.

    llama.cpp rotates neighbours, transformers the two halves of the rotated part; the converter interleaves the halves
    of the head, which is the same only where all of it is rotated.
    """
    heads = {"q_proj": model.hparams["num_attention_heads"], "k_proj": model.hparams["num_key_value_heads"]}
    rotated = model.hparams["attn_rotary_emb"]
    for name, load in model.model_tensors.items():
        count = heads.get(name.split(".")[-2]) if name.endswith(".weight") else None
        if count is not None:
            model.model_tensors[name] = _reordered(load, count, rotated)


def _reordered(load: Loader, heads: int, rotated: int) -> Loader:
    def reordered() -> Tensor:
        import torch

        weight = load()
        width = weight.shape[0] // heads
        order = torch.arange(width)
        wanted = torch.cat([order[:rotated].reshape(2, -1).T.reshape(-1), order[rotated:]])
        interleaved = order.reshape(2, -1).T.reshape(-1)
        shown = torch.empty_like(wanted)
        shown[interleaved] = wanted
        return weight.reshape(heads, width, -1)[:, shown.tolist()].reshape(weight.shape)

    return reordered
