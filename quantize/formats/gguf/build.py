"""The GGUF format: every type that llama.cpp quantizes to, from one 16-bit file that all variants share.

In: a checkpoint and options. Out: a .gguf file named by the GGUF convention, or its parts. The numbers are llama.cpp's
own; the calls into it are in runtimes/llama_cpp, the comparison with the source is in check.py.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from quantize.calibration.budget import BlockMemory
from quantize.errors import PlanError, QuantizeError, VerifyError, disk_errors, some_of
from quantize.events import Reporter, note, status, warn
from quantize.files.gguf import GgufFile, GgufTensor, read_gguf
from quantize.files.gguf_split import read_model
from quantize.formats.base import BuildResult, Collector, Context, KeptTensor, LeftOut, RunLimits, SizePlan, SolveCost
from quantize.formats.gguf.layout import GgufLayout
from quantize.formats.gguf.options import GgufOptions
from quantize.formats.gguf.source import Expected
from quantize.formats.gguf.towers import copy_towers
from quantize.formats.gguf.types import BITS, ELEMENT_TYPES, UNQUANTIZED_TYPES, base_type
from quantize.model.checkpoint import Checkpoint
from quantize.model.config import reads_more_than_text
from quantize.model.source import checkpoint_key
from quantize.runtimes.llama_cpp.convert import ConvertRequest
from quantize.runtimes.llama_cpp.left_out import read_left_out
from quantize.runtimes.llama_cpp.mmproj import convert_whole
from quantize.runtimes.llama_cpp.quantize import QuantizeSettings, SizedFile
from quantize.runtimes.llama_cpp.vocabulary import PRE
from quantize.runtimes.llama_cpp.vocabulary import names as pre_tokenizers
from quantize.store.manifest import tool_versions
from quantize.system.process import run_step

if TYPE_CHECKING:
    from quantize.formats.gguf.solve import SolvedFile

HUB_URL = "https://huggingface.co/"
TRY_OUT_TOKENS = 16
NAMED = 3  # of the tensors that are left out; the manifest has all


class GgufBuilder:
    """GGUF through llama.cpp."""

    name = "gguf"
    source_copies = 1  # the 16-bit file
    computes_in_half = False  # llama.cpp's activations are float32
    Options = GgufOptions

    _expected: Mapping[Any, Expected] = MappingProxyType({})  # of the source that was asked last

    def tools(self, options: GgufOptions) -> Sequence[str]:
        """The converter, its libraries and the quantizer."""
        calibrated = ["torch", "transformers"] if options.imatrix else []
        return sorted({"llama-cpp-python", "auto-round", "gguf", *calibrated})

    def needs_calibration(self, options: GgufOptions) -> bool:
        """Only for an importance matrix."""
        return options.imatrix

    def check(self, checkpoint: Checkpoint, options: GgufOptions) -> None:
        """Overrides must name tensors; whether the converter knows the model is seen when it is sized or built."""

    def sizes(
        self, context: Context, options: Sequence[GgufOptions], reporter: Reporter
    ) -> Sequence[SizePlan | QuantizeError]:
        """By llama.cpp's dry run on a header-only conversion, one for each pre-tokenizer that is chosen."""
        plans: dict[int, SizePlan | QuantizeError] = {}
        for chosen in dict.fromkeys(item.pre_tokenizer for item in options):
            group = [(place, item) for place, item in enumerate(options) if item.pre_tokenizer == chosen]
            alike = [item for _, item in group]
            try:
                sized = self._sized(replace(context, options=alike[0]), alike, reporter)
            except PlanError as exc:
                if len(alike) == len(options):
                    raise
                sized = [exc] * len(alike)
            plans |= dict(zip((place for place, _ in group), sized, strict=True))
        return [plans[place] for place in range(len(options))]

    def _sized(
        self, context: Context, options: Sequence[GgufOptions], reporter: Reporter
    ) -> Sequence[SizePlan | QuantizeError]:
        """The sizes of variants that share a 16-bit file."""
        from quantize.runtimes.llama_cpp.quantize import convert_and_size, dry_run

        jobs = [_settings(item, context.limits, None) for item in options]
        key, ready = self.intermediate(context)
        if ready is not None:
            sized = run_step("sizing the GGUF files", reporter, dry_run, ready, jobs)
        else:
            out, request = context.scratch / "headers.gguf", _request(context, self.outtype(context))
            sized = run_step("sizing the GGUF files", reporter, convert_and_size, request, out, jobs)
        plans: list[SizePlan | QuantizeError] = []
        for item, result in zip(options, sized, strict=True):
            if isinstance(result, QuantizeError):
                plans.append(result)
                continue
            try:
                _check_overrides(item, [name for name, _, _ in result.tensors])
                plan = _size_plan(item, result, key, ready is not None)
                with disk_errors(context.scratch):
                    extra = _imatrix_bytes(context, result.architecture) if item.imatrix else 0
                kept, whole = (_solving_bytes(context.checkpoint, plan) if item.gptq else 0), plan.file_bytes + extra
                plans.append(replace(plan, file_bytes=whole + result.towers_bytes, scratch_bytes=kept))
            except PlanError as exc:
                plans.append(exc)
        return plans

    def collector(self, context: Context, reporter: Reporter) -> Collector:
        """Keeps the diagonal of every Gram matrix; all of it, where it is solved with."""
        from quantize.formats.gguf.grams import GramCollector
        from quantize.formats.gguf.imatrix import ImatrixCollector

        diagonals = context.scratch / "imatrix.safetensors"
        return GramCollector(context.scratch, diagonals) if context.options.gptq else ImatrixCollector(diagonals)

    def solver_bytes(self, block: BlockMemory, options: GgufOptions, threads: int) -> int:
        """The folded matrices; else nothing that counts, as a diagonal is copied."""
        return sum(block.grams) // 2 if options.gptq else 0

    def solve_operations(self, cost: SolveCost) -> float:
        """None: it is solved after the pass."""
        return 0.0

    def build(self, context: Context, reporter: Reporter) -> BuildResult:
        """Convert once per source, quantize, name the file by the convention."""
        with self.converted(context, reporter) as intermediate:
            return self._quantize(context, intermediate, reporter)

    def intermediates(self, context: Context) -> Sequence[tuple[str, str]]:
        """The 16-bit file."""
        return [("gguf", self.intermediate(context)[0])]

    def _quantize(self, context: Context, intermediate: Path, reporter: Reporter) -> BuildResult:
        from quantize.runtimes.llama_cpp.quantize import quantize

        options: GgufOptions = context.options
        imatrix = None
        files = [_file_name(intermediate, options)]
        if options.imatrix:
            files.append(_file_name(intermediate, options).removesuffix(".gguf") + ".imatrix.gguf")
            imatrix = context.staging / files[1]
            _write_imatrix(context, intermediate, imatrix)
        towers, carried = copy_towers(intermediate, context.staging)
        files += towers
        status(reporter, context.variant, f"quantizing to {options.type}")
        job = _settings(options, context.limits, imatrix)
        out = context.staging / files[0]
        names, warnings = run_step(f"quantizing to {options.type}", reporter, quantize, intermediate, out, job)
        written = read_model(context.staging / names[0])
        _check_overrides(options, [*written.tensors])
        solved = _solve(context, intermediate, context.staging / names[0], reporter) if options.gptq else None
        tensors = list(written.tensors.values())
        kept = _kept(options, [(item.name, item.type, item.shape) for item in tensors])
        weights = sum(item.size_bytes for item in tensors)
        bits = round(8 * weights / _elements(tensors), 4)
        facts: dict[str, Any] = {"llama_cpp_warnings": len(warnings)}
        if solved is not None:
            facts |= {"layers": solved.layers, "unsolved": solved.unsolved, "solve_seconds": solved.seconds}
        return BuildResult(
            (*names, *files[1:]), weights, BITS[options.type], None, bits, (*kept, *carried), facts,
            device=solved.device if solved is not None else None,
            left_out=tuple(LeftOut(name, why) for name, why in sorted(read_left_out(intermediate).items())),
        )  # fmt: skip

    def verify(self, folder: Path, checkpoint: Checkpoint, limits: RunLimits, reporter: Reporter) -> Mapping[str, Any]:
        """Tensors, fields, template, tokens and predictions against the source's; load and generate in llama.cpp."""
        from quantize.formats.gguf.check import MOST_SPLIT_OTHERWISE, compare_header, said_of_ends
        from quantize.formats.gguf.try_out import try_out

        path = GgufLayout().main_file(folder)
        file = read_model(path)
        expected = self._asked(checkpoint, file, reporter)
        compare_header(file, checkpoint, expected)
        known = {*checkpoint.tensors, *checkpoint.computed}
        if lost := [name for name in expected.left_out if name not in known]:
            raise VerifyError(f"{path.name}: {lost[0]} in the source are lost", hint="the converter drops them unseen")
        for what in [
            *(f"{name} is left out: {why}" for name, why in [*expected.left_out.items()][:NAMED]),
            expected.unmeasured,
        ]:
            if what:
                warn(reporter, "", f"{path.name}: {what}")
        facts: dict[str, Any] = run_step(
            "loading in llama.cpp",
            reporter,
            try_out,
            path,
            TRY_OUT_TOKENS,
            limits.threads,
            checkpoint,
            expected,
            limits.place,
        )
        for what in said_of_ends(checkpoint, facts):
            note(reporter, "", f"{path.name}: {what}")
        if (split := facts.get("split_otherwise")) is not None:
            most = f"at most {MOST_SPLIT_OTHERWISE:.1%} of {facts['lines']:,} may be"
            what = f"llama.cpp splits {split['lines']:,} lines of the same text into other tokens than the source"
            warn(reporter, "", f"{path.name}: {what} ({most}), first {split['first']}")
        return {"runtime": "llama.cpp", **facts}

    def _asked(self, checkpoint: Checkpoint, file: GgufFile, reporter: Reporter) -> Expected:
        """What the source says, asked once for all its variants."""
        from quantize.formats.gguf.source import expected_of

        pre_tokenizer = file.fields.get(PRE)
        known = pre_tokenizer if pre_tokenizer in pre_tokenizers() else None
        files = [(path, path.stat().st_mtime_ns, path.stat().st_size) for path in checkpoint.files()]
        key = (known, *files)
        if key not in self._expected:
            self._expected = {key: run_step("asking the source", reporter, expected_of, checkpoint, known)}
        return self._expected[key]

    def outtype(self, context: Context) -> str:
        """The type that is converted to: the source's, whatever its activations are."""
        return context.checkpoint.dtype

    def intermediate(self, context: Context) -> tuple[str, Path | None]:
        """Cache key of the 16-bit file, and the file itself if it is there."""
        parts = [checkpoint_key(context.source), self.outtype(context), *_metadata_lines(context)]
        parts.append(f"pre_tokenizer={context.options.pre_tokenizer}")
        parts += ["towers"] if reads_more_than_text(context.checkpoint.config) else []
        parts += [f"{name}={version}" for name, version in tool_versions(["auto-round", "gguf"]).items()]
        key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]
        return key, _model_file(context.cache.entry("gguf", key))

    @contextmanager
    def converted(self, context: Context, reporter: Reporter) -> Iterator[Path]:
        """The 16-bit file, which stays as long as the context is open."""
        request = _request(context, self.outtype(context))

        def fill(scratch: Path) -> None:
            status(reporter, context.variant, f"converting to GGUF {request.outtype}, once for all GGUF variants")
            out = scratch / f"{context.source.name}-{request.outtype}.gguf"
            run_step("converting to GGUF", reporter, convert_whole, request, out)

        with context.cache.using("gguf", self.intermediate(context)[0], fill) as folder:
            found = _model_file(folder)
            assert found is not None
            yield found


def _model_file(folder: Path) -> Path | None:
    """The 16-bit file of a cache entry."""
    name = GgufLayout().main_name(path.name for path in folder.glob("*.gguf"))
    return None if name is None else folder / name


def _request(context: Context, outtype: str) -> ConvertRequest:
    return ConvertRequest(context.checkpoint.folder, outtype, _metadata(context), context.options.pre_tokenizer)


def _metadata(context: Context) -> dict[str, Any]:
    """general.* keys. Null stands for "leave it out": the converter would else guess from the folder's name."""
    source = context.source
    base = _base_model(source.base_model)
    return {
        "general.name": source.name,
        "general.organization": base.get("organization"),
        "general.quantized_by": "quantize",
        "general.license": source.license,
        "general.source.url": source.uri,
        "general.base_models": [base] if base else None,
    }


def _metadata_lines(context: Context) -> list[str]:
    return [f"{key}={value}" for key, value in sorted(_metadata(context).items(), key=lambda item: item[0])]


def _base_model(hub_id: str | None) -> dict[str, str]:
    if hub_id is None or "/" not in hub_id:
        return {}
    organization, name = hub_id.split("/", 1)
    return {"name": name, "organization": organization, "repo_url": HUB_URL + hub_id}


def _settings(options: GgufOptions, limits: RunLimits, imatrix: Path | None) -> QuantizeSettings:
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


def _file_name(intermediate: Path, options: GgufOptions) -> str:
    """<name>-<type>.gguf; the convention: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md."""
    stem = intermediate.stem.rpartition("-")[0]
    return f"{stem}-{options.type}{f'-{options.made_with}' if options.made_with else ''}.gguf"


def _solve(context: Context, intermediate: Path, quantized: Path, reporter: Reporter) -> SolvedFile:
    """Error feedback into the types that llama.cpp chose. Says what keeps llama.cpp's own rounding."""
    from quantize.formats.gguf.solve import SolveRequest, solve_file

    limits = context.limits
    request = SolveRequest(
        intermediate, quantized, context.checkpoint, context.scratch, context.variant, limits.threads,
        limits.own_device,
    )  # fmt: skip
    status(reporter, context.variant, f"solving into {context.options.type}")
    solved: SolvedFile = run_step(f"solving into {context.options.type}", reporter, solve_file, request)
    for why in sorted(set(solved.unsolved.values())):
        names = [name for name, reason in solved.unsolved.items() if reason == why]
        note(reporter, context.variant, f"not solved: {some_of(names, NAMED)}: {why}")
    return solved


def _solving_bytes(checkpoint: Checkpoint, plan: SizePlan) -> int:
    """On disk beside the artifact: the Gram matrices, and what was solved."""
    from quantize.formats.gguf.grams import grams_bytes

    return grams_bytes(checkpoint) + plan.weights_bytes


def _write_imatrix(context: Context, intermediate: Path, out: Path) -> None:
    from quantize.formats.gguf.imatrix import write_from_scratch

    architecture = str(read_gguf(intermediate).fields["general.architecture"])
    scratch = context.scratch / "imatrix.safetensors"
    write_from_scratch(scratch, out, architecture, context.checkpoint, context.calibrated_on, intermediate)


def _imatrix_bytes(context: Context, architecture: str) -> int:
    """Size of the importance matrix file, found by writing one of zeros."""
    from quantize.formats.gguf.imatrix import write_from_scratch, write_zeros

    scratch, out = context.scratch / "zeros.safetensors", context.scratch / "zeros.gguf"
    write_zeros(scratch, context.checkpoint)
    write_from_scratch(scratch, out, architecture, context.checkpoint, context.calibrated_on)
    return out.stat().st_size


def _check_overrides(options: GgufOptions, names: list[str]) -> None:
    for pattern in options.overrides:
        if not any(re.search(pattern, name) for name in names):
            hint = f"tensors are called like: {', '.join(sorted(names)[:3])}"
            raise PlanError(f"override {pattern!r} matches no tensor", hint=hint)


def _size_plan(options: GgufOptions, sized: SizedFile, key: str, ready: bool) -> SizePlan:
    weights = sum(size for _, _, size in sized.tensors)
    kept = _kept(options, [(name, kind, ()) for name, kind, _ in sized.tensors])
    intermediate = 0 if ready else sized.source_bytes + sized.towers_bytes
    bits = round(8 * weights / sized.weights, 4)
    largest = max(sized.shards, default=0)  # the last part is written before the whole file is cut off there
    return SizePlan(
        sized.file_bytes, weights, len(sized.tensors), bits, kept, intermediate, f"gguf-{key}", passing_bytes=largest
    )


def _kept(options: GgufOptions, tensors: list[tuple[str, str, tuple[int, ...]]]) -> tuple[KeptTensor, ...]:
    """Tensors with more bits than the type's own, each with the reason that can be told from its shape and type."""
    base = base_type(options.type)
    kept = []
    for name, kind, shape in tensors:
        if kind == base or ELEMENT_TYPES[kind] <= ELEMENT_TYPES[base] + 0.01:
            continue
        kept.append(KeptTensor(name, kind, _reason(options, name, kind, shape, base)))
    return tuple(sorted(kept, key=lambda item: item.tensor))


def _reason(options: GgufOptions, name: str, kind: str, shape: tuple[int, ...], base: str) -> str:
    if any(re.search(pattern, name) for pattern in options.overrides):
        return "recipe: overrides"
    if name == "token_embd.weight" and options.embedding_type == kind:
        return "recipe: embedding_type"
    if name == "output.weight" and options.output_type == kind:
        return "recipe: output_type"
    if kind in UNQUANTIZED_TYPES:
        return "llama.cpp keeps norms, biases and other small tensors unquantized"
    if shape and shape[0] % 256 and (base.endswith("_K") or base.startswith("IQ")):
        return f"row of {shape[0]} values is no multiple of 256: {kind} instead of a 256-value type"
    return f"llama.cpp's mixture for {options.type}"


def _elements(tensors: list[GgufTensor]) -> int:
    total = 0
    for item in tensors:
        count = 1
        for number in item.shape:
            count *= number
        total += count
    return total
