"""The bitsandbytes formats: LLM.int8 (row-wise INT8) and NF4, as transformers saves them.

In: a checkpoint, read tensor by tensor. Out: a Hugging Face folder with the same tensors as transformers' own
save_pretrained of the model quantized on load. No calibration; memory holds one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from quantize.errors import CheckpointError, PlanError
from quantize.events import Reporter, status
from quantize.formats.base import BuildResult, Context, RunLimits, SizePlan, UncalibratedBuilder
from quantize.formats.bitsandbytes.steps import nf4_state, stored_type
from quantize.formats.folder_build import (
    DTYPE_NAMES,
    Shape,
    TensorLayout,
    config_text,
    kept_modules,
    left_out,
    linear_shapes,
    plan_layout,
    size_plan,
    stored_in,
    write_beside,
)
from quantize.model.architecture import anatomy_of, block_layouts
from quantize.model.checkpoint import Checkpoint
from quantize.model.towers import tower_modules, tower_tensors
from quantize.numerics.constants import NF4_BLOCK
from quantize.recipe.model import FormatOptions
from quantize.system.process import run_step

HEAD = "lm_head"  # where it is tied, no tensor names it


class BitsandbytesOptions(FormatOptions):
    """The recipe section of a bitsandbytes variant."""

    type: Literal["int8", "nf4"] = Field("int8", description="LLM.int8, or 4-bit NormalFloat in blocks of 64")
    threshold: float = Field(6.0, ge=0, description="activations beyond this are multiplied in 16 bit (int8 only)")

    def variant_name(self) -> str:
        """`bnb-int8` or `bnb-nf4`."""
        return f"bnb-{self.type}"


class BitsandbytesBuilder(UncalibratedBuilder):
    """bitsandbytes, streamed."""

    name = "bitsandbytes"
    computes_in_half = True
    Options = BitsandbytesOptions

    def tools(self, options: BitsandbytesOptions) -> Sequence[str]:
        """The rounding is bitsandbytes' own."""
        return ("bitsandbytes", "torch")

    def check(self, checkpoint: Checkpoint, options: BitsandbytesOptions) -> None:
        """transformers puts bitsandbytes' linears in the place of plain ones: not of experts, which are no linears of
        their own, nor of classes that are derived.
        """
        try:
            layouts = list(block_layouts(checkpoint.config))
        except CheckpointError as exc:
            hint = "a gguf variant without an importance matrix may be made of this model"
            raise PlanError(f"bitsandbytes must know what blocks are made of: {exc.message}", hint=hint) from exc
        if any(layout.experts for layout in layouts):
            raise PlanError(
                f"bitsandbytes does not quantize the experts of {checkpoint.architecture}",
                hint="use a gguf, gptq or awq variant for this model",
            )
        kinds = sorted({linear.kind for layout in layouts for linear in layout.linears if linear.kind})
        if kinds:
            raise PlanError(
                f"the linears of {checkpoint.architecture} are {', '.join(kinds)}, which transformers does not replace "
                "by bitsandbytes' own", hint="use a gguf, gptq or awq variant for this model",
            )  # fmt: skip
        if options.type == "nf4":
            _check_rows(checkpoint)

    def sizes(self, context: Context, options: Sequence[BitsandbytesOptions], reporter: Reporter) -> list[SizePlan]:
        """By arithmetic: the layout fixes every byte."""
        return [_size(context.checkpoint, item) for item in options]

    def build(self, context: Context, reporter: Reporter) -> BuildResult:
        """Quantize and write one tensor after another, in a worker."""
        options: BitsandbytesOptions = context.options
        status(reporter, context.variant, f"quantizing to {options.type}")
        files, device, wide = run_step(f"quantizing to {options.type}", reporter, _write, context)
        checkpoint = replace(context.checkpoint, wide=wide)
        beside = write_beside(context, _config(checkpoint, options))
        size = _size(checkpoint, options)
        bits, block = (8, None) if options.type == "int8" else (4, NF4_BLOCK)
        return BuildResult(
            (*files, *beside),
            size.weights_bytes,
            bits,
            block,
            size.bits_per_weight,
            size.kept,
            device=device,
            left_out=left_out(checkpoint),
            stored=stored_in(checkpoint, by_itself=checkpoint.dtype),
        )

    def verify(self, folder: Path, checkpoint: Checkpoint, limits: RunLimits, reporter: Reporter) -> Mapping[str, Any]:
        """Load with transformers + bitsandbytes and generate."""
        from quantize.formats.bitsandbytes.steps import check_loaded

        status(reporter, "", "loading in transformers with bitsandbytes")
        facts: dict[str, Any] = run_step(
            "loading in transformers", reporter, check_loaded, folder, limits.threads, checkpoint, limits.place.device
        )
        return facts


def _write(reporter: Reporter, context: Context) -> tuple[tuple[str, ...], str, bool]:
    """In a worker: the names of the files, the kind of processor that rounded, whether FP16 is too narrow."""
    from quantize.calibration.reach import widened
    from quantize.formats.bitsandbytes.steps import check_installed, write_quantized

    check_installed()
    checkpoint = context.checkpoint
    if checkpoint.dtype == "F16":
        checkpoint = widened(checkpoint, context.source, context.cache, reporter, "cpu")
    options: BitsandbytesOptions = context.options
    layout = _layout(checkpoint, options)
    files, device = write_quantized(
        reporter, checkpoint, context.staging, context.scratch, layout.table, layout.packed, options.type,
        context.variant,
    )  # fmt: skip
    return files, device, checkpoint.wide


def _layout(checkpoint: Checkpoint, options: BitsandbytesOptions) -> TensorLayout:
    state = len(nf4_state(stored_type(checkpoint), (1, 1))) - len("[1, 1]")

    def int8(out: int, width: int) -> dict[str, tuple[str, Shape]]:
        return {"SCB": ("F32", (out,)), "weight": ("I8", (out, width)), "weight_format": ("U8", ())}

    def nf4(out: int, width: int) -> dict[str, tuple[str, Shape]]:
        blocks = -(-out * width // NF4_BLOCK)
        return {
            "weight": ("U8", ((out * width + 1) // 2, 1)),
            "weight.absmax": ("F32", (blocks,)),
            "weight.quant_map": ("F32", (16,)),
            "weight.quant_state.bitsandbytes__nf4": ("U8", (state + len(f"[{out}, {width}]"),)),
        }

    return plan_layout(checkpoint, int8 if options.type == "int8" else nf4, stored_dtype=stored_type(checkpoint))


def _check_rows(checkpoint: Checkpoint) -> None:
    """Blocks of NF4 go over the ends of rows, and bitsandbytes' product on a CPU takes whole ones. Raises PlanError."""
    for name, _, width in linear_shapes(checkpoint):
        if width % NF4_BLOCK:
            raise PlanError(
                f"{name} has {width} inputs; NF4 takes multiples of {NF4_BLOCK}",
                hint="use int8, or a gguf, gptq or awq variant for this model",
            )


def _size(checkpoint: Checkpoint, options: BitsandbytesOptions) -> SizePlan:
    layout = _layout(checkpoint, options)
    return size_plan(checkpoint, layout, _config(checkpoint, options), stored_dtype=stored_type(checkpoint))


def _skipped(checkpoint: Checkpoint) -> list[str] | None:
    """The modules that transformers is to leave as they are; None where they are those that it leaves by itself."""
    kept, anatomy, apart = kept_modules(checkpoint), anatomy_of(checkpoint.config), tower_tensors(checkpoint)
    outside = [name for name in checkpoint.tensors if anatomy.block_of(name) is None and name not in apart]
    names = {name.removesuffix(".weight") for name in outside if name.endswith(".weight")}
    return sorted({*names, *kept, *tower_modules(checkpoint), HEAD}) if kept or apart else None


def _config(checkpoint: Checkpoint, options: BitsandbytesOptions) -> str:
    four = options.type == "nf4"
    return config_text(
        checkpoint,
        {
            "quant_method": "bitsandbytes",
            "_load_in_4bit": four,
            "_load_in_8bit": not four,
            "load_in_4bit": four,
            "load_in_8bit": not four,
            "llm_int8_threshold": options.threshold,
            "llm_int8_skip_modules": _skipped(checkpoint),
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
            "bnb_4bit_quant_type": "nf4" if four else "fp4",
            "bnb_4bit_use_double_quant": False,
            "bnb_4bit_compute_dtype": DTYPE_NAMES[stored_type(checkpoint)] if four else "float32",
            "bnb_4bit_quant_storage": "uint8",
        },
        dtype=DTYPE_NAMES[stored_type(checkpoint)],
    )
