"""The papers that go with a published artifact, written anew from its manifest and figures, and signed.

In: an artifact. Out: the model card with what was measured, quality.svg where there are other variants to compare it
with, provenance.json, sbom.cdx.json, a NOTICE where the licence asks for one, model.sig. None of them is part of the
digest; the signature covers the others.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantize.charts.comparison import comparison_file
from quantize.errors import SignatureError
from quantize.evaluate.comparison import read_comparison
from quantize.provenance.card import render_card
from quantize.provenance.licence import Licence, artifact_licence, check_licence
from quantize.provenance.sbom import bill_of_materials
from quantize.provenance.siblings import keep_comparison
from quantize.provenance.signature import sign
from quantize.provenance.statement import RunDetails, statement
from quantize.store.artifact import Artifact
from quantize.store.manifest import (
    CARD_NAME,
    CHART_NAME,
    NOTICE_NAME,
    PROVENANCE_NAME,
    SBOM_NAME,
    SIGNATURE_NAME,
    Manifest,
)
from quantize.store.store import Store
from quantize.system.files import write_text


@dataclass(frozen=True)
class Signing:
    """How papers go out. key: None leaves a signature as it is. run: who built it, where the statement is to say so."""

    key: Path | None = None
    password: str | None = field(default=None, repr=False)
    run: RunDetails | None = None


def prepare(
    artifact: Artifact,
    *places: str,
    store: Store | None = None,
    anew: bool = False,
    remark: str = "",
    signing: Signing | None = None,
) -> None:
    """Make an artifact ready to go out to `places`: licence checked, papers written, signed if there is a key.

    store: with the other variants that its card compares it with; None leaves that as it is. anew: compares them as
    they are now, though it has a comparison; that of a signed artifact stays, unless there is a key. remark: what its
    card has to say first.

    Raises LicenceError. SignatureError: it was signed, and now has more to say. UsageError: the key can't be used.
    OSError.
    """
    signing = signing or Signing()
    check_licence(artifact, *places)
    if store is not None and (signing.key is not None or not (artifact.folder / SIGNATURE_NAME).is_file()):
        keep_comparison(artifact, store, anew=anew)
    texts = _texts(artifact, remark, signing.run)
    changed = _changes(artifact.folder, texts)
    if signing.key is None and changed and (artifact.folder / SIGNATURE_NAME).is_file():
        raise SignatureError(
            f"{artifact.ref}: it was signed, and {', '.join(changed)} would no longer be what was signed",
            hint="sign it again: `quantize publish --sign-key KEY`, or `quantize sign`",
        )
    _write(artifact.folder, changed)
    _clear(artifact, artifact.folder, texts)
    if signing.key is not None:
        sign(artifact.folder, signing.key, signing.password)


def write_documents(
    artifact: Artifact, folder: Path | None = None, *, remark: str = "", run: RunDetails | None = None
) -> tuple[str, ...]:
    """Write the papers into `folder` (the artifact's own if None) and return their names.

    The same artifact and figures give the same bytes, unless `run` says who built it, and when; a statement that says
    so already goes on to say it. A paper that is there with the same text is left alone. Raises OSError.
    """
    texts = _texts(artifact, remark, run)
    folder = folder or artifact.folder
    _write(folder, _changes(folder, texts))
    _clear(artifact, folder, texts)
    return tuple(texts)


def _texts(artifact: Artifact, remark: str, run: RunDetails | None) -> dict[str, str]:
    licence, measurements = artifact_licence(artifact), artifact.measurements()
    said = statement(artifact, run)
    if run is None:
        said = _with_known_run(artifact.folder / PROVENANCE_NAME, said)
    return {
        CARD_NAME: render_card(artifact.manifest, measurements, licence, remark),
        PROVENANCE_NAME: _json(said),
        SBOM_NAME: _json(bill_of_materials(artifact)),
        **_notice(artifact.manifest, licence),
        **_chart(artifact.manifest, measurements),
    }


def _with_known_run(path: Path, said: dict[str, Any]) -> dict[str, Any]:
    """A statement with the run details that an earlier one about the same build has."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        before = json.loads(path.read_bytes())
        details = before["predicate"].pop("runDetails")
        mine = {**said, "predicate": {key: value for key, value in said["predicate"].items() if key != "runDetails"}}
        if before == mine:
            return {**said, "predicate": {**mine["predicate"], "runDetails": details}}
    return said


def _changes(folder: Path, texts: dict[str, str]) -> dict[str, str]:
    paths = {name: folder / name for name in texts}
    return {
        name: text
        for name, text in texts.items()
        if not paths[name].is_file() or paths[name].read_bytes() != text.encode()
    }


def _write(folder: Path, texts: dict[str, str]) -> None:
    for name, text in texts.items():
        write_text(folder / name, text)


def _clear(artifact: Artifact, folder: Path, texts: Mapping[str, str]) -> None:
    """Remove a chart that the card no longer shows."""
    if CHART_NAME not in texts and all(entry.path != CHART_NAME for entry in artifact.manifest.files):
        (folder / CHART_NAME).unlink(missing_ok=True)


def _notice(manifest: Manifest, licence: Licence | None) -> dict[str, str]:
    """The NOTICE that a licence asks for, unless the base model brought one along."""
    rule = licence.rule if licence is not None else None
    carried = any(entry.path.startswith(NOTICE_NAME) for entry in manifest.files)
    if rule is None or rule.notice is None or carried:
        return {}
    changed = f"quantized to {manifest.variant} ({manifest.format}) from {manifest.source.uri}"
    return {NOTICE_NAME: f"{rule.notice}\n\nThese weights were changed: {changed}.\n"}


def _chart(manifest: Manifest, measurements: Mapping[str, Any]) -> dict[str, str]:
    """The chart that the card shows, where it shows one."""
    found = read_comparison(measurements)
    text = "" if found is None else comparison_file(found, manifest.source.name)
    return {CHART_NAME: text} if text else {}


def _json(data: dict[str, Any]) -> str:
    return json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
