"""What each type costs the model in each matrix.

In: the 16-bit file, the Gram matrices of the calibration pass, how much each output matters. Out: a Cost a matrix.
Runs in a worker process, one matrix after the other; what is found is on record in scratch, and a build that is stopped
goes on there.

The loss of a model changes with an error dW of a matrix by half of the sum over its outputs o of f_o dW_o G dW_oᵀ: G is
the Gram matrix of its input, f_o the mean square gradient of the loss at the output (the Fisher information in the form
of Martens and Grosse 2015). dW is what llama.cpp's own rounding leaves. Where the variant is solved, that is multiplied
by what solving leaves of it, measured on some rows of some blocks for each kind of matrix and type.
Without gradients f_o is the same for all outputs of a matrix, and all matrices matter alike. The output head and
the token embedding have statistics of their own where gradients are there (vocabulary.py). A matrix that the pass has
no Gram matrix of is guessed by the error of its weights alone, at the rate of the others.
"""

from __future__ import annotations

import json
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.errors import disk_errors
from quantize.events import Reporter, note, progress
from quantize.files.gguf import read_gguf
from quantize.formats.gguf.columns import column_order
from quantize.formats.gguf.fit.grams import read_outputs
from quantize.formats.gguf.fit.rounding import factor_of, rounding_error, short, solved_ratio, vocabulary_error
from quantize.formats.gguf.fit.survey import Matrix
from quantize.formats.gguf.fit.table import Cost
from quantize.formats.gguf.grams import RECORD_NAME, read_gram
from quantize.formats.gguf.imatrix import gguf_names
from quantize.formats.gguf.matrices import read_matrix
from quantize.formats.gguf.vocabulary import (
    EMBEDDING,
    HEAD,
    VocabularyLoss,
    read_vocabulary,
    source_of,
)
from quantize.model.architecture import block_layouts
from quantize.model.checkpoint import Checkpoint
from quantize.model.layout import Linear
from quantize.system.cache import hash_file

if TYPE_CHECKING:
    from torch import Tensor

LOG_NAME = "fit.jsonl"
MOST_ROWS = 2048  # of a matrix, evenly spaced, that are rounded; of those the pass has no Gram matrix of, too
MOST_WORDS = 65536  # of head and embedding, evenly spaced
SOLVED_BLOCKS = 4  # in which it is measured what solving leaves, evenly spaced
SOLVED_ROWS = 96  # of a matrix there


@dataclass(frozen=True)
class CostRequest:
    """What `find_costs` is given. exact: the 16-bit file. scratch: where the pass left its statistics."""

    exact: Path
    checkpoint: Checkpoint
    scratch: Path
    variant: str
    matrices: Mapping[str, Matrix]
    solved: bool
    threads: int = 1


@dataclass(frozen=True)
class TypeCosts:
    """unit: see CostTable. ratios: kind of matrix -> type -> what solving leaves of llama.cpp's loss."""

    costs: dict[str, Cost]
    unit: str
    ratios: dict[str, dict[str, float]]
    seconds: float


def find_costs(reporter: Reporter, request: CostRequest) -> TypeCosts:
    """Costs of all matrices that have a choice. Raises BuildError, DiskFullError."""
    began = time.perf_counter()
    import torch

    torch.set_num_threads(request.threads)
    finder = _Finder(request, reporter)
    finder.run()
    return TypeCosts(*finder.costs(), round(time.perf_counter() - began, 2))


class _Finder:
    """The work, and its record: a line for each linear."""

    def __init__(self, request: CostRequest, reporter: Reporter) -> None:
        self._request, self._reporter = request, reporter
        self._exact = read_gguf(request.exact)
        self._log = request.scratch / LOG_NAME
        wanted = {name: item.wanted for name, item in request.matrices.items()}
        identity = {"grams": hash_file(request.scratch / RECORD_NAME), "wanted": wanted, "solved": request.solved}
        self._identity = json.dumps({"identity": identity}, sort_keys=True)
        self._lines: dict[str, dict[str, Any]] = {}

    def run(self) -> None:
        """Find what is not on record."""
        self._resume()
        layouts = list(block_layouts(self._request.checkpoint.config))
        step = max(1, len(layouts) // SOLVED_BLOCKS)
        sampled = {layout.index for layout in layouts[step // 2 :: step]}
        named = self._named()
        for layout in layouts:
            for key, linears in layout.inputs.items():
                wanted = [item for item in linears if item.tensor in named and item.tensor not in self._lines]
                if not wanted:
                    continue
                gram = read_gram(self._request.scratch, self._request.checkpoint, layout, key)
                outputs = read_outputs(self._request.scratch, layout)
                for linear in wanted:
                    name, expert = named[linear.tensor]
                    solving = self._request.solved and layout.index in sampled and not expert
                    facts = self._linear(linear, name, expert, gram, outputs.get(linear.tensor), solving=solving)
                    self._record(linear.tensor, {"name": name, **facts})
                    progress(self._reporter, self._request.variant, "what types cost, matrices", len(self._lines),
                             len(named))  # fmt: skip
        for name in self._request.matrices:
            if name not in self._lines and not any(name == found for found, _ in named.values()):
                self._record(name, {"name": name, **(self._of_vocabulary(name) or self._alone(name))})

    def _named(self) -> dict[str, tuple[str, int | None]]:
        """Linear -> its matrix in the file and the expert that it is of, for those that have a choice."""
        named = gguf_names(str(self._exact.fields["general.architecture"]), self._request.checkpoint)
        found = {}
        for layout in block_layouts(self._request.checkpoint.config):
            for linear in layout.linears:
                name, expert = named(linear.tensor)
                if name and name in self._request.matrices and self._same_size(linear, name, expert):
                    found[linear.tensor] = (name, expert)
        return found

    def _same_size(self, linear: Linear, name: str, expert: int | None) -> bool:
        source = self._request.checkpoint.tensors[linear.tensor].elements
        whole = self._request.matrices[name].elements
        return source == (whole if expert is None else whole // self._exact.tensors[name].shape[-1])

    def _linear(
        self, linear: Linear, name: str, expert: int | None, gram: Tensor, outputs: Tensor | None, *, solving: bool
    ) -> dict[str, Any]:
        """Errors and costs of each type, and what solving leaves; errors: as shares of the weights' squares."""
        weight = read_matrix(self._exact.tensors[name], expert)
        source = self._request.checkpoint.read(linear.tensor)
        order = column_order(weight, source)
        if order is None:
            return self._rows(weight.float(), None, None, self._request.matrices[name].wanted, solving=False)
        if order:
            gram = gram[list(order)][:, list(order)]
        if outputs is not None:
            rows = column_order(weight.T, source.T)
            outputs = outputs.mean().expand(len(weight)) if rows is None else outputs[list(rows)] if rows else outputs
        return self._rows(weight.float(), gram, outputs, self._request.matrices[name].wanted, solving=solving)

    def _of_vocabulary(self, name: str) -> dict[str, Any] | None:
        """Of the output head, or the token embedding; None for others, and where nothing is known of them."""
        from quantize.system.threads import on_threads

        found = read_vocabulary(self._request.scratch) if name in (EMBEDDING, HEAD) else None
        tensor = source_of(name, self._exact, self._request.checkpoint) if found is not None else None
        if found is None or tensor is None:
            return None
        weight = read_matrix(self._exact.tensors[name], None)
        if column_order(weight, self._request.checkpoint.read(tensor)) != () or len(weight) > len(found.outputs):
            return None
        tied, kinds = HEAD not in self._exact.tensors, self._request.matrices[name].wanted
        loss = VocabularyLoss(found, weight, is_head=tied or name == HEAD, is_embedding=name == EMBEDDING)
        rows = slice(None, None, -(-len(weight) // MOST_WORDS))
        some = weight[rows]
        tasks = [partial(vocabulary_error, some, loss, rows, kind) for kind in kinds]
        errors = dict(zip(kinds, on_threads(tasks, self._request.threads), strict=True))
        facts: dict[str, Any] = {
            "errors": {kind: short(item.error) for kind, item in errors.items()},
            "shares": {kind: short(item.error) for kind, item in errors.items()},
            "nats": {kind: short(item.nats) for kind, item in errors.items()},
            "is_vocabulary": True,
        }
        if self._request.solved and (tied or name == HEAD):
            facts["ratios"] = self._ratios(some[:: -(-len(some) // SOLVED_ROWS)].float(), loss.gram(), kinds)
        return facts

    def _alone(self, name: str) -> dict[str, Any]:
        tensor, parts = self._exact.tensors[name], list[dict[str, Any]]()
        for expert in range(tensor.shape[-1]) if len(tensor.shape) > 2 else (None,):
            weight = read_matrix(tensor, expert)
            weight = weight[:: -(-len(weight) // MOST_ROWS)].float()
            parts.append(self._rows(weight, None, None, self._request.matrices[name].wanted, solving=False))
        errors = {kind: statistics.fmean(part["errors"][kind] for part in parts) for kind in parts[0]["errors"]}
        return {"errors": errors}

    def _rows(
        self, weight: Tensor, gram: Tensor | None, outputs: Tensor | None, kinds: Sequence[str], *, solving: bool
    ) -> dict[str, Any]:
        """Of a matrix [out, in] in the order of the file: each type's error on some of its rows, evenly spaced."""
        from quantize.system.threads import on_threads

        stride = -(-len(weight) // MOST_ROWS)
        rows, some = weight[::stride].contiguous(), None if outputs is None else outputs[::stride]
        tasks = [partial(rounding_error, rows, gram, some, kind) for kind in kinds]
        found = dict(zip(kinds, on_threads(tasks, self._request.threads), strict=True))
        scale = len(weight) / len(rows)
        facts: dict[str, Any] = {"errors": {kind: short(item.error) for kind, item in found.items()}}
        if gram is not None:
            facts["shares"] = {kind: short(item.share) for kind, item in found.items()}
        if outputs is not None:
            facts["nats"] = {kind: short(item.nats * scale) for kind, item in found.items()}
        if solving and gram is not None:
            facts["ratios"] = self._ratios(rows, gram, kinds)
        return facts

    def _ratios(self, rows: Tensor, gram: Tensor, kinds: Sequence[str]) -> dict[str, float]:
        """What solving leaves of llama.cpp's loss, by type, on some rows."""
        from quantize.numerics.kquants import GRIDS
        from quantize.system.threads import on_threads

        some = rows[:: -(-len(rows) // SOLVED_ROWS)].contiguous()
        solved = [kind for kind in kinds if kind in GRIDS]
        forms = {(GRIDS[kind].block, GRIDS[kind].sub): GRIDS[kind] for kind in solved}
        factoring = [partial(factor_of, gram, grid) for grid in forms.values()]
        factors = dict(zip(forms, on_threads(factoring, self._request.threads), strict=True))
        grids = [GRIDS[kind] for kind in solved]
        solving = [partial(solved_ratio, some, factors[grid.block, grid.sub], gram, grid) for grid in grids]
        return dict(zip(solved, on_threads(solving, self._request.threads), strict=True))

    def costs(self) -> tuple[dict[str, Cost], str, dict[str, dict[str, float]]]:
        """Of all that is on record."""
        by_name: dict[str, list[dict[str, Any]]] = {}
        for facts in self._lines.values():
            by_name.setdefault(facts["name"], []).append(facts)
        guided = any("nats" in facts for facts in self._lines.values())
        ratios = _mean_ratios(by_name)
        whole = {name: parts for name, parts in by_name.items() if all("shares" in part for part in parts)}
        losses = {name: _losses(parts, guided, len(whole)) for name, parts in whole.items()}
        rates = _rates(losses, by_name)
        costs = {}
        for name, item in self._request.matrices.items():
            known = losses.get(name)
            raw = known or {
                kind: rates.get(kind, max(rates.values(), default=1.0)) * _mean_error(by_name[name], kind)
                for kind in item.wanted
            }  # fmt: skip
            left = ratios.get(kind_of(name), {}) if known else {}
            is_vocabulary = any("is_vocabulary" in part for part in by_name[name])
            costs[name] = Cost(
                elements=item.elements, allowed=item.allowed,
                found="head" if is_vocabulary else "gram" if known else "guess",
                losses={kind: short(raw[kind] * left.get(kind, 1.0)) for kind in item.wanted},
            )  # fmt: skip
        return costs, "nats" if guided else "share", ratios

    def _resume(self) -> None:
        """Take what a stopped build has on record."""
        lines = self._log.read_text("utf-8", errors="replace").split("\n") if self._log.is_file() else []
        if lines and lines[0] == self._identity:
            for line in lines[1:]:
                try:
                    facts = json.loads(line)
                    self._lines[facts.pop("tensor")] = facts
                except (ValueError, KeyError, TypeError, AttributeError):
                    break
        if self._lines:
            note(self._reporter, self._request.variant, f"what types cost: {len(self._lines)} matrices are known")
        text = [self._identity, *(json.dumps({"tensor": name, **facts}) for name, facts in self._lines.items())]
        with disk_errors(self._request.scratch):
            self._log.write_text("".join(f"{line}\n" for line in text), "utf-8")

    def _record(self, tensor: str, facts: dict[str, Any]) -> None:
        self._lines[tensor] = facts
        with disk_errors(self._request.scratch), self._log.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"tensor": tensor, **facts}) + "\n")


def kind_of(name: str) -> str:
    """What matrices of all blocks have in common: attn_q, ffn_down …"""
    return re.sub(r"^blk\.\d+\.|\.weight$", "", name)


def _mean_ratios(by_name: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, float]]:
    """Kind of matrix -> type -> the geometric mean of what was measured."""
    found: dict[str, dict[str, list[float]]] = {}
    for name, parts in by_name.items():
        for kind, value in (item for part in parts for item in part.get("ratios", {}).items()):
            found.setdefault(kind_of(name), {}).setdefault(kind, []).append(max(value, 1e-6))
    return {
        name: {kind: short(statistics.geometric_mean(values)) for kind, values in kinds.items()}
        for name, kinds in found.items()
    }


def _losses(parts: Sequence[Mapping[str, Any]], guided: bool, matrices: int) -> dict[str, float]:
    """Of a matrix, or of all experts in it. An expert that no gradient came to costs nothing that is known."""
    kinds = parts[0]["shares"]
    if guided:
        return {kind: sum(part.get("nats", {}).get(kind, 0.0) for part in parts) for kind in kinds}
    return {kind: statistics.fmean(part["shares"][kind] for part in parts) / matrices for kind in kinds}


def _mean_error(parts: Sequence[Mapping[str, Any]], kind: str) -> float:
    return statistics.fmean(part["errors"][kind] for part in parts)


def _rates(losses: Mapping[str, Mapping[str, float]], by_name: Mapping[str, Any]) -> dict[str, float]:
    """Type -> the median over matrices of their cost for an error of the weights."""
    found: dict[str, list[float]] = {}
    for name, kinds in losses.items():
        for kind, loss in kinds.items():
            if (error := _mean_error(by_name[name], kind)) > 0:
                found.setdefault(kind, []).append(loss / error)
    return {kind: statistics.median(values) for kind, values in found.items()}
