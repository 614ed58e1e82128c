"""artifacts.lock: which artifacts a deployment runs, by digest, and where each was published.

In: a file. Out: Pins, and the file again, in the same order whoever writes it. `quantize gc` keeps what is in it.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from quantize.errors import RecipeError, UsageError, first_line
from quantize.events import Reporter
from quantize.recipe.model import SlugText
from quantize.recipe.yaml import MAX_BYTES, parse_document
from quantize.store.artifact import Artifact
from quantize.store.manifest import Manifest
from quantize.store.store import Store
from quantize.store.verify import check_files
from quantize.system.cache import default_cache_root
from quantize.system.digest import PIN
from quantize.system.files import write_text
from quantize.system.flock import file_lock
from quantize.system.untrusted import read_limited

HEADER = "# What a deployment runs, by digest: `quantize publish` writes it, `quantize pull --locked` and\n"
HEADER += "# `quantize serve --locked` read it. Commit it.\n"
FORM = "it is a list `artifacts:` of items with `name`, `variant`, `digest` and `published`, a list of references"


class Pin(BaseModel):
    """One artifact. digest: of its manifest.json, at least twelve hex digits. published: pinned references."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: SlugText
    variant: SlugText
    digest: Annotated[str, StringConstraints(pattern=f"^{PIN}$")]
    published: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """name/variant."""
        return f"{self.name}/{self.variant}"

    def means(self, digest: str) -> bool:
        """Whether an artifact with this digest is the one."""
        return digest.startswith(self.digest)


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    artifacts: tuple[Pin, ...]


def read_pins(path: Path) -> list[Pin]:
    """The pins in a file. Raises UsageError: not there, or not of that form."""
    try:
        data = parse_document(read_limited(path, MAX_BYTES).decode(), str(path)).data
        pins = _File.model_validate(data).artifacts
    except OSError as exc:
        raise UsageError(f"{path}: {exc.strerror}", hint="`quantize publish` writes it") from exc
    except UnicodeDecodeError as exc:
        raise UsageError(f"{path}: not YAML (byte {exc.start} is not UTF-8)", hint=FORM) from exc
    except RecipeError as exc:
        what = first_line(exc).removeprefix(f"{path}:")
        raise UsageError(f"{path}: not YAML that can be read ({what})", hint=FORM) from exc
    except ValidationError as exc:
        first = exc.errors()[0]
        where = ".".join(str(step) for step in first["loc"]) or "the file"
        raise UsageError(f"{path}: `{where}`: {first['msg']}", hint=FORM) from exc
    for key, times in Counter(pin.key for pin in pins).items():
        if times > 1:
            raise UsageError(f"{path}: {key} is pinned twice", hint="keep one of the two")
    return list(pins)


def pin(path: Path, artifact: Artifact, reference: str) -> None:
    """Write an artifact, and one more place where it is, into a file of pins. Raises UsageError."""
    try:
        with _alone(path):
            _pin_alone(path, artifact.manifest, reference)
    except OSError as exc:
        raise UsageError(f"{path}: {first_line(exc)}", hint=f"published all the same: {reference}") from exc


def _pin_alone(path: Path, manifest: Manifest, reference: str) -> None:
    pins = {item.key: item for item in (read_pins(path) if path.exists() else [])}
    key = f"{manifest.name}/{manifest.variant}"
    before = pins[key].published if key in pins and pins[key].means(manifest.digest) else ()
    kept = tuple(item for item in before if _place(item) != _place(reference))
    pins[key] = Pin(name=manifest.name, variant=manifest.variant, digest=manifest.digest, published=(*kept, reference))
    entries = [{**pins[name].model_dump(), "published": list(pins[name].published)} for name in sorted(pins)]
    text = HEADER + yaml.safe_dump({"artifacts": entries}, sort_keys=False, allow_unicode=True, width=1000)
    write_text(path, text)


def chosen(pins: list[Pin], names: tuple[str, ...], path: Path) -> list[Pin]:
    """The pins of these names, all if none is given. Raises UsageError: one is not pinned."""
    known = {item.key: item for item in pins}
    for name in names:
        if name not in known:
            raise UsageError(f"{name} is not in {path}", hint=f"there are: {', '.join(sorted(known)) or 'none'}")
    return [known[name] for name in names] if names else pins


def locked_words(words: tuple[str, ...], path: Path, store: Store, reporter: Reporter) -> tuple[str, ...]:
    """`[NAME=]NAME/VARIANT` of the command line, all that is pinned if there is none, as what is pinned exactly.

    Raises UsageError: not pinned, or not in the store. VerifyError: its files are not those that are pinned.
    """
    pins, found = read_pins(path), []
    for word in words or tuple(item.key for item in pins):
        name, equals, key = word.rpartition("=")
        (item,) = chosen(pins, (key,), path)
        try:
            artifact = store.find(f"{key}@{item.digest}")
        except UsageError as exc:
            hint = "get it with `quantize pull --locked`"
            raise UsageError(f"{key} is pinned as {item.digest}, which is not in {store.root}", hint=hint) from exc
        check_files(artifact, reporter)
        found.append(f"{name}{equals}{key}@{item.digest}")
    return tuple(found)


def _place(reference: str) -> str:
    """A pinned reference without its digest and revision: where it is."""
    head, at, _ = reference.removesuffix("/").partition("@")
    return head if at else reference


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One writer at a time on this machine; the lock is no file beside what is committed."""
    name = hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:16]
    folder = default_cache_root() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with file_lock(folder / f"{name}.lock"):
        yield
