"""The papers that go with a published artifact, written anew from its manifest and figures.

In: an artifact. Out: the model card with what was measured, provenance.json, sbom.cdx.json, and a NOTICE where the
licence asks for one. None of them is part of the digest; the signature covers them all.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from quantize.artifact import Artifact, write_text
from quantize.card import render_card
from quantize.manifest import CARD_NAME, NOTICE_NAME, PROVENANCE_NAME, SBOM_NAME, Manifest
from quantize.provenance.licence import Licence, artifact_licence
from quantize.provenance.sbom import bill_of_materials
from quantize.provenance.statement import RunDetails, statement


def write_documents(artifact: Artifact, folder: Path | None = None, run: RunDetails | None = None) -> tuple[str, ...]:
    """Write the papers into `folder` (the artifact's own if None) and return their names.

    The same artifact and figures give the same bytes, unless `run` says who built it, and when. A paper that is there
    with the same text is left alone. Raises OSError.
    """
    licence = artifact_licence(artifact)
    texts = {
        CARD_NAME: render_card(artifact.manifest, artifact.measurements(), licence),
        PROVENANCE_NAME: _json(statement(artifact, run)),
        SBOM_NAME: _json(bill_of_materials(artifact)),
        **_notice(artifact.manifest, licence),
    }
    for name, text in texts.items():
        path = (folder or artifact.folder) / name
        if not path.is_file() or path.read_bytes() != text.encode():
            write_text(path, text)
    return tuple(texts)


def _notice(manifest: Manifest, licence: Licence | None) -> dict[str, str]:
    """The NOTICE that a licence asks for, unless the base model brought one along."""
    rule = licence.rule if licence is not None else None
    carried = any(entry.path.startswith(NOTICE_NAME) for entry in manifest.files)
    if rule is None or rule.notice is None or carried:
        return {}
    changed = f"quantized to {manifest.variant} ({manifest.format}) from {manifest.source.uri}"
    return {NOTICE_NAME: f"{rule.notice}\n\nThese weights were changed: {changed}.\n"}


def _json(data: dict[str, Any]) -> str:
    return json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
