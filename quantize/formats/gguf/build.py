"""The GGUF format: every type that llama.cpp quantizes to, from one 16-bit file that all variants share.

In: a checkpoint and options. Out: a .gguf file named by the GGUF convention, or its parts. The numbers are llama.cpp's
own; the calls into it are in runtimes/llama_cpp, the comparison with the source is in check.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from quantize.calibration.budget import BlockMemory
from quantize.errors import PlanError, QuantizeError, UsageError, VerifyError, disk_errors
from quantize.events import Reporter, note, status, warn
from quantize.files.gguf import GgufFile
from quantize.files.gguf_split import read_model
from quantize.formats.base import BuildResult, Collector, Context, LeftOut, RunLimits, SizePlan, SolveCost
from quantize.formats.gguf.fit.plan import planned
from quantize.formats.gguf.fit.survey import Survey, survey, survey_jobs
from quantize.formats.gguf.fit.table import NAME as FIT_NAME
from quantize.formats.gguf.layout import GgufLayout
from quantize.formats.gguf.making import (
    NAMED,
    check_overrides,
    file_name,
    imatrix_bytes,
    kept_tensors,
    make_file,
    settings_of,
    solved_note,
    solving_bytes,
    write_imatrix,
)
from quantize.formats.gguf.options import GgufOptions
from quantize.formats.gguf.source import Expected
from quantize.formats.gguf.towers import copy_towers
from quantize.formats.gguf.types import BITS
from quantize.model.checkpoint import Checkpoint
from quantize.model.config import reads_more_than_text
from quantize.model.shape import ModelShape
from quantize.model.source import checkpoint_key
from quantize.runtimes.llama_cpp.convert import ConvertRequest
from quantize.runtimes.llama_cpp.left_out import read_left_out
from quantize.runtimes.llama_cpp.mmproj import convert_whole
from quantize.runtimes.llama_cpp.quantize import QuantizeSettings, SizedFile
from quantize.runtimes.llama_cpp.vocabulary import PRE
from quantize.runtimes.llama_cpp.vocabulary import names as pre_tokenizers
from quantize.store.manifest import tool_versions
from quantize.system.process import run_step

HUB_URL = "https://huggingface.co/"
TRY_OUT_TOKENS = 16


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
        groups = [_jobs(item, context.limits) for item in options]
        sized = self._dry_runs(context, [job for group in groups for job in group], reporter)
        key, ready = self.intermediate(context)
        plans: list[SizePlan | QuantizeError] = []
        for item, group in zip(options, groups, strict=True):
            found, sized = sized[: len(group)], sized[len(group) :]
            result = found[0]
            if isinstance(result, QuantizeError):
                plans.append(result)
                continue
            try:
                check_overrides(item, [name for name, _, _ in result.tensors])
                plan = _size_plan(context, item, found, result, key, ready is not None)
                with disk_errors(context.scratch):
                    extra = imatrix_bytes(context, result.architecture) if item.imatrix else 0
                whole = plan.file_bytes + extra + result.towers_bytes
                plans.append(replace(plan, file_bytes=whole))
            except (PlanError, UsageError) as exc:
                plans.append(exc)
        return plans

    def _dry_runs(
        self, context: Context, jobs: Sequence[QuantizeSettings], reporter: Reporter
    ) -> list[SizedFile | QuantizeError]:
        """Of the 16-bit file, if it is there, else of headers that are converted for it."""
        from quantize.runtimes.llama_cpp.quantize import convert_and_size, dry_run

        _, ready = self.intermediate(context)
        if ready is not None:
            return run_step("sizing the GGUF files", reporter, dry_run, ready, jobs)
        out = context.scratch / "headers.gguf"
        request = _request(context, self.outtype(context))
        return run_step("sizing the GGUF files", reporter, convert_and_size, request, out, jobs)

    def survey(self, context: Context, reporter: Reporter) -> Survey:
        """What choosing types needs to know of a model, for a variant that must fit. Raises as `sizes` does."""
        found = self._dry_runs(context, survey_jobs(context.options, context.limits), reporter)
        return survey(context.options, found, ModelShape.from_config(context.checkpoint.config))

    def collector(self, context: Context, reporter: Reporter) -> Collector:
        """Keeps the diagonal of every Gram matrix; all of it, where it is solved with."""
        from quantize.formats.gguf.fit.grams import FitCollector
        from quantize.formats.gguf.grams import GramCollector
        from quantize.formats.gguf.imatrix import ImatrixCollector

        diagonals = context.scratch / "imatrix.safetensors"
        if context.options.fit is not None:
            return FitCollector(context.scratch, diagonals)
        return GramCollector(context.scratch, diagonals) if context.options.gptq else ImatrixCollector(diagonals)

    def solver_bytes(self, block: BlockMemory, options: GgufOptions, threads: int) -> int:
        """The folded matrices; else nothing that counts, as a diagonal is copied."""
        return sum(block.grams) // 2 if options.gptq or options.fit is not None else 0

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
        options: GgufOptions = context.options
        imatrix = None
        files = [file_name(intermediate, options)]
        if options.imatrix:
            files.append(file_name(intermediate, options).removesuffix(".gguf") + ".imatrix.gguf")
            imatrix = context.staging / files[1]
            write_imatrix(context, intermediate, imatrix)
        towers, carried = copy_towers(intermediate, context.staging)
        files += towers
        chosen: Mapping[str, str] | None = None
        if options.fit is None:
            job = settings_of(options, context.limits, imatrix)
            made = make_file(context, intermediate, context.staging / files[0], job, reporter)
            names, bits, facts = (*made.names, *files[1:]), BITS[options.type], made.facts
        else:
            from quantize.formats.gguf.fit.build import fit_file

            assert imatrix is not None
            fitted = fit_file(context, intermediate, files[0], imatrix, reporter)
            made, chosen = fitted.made, fitted.record.types
            names, bits, facts = (*files, FIT_NAME), round(made.bits_per_weight), made.facts | fitted.facts
        kept = kept_tensors(options, [(item.name, item.type, item.shape) for item in made.tensors], chosen)
        return BuildResult(
            names, made.weights_bytes, bits, None, made.bits_per_weight, (*kept, *carried), facts,
            device=made.solved.device if made.solved is not None else None,
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
            "loading in llama.cpp", reporter, try_out, path, TRY_OUT_TOKENS, limits.threads, checkpoint, expected,
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


def _jobs(options: GgufOptions, limits: RunLimits) -> list[QuantizeSettings]:
    """The dry runs that a variant is sized by."""
    return survey_jobs(options, limits) if options.fit is not None else [settings_of(options, limits, None)]


def _size_plan(
    context: Context, options: GgufOptions, found: Sequence[SizedFile | QuantizeError], sized: SizedFile, key: str,
    ready: bool,
) -> SizePlan:  # fmt: skip
    """Of the dry runs of a variant; sized: the first of them. Raises PlanError."""
    plan = _exact_plan(options, sized, key, ready) if options.fit is None else None
    if plan is None:
        surveyed = survey(options, found, ModelShape.from_config(context.checkpoint.config))
        before = 0 if ready else sized.source_bytes + sized.towers_bytes
        guided = bool(context.calibrated_on.spec.get("guided"))
        plan = planned(surveyed, len(sized.tensors), before, f"gguf-{key}", guided=guided)
    if options.fit is None and not options.gptq:
        return plan
    files = 0 if options.fit is None else 1 + options.fit.check
    solved = max(1, files) * plan.weights_bytes if options.gptq else 0
    return replace(plan, scratch_bytes=solving_bytes(context.checkpoint, files * plan.weights_bytes + solved))


def _exact_plan(options: GgufOptions, sized: SizedFile, key: str, ready: bool) -> SizePlan:
    weights = sum(size for _, _, size in sized.tensors)
    kept = kept_tensors(options, [(name, kind, ()) for name, kind, _ in sized.tensors])
    intermediate = 0 if ready else sized.source_bytes + sized.towers_bytes
    bits = round(8 * weights / sized.weights, 4)
    largest = max(sized.shards, default=0)  # the last part is written before the whole file is cut off there
    return SizePlan(
        sized.file_bytes, weights, len(sized.tensors), bits, kept, intermediate, f"gguf-{key}", passing_bytes=largest,
        notes=(solved_note(sized),) if options.gptq else (),
    )  # fmt: skip
