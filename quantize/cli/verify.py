"""quantize verify ARTIFACT…"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from quantize.build.find_source import reopen_source
from quantize.build.verification import Verification, verify
from quantize.cli.common import (
    json_option,
    make_limits,
    open_cache,
    print_json,
    quiet_option,
    store_option,
    trust_options,
    verbose_option,
)
from quantize.cli.progress import console_reporter
from quantize.errors import UsageError
from quantize.formats import find_builder
from quantize.provenance.signature import Trust
from quantize.runtimes.devices import CPU, check_name
from quantize.store.store import Store
from quantize.store.verify import check_files
from quantize.targets import find_artifact


@click.command("verify")
@click.argument("artifacts", nargs=-1, metavar="ARTIFACT...")
@click.option(
    "--source", type=click.Path(path_type=Path), help="The model that they were built from, where it is not found."
)
@click.option("--hashes-only", is_flag=True, help="Only files, sizes and hashes; load nothing.")
@trust_options
@click.option("--device", default=CPU, show_default=True, help="auto, cpu, or a GPU such as cuda:0 or vulkan:0.")
@store_option
@json_option
@quiet_option
@verbose_option
def command(
    artifacts: tuple[str, ...], source: Path | None, hashes_only: bool, public_key: Path | None,
    identity: str | None, issuer: str | None, device: str, store: Store, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Check each ARTIFACT (all current ones if none is named) against its manifest, and run it.

    With --public-key, or --identity and --issuer, its signature must be there and cover every file.
    """
    trust = Trust.of(public_key, identity, issuer)
    limits = replace(make_limits(None, CPU, None), device=check_name(device))
    named = [find_artifact(ref, store) for ref in artifacts]
    found = named or store.current_artifacts()
    if not found:
        raise UsageError(f"no artifacts in {store.root}", hint="build some first")
    results = []
    for artifact in found:
        with console_reporter(quiet=quiet or as_json) as reporter:
            check_files(artifact, reporter)
            facts = {"signature": "good"} if trust is not None else {}
            if trust is not None:
                trust.check(artifact.folder)
            if not hashes_only:
                checkpoint = reopen_source(artifact, open_cache(), reporter, source)
                kind = artifact.manifest.format
                asked = Verification(kind, find_builder(kind), artifact.folder, checkpoint)
                facts |= verify(asked, limits, reporter)
        results.append({"artifact": artifact.ref, "digest": artifact.manifest.digest, **facts})
        if not as_json:
            click.echo(f"{artifact.ref}: good" + (", signature too" if trust is not None else ""))
    if as_json:
        print_json(results)
