"""quantize sign ARTIFACT…"""

from __future__ import annotations

import os
from pathlib import Path

import click

from quantize.build.evaluate_again import built_of
from quantize.cli.common import json_option, noted, print_json, store_option, verbose_option
from quantize.errors import UsageError
from quantize.provenance.documents import write_documents
from quantize.provenance.siblings import keep_comparison
from quantize.provenance.signature import PASSWORD_VARIABLE, sign, sign_with_sigstore
from quantize.provenance.statement import RunDetails, known_run
from quantize.store.artifact import artifact_lock
from quantize.store.staging import store_errors
from quantize.store.store import Store
from quantize.targets import ArtifactTarget, RecipeTarget, find_target


@click.command("sign")
@click.argument("artifacts", nargs=-1, required=True, metavar="ARTIFACT|RECIPE...")
@click.option("--key", type=click.Path(path_type=Path, dir_okay=False), help="Private key, a PEM file.")
@click.option("--sigstore", is_flag=True, help="Sign by Sigstore instead; needs the network and an identity.")
@click.option("--run-details", is_flag=True, help="Say in provenance.json who ran the build, and when, as CI knows it.")
@store_option
@json_option
@verbose_option
def command(
    artifacts: tuple[str, ...], key: Path | None, sigstore: bool, run_details: bool, store: Store, as_json: bool
) -> None:
    """Write each ARTIFACT's papers (model card with figures, provenance.json, sbom.cdx.json) and sign it: model.sig.

    A recipe stands for its current artifacts. `model_signing verify` accepts the signature, which covers every file but
    itself, measurements.json and evaluation.md. A password of the key is read from QUANTIZE_SIGN_PASSWORD.
    """
    if (key is None) == (not sigstore):
        raise UsageError("give --key FILE, or --sigstore", hint="a signature is by one of the two")
    run = known_run(os.environ) if run_details else None
    named = [noted(find_target(word, store, (ArtifactTarget, RecipeTarget))) for word in artifacts]
    found = [item for target in named for item in built_of(target, store)]
    results = []
    for artifact in found:
        with artifact_lock(store.root, artifact), store_errors(store.root):
            keep_comparison(artifact, store, anew=True)
            names = write_documents(artifact, run=run)
            if key is not None:
                signed = sign(artifact.folder, key, os.environ.get(PASSWORD_VARIABLE))
            else:
                signed = True
                sign_with_sigstore(artifact.folder, ambient=RunDetails.of(os.environ) is not None)
        results.append({"artifact": artifact.ref, "papers": list(names), "signed": signed})
        if not as_json:
            click.echo(f"{artifact.ref}: {'signed' if signed else 'signed already by this key'}")
    if as_json:
        print_json(results)
