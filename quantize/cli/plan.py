"""quantize plan RECIPE"""

from __future__ import annotations

from pathlib import Path

import click

from quantize.build.job import VariantJob
from quantize.build.plan import make_plan
from quantize.build.size import SizedPlan, size_plan
from quantize.cli.anatomy import anatomy_lines
from quantize.cli.common import (
    is_verbose,
    json_option,
    limits_options,
    make_limits,
    open_cache,
    open_recipe,
    print_json,
    quiet_option,
    store_option,
    verbose_option,
)
from quantize.cli.progress import console_reporter
from quantize.cli.table import Column, print_table, wide_option
from quantize.formats import find_format
from quantize.formats.base import RunLimits
from quantize.store.artifact import REFUSED, UNJUDGED, Artifact
from quantize.store.fit_facts import read_fit
from quantize.store.manifest import CalibrationPart
from quantize.store.store import Store
from quantize.store.workspace import Workspace
from quantize.system.sizes import mebibytes_text, size_text


@click.command("plan")
@click.argument("recipe", type=click.Path(path_type=Path))
@store_option
@limits_options
@wide_option
@json_option
@quiet_option
@verbose_option
def command(
    recipe: Path, store: Store, threads: int | None, device: str, memory_budget: str | None, as_json: bool, quiet: bool
) -> None:
    """Show what RECIPE, a file or a name, would build: exact sizes, disk needed and free, what is built already. Writes
    nothing. With -v, also what the model's blocks are made of.
    """
    parsed = open_recipe(recipe)
    with console_reporter(quiet=quiet or as_json) as reporter:
        workspace = Workspace(store, open_cache(), reporter)
        limits = make_limits(threads, device, memory_budget)
        plan = size_plan(make_plan(parsed, workspace), workspace, limits)
    if as_json:
        print_json(plan.to_data())
    else:
        _print(plan, limits)
        if is_verbose():
            click.echo("\n".join(anatomy_lines(plan.source.location)))
    refused = [job.refusal for job in plan.jobs if job.refusal is not None]
    if refused:
        click.get_current_context().meta["quantize.verbose"] = False  # -v asked for the blocks; this is no defect
        raise refused[0]


def _print(plan: SizedPlan, limits: RunLimits) -> None:
    columns = [Column("VARIANT"), Column("FORMAT", rank=3), Column("TENSORS", "right", rank=5), Column("SIZE", "right")]
    columns += [
        Column("BYTES", "right", rank=4),
        Column("BITS/WEIGHT", "right", rank=2),
        Column("KEPT HIGHER", "right", rank=6),
        Column("STATE"),
    ]
    print_table(columns, [_row(job) for job in plan.jobs], empty="nothing to build")
    for job in plan.jobs:
        for text in job.size.notes if job.size is not None else ():
            click.echo(f"note    {job.name}: {text}")
    for job in plan.jobs:
        for text in curve_lines(job.existing):
            click.echo(text)
    click.echo(f"source  {plan.source.uri}  sha256 {plan.source.digest[:12]}")
    for advice in _advice(plan):
        click.echo(f"note    {advice}")
    for part in plan.shown:
        click.echo(f"text    {_text_of(part)}")
    if plan.is_guided:
        click.echo("        guided: the model goes forward and back first, for what each token counts")
    if plan.memory_bytes:
        click.echo(f"memory  {mebibytes_text(plan.memory_bytes)} at the least for the calibration pass")
    if (gpu := plan.gpu) is not None:
        taken, free, states = map(mebibytes_text, (gpu.pass_bytes, gpu.free_bytes, gpu.state_bytes))
        click.echo(f"gpu     {taken} of {gpu.device} for the calibration pass, {free} free")
        click.echo(f"        hidden states: up to {states}, {plan.states_are(limits)}")
    for room in plan.rooms:
        missing = f", {size_text(room.missing_bytes)} missing" if room.missing_bytes else ""
        needed, free = size_text(room.needed_bytes), size_text(room.free_bytes)
        what = "disk " if len(plan.rooms) == 1 else room.what
        click.echo(f"{what}   {needed} needed at the peak, {free} free{missing}")


def _advice(plan: SizedPlan) -> list[str]:
    """What the formats have to say of what is to be built; the same words once, with the variants before them."""
    said: dict[str, list[str]] = {}
    for job in plan.jobs:
        if text := find_format(job.variant.format).advice(job.variant.options.model_dump()):
            said.setdefault(text, []).append(job.variant.name)
    return [f"{', '.join(names)}: {text}" for text, names in said.items()]


def _text_of(part: CalibrationPart) -> str:
    if part.left_out is not None:
        return f"{part.dataset} is left out: {part.left_out}"
    return f"{part.dataset}, up to {part.sequences:,} sequences of {part.tokens // part.sequences:,} tokens"


def curve_lines(artifact: Artifact | None) -> list[str]:
    """Bytes against predicted loss of a fitted artifact, with the maps of llama.cpp's own among the others."""
    facts = None if artifact is None else read_fit(artifact.measurements())
    if artifact is None or facts is None:
        return []
    shown = [f"        {size_text(size):>10}  {loss:<10.4g} {name}" for size, loss, name in facts.rows]
    return [f"curve   {artifact.manifest.variant}: size and predicted loss, {facts.unit_words}", *shown]


def _row(job: VariantJob) -> list[str]:
    name, size = job.variant.name, job.size
    state = _state(job)
    if size is None:
        return [name, job.variant.format, "", "", "", "", "", state]
    most = "<= " if size.at_most else ""
    sizes = f"{most}{size_text(size.file_bytes)}", f"{most}{size.file_bytes:,}"
    numbers = [str(size.tensors), *sizes, f"{most}{size.bits_per_weight:.2f}"]
    return [name, job.variant.format, *numbers, str(len(size.kept)), state]


def _state(job: VariantJob) -> str:
    if job.refusal is not None:
        return f"refused: {job.refusal.message.splitlines()[0]}"
    if job.existing is None:
        return "to build"
    words = {UNJUDGED: "built, to be evaluated", REFUSED: "built, refused by its gates"}
    word = words.get(job.existing.folder.parent.name, "up to date")
    return f"{word} ({job.existing.manifest.short_digest})"
