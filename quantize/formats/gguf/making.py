"""One model file: quantized by llama.cpp, and solved after it where that is asked for.

In: the 16-bit file, settings, a folder. Out: the file in the folder, and what was done. Which settings: build.py, and
fit where types are chosen.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.errors import PlanError, some_of
from quantize.events import Reporter, note, status
from quantize.files.gguf import GgufTensor, read_gguf
from quantize.files.gguf_split import read_model
from quantize.formats.base import Context, KeptTensor, RunLimits
from quantize.formats.gguf.options import GgufOptions
from quantize.formats.gguf.types import ELEMENT_TYPES, UNQUANTIZED_TYPES, base_type
from quantize.formats.gguf.vocabulary import EMBEDDING, HEAD
from quantize.model.checkpoint import Checkpoint
from quantize.runtimes.llama_cpp.quantize import QuantizeSettings, SizedFile
from quantize.system.process import run_step

if TYPE_CHECKING:
    from quantize.formats.gguf.solve import SolvedFile

NAMED = 3  # of several, where people read


@dataclass(frozen=True)
class MadeFile:
    """A model file, or its parts. names: in the folder that it was made in. solved: None where nothing was."""

    names: tuple[str, ...]
    tensors: tuple[GgufTensor, ...]
    warnings: tuple[str, ...]
    solved: SolvedFile | None = None

    @property
    def weights_bytes(self) -> int:
        """Of all tensors."""
        return sum(item.size_bytes for item in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Of all tensors, scales included."""
        return round(8 * self.weights_bytes / sum(math.prod(item.shape) for item in self.tensors), 4)

    @property
    def facts(self) -> dict[str, Any]:
        """For measurements.json."""
        found: dict[str, Any] = {"llama_cpp_warnings": len(self.warnings)}
        if (solved := self.solved) is not None:
            found |= {"layers": solved.layers, "unsolved": solved.unsolved, "solve_seconds": solved.seconds}
        return found


def make_file(
    context: Context, intermediate: Path, out: Path, settings: QuantizeSettings, reporter: Reporter, *, log: str = ""
) -> MadeFile:
    """Quantize the 16-bit file into `out`, or into parts beside it, and solve it where the variant is solved.

    log: a folder in scratch for what is solved, where several files of a variant are. Raises PlanError, BuildError,
    DiskFullError.
    """
    from quantize.runtimes.llama_cpp.quantize import quantize

    what = f"quantizing to {settings.type}"
    status(reporter, context.variant, what)
    names, warnings = run_step(what, reporter, quantize, intermediate, out, settings)
    written = read_model(out.with_name(names[0]))
    check_overrides(context.options, [*written.tensors])
    solved = None
    if context.options.gptq:
        solved = _solve(context, intermediate, out.with_name(names[0]), settings.type, reporter, log)
    return MadeFile(names, tuple(written.tensors.values()), warnings, solved)


def settings_of(options: GgufOptions, limits: RunLimits, imatrix: Path | None) -> QuantizeSettings:
    """What llama.cpp is asked for."""
    return QuantizeSettings(
        type=options.type,
        overrides=tuple(options.overrides.items()),
        output_type=options.output_type,
        embedding_type=options.embedding_type,
        pure=options.pure,
        imatrix=imatrix,
        imatrix_later=options.imatrix and imatrix is None,
        threads=limits.threads,
        split_bytes=options.split_size,
    )


def file_name(intermediate: Path, options: GgufOptions) -> str:
    """<name>-<type>.gguf; the convention: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md."""
    stem = intermediate.stem.rpartition("-")[0]
    kind = options.type if options.fit is None else options.fit.label
    return f"{stem}-{kind}{f'-{options.made_with}' if options.made_with else ''}.gguf"


def _solve(
    context: Context, intermediate: Path, quantized: Path, kind: str, reporter: Reporter, log: str
) -> SolvedFile:
    """Error feedback into the types that llama.cpp chose. Says what keeps llama.cpp's own rounding."""
    from quantize.formats.gguf.solve import SolveRequest, solve_file

    limits = context.limits
    request = SolveRequest(
        intermediate, quantized, context.checkpoint, context.scratch, context.variant, limits.threads,
        limits.own_device, context.scratch / log,
    )  # fmt: skip
    status(reporter, context.variant, f"solving into {kind}")
    solved: SolvedFile = run_step(f"solving into {kind}", reporter, solve_file, request)
    for why in sorted(set(solved.unsolved.values())):
        names = [name for name, reason in solved.unsolved.items() if reason == why]
        note(reporter, context.variant, f"not solved: {some_of(names, NAMED)}: {why}")
    return solved


def solved_note(sized: SizedFile) -> str:
    """How many matrices of a file will be solved, and which keep llama.cpp's own rounding."""
    from quantize.numerics.kquants import GRIDS

    kinds = {name: kind for name, kind, _ in sized.tensors if len(sized.shapes[name]) > 1}
    matrices = {name: kind for name, kind in kinds.items() if kind not in UNQUANTIZED_TYPES}
    ends = [name for name in matrices if name in (EMBEDDING, HEAD)]
    others = [name for name, kind in matrices.items() if kind not in GRIDS and name not in ends]
    left = [f"{len(others)} of types that are not solved ({', '.join(sorted({matrices[name] for name in others}))})"]
    left = [*(left if others else []), *([f"{len(ends)} of embedding and head"] if ends else [])]
    count = len(matrices) - len(ends) - len(others)
    kept = f"; {' and '.join(left)} keep llama.cpp's own rounding" if left else ""
    return f"up to {count} of {len(matrices)} matrices are solved{kept}"


def solving_bytes(checkpoint: Checkpoint, weights_bytes: int) -> int:
    """On disk beside the artifact: the Gram matrices, and what was solved."""
    from quantize.formats.gguf.grams import grams_bytes

    return grams_bytes(checkpoint) + weights_bytes


def write_imatrix(context: Context, intermediate: Path, out: Path) -> None:
    """llama.cpp's importance matrix, of what the pass left in scratch."""
    from quantize.formats.gguf.imatrix import write_from_scratch

    architecture = str(read_gguf(intermediate).fields["general.architecture"])
    scratch = context.scratch / "imatrix.safetensors"
    write_from_scratch(scratch, out, architecture, context.checkpoint, context.calibrated_on, intermediate)


def imatrix_bytes(context: Context, architecture: str) -> int:
    """Size of the importance matrix file, found by writing one of zeros."""
    from quantize.formats.gguf.imatrix import write_from_scratch, write_zeros

    scratch, out = context.scratch / "zeros.safetensors", context.scratch / "zeros.gguf"
    write_zeros(scratch, context.checkpoint)
    write_from_scratch(scratch, out, architecture, context.checkpoint, context.calibrated_on)
    return out.stat().st_size


def check_overrides(options: GgufOptions, names: Sequence[str]) -> None:
    """Raises PlanError: a pattern is of no tensor."""
    for pattern in options.overrides:
        if not any(re.search(pattern, name) for name in names):
            hint = f"tensors are called like: {', '.join(sorted(names)[:3])}"
            raise PlanError(f"override {pattern!r} matches no tensor", hint=hint)


def kept_tensors(
    options: GgufOptions, tensors: Sequence[tuple[str, str, tuple[int, ...]]], chosen: Mapping[str, str] | None = None
) -> tuple[KeptTensor, ...]:
    """Tensors with more bits than the type's own, each with the reason that can be told from its shape and type.

    chosen: the types that were chosen for what must fit; then it is those with no choice, which keep 16 bits or more.
    """
    lowest = ELEMENT_TYPES["Q8_0" if chosen is not None else base_type(options.type)]
    base = "" if chosen is not None else base_type(options.type)
    kept = []
    for name, kind, shape in tensors:
        if kind == base or ELEMENT_TYPES[kind] <= lowest + 0.01:
            continue
        kept.append(KeptTensor(name, kind, _reason(options, name, kind, shape, base)))
    return tuple(sorted(kept, key=lambda item: item.tensor))


def _reason(options: GgufOptions, name: str, kind: str, shape: tuple[int, ...], base: str) -> str:
    if any(re.search(pattern, name) for pattern in options.overrides):
        return "recipe: overrides"
    if name == EMBEDDING and options.embedding_type == kind:
        return "recipe: embedding_type"
    if name == HEAD and options.output_type == kind:
        return "recipe: output_type"
    if kind in UNQUANTIZED_TYPES:
        return "llama.cpp keeps norms, biases and other small tensors unquantized"
    if shape and shape[0] % 256 and (base.endswith("_K") or base.startswith("IQ")):
        return f"row of {shape[0]} values is no multiple of 256: {kind} instead of a 256-value type"
    return f"llama.cpp's mixture for {options.type}"
