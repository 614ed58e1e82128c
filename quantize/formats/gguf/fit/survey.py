"""What llama.cpp would write of a model, as far as choosing types needs to know: from headers alone.

In: a variant's options, llama.cpp's dry runs. Out: a Survey: which matrices have a choice and of what, what else the
file has, the stock type maps with their sizes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from quantize.errors import PlanError, QuantizeError
from quantize.files.gguf import UNQUANTIZED, padded
from quantize.formats.base import RunLimits
from quantize.formats.gguf.fit.budget import Budget, Frame, budget_of, too_small
from quantize.formats.gguf.fit.spec import FitSpec
from quantize.formats.gguf.fit.table import Cost, CostTable, StockMap, tensor_bytes
from quantize.formats.gguf.fit.types import STOCK, candidates
from quantize.formats.gguf.making import settings_of
from quantize.formats.gguf.options import GgufOptions
from quantize.formats.gguf.vocabulary import EMBEDDING, HEAD
from quantize.model.shape import ModelShape
from quantize.runtimes.llama_cpp.quantize import QuantizeSettings, SizedFile

LARGEST = "Q8_0"  # the type map in which every matrix that is quantized at all shows


@dataclass(frozen=True)
class Matrix:
    """One that has a choice. width: of its rows. allowed: types that may be chosen. wanted: those, and stock maps'."""

    elements: int
    width: int
    allowed: tuple[str, ...]
    wanted: tuple[str, ...]


@dataclass(frozen=True)
class Survey:
    """other_bytes: of the file beside the matrices that have a choice. stock: llama.cpp's own maps. given: types that a
    recipe names, by its patterns; they stay.
    """

    spec: FitSpec
    frame: Frame
    other_bytes: int
    matrices: Mapping[str, Matrix]
    stock: Mapping[str, StockMap]

    @cached_property
    def sizes(self) -> CostTable:
        """The table without what anything costs."""
        return self.table({}, unit="share", solved=False)

    def table(self, costs: Mapping[str, Cost], *, unit: str, solved: bool) -> CostTable:
        """The table; a matrix without costs has none of 0."""
        nothing = {
            name: Cost(elements=item.elements, allowed=item.allowed, losses=dict.fromkeys(item.wanted, 0.0),
                       found="guess")
            for name, item in self.matrices.items()
        }  # fmt: skip
        return CostTable(
            unit="nats" if unit == "nats" else "share", solved=solved, other_bytes=self.other_bytes,
            matrices={**nothing, **costs}, stock=dict(self.stock),
        )  # fmt: skip

    @cached_property
    def budget(self) -> Budget:
        """What the file may take. Raises UsageError: not even the smallest file fits, with the least that would."""
        found = budget_of(self.spec, self.frame)
        if found.file_bytes < self.sizes.least_bytes:
            raise too_small(self.spec, self.frame, found, self.sizes.least_bytes)
        return found


def survey_jobs(options: GgufOptions, limits: RunLimits) -> list[QuantizeSettings]:
    """The dry runs that `survey` reads: all in the largest type, and each stock map, with what the recipe names."""
    base = settings_of(options, limits, None)
    return [replace(base, type=kind) for kind in (LARGEST, *STOCK)]


def survey(
    options: GgufOptions, found: Sequence[SizedFile | QuantizeError], shape: ModelShape, *, spec: FitSpec | None = None
) -> Survey:
    """Of the results of `survey_jobs`. spec: another one than the variant's. Raises PlanError, or as a dry run."""
    from quantize.numerics.kquants import GRIDS

    spec, largest = spec or options.fit, found[0]
    assert spec is not None
    if isinstance(largest, QuantizeError):
        raise largest
    stock = {
        kind: result
        for kind, result in zip(STOCK, found[1:], strict=True)
        if isinstance(result, SizedFile) and all(item in GRIDS or item in UNQUANTIZED for _, item, _ in result.tensors)
    }
    free = _free(largest, list(stock.values()))
    maps = {
        kind: {name: item for name, item, _ in result.tensors if name in free} for kind, result in stock.items()
    }  # fmt: skip
    tied, matrices = HEAD not in largest.shapes, dict[str, Matrix]()
    for name in free:
        shape_of = largest.shapes[name]
        allowed = candidates(name, shape_of[0], tied=tied)
        wanted = dict.fromkeys([*allowed, *(types[name] for types in maps.values())])
        matrices[name] = Matrix(math.prod(shape_of), shape_of[0], allowed, tuple(wanted))
    if not matrices:
        raise PlanError("fit: no matrix of this model has a choice of types", hint="give a `type`")
    other = largest.header_bytes + sum(padded(size) for name, _, size in largest.tensors if name not in matrices)
    stock_maps = {kind: StockMap(bytes=stock[kind].file_bytes, types=types) for kind, types in maps.items()}
    frame = Frame(shape, largest.header_bytes, largest.weights, largest.towers_bytes)
    return Survey(spec, frame, other, matrices, stock_maps)


def _free(largest: SizedFile, stock: Sequence[SizedFile]) -> tuple[str, ...]:
    """Matrices whose type is llama.cpp's choice: quantized, in blocks, and not the same in every map."""
    maps = [{name: kind for name, kind, _ in result.tensors} for result in stock]
    found = []
    for name, kind, _ in largest.tensors:
        kinds = {kind, *(types[name] for types in maps)}
        if kind not in UNQUANTIZED and len(kinds) > 1 and largest.shapes[name][0] % 32 == 0:
            found.append(name)
    return tuple(found)


def map_bytes(table: CostTable, types: Mapping[str, str]) -> int:
    """The file's bytes with a map."""
    return table.other_bytes + sum(tensor_bytes(kind, table.matrices[name].elements) for name, kind in types.items())


def settings_for(types: Mapping[str, str], base: QuantizeSettings, kind: str) -> QuantizeSettings:
    """What llama.cpp is asked for so that each matrix has its type. kind: the file type that the header names."""
    rows = tuple((_pattern(name), item) for name, item in types.items() if name not in (EMBEDDING, HEAD))
    return replace(
        base, type=kind, overrides=(*base.overrides, *rows), output_type=types.get(HEAD, base.output_type),
        embedding_type=types.get(EMBEDDING, base.embedding_type),
    )  # fmt: skip


def _pattern(name: str) -> str:
    return f"^{name.replace('.', chr(92) + '.')}$"


def nearest_kind(table: CostTable, file_bytes: int) -> str:
    """The stock map that is largest within so many bytes: what the header calls the file."""
    fitting = [(item.bytes, name) for name, item in table.stock.items() if item.bytes <= file_bytes]
    return max(fitting)[1] if fitting else STOCK[0]
