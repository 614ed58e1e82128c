"""What each type would cost in each matrix, and the map that costs least within a budget.

In: sizes and predicted losses. Out: a map from tensors to types, points of the curve of bytes against predicted loss.
As JSON it lies beside the model, so that other budgets can be asked about without another build.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError

from quantize.errors import PlanError, StoreError
from quantize.files.gguf import TENSOR_TYPES, padded
from quantize.formats.gguf.fit.types import group_of
from quantize.recipe.yaml import STRICT

NAME = "fit.json"
CURVE_POINTS = 16
_BLOCKS = {name: (values, size) for name, values, size in TENSOR_TYPES.values()}
Count = Annotated[int, Field(ge=0)]
Loss = Annotated[float, Field(ge=0)]


def tensor_bytes(kind: str, elements: int) -> int:
    """What a tensor takes in a file, up to where the next one begins."""
    values, size = _BLOCKS[kind]
    return padded(elements // values * size)


class Cost(BaseModel):
    """One matrix. allowed: types that may be chosen. losses: what each type costs, those of stock maps among them.

    found: by its Gram matrix, or a guess from the error of its weights alone.
    """

    model_config = STRICT
    elements: Count
    allowed: tuple[str, ...]
    losses: Mapping[str, Loss]
    found: Literal["gram", "head", "guess"]


class StockMap(BaseModel):
    """A type map of llama.cpp's own. types: of the matrices that are chosen here. bytes: of the whole file."""

    model_config = STRICT
    bytes: Count
    types: Mapping[str, str]


class Point(BaseModel):
    """A map on the curve. bytes: of the file. loss: predicted."""

    model_config = STRICT
    bytes: Count
    loss: Loss


class ChosenMap(Point):
    """A map. bound: the least that any map of no more bytes could cost."""

    types: Mapping[str, str]
    bound: Loss


class CostTable(BaseModel):
    """All matrices that have a choice. other_bytes: of the file beside them: header, norms, what is given by a recipe.

    unit: of losses: `nats` a token, where statistics were guided; else `share`, the mean over the matrices of the
    squared error of the output as a share of its energy.
    """

    model_config = STRICT
    unit: Literal["nats", "share"]
    solved: bool
    other_bytes: Count
    matrices: Mapping[str, Cost]
    stock: Mapping[str, StockMap]

    @cached_property
    def _groups(self) -> dict[str, list[str]]:
        groups: dict[str, list[str]] = {}
        for name in self.matrices:
            groups.setdefault(group_of(name), []).append(name)
        found: dict[str, list[str]] = {}
        for key, names in groups.items():
            alike = len({self.matrices[name].allowed for name in names}) == 1
            found |= {key: names} if alike else {name: [name] for name in names}
        return found

    @cached_property
    def _units(self) -> list[list[tuple[int, float]]]:
        return [
            [(sum(self._size(name, kind) for name in names), sum(self.matrices[name].losses[kind] for name in names))
             for kind in self.matrices[names[0]].allowed]
            for names in self._groups.values()
        ]  # fmt: skip

    def _size(self, name: str, kind: str) -> int:
        return tensor_bytes(kind, self.matrices[name].elements)

    @property
    def least_bytes(self) -> int:
        """The smallest file that there is."""
        return self.other_bytes + sum(min(size for size, _ in unit) for unit in self._units)

    @property
    def most_bytes(self) -> int:
        """The largest."""
        return self.other_bytes + sum(max(size for size, _ in unit) for unit in self._units)

    def choose(self, most_bytes: int) -> ChosenMap:
        """The map that costs least within so many bytes of the file. Raises PlanError: there is none."""
        if most_bytes < self.least_bytes:
            raise PlanError(f"{most_bytes:,} bytes are not enough", hint=f"the least is {self.least_bytes:,}")
        from quantize.numerics.allocation import allocate  # with numpy, which plans of other variants go without

        found = allocate(self._units, most_bytes - self.other_bytes)
        types = {
            name: self.matrices[names[0]].allowed[choice]
            for names, choice in zip(self._groups.values(), found.picked, strict=True)
            for name in names
        }
        return ChosenMap(
            bytes=self.other_bytes + found.size, loss=_short(found.loss), bound=_short(max(0.0, found.bound)),
            types={name: types[name] for name in self.matrices},
        )  # fmt: skip

    def loss(self, types: Mapping[str, str]) -> float:
        """What a map costs."""
        return _short(sum(cost.losses[types[name]] for name, cost in self.matrices.items()))

    def stock_points(self) -> dict[str, Point]:
        """llama.cpp's own maps on the curve, by rising size."""
        maps = sorted(self.stock.items(), key=lambda item: (item[1].bytes, item[0]))
        return {name: Point(bytes=item.bytes, loss=self.loss(item.types)) for name, item in maps}

    def best_stock(self, most_bytes: int) -> str | None:
        """The stock map of no more bytes that costs least; None where all are larger."""
        points = {name: point for name, point in self.stock_points().items() if point.bytes <= most_bytes}
        return min(points, key=lambda name: (points[name].loss, name), default=None)

    def curve(self) -> list[Point]:
        """Bytes against predicted loss, from the smallest file to the largest."""
        least, most = self.least_bytes, self.most_bytes
        budgets = [least + (most - least) * step // (CURVE_POINTS - 1) for step in range(CURVE_POINTS)]
        found = {point.bytes: point.loss for point in map(self.choose, budgets)}
        return [Point(bytes=size, loss=loss) for size, loss in sorted(found.items())]


class Measured(BaseModel):
    """Mean KL divergence to the 16-bit file on held-out text, of the chosen map and of a stock map, in nats a token."""

    model_config = STRICT
    chosen_kl: Loss
    stock_kl: Loss
    tokens: Count

    @property
    def is_stock_better(self) -> bool:
        """Whether the stock map is the one to take."""
        return self.stock_kl < self.chosen_kl


class FitRecord(BaseModel):
    """What lies beside a fitted model. budget_bytes: of the file. taken: the map that the file has: `fitted`, or the
    name of a stock map that was measured to be better.
    """

    model_config = STRICT
    version: Literal[1] = 1
    asked: str
    budget_bytes: Count
    taken: str
    types: Mapping[str, str]
    point: Point
    bound: Loss
    against: str | None
    measured: Measured | None
    table: CostTable


def read_record(path: Path) -> FitRecord:
    """From a file. Raises StoreError: it is not one."""
    try:
        return FitRecord.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as exc:
        raise StoreError(f"{path} can't be read", hint="build it again") from exc


def record_text(record: FitRecord) -> str:
    """The content of the file."""
    data: dict[str, Any] = record.model_dump(mode="json")
    return json.dumps(data, indent=1) + "\n"


def _short(value: float) -> float:
    """As many digits as say something."""
    return float(f"{value:.6g}")
