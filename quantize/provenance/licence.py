"""Licence of a base model -> what a quantized copy of it must carry, say and be called.

In: an artifact. Out: a Licence, or LicenceError with what to write in the recipe. Tables: the Hub's licence names, the
phrases that tell common texts apart, and what some licences ask of whoever passes a model on. No legal advice.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from quantize.errors import LicenceError
from quantize.store.artifact import Artifact
from quantize.store.manifest import Manifest

UNKNOWN = {"", "other", "unknown", "none"}
TEXT_FILES = "LICENSE*"
MAX_TEXT_BYTES = 1 << 20

# Hub name -> SPDX id; None where SPDX has none, or the Hub's name stands for a family.
# https://huggingface.co/docs/hub/repositories-licenses and https://spdx.org/licenses
KNOWN: Mapping[str, str | None] = {
    "apache-2.0": "Apache-2.0", "mit": "MIT", "openrail": None, "bigscience-openrail-m": None,
    "creativeml-openrail-m": None, "bigscience-bloom-rail-1.0": None, "bigcode-openrail-m": None, "afl-3.0": "AFL-3.0",
    "artistic-2.0": "Artistic-2.0", "bsl-1.0": "BSL-1.0", "bsd": None, "bsd-2-clause": "BSD-2-Clause",
    "bsd-3-clause": "BSD-3-Clause", "bsd-3-clause-clear": "BSD-3-Clause-Clear", "c-uda": "C-UDA-1.0", "cc": None,
    "cc0-1.0": "CC0-1.0", "cc-by-2.0": "CC-BY-2.0", "cc-by-2.5": "CC-BY-2.5", "cc-by-3.0": "CC-BY-3.0",
    "cc-by-4.0": "CC-BY-4.0", "cc-by-sa-3.0": "CC-BY-SA-3.0", "cc-by-sa-4.0": "CC-BY-SA-4.0",
    "cc-by-nc-2.0": "CC-BY-NC-2.0", "cc-by-nc-3.0": "CC-BY-NC-3.0", "cc-by-nc-4.0": "CC-BY-NC-4.0",
    "cc-by-nd-4.0": "CC-BY-ND-4.0", "cc-by-nc-nd-3.0": "CC-BY-NC-ND-3.0", "cc-by-nc-nd-4.0": "CC-BY-NC-ND-4.0",
    "cc-by-nc-sa-2.0": "CC-BY-NC-SA-2.0", "cc-by-nc-sa-3.0": "CC-BY-NC-SA-3.0", "cc-by-nc-sa-4.0": "CC-BY-NC-SA-4.0",
    "cdla-sharing-1.0": "CDLA-Sharing-1.0", "cdla-permissive-1.0": "CDLA-Permissive-1.0",
    "cdla-permissive-2.0": "CDLA-Permissive-2.0", "wtfpl": "WTFPL", "ecl-2.0": "ECL-2.0", "epl-1.0": "EPL-1.0",
    "epl-2.0": "EPL-2.0", "etalab-2.0": "etalab-2.0", "eupl-1.1": "EUPL-1.1", "eupl-1.2": "EUPL-1.2", "agpl-3.0": None,
    "gfdl": None, "gpl": None, "gpl-2.0": None, "gpl-3.0": None, "lgpl": None, "lgpl-2.1": None, "lgpl-3.0": None,
    "isc": "ISC", "lppl-1.3c": "LPPL-1.3c", "ms-pl": "MS-PL", "mpl-2.0": "MPL-2.0", "odc-by": "ODC-By-1.0",
    "odbl": "ODbL-1.0", "openrail++": None, "osl-3.0": "OSL-3.0", "postgresql": "PostgreSQL", "ofl-1.1": "OFL-1.1",
    "ncsa": "NCSA", "unlicense": "Unlicense", "zlib": "Zlib", "pddl": "PDDL-1.0", "lgpl-lr": None,
    "deepfloyd-if-license": None, "llama2": None, "llama3": None, "llama3.1": None, "llama3.2": None, "llama3.3": None,
    "llama4": None, "gemma": None,
}  # fmt: skip

# A text is a licence's if it has all of its phrases: lower case, one space between words, straight quotes.
_BSD = "redistribution and use in source and binary forms, with or without modification, are permitted"
PHRASES: Mapping[str, tuple[str, ...]] = {
    "apache-2.0": ("apache license version 2.0, january 2004",),
    "mit": (
        "permission is hereby granted, free of charge, to any person obtaining a copy of this software",
        "permission notice shall be included in all copies or substantial portions of the software",
    ),
    "bsd-2-clause": (_BSD, "redistributions in binary form must reproduce"),
    "bsd-3-clause": (_BSD, "may be used to endorse or promote products derived from"),
    "isc": ("permission to use, copy, modify, and/or distribute this software for any purpose with or without fee",),
    "unlicense": ("this is free and unencumbered software released into the public domain",),
    "mpl-2.0": ("mozilla public license version 2.0 ",),
    "agpl-3.0": ("gnu affero general public license version 3, 19 november 2007",),
    "gpl-3.0": ("gnu general public license version 3, 29 june 2007",),
    "gpl-2.0": ("gnu general public license version 2, june 1991",),
    "lgpl-3.0": ("gnu lesser general public license version 3, 29 june 2007",),
    "lgpl-2.1": ("gnu lesser general public license version 2.1, february 1999",),
    "cc0-1.0": ("cc0 1.0 universal",),
    "cc-by-4.0": ("attribution 4.0 international",),
    "cc-by-sa-4.0": ("attribution-sharealike 4.0 international",),
    "cc-by-nd-4.0": ("attribution-noderivatives 4.0 international",),
    "cc-by-nc-4.0": ("attribution-noncommercial 4.0 international",),
    "cc-by-nc-sa-4.0": ("attribution-noncommercial-sharealike 4.0 international",),
    "cc-by-nc-nd-4.0": ("attribution-noncommercial-noderivatives 4.0 international",),
    "llama2": ("llama 2 community license agreement",),
    "llama3": ("meta llama 3 community license agreement",),
    "llama3.1": ("llama 3.1 community license agreement",),
    "llama3.2": ("llama 3.2 community license agreement",),
    "llama3.3": ("llama 3.3 community license agreement",),
    "llama4": ("llama 4 community license agreement",),
    "gemma": ("gemma terms of use",),
    "tongyi-qianwen": ("tongyi qianwen license agreement",),
    "qwen": ("qwen license agreement",),
    "qwen-research": ("qwen research license agreement",),
}
NARROWER = {"bsd-2-clause": "bsd-3-clause"}  # the second's text has all phrases of the first's


@dataclass(frozen=True)
class Rule:
    """What a licence asks of whoever passes a model on, beside its own text. prefix: how the model's name begins.

    display: words that must be shown. notice: the line that its NOTICE must have. source: where it says so.
    """

    source: str
    prefix: str | None = None
    display: str | None = None
    notice: str | None = None


def _llama(version: str, url: str, *, model: str = "Llama") -> Rule:
    prefix = "Llama 3" if version == "3" else "Llama"
    holder = "Copyright © Meta Platforms, Inc. All Rights Reserved."
    notice = f"{model} {version} is licensed under the {model} {version} Community License, {holder}"
    return Rule(f"{url}, section 1.b", prefix, f"Built with {model}{' 3' if version == '3' else ''}", notice)


_QWEN_NOTICE = "is licensed under the {} LICENSE AGREEMENT, Copyright (c) Alibaba Cloud. All Rights Reserved."
RULES: Mapping[str, Rule] = {
    "llama2": Rule(
        "https://ai.meta.com/llama/license, section 1.b",
        notice="Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) Meta Platforms, Inc. "
        "All Rights Reserved.",
    ),
    "llama3": _llama("3", "https://www.llama.com/llama3/license", model="Meta Llama"),
    "llama3.1": _llama("3.1", "https://www.llama.com/llama3_1/license"),
    "llama3.2": _llama("3.2", "https://www.llama.com/llama3_2/license"),
    "llama3.3": _llama("3.3", "https://www.llama.com/llama3_3/license"),
    "llama4": _llama("4", "https://www.llama.com/llama4/license"),
    "gemma": Rule(
        "https://ai.google.dev/gemma/terms, section 3.1",
        notice="Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
    ),
    "qwen": Rule(
        "https://huggingface.co/Qwen/Qwen2.5-72B-Instruct/blob/main/LICENSE, sections 3 and 4",
        display="Built with Qwen",
        notice=f"Qwen {_QWEN_NOTICE.format('Qwen')}",
    ),
}


@dataclass(frozen=True)
class Licence:
    """name: as the base model, its recipe or its LICENSE has it. id: the Hub's name of it, if it is a known one."""

    name: str
    id: str | None

    @property
    def rule(self) -> Rule | None:
        """What it asks, beside its text."""
        return RULES.get(self.id or "")

    @property
    def spdx(self) -> str | None:
        """Its SPDX id; None where SPDX has none, or more than one."""
        return KNOWN.get(self.id or "")

    def hub_metadata(self, files: Iterable[str]) -> dict[str, str]:
        """The keys of a Hub card's front matter. files: names of the artifact's files."""
        if self.id in KNOWN:
            return {"license": str(self.id)}
        texts = sorted(name for name in files if fnmatch(name, TEXT_FILES))
        link = {"license_link": texts[0]} if texts else {}
        return {"license": "other", "license_name": self.name.lower().replace(" ", "-"), **link}


def check_licence(artifact: Artifact, *places: str) -> Licence:
    """The licence of what is to be published as `places`, references such as hf://ORG/NAME; or as its recipe names it.

    Raises LicenceError: it is not known, its text is another's, or a name does not begin as it asks.
    """
    manifest, ref = artifact.manifest, artifact.ref
    found = recognise(licence_text(artifact.folder, manifest))
    licence = licence_of(manifest, found)
    if licence is None:
        what = f"it could be {' or '.join(found)}" if found else "neither its card nor a LICENSE file says"
        raise LicenceError(
            f"{ref}: the licence of its source {manifest.source.uri} is not known: {what}",
            hint="write into the recipe `source: {license: …}`, an SPDX id or the Hub's name such as apache-2.0, and "
            "build again; a recipe's licence is your word for it",
        )
    if len(found) == 1 and licence.id and not _same(licence.id, found[0]):
        raise LicenceError(
            f"{ref}: its licence is said to be {licence.name}, and its LICENSE file is the text of {found[0]}",
            hint=f"write into the recipe which of them it is: `source: {{license: {found[0]}}}`, and build again",
        )
    _check_names(ref, licence, (manifest.source.name, *(places or (manifest.name,))))
    return licence


def licence_of(manifest: Manifest, recognised: tuple[str, ...] = ()) -> Licence | None:
    """The licence that a manifest states, else the one that its LICENSE file was recognised as; None if neither is."""
    stated = manifest.source.license or ""
    if stated.lower() not in UNKNOWN:
        return Licence(stated, _hub_id(stated) or (recognised[0] if len(recognised) == 1 else None))
    return Licence(recognised[0], recognised[0]) if len(recognised) == 1 else None


def artifact_licence(artifact: Artifact) -> Licence | None:
    """The licence of an artifact, by its manifest and the LICENSE files that it carries."""
    return licence_of(artifact.manifest, recognise(licence_text(artifact.folder, artifact.manifest)))


def licence_text(folder: Path, manifest: Manifest) -> str:
    """The LICENSE files that an artifact carries, one after the other; "" if there are none."""
    names = [entry.path for entry in manifest.files if fnmatch(entry.path, TEXT_FILES)]
    paths = [folder / name for name in names if (folder / name).is_file()]
    return "\n".join(path.read_bytes()[:MAX_TEXT_BYTES].decode("utf-8", "replace") for path in paths)


def recognise(text: str) -> tuple[str, ...]:
    """The licences whose phrases a text has, by the Hub's names."""
    plain = " ".join(re.sub(r"[“”]", '"', text).replace("’", "'").lower().split()) + " "
    found = [name for name, phrases in PHRASES.items() if all(phrase in plain for phrase in phrases)]
    return tuple(name for name in found if NARROWER.get(name) not in found)


def _hub_id(stated: str) -> str | None:
    lowered = stated.lower()
    by_spdx = {spdx.lower(): name for name, spdx in KNOWN.items() if spdx}
    return lowered if lowered in KNOWN or lowered in PHRASES else by_spdx.get(lowered)


def _same(stated: str, text: str) -> bool:
    """Whether a stated licence can have that text: itself, or a family such as `bsd` or `cc` that it belongs to."""
    return stated == text or text.startswith(f"{stated}-")


def _check_names(ref: str, licence: Licence, names: Iterable[str]) -> None:
    rule = licence.rule
    if rule is None or rule.prefix is None:
        return
    for name in names:
        if not any(_letters(part).startswith(_letters(rule.prefix)) for part in _parts(name)):
            raise LicenceError(
                f"{ref}: the name {name!r} does not begin with {rule.prefix!r}, as {licence.name} asks ({rule.source})",
                hint="name it so: `name:` and `source: {name: …}` in the recipe, or the target",
            )


def _parts(reference: str) -> list[str]:
    """Where a model's name can be in a reference: each folder of it, without the host or organisation."""
    _, scheme, rest = reference.partition("://")
    return rest.split("/")[1:] if scheme else reference.split("/")


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
