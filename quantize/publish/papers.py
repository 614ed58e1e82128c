"""What goes out beside an artifact's files: its papers, written anew, what its card must say, and a signature.

In: an artifact, a notice, and who signs. Out: files in the artifact's own folder, the same as long as nothing changes.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from quantize.artifact import Artifact, store_errors, variant_lock, write_text
from quantize.manifest import CARD_NAME, SIGNATURE_NAME
from quantize.provenance.documents import write_documents
from quantize.provenance.signature import sign
from quantize.provenance.statement import RunDetails
from quantize.publish.policy import MARK


@dataclass(frozen=True)
class Signing:
    """key: a private key; None leaves what is signed as it is. run: who ran the build, for the provenance."""

    key: Path | None = None
    password: str | None = None
    run: RunDetails | None = None


def write_papers(store: Path, artifact: Artifact, notice: str, signing: Signing) -> None:
    """Bring the papers up to date, and sign them. Raises StoreError, SignatureError, UsageError.

    Without a key, papers that somebody has signed stay as they are: their card says by itself how its gates decided.
    """
    manifest = artifact.manifest
    inside = artifact.folder.absolute().is_relative_to(store.absolute())
    held = variant_lock(store, manifest.name, manifest.variant) if inside else contextlib.nullcontext()
    with held, store_errors(store):
        if signing.key is None and (artifact.folder / SIGNATURE_NAME).is_file():
            return
        write_documents(artifact, run=signing.run)
        _write_notice(artifact.folder / CARD_NAME, notice)
        if signing.key is not None:
            sign(artifact.folder, signing.key, signing.password)


def _write_notice(card: Path, notice: str) -> None:
    """Have the card say this under its title."""
    before = card.read_text(encoding="utf-8")
    lines = [line for line in before.splitlines() if not line.startswith(MARK)]
    if notice:
        title = next(index for index, line in enumerate(lines) if line.startswith("# "))
        lines[title + 1 : title + 1] = ["", notice]
        write_text(card, "\n".join(lines) + "\n")
