"""The files beside the weights of a model: which there are, JSON ones read, the chat template, links that lead out.

In: a folder. Out: paths in it, plain data. What the files mean together is left to checkpoint.py.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from quantize.errors import CheckpointError, first_line
from quantize.files.safetensors import INDEX_NAME
from quantize.system.untrusted import parse_json, read_limited

MAX_JSON_BYTES = 256 << 20
MAX_TEMPLATE_BYTES = 4 << 20
CARRIED_FILES = ("LICENSE*", "NOTICE*", "USE_POLICY*")  # go with every artifact
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "vocab.txt",
)  # fmt: skip
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
TEMPLATES = "additional_chat_templates"  # a folder, with a file for each template but the default one
MAX_TEMPLATES = 100
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
CONFIG_FILES = ("config.json", "generation_config.json")


def tokenizer_files(folder: Path) -> list[str]:
    """The names of the tokenizer's files that there are, chat templates among them, by the folder."""
    names = [name for name in TOKENIZER_FILES if os.path.isfile(folder / name)]
    return names + [f"{TEMPLATES}/{path.name}" for path in _named_templates(folder)]


def processor_files(folder: Path) -> list[str]:
    """The names of the files that there are of how images, video and sound are prepared."""
    return [name for name in PROCESSOR_FILES if os.path.isfile(folder / name)]


def known_files(folder: Path) -> list[Path]:
    """The files beside the weights that belong to a model: config, tokenizer, processor, index, card, licence."""
    names = {*CONFIG_FILES, *PROCESSOR_FILES, INDEX_NAME, "README.md"}
    found = [folder / name for name in sorted({*names, *tokenizer_files(folder)})]
    found += [path for pattern in CARRIED_FILES for path in sorted(folder.glob(pattern))]
    return [path for path in found if os.path.isfile(path)]


def read_chat_template(folder: Path) -> str | None:
    """The chat template of a folder, as transformers finds it; None if there is none.

    chat_template.jinja comes before tokenizer_config.json, and chat_template.json, an older place, last. Of several
    named ones, files, a list or an object, the one called "default" counts. Raises CheckpointError: it can't be read.
    """
    for file in (folder / "chat_template.jinja", folder / TEMPLATES / "default.jinja"):
        if not os.path.isfile(file):
            continue
        try:
            return read_limited(file, MAX_TEMPLATE_BYTES).decode("utf-8")
        except (OSError, ValueError) as exc:
            raise CheckpointError(f"{file.name}: can't be read ({first_line(exc)})", hint="download it again") from exc
    for name in ("tokenizer_config.json", "chat_template.json"):
        template = _default_template(read_json(folder / name).get("chat_template"))
        if template is not None:
            return template
    return None


def _default_template(template: object) -> str | None:
    if isinstance(template, list):
        template = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) else None


def read_json(path: Path) -> dict[str, Any]:
    """A model's JSON file, an object; {} where there is no such file. Raises CheckpointError."""
    if not os.path.isfile(path):
        return {}
    try:
        data = parse_json(read_limited(path, MAX_JSON_BYTES))
    except OSError as exc:
        raise CheckpointError(f"{path.name}: can't be read: {exc.strerror}", hint="check its permissions") from exc
    except ValueError as exc:
        raise CheckpointError(f"{path.name}: not JSON ({first_line(exc, 100)})", hint="download it again") from exc
    if not isinstance(data, dict):
        raise CheckpointError(f"{path.name}: not a JSON object", hint="download it again")
    return data


def check_inside(folder: Path, name: str, said_by: str) -> None:
    """Refuse names that leave the folder. A symlink is fine when it stays inside, or in a hub cache's blobs."""
    try:
        target, root = (folder / name).resolve(), folder.resolve()
    except (OSError, RuntimeError, ValueError) as exc:  # a circle of links
        raise CheckpointError(
            f"{said_by}: {name!r} can't be followed", hint="this checkpoint can't be trusted"
        ) from exc
    within = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    plain = not Path(name).is_absolute() and ".." not in Path(name).parts
    if not plain or not any(target.is_relative_to(place) for place in within):
        hint = "this checkpoint can't be trusted"
        if plain and (folder / name).is_symlink():
            hint += f"; if you trust it, copy what its links lead to: cp -rL {folder.name} another-folder"
        raise CheckpointError(f"{said_by}: {name!r} leaves the folder", hint=hint)


def _named_templates(folder: Path) -> list[Path]:
    place = folder / TEMPLATES
    return sorted(path for path in place.glob("*.jinja") if os.path.isfile(path))[:MAX_TEMPLATES]
