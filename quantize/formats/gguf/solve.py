"""Error feedback into the types that llama.cpp chose: its file stays as it is but for the bytes of its matrices.

In: the 16-bit file, llama.cpp's quantized one, the Gram matrices of the calibration pass. Out: the quantized file with
other codes and scales in the same places, and what each matrix loses. Runs in a worker process, one matrix after the
other; what was solved is on record in scratch, and a build that is stopped goes on there.
The numbers are numerics/grid_solver.py's.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from quantize.errors import BuildError, disk_errors
from quantize.events import Reporter, note, progress, warn
from quantize.files.gguf import UNQUANTIZED, GgufFile, GgufTensor, read_gguf
from quantize.files.gguf_split import read_model
from quantize.formats.gguf.columns import column_order
from quantize.formats.gguf.grams import RECORD_NAME, read_gram
from quantize.formats.gguf.imatrix import gguf_names
from quantize.formats.gguf.matrices import read_bytes, read_matrix, span
from quantize.formats.gguf.vocabulary import EMBEDDING, HEAD, VocabularyLoss, read_vocabulary, source_of
from quantize.model.architecture import block_layouts
from quantize.model.checkpoint import Checkpoint
from quantize.model.layout import Linear
from quantize.system.cache import hash_file
from quantize.system.files import sync

if TYPE_CHECKING:
    import torch

    from quantize.numerics.gptq import Factor
    from quantize.numerics.grid_solver import GridRows

Result = TypeVar("Result")
DATA_NAME, LOG_NAME = "solved.bin", "solved.jsonl"
NO_GRAM = "its input is not among those that the calibration pass records"
NO_GRID = "llama.cpp's own rounding: {type} is not solved"


@dataclass(frozen=True)
class SolveRequest:
    """What `solve_file` is given. exact: the 16-bit file. quantized: llama.cpp's, or the first of its parts.

    scratch: where the pass left its Gram matrices. device: cpu or a GPU of this machine. log: a folder for what is
    solved; None for scratch itself.
    """

    exact: Path
    quantized: Path
    checkpoint: Checkpoint
    scratch: Path
    variant: str
    threads: int = 1
    device: str = "cpu"
    log: Path | None = None


@dataclass(frozen=True)
class SolvedFile:
    """What was done. layers: of each linear, by its module's name in the source: `loss` and, of llama.cpp's rounding,
    `nearest_loss`, as shares of the output's energy over the calibration tokens; `type`; `fallback_rows` of `rows`.

    unsolved: tensor of the file -> why it has llama.cpp's bytes. device: that it was computed on. seconds: that solving
    took, in this build.
    """

    layers: dict[str, dict[str, Any]]
    unsolved: dict[str, str]
    device: str
    seconds: float


@dataclass(frozen=True)
class _Place:
    """Where a linear's weight is: in the 16-bit file and in the quantized one, each a whole tensor or an expert's."""

    exact: GgufTensor
    quantized: GgufTensor
    expert: int | None

    def bytes_of(self, tensor: GgufTensor) -> tuple[int, int]:
        """Offset and size of the linear's part of a tensor."""
        return span(tensor, self.expert)


def solve_file(reporter: Reporter, request: SolveRequest) -> SolvedFile:
    """Solve every matrix that has a Gram matrix and a type with a grid, and write it into llama.cpp's file.

    Raises BuildError, DiskFullError.
    """
    began = time.perf_counter()
    import torch

    from quantize.numerics.precision import settle_precision
    from quantize.system.processor import device_name

    torch.set_num_threads(request.threads)
    settle_precision(torch.device(request.device))
    device = device_name(request.device)
    places, unsolved = _places(request)
    total = len(places)
    with _Log(request, device) as log:
        if log.facts:
            note(reporter, request.variant, f"goes on at matrix {len(log.facts) + 1} of {total}")
        for read, linears in _inputs(request, places):
            if all(linear.tensor in log.facts for linear in linears):
                continue
            solver = _InputSolver(request, reporter, read())
            for linear in linears:
                if linear.tensor in log.facts:
                    continue
                log.add(linear.tensor, *solver.solve(linear, places[linear.tensor]))
                progress(reporter, request.variant, "solving, matrices", len(log.facts), total)
        _patch(places, log)
    left = {linear: facts["unsolved"] for linear, facts in log.facts.items() if "unsolved" in facts}
    unsolved |= {places[linear].quantized.name: why for linear, why in left.items()}
    layers = {name.removesuffix(".weight"): facts for name, facts in log.facts.items() if name not in left}
    return SolvedFile(layers, dict(sorted(unsolved.items())), device, round(time.perf_counter() - began, 2))


def _places(request: SolveRequest) -> tuple[dict[str, _Place], dict[str, str]]:
    """Linear -> where it is, for those that can be solved; tensor -> why not, for other quantized ones."""
    from quantize.numerics.kquants import GRIDS

    exact, quantized = read_gguf(request.exact), read_model(request.quantized)
    named = gguf_names(str(exact.fields["general.architecture"]), request.checkpoint)
    places: dict[str, _Place] = {}
    unsolved = {item.name: NO_GRAM for item in quantized.tensors.values() if _is_matrix(item)}
    for layout in block_layouts(request.checkpoint.config):
        for linear in layout.linears:
            name, expert = named(linear.tensor)
            found = quantized.tensors.get(name) if name else None
            if found is None or name is None or not _is_matrix(found):
                continue
            if found.type not in GRIDS:
                unsolved[name] = NO_GRID.format(type=found.type)
                continue
            unsolved.pop(name, None)
            places[linear.tensor] = _Place(_tensor(exact, name), found, expert)
    name, tensor = _head(request, exact)
    head = quantized.tensors.get(name)
    if tensor is not None and head is not None and head.type in GRIDS:
        unsolved.pop(name, None)
        places[tensor] = _Place(_tensor(exact, name), head, None)
    return places, unsolved


def _head(request: SolveRequest, exact: GgufFile) -> tuple[str, str | None]:
    """The output head in the file, which may be the embedding, and its tensor in the source; None where nothing is
    known of its input.
    """
    name = HEAD if HEAD in exact.tensors else EMBEDDING
    known = read_vocabulary(request.scratch) is not None
    return name, source_of(name, exact, request.checkpoint) if known else None


def _head_gram(request: SolveRequest, place: _Place) -> torch.Tensor:
    found = read_vocabulary(request.scratch)
    assert found is not None
    weight, tied = read_matrix(place.exact, None), place.exact.name == EMBEDDING
    return VocabularyLoss(found, weight, is_head=True, is_embedding=tied).gram()


def _is_matrix(item: GgufTensor) -> bool:
    return len(item.shape) > 1 and item.type not in UNQUANTIZED


def _tensor(file: GgufFile, name: str) -> GgufTensor:
    if name not in file.tensors:
        raise BuildError(f"{file.path.name} has no tensor {name}", hint="the 16-bit file changed: build again")
    return file.tensors[name]


def _inputs(
    request: SolveRequest, places: Mapping[str, _Place]
) -> Iterator[tuple[Callable[[], torch.Tensor], tuple[Linear, ...]]]:
    """Each input of each block, and the head's: what gives its Gram matrix, and the linears to solve that read it, in
    the order in which they are solved.
    """
    checkpoint = request.checkpoint
    for layout in block_layouts(checkpoint.config):
        for key, linears in layout.inputs.items():
            found = tuple(linear for linear in linears if linear.tensor in places)
            if found:
                yield partial(read_gram, request.scratch, checkpoint, layout, key), found
    for tensor, place in places.items():
        if place.exact.name in (EMBEDDING, HEAD):
            yield partial(_head_gram, request, place), (Linear(tensor, "", ""),)


@dataclass
class _InputSolver:
    """Solves the linears that read one input. Factors are shared by linears whose types have blocks of one form."""

    request: SolveRequest
    reporter: Reporter
    gram: torch.Tensor
    _factors: dict[Any, Factor] = field(default_factory=dict)

    def solve(self, linear: Linear, place: _Place) -> tuple[bytes, dict[str, Any]]:
        """The bytes of a linear's weight, and its facts; none, and why, where its columns are not the source's."""
        from quantize.numerics.gptq import estimated_loss
        from quantize.numerics.grid_solver import DAMPING

        weight = read_matrix(place.exact, place.expert)
        order = column_order(weight, self.request.checkpoint.read(linear.tensor))
        if order is None:
            return b"", {"unsolved": "its columns are not those of the source's matrix"}
        weight = weight.to(self.request.device)
        factor = self._factor(place.quantized.type, order)
        solved = self._solved(weight, factor, place)
        energy = _on_one_thread(partial(estimated_loss, weight, factor.gram))
        loss, nearest, kept = solved.figures.sum(1).tolist()
        if factor.damping > DAMPING:
            text = f"{linear.tensor}: damping raised to {factor.damping:g} to make it solvable"
            warn(self.reporter, self.request.variant, text)
        shares = {"loss": loss, "nearest_loss": nearest}
        return solved.data.tobytes(), {
            **{name: float(f"{value / energy:.6g}") if energy > 0 else 0.0 for name, value in shares.items()},
            "type": place.quantized.type,
            "rows": len(weight),
            "fallback_rows": int(kept),
        }

    def _solved(self, weight: torch.Tensor, factor: Factor, place: _Place) -> GridRows:
        from quantize.numerics.grid_solver import collect, row_tasks
        from quantize.numerics.kquants import GRIDS
        from quantize.system.threads import on_threads

        data = read_bytes(place.quantized, *place.bytes_of(place.quantized)).reshape(len(weight), -1)
        tasks = row_tasks(weight, factor, GRIDS[place.quantized.type], data)
        return collect(on_threads(tasks, self.request.threads if self.request.device == "cpu" else 1))

    def _factor(self, kind: str, order: tuple[int, ...]) -> Factor:
        """The factor of the Gram matrix with its channels in the file's order, () for the source's."""
        import torch

        from quantize.numerics.grid_solver import factor_for
        from quantize.numerics.kquants import GRIDS

        grid = GRIDS[kind]
        form = (grid.block, grid.sub, order)
        if form not in self._factors:
            gram = self.gram
            if order:
                places = torch.tensor(order)
                gram = gram.index_select(0, places).index_select(1, places)
            self._factors[form] = _on_one_thread(partial(factor_for, gram.to(self.request.device), grid))
        return self._factors[form]


def _on_one_thread(task: Callable[[], Result]) -> Result:
    """What gives the same bits whatever the number of threads."""
    from quantize.system.threads import on_threads

    return on_threads([task], 1)[0]


def _patch(places: Mapping[str, _Place], log: _Log) -> None:
    """Write what was solved into llama.cpp's file."""
    paths = sorted({place.quantized.path for place in places.values()})
    with disk_errors(log.folder):
        for path in paths:
            with path.open("r+b") as file:
                for tensor, place in places.items():
                    if place.quantized.path == path and (data := log.data(tensor)):
                        offset, size = place.bytes_of(place.quantized)
                        if len(data) != size:
                            raise BuildError(f"{tensor}: solved to {len(data):,} bytes, not {size:,}")
                        file.seek(offset)
                        file.write(data)
            sync(path)


class _Log:
    """Solved matrices on disk, in order: their bytes in one file, and a line of JSON for each in another.

    The line comes last; what has none is cut off when a build goes on. facts: by the linear's name.
    """

    def __init__(self, request: SolveRequest, device: str) -> None:
        self.folder, self.facts = request.log or request.scratch, dict[str, dict[str, Any]]()
        self._spans: dict[str, tuple[int, int]] = {}
        self._end = 0
        sources = hash_file(request.scratch / RECORD_NAME), request.quantized.name, device
        self._identity = json.dumps({"identity": sources})

    def __enter__(self) -> _Log:
        with disk_errors(self.folder):
            self.folder.mkdir(exist_ok=True)
            lines, kept = self._known(), [self._identity]
            self._data = (self.folder / DATA_NAME).open("r+b" if lines else "w+b")
            for line in lines:
                entry = self._entry(line)
                if entry is None:
                    break
                self._take(*entry)
                kept.append(line)
            self._data.truncate(self._end)
            self._lines: BinaryIO = (self.folder / LOG_NAME).open("wb")
            self._append("".join(f"{line}\n" for line in kept))
        return self

    def __exit__(self, *_: object) -> None:
        self._data.close()
        self._lines.close()

    def add(self, tensor: str, data: bytes, facts: dict[str, Any]) -> None:
        """Have a matrix on record."""
        sha256 = hashlib.sha256(data).hexdigest()
        with disk_errors(self.folder):
            self._data.seek(self._end)
            self._data.write(data)
            self._data.flush()
            os.fsync(self._data.fileno())
            self._append(json.dumps({"tensor": tensor, "size": len(data), "sha256": sha256, "facts": facts}) + "\n")
        self._take(tensor, len(data), facts)

    def data(self, tensor: str) -> bytes:
        """The bytes of a matrix; none for one that was not solved."""
        start, size = self._spans[tensor]
        self._data.seek(start)
        return self._data.read(size)

    def _append(self, text: str) -> None:
        self._lines.write(text.encode())
        self._lines.flush()
        os.fsync(self._lines.fileno())

    def _take(self, tensor: str, size: int, facts: dict[str, Any]) -> None:
        self._spans[tensor], self.facts[tensor] = (self._end, size), facts
        self._end += size

    def _known(self) -> list[str]:
        """Lines of a stopped build that solved the same."""
        path = self.folder / LOG_NAME
        if not path.is_file() or not (self.folder / DATA_NAME).is_file():
            return []
        first, *lines = path.read_text("utf-8", errors="replace").split("\n")
        return lines if first == self._identity else []

    def _entry(self, line: str) -> tuple[str, int, dict[str, Any]] | None:
        """A line of the record, where its bytes are there."""
        try:
            found = json.loads(line)
            tensor, size, sha256, facts = (found[key] for key in ("tensor", "size", "sha256", "facts"))
        except (ValueError, KeyError, TypeError):
            return None
        self._data.seek(self._end)
        return (tensor, size, facts) if hashlib.sha256(self._data.read(size)).hexdigest() == sha256 else None
