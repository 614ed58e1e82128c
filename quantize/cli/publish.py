"""quantize publish ARTIFACT… --to TARGET"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from quantize.build.evaluate_again import built_of
from quantize.cli.common import (
    json_option,
    noted,
    print_json,
    quiet_option,
    store_option,
    verbose_option,
)
from quantize.cli.progress import console_reporter
from quantize.provenance.documents import Signing
from quantize.provenance.signature import PASSWORD_VARIABLE
from quantize.provenance.statement import known_run
from quantize.publish.pins import pin
from quantize.publish.places import forms
from quantize.publish.policy import own_policy, read_policy
from quantize.publish.send import Published, Wanted, publish
from quantize.publish.transfer import Session
from quantize.store.store import PINS_NAME, Store
from quantize.system.sizes import size_text
from quantize.targets import ArtifactTarget, RecipeTarget, find_target


@click.command("publish")
@click.argument("words", nargs=-1, required=True, metavar="ARTIFACT|RECIPE...")
@click.option("--to", "target", required=True, metavar="TARGET", help=f"{forms().capitalize()}.")
@click.option("--move-tag", is_flag=True, help="Have a tag that means something else mean this publication.")
@click.option("--sign-key", type=click.Path(path_type=Path, dir_okay=False), help="Sign with this private key, a PEM.")
@click.option("--run-details", is_flag=True, help="Say in provenance.json who ran the build, and when, as CI knows it.")
@click.option(
    "--lock", type=click.Path(path_type=Path, dir_okay=False), default=PINS_NAME, show_default=True,
    help="File that the published digests are pinned in.",
)  # fmt: skip
@click.option("--no-lock", is_flag=True, help="Pin nothing.")
@click.option("--jobs", type=click.IntRange(min=1), default=4, show_default=True, help="Files at a time.")
@store_option
@json_option
@quiet_option
@verbose_option
def command(
    words: tuple[str, ...], target: str, move_tag: bool, sign_key: Path | None, run_details: bool, lock: Path,
    no_lock: bool, jobs: int, store: Store, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Publish each ARTIFACT, or the current ones of a RECIPE, to TARGET, and pin them by digest.

    Without a tag or name in TARGET, each artifact gets its own place below it. What is there is not sent again, and the
    tag is put last. Logins are those of docker and hf. What its gates refused, or was never evaluated, needs a
    `publish` section in the recipe.
    """
    run = known_run(os.environ) if run_details else None
    signing = Signing(sign_key, os.environ.get(PASSWORD_VARIABLE), run)
    wanted = [item for word in words for item in _wanted(word, store)]
    results = []
    with console_reporter(quiet=quiet or as_json) as reporter:
        session = Session(reporter, jobs)
        for done in publish(wanted, target, store.root, session, move_tag=move_tag, signing=signing):
            if not no_lock:
                pin(lock, done.artifact, done.reference)
            results.append(done)
    if as_json:
        print_json([_as_json(done) for done in results])
        return
    for done in results:
        sent = f"{size_text(done.sent_bytes)} in {done.sent_files} files sent" if done.sent_files else "was there"
        click.echo(f"{done.artifact.ref}  {done.reference}  ({sent})")


def _wanted(word: str, store: Store) -> list[Wanted]:
    """An artifact by the policy in the recipe that it carries, or a recipe's by its own."""
    target = noted(find_target(word, store, (ArtifactTarget, RecipeTarget)))
    if isinstance(target, ArtifactTarget):
        return [Wanted(target.artifact, own_policy(target.artifact))]
    policy = read_policy(target.path)
    return [Wanted(found, policy) for found in built_of(target, store)]


def _as_json(done: Published) -> dict[str, Any]:
    return {
        "artifact": done.artifact.ref,
        "artifact_digest": done.artifact.manifest.digest,
        "name": done.name,
        "reference": done.reference,
        "digest": done.digest,
        "size_bytes": done.size_bytes,
        "sent_bytes": done.sent_bytes,
        "sent_files": done.sent_files,
        "moved_from": done.moved_from,
    }
