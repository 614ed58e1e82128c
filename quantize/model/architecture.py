"""Tables of decoder architectures: what each tensor is, which linears share an input, and what feeds them.

In: a model's config.json as a dictionary. Out: one BlockLayout per decoder block (linears, the key of the input that
each one reads, the norm or linear that a channel scale can be folded into) and the role of any tensor by its name.
Left to others: reading tensors (checkpoint), running blocks (activations), folding scales (numerics). Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from quantize.errors import CheckpointError
from quantize.model.config import number, optional_number

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Linear:
    """A linear of a block that can be quantized.

    tensor: full name of its weight [out, in]. module: path inside the block. input: key of the input that it reads,
    shared by all linears that read the same tensor. expert: its expert's index, None outside a mixture of experts.
    """

    tensor: str
    module: str
    input: str
    expert: int | None = None


@dataclass(frozen=True)
class NormSource:
    """A norm whose weight scales a group's input channels: y = normalized(x) * (offset + weight)."""

    tensor: str
    offset: float


@dataclass(frozen=True)
class RowsSource:
    """Rows [start, stop) of a linear whose outputs reach a group's input channels one to one.

    repeats > 1: each run of `head_dim` outputs feeds `repeats` consecutive runs of input channels (grouped-query
    attention: the query heads of one key-value head), so those channels must share one scale.
    """

    tensor: str
    start: int
    stop: int
    head_dim: int = 1
    repeats: int = 1


@dataclass(frozen=True)
class FoldGroup:
    """Linears whose input channels take one common scale, and where its inverse goes.

    passengers: weights [out, in] kept in high precision that read the same input (routers), so must be scaled too.
    """

    name: str
    linears: tuple[Linear, ...]
    source: NormSource | RowsSource | None
    passengers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Experts:
    """The routed experts of a block.

    module: path of the experts' container inside the block as transformers builds it. gate, up, down: full weight
    names with {expert}. router: full weight name. input, expert_input, output: input keys; the last two hold {expert}.
    """

    module: str
    count: int
    gate: str
    up: str
    down: str
    router: str
    input: str
    expert_input: str
    output: str


@dataclass(frozen=True)
class BlockLayout:
    """One decoder block: `prefix` starts each of its tensors' names; `renames` maps disk paths to module paths."""

    index: int
    prefix: str
    groups: tuple[FoldGroup, ...]
    experts: Experts | None
    renames: tuple[tuple[str, str], ...] = ()

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Every linear that can be quantized, in a fixed order."""
        return tuple(linear for group in self.groups for linear in group.linears)

    @property
    def inputs(self) -> dict[str, tuple[Linear, ...]]:
        """Input key -> the linears that read it, in a fixed order."""
        found: dict[str, list[Linear]] = {}
        for linear in self.linears:
            found.setdefault(linear.input, []).append(linear)
        return {key: tuple(linears) for key, linears in found.items()}

    def pieces(self, *, folded: bool) -> tuple[BlockLayout, ...]:
        """The block in parts that can be solved apart, each with some of the groups and no input of another's.

        folded: scales are folded into the rows of other groups, which keeps those groups together.
        """
        parts: list[list[FoldGroup]] = []
        for group in self.groups:
            rows = group.source.tensor if folded and isinstance(group.source, RowsSource) else None
            fed = (part for part in parts if any(linear.tensor == rows for item in part for linear in item.linears))
            home = next(fed, None)
            if home is None:
                parts.append(home := [])
            home.append(group)
        return tuple(replace(self, groups=tuple(part)) for part in parts)

    def module_path(self, tensor: str) -> str:
        """The parameter path inside the block that `tensor` (a full name) is loaded into."""
        path = tensor.removeprefix(self.prefix)
        for disk, module in self.renames:
            path = path.replace(disk, module)
        return path


@dataclass(frozen=True)
class Mixture:
    """How an architecture names its mixture of experts, on disk and in memory."""

    disk: str
    gate: str
    up: str
    down: str
    shared: bool = False
    dense_layers: bool = False


@dataclass(frozen=True)
class Architecture:
    """One row of the table.

    fused: q/k/v and gate/up are one linear each. norm_offset: 1.0 where a norm multiplies by (1 + weight).
    mlp_norm: the norm in front of the MLP. attention: the attention kernel that is right for it in transformers.
    """

    name: str
    fused: bool = False
    norm_offset: float = 0.0
    mlp_norm: str = "post_attention_layernorm"
    attention: str = "sdpa"
    mixture: Mixture | None = None


_QWEN_NAMES = ("mlp", "gate_proj", "up_proj", "down_proj")

TABLE: dict[str, Architecture] = {
    row.name: row
    for row in (
        Architecture("LlamaForCausalLM"),
        Architecture("MistralForCausalLM"),
        Architecture("Qwen2ForCausalLM"),
        Architecture("Qwen3ForCausalLM"),
        # Attention soft caps exist in the eager kernel only.
        Architecture("Gemma2ForCausalLM", norm_offset=1.0, mlp_norm="pre_feedforward_layernorm", attention="eager"),
        Architecture("Gemma3ForCausalLM", norm_offset=1.0, mlp_norm="pre_feedforward_layernorm"),
        Architecture("Phi3ForCausalLM", fused=True),
        Architecture("MixtralForCausalLM", mixture=Mixture("block_sparse_moe", "w1", "w3", "w2")),
        Architecture("Qwen2MoeForCausalLM", mixture=Mixture(*_QWEN_NAMES, shared=True, dense_layers=True)),
        Architecture("Qwen3MoeForCausalLM", mixture=Mixture(*_QWEN_NAMES, dense_layers=True)),
    )
}

MAX_BLOCKS = 10_000
MAX_EXPERTS = 4_096
_COUNT_KEYS = ("num_local_experts", "num_experts")  # transformers has written both for the same model
_BLOCK = re.compile(r"model\.layers\.(\d+)\.")


def architecture_of(config: Config) -> Architecture:
    """The table row for a config.json.

    Raises:
        CheckpointError: the config names no architecture, or one that is not in the table.
    """
    found = config.get("architectures")
    names = [str(name) for name in found] if isinstance(found, list) else []
    for name in names:
        if name in TABLE:
            return TABLE[name]
    said = ", ".join(names) if names else "none (config.json has no 'architectures')"
    raise CheckpointError(
        f"architecture not in the table: {said}",
        hint=f"known: {', '.join(TABLE)}. To add one, add a row to TABLE in quantize/model/architecture.py and a tiny "
        "config of it to tests/architectures.py: the tests then compare it with transformers",
    )


def block_count(config: Config) -> int:
    """How many decoder blocks the model has."""
    return number(config, "num_hidden_layers", MAX_BLOCKS)


def block_layouts(config: Config) -> Iterator[BlockLayout]:
    """The layout of each block, first to last."""
    return (block_layout(config, index) for index in range(block_count(config)))


def block_layout(config: Config, index: int) -> BlockLayout:
    """What block `index` is made of.

    Raises:
        CheckpointError: unknown architecture, or config.json lacks a number that the layout needs.
    """
    row = architecture_of(config)
    prefix = f"model.layers.{index}."
    attention = _attention_groups(row, config, prefix)
    mixture = row.mixture if _has_experts(row, config, index) else None
    if mixture is None:
        return BlockLayout(index, prefix, (*attention, *_dense_groups(row, config, prefix)), None)
    experts = _experts(mixture, config, prefix)
    renames = ((f"{mixture.disk}.", "mlp."),) if mixture.disk != "mlp" else ()
    return BlockLayout(index, prefix, (*attention, *_expert_groups(row, mixture, config, experts)), experts, renames)


def block_index(tensor: str) -> int | None:
    """The block that a tensor belongs to, None outside the blocks."""
    match = _BLOCK.match(tensor)
    return int(match.group(1)) if match else None


def _attention_groups(row: Architecture, config: Config, prefix: str) -> tuple[FoldGroup, ...]:
    heads = number(config, "num_attention_heads")
    kv_heads = optional_number(config, "num_key_value_heads") or heads
    head_dim = optional_number(config, "head_dim") or number(config, "hidden_size") // heads
    names = ("qkv_proj",) if row.fused else ("q_proj", "k_proj", "v_proj")
    readers = tuple(_linear(prefix, f"self_attn.{name}", "attention") for name in names)
    output = _linear(prefix, "self_attn.o_proj", "attention_output")
    first = (heads + kv_heads) * head_dim if row.fused else 0
    values = RowsSource(readers[-1].tensor, first, first + kv_heads * head_dim, head_dim, heads // kv_heads)
    norm = NormSource(f"{prefix}input_layernorm.weight", row.norm_offset)
    return FoldGroup("attention", readers, norm), FoldGroup("attention_output", (output,), values)


def _dense_groups(row: Architecture, config: Config, prefix: str) -> tuple[FoldGroup, ...]:
    norm = NormSource(f"{prefix}{row.mlp_norm}.weight", row.norm_offset)
    names = ("gate_up_proj",) if row.fused else ("gate_proj", "up_proj")
    readers = tuple(_linear(prefix, f"mlp.{name}", "mlp") for name in names)
    down = _linear(prefix, "mlp.down_proj", "mlp_output")
    width = number(config, "intermediate_size")
    first = width if row.fused else 0
    source = RowsSource(readers[-1].tensor, first, first + width)
    return FoldGroup("mlp", readers, norm), FoldGroup("mlp_output", (down,), source)


def _expert_groups(row: Architecture, mixture: Mixture, config: Config, experts: Experts) -> tuple[FoldGroup, ...]:
    prefix = experts.router.removesuffix(f"{mixture.disk}.gate.weight")
    readers: list[Linear] = []
    passengers = [experts.router]
    outputs: list[FoldGroup] = []
    if mixture.shared:
        base = f"{mixture.disk}.shared_expert"
        readers += [_linear(prefix, f"{base}.{name}", "mlp") for name in ("gate_proj", "up_proj")]
        passengers.append(f"{prefix}{base}_gate.weight")
        down = _linear(prefix, f"{base}.down_proj", "shared_expert_output")
        width = number(config, "shared_expert_intermediate_size")
        outputs.append(FoldGroup("shared_expert_output", (down,), RowsSource(readers[-1].tensor, 0, width)))
    width = optional_number(config, "moe_intermediate_size") or number(config, "intermediate_size")
    for expert in range(experts.count):
        key, output = experts.expert_input.format(expert=expert), experts.output.format(expert=expert)
        gate, up, down_name = (name.format(expert=expert) for name in (experts.gate, experts.up, experts.down))
        readers += [_expert_linear(prefix, name, key, expert) for name in (gate, up)]
        source = RowsSource(up, 0, width)
        outputs.append(FoldGroup(output, (_expert_linear(prefix, down_name, output, expert),), source))
    norm = NormSource(f"{prefix}{row.mlp_norm}.weight", row.norm_offset)
    return FoldGroup("mlp", tuple(readers), norm, tuple(passengers)), *outputs


def _experts(mixture: Mixture, config: Config, prefix: str) -> Experts:
    base = f"{prefix}{mixture.disk}"
    names = [f"{base}.experts.{{expert}}.{name}.weight" for name in (mixture.gate, mixture.up, mixture.down)]
    return Experts(
        module="mlp.experts",
        count=number(config, next((key for key in _COUNT_KEYS if key in config), _COUNT_KEYS[0]), MAX_EXPERTS),
        gate=names[0],
        up=names[1],
        down=names[2],
        router=f"{base}.gate.weight",
        input="mlp",
        expert_input="expert_{expert}",
        output="expert_{expert}_output",
    )


def _has_experts(row: Architecture, config: Config, index: int) -> bool:
    if row.mixture is None:
        return False
    if not row.mixture.dense_layers:
        return True
    step, dense = optional_number(config, "decoder_sparse_step") or 1, config.get("mlp_only_layers") or []
    if not isinstance(dense, list):
        raise CheckpointError(f"config.json: mlp_only_layers must be a list, found {dense!r}")
    return index not in dense and (index + 1) % step == 0


def _linear(prefix: str, module: str, key: str) -> Linear:
    return Linear(f"{prefix}{module}.weight", module, key)


def _expert_linear(prefix: str, tensor: str, key: str, expert: int) -> Linear:
    return Linear(tensor, tensor.removeprefix(prefix).removesuffix(".weight"), key, expert)
