"""quantize rebuild ARTIFACT"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from quantize.build.rebuild import Given, Rebuild, rebuild, rebuild_folders
from quantize.cli.common import (
    json_option,
    limits_options,
    make_limits,
    open_cache,
    print_json,
    quiet_option,
    store_option,
    verbose_option,
)
from quantize.cli.progress import console_reporter
from quantize.cli.table import Column, print_table, wide_option
from quantize.errors import RefusedError
from quantize.store.store import Store
from quantize.store.workspace import Workspace
from quantize.targets import find_artifact

SHOWN_TENSORS = 20


@click.command("rebuild")
@click.argument("artifact")
@click.option(
    "--source", type=click.Path(path_type=Path), help="The model that it was built from, where it is not found."
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    help="The file of calibration text, or the folder of several, where it is not found.",
)
@click.option("--keep", type=click.Path(path_type=Path), metavar="DIR", help="Build into this new folder, and keep it.")
@store_option
@limits_options
@wide_option
@json_option
@quiet_option
@verbose_option
def command(
    artifact: str, source: Path | None, calibration: Path | None, keep: Path | None, store: Store, threads: int | None,
    device: str, memory_budget: str | None, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Build ARTIFACT again from its manifest alone, in a scratch folder, and compare file by file.

    Says `identical`, or which tensor differs and by how much (exit code 3). Tool versions and a kind of processor that
    are not the manifest's come first. Nothing in the store or the cache is used or changed; the scratch folder is under
    $TMPDIR.
    """
    found = find_artifact(artifact, store)
    limits = make_limits(threads, device, memory_budget)
    with rebuild_folders(keep) as (folder, work), console_reporter(quiet=quiet or as_json) as reporter:
        workspace = Workspace(store, open_cache(), reporter)
        result = rebuild(found, folder, work, workspace, limits, Given(source, calibration))
    if as_json:
        print_json(_as_json(result, keep))
    else:
        _print(result)
    if not result.identical:
        click.get_current_context().exit(RefusedError.exit_code)


def _print(result: Rebuild) -> None:
    if result.tools:
        rows = [[item.tool, item.manifest or "-", item.here or "not installed"] for item in result.tools]
        print_table([Column("TOOL"), Column("MANIFEST"), Column("HERE")], rows, empty="")
    if result.device is not None:
        click.echo(result.device)
    for field in result.fields:
        click.echo(f"manifest: `{field}` differs")
    for item in result.differences:
        click.echo(f"{item.path}: {item.what}")
        for tensor in item.tensors[:SHOWN_TENSORS]:
            click.echo(f"  {tensor}")
        if len(item.tensors) > SHOWN_TENSORS:
            click.echo(f"  and {len(item.tensors) - SHOWN_TENSORS} more tensors; --json has them all")
    word = "identical" if result.identical else "different"
    digest = result.artifact.manifest.digest if result.same_digest else "the digests differ"
    old, new = result.artifact.manifest.schema_version, result.rebuilt.manifest.schema_version
    if old != new:
        digest = f"the digests differ, as its manifest is of schema {old} and is written in schema {new} now"
    click.echo(f"{result.artifact.ref}: {word} ({result.files} files, {digest}, {result.seconds:.0f} s)")


def _as_json(result: Rebuild, keep: Path | None) -> dict[str, Any]:
    return {
        "artifact": result.artifact.ref,
        "identical": result.identical,
        "digest": result.artifact.manifest.digest,
        "rebuilt_digest": result.rebuilt.manifest.digest,
        "tools": [dataclasses.asdict(item) for item in result.tools],
        "device": dataclasses.asdict(result.device) if result.device else None,
        "manifest_fields": list(result.fields),
        "files": result.files,
        "differences": [dataclasses.asdict(item) for item in result.differences],
        "seconds": round(result.seconds, 1),
        "folder": str(keep.absolute()) if keep else None,
    }
