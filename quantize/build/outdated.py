"""Whether an artifact is what its inputs would be made into today: what was mended since is built again.

In: an artifact that has the right build key, and its source. Out: "" or why not, by what its manifest says. A build key
names what goes in, and it is in the manifest, which the digest covers: so what was right before keeps key and digest,
and only what was not is found here.
"""

from __future__ import annotations

import math
from typing import Any

from quantize.formats import known_format
from quantize.model.checkpoint import main_dtype, read_model
from quantize.model.config import reads_more_than_text
from quantize.model.source import PinnedSource
from quantize.model.towers import APART, NOT_CARRIED
from quantize.store.artifact import Artifact
from quantize.store.manifest import Manifest

IN_HALF = "the source is in BF16, and what is not quantized was stored in FP16, which may not hold it"
TEXT_ONLY = "the source reads more than text, and its other parts are neither carried over nor named as left out"


def outdated(artifact: Artifact, source: PinnedSource) -> str:
    """Why it is to be built again; "" if it is not. Reads headers where the manifest does not settle it."""
    manifest = artifact.manifest
    may_be = (_may_be_in_half(manifest), _may_lack_towers(manifest))
    if source.is_gguf or not any(may_be):
        return ""
    config, dtype = _headers(source)
    if may_be[0] and dtype == "BF16":
        return IN_HALF
    return TEXT_ONLY if may_be[1] and reads_more_than_text(config) else ""


def _headers(source: PinnedSource) -> tuple[dict[str, Any], str]:
    """config.json of a folder, and the type that most weights have, once mended where they are."""
    if source.mending is None:
        config, tensors = read_model(source.location)
        return config, main_dtype((info.dtype, info.elements) for info in tensors.values())
    from quantize.model.mended import open_tensors

    table = open_tensors(source.mending).table
    return read_model(source.mending.folder)[0], main_dtype((kind, math.prod(shape)) for kind, shape in table.values())


def _may_be_in_half(manifest: Manifest) -> bool:
    """Where 16 bits are those that it is computed in, and they are FP16 without a word on it."""
    builder = known_format(manifest.format).builder
    if builder is None or not builder.computes_in_half or manifest.stored is not None:
        return False
    return any(item.type == "F16" and not item.reason.startswith(APART) for item in manifest.kept_in_high_precision)


def _may_lack_towers(manifest: Manifest) -> bool:
    kept = any(item.reason.startswith(APART) for item in manifest.kept_in_high_precision)
    return not kept and not any(item.reason.startswith(NOT_CARRIED) for item in manifest.left_out)
