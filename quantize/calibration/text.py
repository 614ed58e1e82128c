"""Calibration spec + tokenizer -> CalibrationSet: the token ids that calibrated formats see, and their hash.

In: a spec, the model's folder (tokenizer, chat template), where relative paths start. Out: token ids, counts, a hash.
What is done with them is left to activations. `python-docs` keeps its held-out topics apart for measuring.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from quantize.errors import CheckpointError, MissingExtraError, PlanError, RecipeError, first_line
from quantize.events import Reporter, status
from quantize.model.source import hub_commit
from quantize.recipe.model import CalibrationSpec, Recipe
from quantize.system.cache import hash_file
from quantize.system.lookup import find_path, is_path_text
from quantize.system.process import run_step
from quantize.system.untrusted import open_regular, parse_json, read_limited

PYTHON_DOCS, SELF = "python-docs", "self"
TOPIC_CHARACTERS = 3000
TOPIC_MINIMUM = 1500
HELD_OUT = slice(32, 72)  # topics of python-docs that are only ever measured on
LOCAL_SUFFIXES = (".txt", ".jsonl", ".parquet")
MAX_LINE_BYTES = 16 << 20
MAX_TEXT_BYTES = 1 << 30

Row = str | list[dict[str, Any]]


@dataclass(frozen=True)
class CalibrationSet:
    """Token ids, one list a sequence, of at most the spec's sequence_length each."""

    token_ids: tuple[tuple[int, ...], ...]
    skipped_rows: int = 0

    @property
    def tokens(self) -> int:
        """Number of tokens in all sequences."""
        return sum(len(ids) for ids in self.token_ids)

    @property
    def hash(self) -> str:
        """Hex sha256 over the sequences: each one's length and ids as little-endian int32."""
        digest = hashlib.sha256()
        for ids in self.token_ids:
            digest.update(len(ids).to_bytes(4, "little"))
            digest.update(b"".join(token.to_bytes(4, "little") for token in ids))
        return digest.hexdigest()


@dataclass(frozen=True)
class TokenSummary:
    """What pins a calibration set: its hash over all token ids, and how much there is."""

    hash: str
    sequences: int
    tokens: int


def summarize_tokens(spec: CalibrationSpec, base: Path, folder: Path, reporter: Reporter) -> TokenSummary:
    """Read and tokenize in a worker, keeping no tokens. Raises as load_calibration_set does."""
    status(reporter, "", "reading the calibration text")
    return run_step("reading the calibration text", reporter, _summary, spec, base, folder)


def _summary(_reporter: Reporter, spec: CalibrationSpec, base: Path, folder: Path) -> TokenSummary:
    found = load_calibration_set(spec, base, folder)
    return TokenSummary(found.hash, len(found.token_ids), found.tokens)


def pinned(spec: CalibrationSpec, base: Path, reporter: Reporter) -> CalibrationSpec:
    """The spec with a hub dataset's revision resolved to a commit; any other spec as it is.

    Raises CheckpointError: the hub does not know it or can't be reached. MissingExtraError.
    """
    if spec.dataset in {PYTHON_DOCS, SELF} or is_path_text(spec.dataset) or find_path(spec.dataset, base) is not None:
        return spec
    commit = hub_commit("dataset", spec.dataset, spec.revision or "main", reporter)
    return spec.model_copy(update={"revision": commit})


def identify(spec: CalibrationSpec, recipe: Recipe) -> dict[str, Any]:
    """What pins the text before it is read: the spec, and the hash or commit behind its dataset name.

    Raises RecipeError: the dataset can't be what the spec says.
    """
    data: dict[str, Any] = spec.model_dump(mode="json")
    if spec.dataset == PYTHON_DOCS:
        data["content"] = hash_file(topics_file())
    elif spec.dataset == SELF:
        data["content"] = hashlib.sha256("\n".join(seed_prompts()).encode()).hexdigest()
    elif is_path_text(spec.dataset) or (recipe.find(spec.dataset) is not None):
        data["dataset"] = Path(spec.dataset).name
        data["content"] = hash_file(_local_file(spec, recipe.path.parent))
    return data


def pinned_spec(spec: CalibrationSpec) -> dict[str, Any]:
    """The spec as manifests have it: a local file by its name, without its folder."""
    data = spec.model_dump(mode="json")
    data["dataset"] = Path(spec.dataset).name if is_path_text(spec.dataset) else spec.dataset
    return data


def load_calibration_set(spec: CalibrationSpec, base: Path, folder: Path) -> CalibrationSet:
    """Read, tokenize and cut the text. base: where relative paths start. folder: the model, for its tokenizer.

    Raises RecipeError: the dataset is missing or has no such column. PlanError: no row is long enough.
    """
    tokenizer = load_tokenizer(folder)
    if spec.dataset == SELF:
        from quantize.runtimes.sampling import sample_from_model

        rows = sample_from_model(folder, seed_prompts(), spec.samples, spec.sequence_length, spec.seed)
        return _checked(CalibrationSet(tuple(tuple(ids) for ids in rows)), spec)
    texts = read_rows(spec, base)
    encoded = (_encode(tokenizer, row, spec) for row in texts)
    return _checked(_pack(encoded, spec) if spec.packing else _truncate(encoded, spec), spec)


def read_rows(spec: CalibrationSpec, base: Path) -> Iterator[Row]:
    """The rows of a dataset in the order in which they are used: texts, or lists of chat messages.

    Raises RecipeError, CheckpointError (the hub does not answer), MissingExtraError.
    """
    if spec.dataset == PYTHON_DOCS:
        rows: Iterable[Row] = python_docs()
    elif is_path_text(spec.dataset) or find_path(spec.dataset, base) is not None:
        rows = _local_rows(_local_file(spec, base), spec)
    else:
        rows = _hub_rows(spec)
    if not spec.shuffle:
        return iter(rows)
    shuffled = list(islice(rows, 100_000))
    random.Random(spec.seed).shuffle(shuffled)
    return iter(shuffled)


def python_docs(held_out: bool = False) -> list[str]:
    """CPython's help topics over 1,500 characters, cut to 3,000, in their own order: those held out, or the others.

    The 33rd to the 72nd are held out. How many that are is the interpreter's matter: CPython 3.11.7 has 41 such topics,
    so 9 are held out there.
    """
    from pydoc_data.topics import topics

    long = [text[:TOPIC_CHARACTERS] for text in topics.values() if len(text) > TOPIC_MINIMUM]
    return long[HELD_OUT] if held_out else long[: HELD_OUT.start] + long[HELD_OUT.stop :]


def seed_prompts() -> list[str]:
    """Openings after which a model writes its own calibration text."""
    path = Path(__file__).with_name("seed_prompts.txt")
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def load_tokenizer(folder: Path) -> Any:
    """The model's own tokenizer, from files only; no code of the model is run. Raises CheckpointError."""
    try:
        from transformers import AutoTokenizer
    except ImportError as exc:
        raise MissingExtraError("calibration", "torch") from exc
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, KeyError, TypeError) as exc:
        raise CheckpointError(f"{folder}: transformers can't load the tokenizer ({first_line(exc)})") from exc


def topics_file() -> Path:
    """Where CPython keeps its help topics. Raises PlanError: this Python has none."""
    import importlib.util

    spec = importlib.util.find_spec("pydoc_data.topics")
    if spec is None or spec.origin is None:
        raise PlanError("this Python has no pydoc_data.topics", hint="name another calibration dataset")
    return Path(spec.origin)


def _local_file(spec: CalibrationSpec, base: Path) -> Path:
    found = find_path(spec.dataset, base)
    if found is None or not found.is_file():
        raise RecipeError(f"calibration: no such file: {spec.dataset}", hint="check the path, or name a hub dataset")
    if found.suffix not in LOCAL_SUFFIXES:
        raise RecipeError(f"calibration: {found.name} is none of {', '.join(LOCAL_SUFFIXES)}")
    return found


def _local_rows(path: Path, spec: CalibrationSpec) -> Iterator[Row]:
    try:
        if path.suffix == ".txt":
            text = read_limited(path, MAX_TEXT_BYTES).decode("utf-8")
            yield from (part for part in text.split("\n\n") if part.strip())
        elif path.suffix == ".jsonl":
            yield from _jsonl_rows(path, spec)
        else:
            yield from _parquet_rows(path, spec)
    except UnicodeDecodeError as exc:
        raise RecipeError(f"{path}: not UTF-8 text (byte {exc.start})", hint="save the file as UTF-8") from exc
    except (OSError, ValueError) as exc:
        raise RecipeError(f"calibration: {path} can't be read ({first_line(exc)})", hint="check the file") from exc


def _parquet_rows(path: Path, spec: CalibrationSpec) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as exc:
        raise MissingExtraError("reading Parquet", "hub") from exc
    try:
        table = parquet.ParquetFile(path)
        if spec.column not in table.schema_arrow.names:
            raise _no_column(path.name, spec, table.schema_arrow.names)
        for batch in table.iter_batches(columns=[spec.column]):
            yield from batch.column(0).to_pylist()
    except pyarrow.ArrowException as exc:
        raise RecipeError(f"calibration: {path} can't be read ({first_line(exc)})", hint="check the file") from exc


def _jsonl_rows(path: Path, spec: CalibrationSpec) -> Iterator[Row]:
    with open_regular(path) as file:
        lines = iter(lambda: file.readline(MAX_LINE_BYTES + 1), b"")
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                if len(line) > MAX_LINE_BYTES:
                    raise ValueError(f"more than {MAX_LINE_BYTES:,} bytes")
                row = parse_json(line)
            except ValueError as exc:
                hint = "one object a line"
                raise RecipeError(f"{path}:{number}:1: not JSON ({first_line(exc, 80)})", hint=hint) from exc
            if not isinstance(row, dict) or spec.column not in row:
                raise _no_column(f"{path}:{number}:1", spec, list(row) if isinstance(row, dict) else [])
            yield row[spec.column]


def _hub_rows(spec: CalibrationSpec) -> Iterator[Row]:
    try:
        from datasets import load_dataset
    except ImportError as exc:
        raise MissingExtraError(f"the hub dataset {spec.dataset}", "hub") from exc
    try:
        rows = load_dataset(spec.dataset, spec.subset, split=spec.split, revision=spec.revision, streaming=True)
        for row in rows:
            if spec.column not in row:
                raise _no_column(spec.dataset, spec, list(row))
            yield row[spec.column]
    except (OSError, ValueError, RuntimeError) as exc:
        hint = "check the name, subset, split and network; `dataset: python-docs` or `self` need none"
        raise CheckpointError(
            f"calibration dataset {spec.dataset}: can't be read ({first_line(exc)})", hint=hint
        ) from exc


def _no_column(where: str, spec: CalibrationSpec, columns: list[str]) -> RecipeError:
    hint = f"it has: {', '.join(map(str, columns[:10]))}" if columns else "each row must be an object"
    return RecipeError(f"{where}: no column `{spec.column}`", hint=hint)


def _encode(tokenizer: Any, row: Row, spec: CalibrationSpec) -> list[int]:
    if isinstance(row, str):
        ids: list[int] = tokenizer(row, truncation=not spec.packing, max_length=spec.sequence_length)["input_ids"]
        return ids
    if not isinstance(row, list) or not all(isinstance(item, dict) and "role" in item for item in row):
        raise RecipeError(f"calibration: column `{spec.column}` holds neither text nor chat messages")
    if tokenizer.chat_template is None:
        raise PlanError("calibration has chat rows, and the model has no chat template", hint="use a text column")
    chat: list[int] = tokenizer.apply_chat_template(row, tokenize=True, return_dict=False)
    return chat if spec.packing else chat[: spec.sequence_length]


def _truncate(rows: Iterable[list[int]], spec: CalibrationSpec) -> CalibrationSet:
    kept: list[tuple[int, ...]] = []
    skipped = 0
    for ids in rows:
        if len(ids) < spec.minimum_tokens:
            skipped += 1
            continue
        kept.append(tuple(ids))
        if len(kept) == spec.samples:
            break
    return CalibrationSet(tuple(kept), skipped)


def _pack(rows: Iterable[list[int]], spec: CalibrationSpec) -> CalibrationSet:
    kept: list[tuple[int, ...]] = []
    buffer: list[int] = []
    skipped = 0
    for ids in rows:
        if len(ids) < spec.minimum_tokens:
            skipped += 1
            continue
        buffer += ids
        while len(buffer) >= spec.sequence_length and len(kept) < spec.samples:
            kept.append(tuple(buffer[: spec.sequence_length]))
            del buffer[: spec.sequence_length]
        if len(kept) == spec.samples:
            return CalibrationSet(tuple(kept), skipped)
    if len(buffer) >= spec.minimum_tokens:
        kept.append(tuple(buffer))
    return CalibrationSet(tuple(kept), skipped)


def _checked(found: CalibrationSet, spec: CalibrationSpec) -> CalibrationSet:
    if not found.token_ids:
        raise PlanError(
            f"calibration dataset {spec.dataset}: no row has {spec.minimum_tokens} tokens "
            f"({found.skipped_rows} were shorter)",
            hint="lower minimum_tokens, set packing: true, or name another dataset",
        )
    return found
