"""quantize pull REFERENCE…"""

from __future__ import annotations

from pathlib import Path

import click

from quantize.cli.common import json_option, print_json, quiet_option, store_option, verbose_option
from quantize.cli.progress import console_reporter
from quantize.errors import UsageError
from quantize.publish.pins import chosen, read_pins
from quantize.publish.receive import pull, pull_pinned
from quantize.publish.transfer import Session
from quantize.store.store import PINS_NAME, Store
from quantize.system.sizes import size_text


@click.command("pull")
@click.argument("references", nargs=-1, metavar="REFERENCE...")
@click.option("--locked", is_flag=True, help="Get what the lock file pins: all of it, or the NAME/VARIANTs given.")
@click.option(
    "--lock",
    type=click.Path(path_type=Path, dir_okay=False),
    default=PINS_NAME,
    show_default=True,
    help="File with the pins.",
)
@click.option("--replace", is_flag=True, help="Make what is pulled current, also before a newer build of yours.")
@click.option("--jobs", type=click.IntRange(min=1), default=4, show_default=True, help="Files at a time.")
@store_option
@json_option
@quiet_option
@verbose_option
def command(
    references: tuple[str, ...], locked: bool, lock: Path, replace: bool, jobs: int, store: Store, as_json: bool,
    quiet: bool,
) -> None:  # fmt: skip
    """Get published artifacts into the store. Every hash is checked before any of it is visible there.

    A REFERENCE is what `quantize publish` printed, such as oci://HOST/REPOSITORY@sha256:…, hf://ORG/NAME@COMMIT or
    /share/NAME/VARIANT@sha256:…; without a digest it is said which one it means now, and where it means none, which
    references do. A pull that broke off goes on where it was.
    """
    if not locked and not references:
        raise UsageError("nothing to pull", hint="name a reference, or say --locked")
    with console_reporter(quiet=quiet or as_json) as reporter:
        session = Session(reporter, jobs)
        if locked:
            pins = chosen(read_pins(lock), references, lock)
            results = [pull_pinned(item, store, session, replace=replace) for item in pins]
        else:
            results = [pull(item, store, session, replace=replace) for item in references]
    if as_json:
        print_json(
            [
                {
                    "artifact": done.artifact.ref,
                    "artifact_digest": done.artifact.manifest.digest,
                    "folder": str(done.artifact.folder),
                    "reference": done.reference,
                    "digest": done.digest,
                    "fetched_bytes": done.fetched_bytes,
                }
                for done in results
            ]
        )
        return
    for done in results:
        got = f"{size_text(done.fetched_bytes)} fetched" if done.fetched_bytes else "was there"
        click.echo(f"{done.artifact.ref}  {done.reference}  ({got})")
