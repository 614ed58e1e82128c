"""What a decoder block is made of: the words that anatomy, calibration and the formats have in common.

In: nothing. Out: frozen data: a block's linears, which of them share an input, what feeds it, and its experts.
Left to others: finding it out (anatomy), reading tensors (checkpoint), running blocks (calibration). Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Linear:
    """A linear of a block that can be quantized.

    tensor: full name of its weight [out, in]. module: path inside the block. input: key of the input that it reads,
    shared by all linears that read the same tensor. expert: its expert's index, None outside a mixture of experts.
    kind: the class of its module where that is not nn.Linear itself.
    """

    tensor: str
    module: str
    input: str
    expert: int | None = None
    kind: str = ""


@dataclass(frozen=True)
class NormSource:
    """A norm whose weight scales a group's input channels: y = normalized(x) * (offset + weight) [+ bias]."""

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

    source: None where nothing was proved to take it: the group is quantized without a scale. passengers: weights
    [out, in] kept in high precision that read the same input (routers), so must be scaled too.
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
    """One decoder block: `prefix` starts each of its tensors' names; `renames` maps disk paths to module paths.

    kept: matrices that stay in high precision, by full name, with the reason. joined: module paths of parameters that
    are several tensors on disk, one below the other, with their paths.
    """

    index: int
    prefix: str
    groups: tuple[FoldGroup, ...]
    experts: Experts | None
    renames: tuple[tuple[str, str], ...] = ()
    kept: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    joined: tuple[tuple[str, tuple[str, ...]], ...] = ()

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
        return dict(self.renames).get(path, path)
