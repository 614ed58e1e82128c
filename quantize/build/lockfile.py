"""A recipe's lock: what a build of it is made of, pinned by hash, in a file beside the recipe.

In: a recipe. Out: a Lock, its YAML text, and what differs between a lock and what a build would take now. The same
inputs give the same bytes: no time and no path of this machine is in it.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from quantize.build.plan import Plan, make_plan
from quantize.calibration.writing import TokenSummary, summarize_tokens
from quantize.errors import LockError, StoreError, UsageError
from quantize.events import Reporter, warn
from quantize.model.source import COMMIT, checkpoint_key, open_source
from quantize.recipe.calibration import Calibration, CalibrationMix, CalibrationSpec
from quantize.recipe.model import Recipe
from quantize.recipe.yaml import read_document, validate
from quantize.runtimes.devices import CPU
from quantize.store.manifest import FileEntry, tool_versions
from quantize.store.workspace import Workspace
from quantize.system.digest import canonical_hash, document_digest
from quantize.system.lookup import is_builtin
from quantize.system.process import run_step
from quantize.system.processor import name_device

SCHEMA_VERSION = 1
SUFFIX = ".lock"
TOKENIZER_TOOLS = ("transformers", "tokenizers", "torch")
HEADER = "# Written by `quantize lock`; `quantize build --locked` refuses anything else. Not to be edited.\n"
MAX_TEXT = 60  # of a value in a message


class _LockModel(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LockedSource(_LockModel):
    """The source by its content. asked: the revision that the recipe names; revision: the commit that it is."""

    uri: str
    revision: str | None
    asked: str | None
    name: str
    base_model: str | None
    license: str | None
    files: tuple[FileEntry, ...]


class LockedCalibration(_LockModel):
    """The text: what identifies it before it is read, and `hash`, the sha256 over the token ids, in order.

    asked: the revision that the recipe names; of a mix, of each part. device: the kind of processor that the lock was
    written on, on which the bits of what is calibrated depend. It is told, not held to; None in older locks.
    """

    identity: dict[str, Any]
    asked: str | tuple[str | None, ...] | None
    hash: str
    sequences: int
    tokens: int
    device: str | None = None


class LockedVariant(_LockModel):
    """One variant of the recipe, all options filled in."""

    options: dict[str, Any]
    tools: dict[str, str]
    build_key: str


class Lock(_LockModel):
    """All that a build of a recipe is made of. `digest` is the sha256 of the canonical JSON of the other fields."""

    schema_version: int
    recipe: str
    source: LockedSource
    calibration: LockedCalibration | None
    variants: dict[str, LockedVariant]
    digest: str = ""

    def computed_digest(self) -> str:
        """sha256 of the RFC 8785 form of every field but `digest`. Raises ValueError: not JSON data."""
        known = self.calibration is None or self.calibration.device is not None
        return document_digest(self.model_dump(mode="json", exclude=None if known else {"calibration": {"device"}}))

    def to_yaml(self) -> str:
        """The text of the file: keys sorted."""
        import yaml

        data = self.model_dump(mode="json")
        return HEADER + yaml.safe_dump(data, sort_keys=True, allow_unicode=True, width=120)


@dataclass(frozen=True)
class LockDifference:
    """One thing that is not as the lock says; None where one side does not have it."""

    what: str
    locked: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.what}: {_text(self.locked)} in the lock, {_text(self.now)} now"


def lock_path(recipe: Path) -> Path:
    """Where the lock of a recipe is: beside it, RECIPE.yaml.lock; of one that the package brings, NAME.lock here."""
    if is_builtin(recipe):
        return Path(f"{recipe.stem}{SUFFIX}")
    return recipe.with_name(recipe.name + SUFFIX)


def read_lock(path: Path) -> Lock:
    """Read and check a lock. Raises UsageError: not there, not readable, no lock, newer than this program, edited."""
    if not path.exists():
        name = str(path).removesuffix(SUFFIX)
        raise UsageError(f"{path}: no such file", hint=f"write it first: quantize lock {name}")
    document = read_document(path)
    version = document.data.get("schema_version") if isinstance(document.data, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise UsageError(f"{path}: schema version {version} is newer than this program", hint="upgrade quantize")
    lock = validate(Lock, document)
    try:
        is_whole = lock.digest == lock.computed_digest()
    except ValueError:
        is_whole = False
    if not is_whole:
        hint = "take it from version control again, or write it anew: quantize lock"
        raise UsageError(f"{path}: was edited: its content does not have the digest that it states", hint=hint)
    return lock


def write_lock(path: Path, lock: Lock) -> None:
    """Write a lock, whole or not at all. Raises StoreError."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        scratch.write_text(lock.to_yaml(), encoding="utf-8")
        scratch.replace(path)
    except OSError as exc:
        scratch.unlink(missing_ok=True)
        raise StoreError(f"{path}: can't be written: {exc.strerror}", hint="check the folder's permissions") from exc


def make_lock(recipe: Recipe, workspace: Workspace, device: str = CPU) -> Lock:
    """Pin a recipe as it is now, the text tokenized. Raises what planning raises.

    device: what it is to be built on, where text is written that the model writes itself.
    """
    plan, kind = _sound(make_plan(recipe, workspace)), None
    if plan.calibrated:
        kind = run_step("looking at the processor", workspace.reporter, name_device, device)
    return _lock_of(plan, recipe, _tokens(plan, workspace, device), kind)


def hold(
    lock: Lock, recipe: Recipe, workspace: Workspace, *, only: Collection[str] = (), force: bool = False,
    evaluate: bool = True, device: str | None = None,
) -> Plan:  # fmt: skip
    """The plan of a recipe at the commits of its lock, made as make_plan does; only the wanted variants count.

    device: what it is to be built on, which is only told if it is of another kind; None where that is not known here.
    Raises LockError with everything that is not as the lock says; what planning raises.
    """
    if lock.recipe != recipe.name:
        hint = f"write one for it: {_command(recipe)}"
        raise LockError(f"the lock is of another recipe: of {lock.recipe}, not {recipe.name}", hint=hint)
    at_commits = _at_commits(lock, recipe)
    plan = _sound(make_plan(at_commits, workspace, only=only, force=force, evaluate=evaluate))
    names = set(only) or {*lock.variants, *(item.name for item in recipe.variants)}
    expected = lock.model_copy(update={"variants": {key: lock.variants[key] for key in lock.variants if key in names}})
    if not plan.calibrated:  # no wanted variant looks at the text
        expected = expected.model_copy(update={"calibration": None})
    known = expected.calibration.device if expected.calibration is not None else None
    _refuse(differences(expected, _lock_of(plan, recipe, lock.calibration, known)), recipe)
    if known is not None and device is not None:
        _tell_device(known, device, workspace.reporter)
    tokens = _tokens(plan, workspace, device or CPU)
    _refuse(differences(expected, _lock_of(plan, recipe, tokens, known)), recipe)
    return plan


def _tell_device(locked: str, device: str, reporter: Reporter) -> None:
    here = run_step("looking at the processor", reporter, name_device, device)
    if here != locked:
        kinds = f"locked on another kind of processor: {locked} there, {here} here"
        warn(reporter, "", f"{kinds}; calibrated variants may get other bytes, text by the model itself may be another")


def differences(lock: Lock, other: Lock) -> list[LockDifference]:
    """Everything that differs, by name; build keys only where nothing else explains that they do."""
    both = lock.variants.keys() & other.variants.keys()
    one, two = dict(_flat(lock, both)), dict(_flat(other, both))
    found = [LockDifference(key, one.get(key), two.get(key)) for key in sorted({*one, *two})]
    found = [item for item in found if item.locked != item.now]
    explained = [item for item in found if not item.what.endswith(".build_key")]
    return explained or found


def _sound(plan: Plan) -> Plan:
    """A plan all of whose jobs have a build key. Raises their refusal."""
    for job in plan.jobs:
        if job.refusal is not None:
            raise job.refusal
    return plan


def _lock_of(plan: Plan, asked: Recipe, tokens: TokenSummary | LockedCalibration | None, device: str | None) -> Lock:
    """What a plan is made of. asked: its recipe as it is written. tokens: what is known of the text. device: the kind
    that it is read on.
    """
    source, spec = plan.source, asked.calibration
    calibration = None
    if plan.calibrated and tokens is not None and spec is not None:
        calibration = LockedCalibration(
            identity=plan.calibrated[0].inputs["calibration"], asked=_asked(spec), hash=tokens.hash,
            sequences=tokens.sequences, tokens=tokens.tokens, device=device,
        )  # fmt: skip
    files = (FileEntry(path=item.path, size_bytes=item.size_bytes, sha256=item.sha256) for item in source.files)
    lock = Lock(
        schema_version=SCHEMA_VERSION,
        recipe=plan.recipe.name,
        source=LockedSource(
            uri=source.uri, revision=source.revision, asked=asked.source.revision, name=source.name,
            base_model=source.base_model, license=source.license, files=tuple(files),
        ),
        calibration=calibration,
        variants={
            job.name: LockedVariant(options=job.variant.normalized(), tools=job.tools, build_key=job.build_key)
            for job in plan.jobs
        },
    )  # fmt: skip
    return lock.model_copy(update={"digest": lock.computed_digest()})


def _tokens(plan: Plan, workspace: Workspace, device: str) -> TokenSummary | None:
    """The text as the model's tokenizer reads it, remembered by all that it depends on; None where none looks at it.

    device: of the pass, where the model writes what it writes itself.
    """
    recipe, source, spec = plan.recipe, plan.source, plan.recipe.calibration
    if spec is None or not plan.calibrated:
        return None
    key = canonical_hash(
        {
            "source": checkpoint_key(source),
            "text": plan.calibrated[0].inputs["calibration"],
            "tools": tool_versions(TOKENIZER_TOOLS),
            **({} if device == CPU else {"device": device}),
        }
    )

    def read() -> dict[str, Any]:
        checkpoint = open_source(source, workspace.cache, workspace.reporter)
        return vars(summarize_tokens(spec, recipe.path.parent, checkpoint, device, workspace.reporter))

    return TokenSummary(**workspace.cache.fact(f"tokens:{key}", read))


def _at_commits(lock: Lock, recipe: Recipe) -> Recipe:
    """The recipe with the lock's commits where both name the same branch or tag of the hub: it may have moved on."""
    source, locked, text = recipe.source, lock.source, lock.calibration
    if locked.uri == f"hub:{source.model}@{locked.revision}" and source.revision == locked.asked:
        recipe = replace(recipe, source=source.model_copy(update={"revision": locked.revision}))
    spec = recipe.calibration
    if spec is None or text is None or text.asked != _asked(spec):
        return recipe
    known = text.identity.get("mix", [text.identity])
    if not isinstance(known, list) or len(known) != len(spec.parts):
        return recipe
    parts = [_at_commit(part, item) for part, item in zip(spec.parts, known, strict=True)]
    return replace(recipe, calibration=spec.with_parts(parts))


def _asked(spec: Calibration) -> str | tuple[str | None, ...] | None:
    """The revisions that a recipe names."""
    return tuple(part.revision for part in spec.parts) if isinstance(spec, CalibrationMix) else spec.revision


def _at_commit(part: CalibrationSpec, known: object) -> CalibrationSpec:
    """A dataset at the commit that it had, if it is the same one."""
    if not isinstance(known, Mapping):
        return part
    commit = known.get("revision")
    same = known.get("dataset") == part.dataset and isinstance(commit, str) and COMMIT.match(commit)
    return part.model_copy(update={"revision": commit}) if same else part


def _refuse(found: list[LockDifference], recipe: Recipe) -> None:
    if found:
        lines = "\n".join(f"  {item}" for item in found)
        count = "one thing is" if len(found) == 1 else f"{len(found)} things are"
        hint = f"get the locked ones back, or lock what is there now: {_command(recipe)}"
        raise LockError(f"{lock_path(recipe.path)}: {count} not as it says\n{lines}", hint=hint)


def _command(recipe: Recipe) -> str:
    """The command that locks a recipe."""
    return f"quantize lock {str(lock_path(recipe.path)).removesuffix(SUFFIX)}"


def _flat(lock: Lock, variants: AbstractSet[str]) -> Iterator[tuple[str, Any]]:
    """Each value with its dotted name; a variant that is not one of `variants` as one line."""
    data = lock.model_dump(mode="json", exclude={"digest"})
    files = data["source"].pop("files")
    for name in lock.variants.keys() - variants:
        data["variants"][name] = f"a {lock.variants[name].options.get('format')} variant"
    yield from _leaves("", data)
    yield from ((f"source.files.{item['path']}", f"sha256 {item['sha256']}") for item in files)


def _leaves(prefix: str, data: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, dict) and value:
            yield from _leaves(f"{prefix}{key}.", value)
        elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
            yield from _leaves(f"{prefix}{key}.", {str(index): item for index, item in enumerate(value)})
        elif value is not None:
            yield f"{prefix}{key}", value


def _text(value: object) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}…"
