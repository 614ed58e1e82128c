"""Calibration text + tokenizer -> CalibrationSet: the token ids that calibrated formats see, and their hash.

In: a spec or a mix, the model's folder (tokenizer, chat template), where relative paths start. Out: token ids, counts,
a hash. What is done with them is left to stream; where the rows come from is for datasets/ to know.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from quantize.calibration.chats import ChatWriter
from quantize.calibration.datasets import Dataset, Row
from quantize.calibration.datasets.base import Chat
from quantize.calibration.datasets.records import messages_of
from quantize.calibration.mix import CalibrationText
from quantize.errors import CheckpointError, MissingExtraError, PlanError, RecipeError, first_line
from quantize.model.checkpoint import tensor_table
from quantize.recipe.calibration import Calibration, CalibrationMix, CalibrationSpec
from quantize.runtimes.devices import CPU
from quantize.store.manifest import CalibrationPart


@dataclass(frozen=True)
class CalibrationSet:
    """Token ids, one list a sequence, of at most the spec's sequence_length each. parts: of a mix, in its order.

    skipped_rows: those that held too little, or nothing. folded_rows: chats whose system message is before the first
    user's text, because the model's template takes none; those that were read, of which not all need be used.
    """

    token_ids: tuple[tuple[int, ...], ...]
    skipped_rows: int = 0
    parts: tuple[CalibrationPart, ...] = ()
    folded_rows: int = 0

    @property
    def tokens(self) -> int:
        """Number of tokens in all sequences."""
        return sum(len(ids) for ids in self.token_ids)

    def remarks(self) -> list[str]:
        """What was done to rows, in words."""
        if not self.folded_rows:
            return []
        return [f"the chat template takes no system message: {self.folded_rows} rows have it before the user's text"]

    @property
    def hash(self) -> str:
        """Hex sha256 over the sequences: each one's length and ids as little-endian int32."""
        digest = hashlib.sha256()
        for ids in self.token_ids:
            digest.update(len(ids).to_bytes(4, "little"))
            digest.update(b"".join(token.to_bytes(4, "little") for token in ids))
        return digest.hexdigest()


def load_calibration_set(spec: Calibration, base: Path, folder: Path, device: str = CPU) -> CalibrationSet:
    """Read, tokenize and cut the text. base: where relative paths start. folder: the model, for its tokenizer.

    device: that it runs on, where it writes some of the text; other kinds of device write other texts.

    Raises RecipeError: a dataset is missing or has no such column. PlanError: no row is long enough, or every part of a
    mix is left out.
    """
    text, tokenizer = CalibrationText(spec, base, device), load_tokenizer(folder)
    if not isinstance(spec, CalibrationMix):
        return load_dataset(text.datasets[0], folder, tokenizer)
    ids: list[tuple[int, ...]] = []
    parts, skipped, folded = [], 0, 0
    for dataset, name, left_out in zip(text.datasets, text.names, parts_left_out(text, folder), strict=True):
        found = CalibrationSet(()) if left_out else load_dataset(dataset, folder, tokenizer)
        part = CalibrationPart(
            dataset=name, sequences=len(found.token_ids), tokens=found.tokens, hash=found.hash, left_out=left_out
        )
        parts.append(part)
        ids += found.token_ids
        skipped += found.skipped_rows
        folded += found.folded_rows
    if not ids:
        hint = "raise up_to_parameters of a part, or add one without"
        raise PlanError(f"calibration: every part of the mix is left out: {parts[0].left_out}", hint=hint)
    return CalibrationSet(tuple(ids), skipped, tuple(parts), folded)


def parts_left_out(text: CalibrationText, folder: Path) -> tuple[str | None, ...]:
    """For each part, why the model in a folder goes without it. Raises CheckpointError."""
    if not any(text.spec.limits):
        return (None,) * len(text.spec.limits)
    return text.left_out(sum(info.elements for info in tensor_table(folder).values()))


def load_dataset(dataset: Dataset, folder: Path, tokenizer: Any) -> CalibrationSet:
    """The sequences of one dataset. Raises as load_calibration_set does."""
    spec = dataset.spec
    chats = ChatWriter(tokenizer)
    encoded = (_encode(tokenizer, chats, row, spec) for row in read_rows(dataset, folder))
    if dataset.made_to_spec:
        return _checked(CalibrationSet(tuple(map(tuple, encoded))), spec)
    found = _pack(encoded, spec) if spec.packing else _truncate(encoded, spec)
    return _checked(replace(found, folded_rows=chats.folded), spec)


def read_rows(dataset: Dataset, folder: Path) -> Iterator[Row]:
    """The rows of a dataset in the order in which they are used. Raises as Dataset.rows does."""
    spec = dataset.spec
    rows = (_placed(row, f"{spec.dataset} row {number}") for number, row in enumerate(dataset.rows(folder), 1))
    if dataset.made_to_spec or not spec.shuffle:
        return iter(rows)
    shuffled = list(islice(rows, 100_000))
    random.Random(spec.seed).shuffle(shuffled)
    return iter(shuffled)


def load_tokenizer(folder: Path) -> Any:
    """The model's own tokenizer, from files only; no code of the model is run. Raises CheckpointError."""
    try:
        from transformers import AutoTokenizer
    except ImportError as exc:
        raise MissingExtraError("calibration", "torch") from exc
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as exc:  # tokenizers raises bare Exceptions
        raise CheckpointError(f"{folder}: transformers can't load the tokenizer ({first_line(exc)})") from exc


def _placed(row: Row, where: str) -> Row:
    """A row whose messages, if it is a chat, know where they stand."""
    return Chat(messages_of(row, where), where=where) if isinstance(row, list) else row


def _encode(tokenizer: Any, chats: ChatWriter, row: Row, spec: CalibrationSpec) -> list[int]:
    if row is None:
        return []
    if isinstance(row, str):
        ids: list[int] = tokenizer(row, truncation=not spec.packing, max_length=spec.sequence_length)["input_ids"]
        return ids
    if isinstance(row, tuple):
        return list(row if spec.packing else row[: spec.sequence_length])
    if not isinstance(row, Chat):
        raise RecipeError(f"calibration: a row of {spec.dataset} is neither text nor chat messages")
    chat = chats.ids(row)
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
