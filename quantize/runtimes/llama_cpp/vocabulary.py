"""What llama.cpp's converter leaves to us about a vocabulary: pre-tokenizers it does not know, templates, ends.

In: a model of the converter. Out: the same model, which then writes what the source says, or PlanError with the nearest
pre-tokenizers. Near is what llama.cpp says: it tokenizes text by each of its names, and the lines that come out as in
the source are counted.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from quantize.errors import PlanError, QuantizeError, first_line
from quantize.model.folder_files import read_chat_template, read_json
from quantize.runtimes.llama_cpp.log import keep_log
from quantize.runtimes.token_lines import token_lines

PRE, TEMPLATE = "tokenizer.ggml.pre", "tokenizer.chat_template"
SCORES, KINDS = "tokenizer.ggml.scores", "tokenizer.ggml.token_type"
NORMAL, USER_DEFINED = 1, 4  # of llama.cpp's token types, as SentencePiece numbers them
ADDED_SCORE = -1000.0  # what the converter gives an added token
EOS, EOT = "tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"
PLACEHOLDER = "quantize-pre-tokenizer"  # in the file that candidates are tried with
TRIED_LINES = 3  # of so many lines one
SHOWN = 3

# The names of llama.cpp's BPE pre-tokenizers, the most usual first; those of one row are one set of rules. A test loads
# each of them.
PRE_TOKENIZERS: tuple[tuple[str, ...], ...] = (
    ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"),
    ("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez"),
    ("gpt-2", "phi-2", "jina-es", "jina-de", "gigachat", "jina-v2-es", "jina-v2-de", "a.x-4.0", "mellum", "modern-bert",
     "jina-v1-en", "jina-v2-code", "roberta-bpe", "exaone4"),
    ("gpt-4o", "llama4", "kanana2"),
    ("chatglm-bpe",), ("glm4",), ("tekken",), ("bailingmoe", "bailingmoe2", "llada-moe"), ("deepseek-llm",),
    ("deepseek-coder",), ("deepseek-v3",), ("youtu",), ("falcon",), ("mpt",), ("starcoder",), ("refact",),
    ("command-r",), ("qwen35",), ("stablelm2",), ("olmo",), ("dbrx",), ("smaug-bpe",), ("poro-chat",), ("viking",),
    ("jais",), ("jais-2",), ("smollm",), ("codeshell",), ("bloom",), ("gpt3-finnish",), ("exaone",), ("exaone-moe",),
    ("chameleon",), ("minerva-7b",), ("tiny_aya",), ("superbpe",), ("trillion",), ("granite-docling",),
    ("seed-coder",), ("hunyuan",), ("hunyuan-dense",), ("joyai-llm",), ("kimi-k2",), ("grok-2",), ("afmoe",),
    ("minimax-m2",), ("solar-open",), ("gemma4",), ("sarvam-moe",), ("default",),
)  # fmt: skip


def names() -> tuple[str, ...]:
    """Every name that a recipe may give."""
    return tuple(name for group in PRE_TOKENIZERS for name in group)


def follow_source(model: Any, chosen: str | None) -> None:
    """Mend what the converter leaves out of a vocabulary: a chosen pre-tokenizer, the chat template, the model's ends.

    The model then raises PlanError: the pre-tokenizer is unknown, or one was chosen and the vocabulary has none.
    """
    own, prepare = model.get_vocab_base_pre, model.prepare_metadata

    def get_vocab_base_pre(tokenizer: Any) -> str:
        if chosen is not None:
            return chosen
        seen = _Seen(tokenizer)
        try:
            return str(own(seen))
        except NotImplementedError as exc:
            raise _unknown(model, tokenizer, seen) from exc

    def prepare_metadata(*args: Any, **kwargs: Any) -> None:
        prepare(*args, **kwargs)
        fields = _Fields(model.gguf_writer)
        if chosen is not None and fields.get(PRE) != chosen:
            raise PlanError(
                f"pre_tokenizer: {chosen} can't be chosen: this tokenizer is no BPE of bytes, or its rules are fixed "
                f"({fields.get(PRE) or 'it has none'})", hint="leave `pre_tokenizer` out",
            )  # fmt: skip
        _keep_merge_order(fields, model.dir_model)
        _keep_user_defined(fields, model.dir_model / "tokenizer.model")
        _keep_template(fields, model.dir_model)
        _keep_ends(fields, model.dir_model)

    model.get_vocab_base_pre, model.prepare_metadata = get_vocab_base_pre, prepare_metadata


class _Fields:
    """The key-values that a GGUF writer will write."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def get(self, key: str) -> Any:
        return next((shard[key].value for shard in self._writer.kv_data if key in shard), None)

    def set(self, key: str, value: str | int) -> None:
        for shard in self._writer.kv_data:
            shard.pop(key, None)
        add = self._writer.add_string if isinstance(value, str) else self._writer.add_uint32
        add(key, value)


def _keep_merge_order(fields: _Fields, folder: Path) -> None:
    """Scores by the rank of each token's merge, where a SentencePiece vocabulary comes without tokenizer.model.

    llama.cpp merges by score, and the converter then gives every token the same one: text is split otherwise.
    """
    scores = fields.get(SCORES)
    if not isinstance(scores, list) or len(set(scores)) != 1:
        return
    model = read_json(folder / "tokenizer.json").get("model")
    merges = model.get("merges") if isinstance(model, dict) else None
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(merges, list) or not isinstance(vocabulary, dict):
        return
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), rank)
    for text, number in vocabulary.items():
        if number < len(scores):
            scores[number] = -float(ranks.get(text, len(merges)))


def _keep_user_defined(fields: _Fields, path: Path) -> None:
    """The pieces that SentencePiece takes as they stand, before it splits the rest: Gemma's runs of spaces, its tags.

    The converter looks for them in tokenizer_config.json alone.
    """
    kinds, scores = fields.get(KINDS), fields.get(SCORES)
    if not path.is_file() or not isinstance(kinds, list) or not isinstance(scores, list):
        return
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2
    for number, piece in enumerate(proto.ModelProto.FromString(path.read_bytes()).pieces):
        if piece.type == piece.USER_DEFINED and number < len(kinds) and kinds[number] == NORMAL:
            kinds[number], scores[number] = USER_DEFINED, ADDED_SCORE


def _keep_template(fields: _Fields, folder: Path) -> None:
    """The chat template that transformers finds; the converter loses one in a dictionary."""
    template = read_chat_template(folder)
    if template is not None and fields.get(TEMPLATE) != template:
        fields.set(TEMPLATE, template)


def _keep_ends(fields: _Fields, folder: Path) -> None:
    """An answer ends where it ends in transformers: at generation_config's ids, which the converter does not read."""
    ends = source_ends(folder)
    if ends and fields.get(EOS) not in ends:
        fields.set(EOS, ends[0])
    turns = [number for number in ends if number in turn_ends(folder) and number != fields.get(EOS)]
    if turns and fields.get(EOT) is None:
        fields.set(EOT, turns[0])


def source_ends(folder: Path) -> tuple[int, ...]:
    """The ids that end an answer, by generation_config.json, else config.json, else the tokenizer; () if none says."""
    config = read_json(folder / "config.json")
    text = config.get("text_config")
    for said in (
        read_json(folder / "generation_config.json").get("eos_token_id"),
        config.get("eos_token_id"),
        text.get("eos_token_id") if isinstance(text, dict) else None,
        tokenizer_end(folder),
    ):
        values = said if isinstance(said, list) else [said]
        if found := [item for item in values if isinstance(item, int) and not isinstance(item, bool)]:
            return tuple(dict.fromkeys(found))
    return ()


def tokenizer_end(folder: Path) -> int | None:
    """The id of the tokenizer's own eos token."""
    eos = _content(read_json(folder / "tokenizer_config.json").get("eos_token"))
    return _ids_by_text(folder).get(str(eos))


def turn_ends(folder: Path) -> frozenset[int]:
    """Those of the source's ends that its chat template writes by their text, or as the eos token."""
    template = read_chat_template(folder)
    if template is None:
        return frozenset()
    eos = _content(read_json(folder / "tokenizer_config.json").get("eos_token"))
    texts = {number: text for text, number in _ids_by_text(folder).items()}
    return frozenset(
        number for number in source_ends(folder)
        if (text := texts.get(number)) and (text in template or (text == eos and "eos_token" in template))
    )  # fmt: skip


def _content(token: object) -> object:
    return token.get("content") if isinstance(token, dict) else token


def _ids_by_text(folder: Path) -> dict[str, int]:
    tokenizer = read_json(folder / "tokenizer.json")
    model, added = tokenizer.get("model"), tokenizer.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    ids = dict(vocabulary) if isinstance(vocabulary, dict) else {}
    for item in added if isinstance(added, list) else []:
        if isinstance(item, dict) and isinstance(item.get("content"), str) and isinstance(item.get("id"), int):
            ids[item["content"]] = item["id"]
    return ids


class _Seen:
    """A tokenizer that remembers the ids of the text that the converter recognizes it by."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.hash = ""

    def encode(self, text: str) -> Any:
        ids = self._tokenizer.encode(text)
        self.hash = hashlib.sha256(str(ids).encode()).hexdigest()
        return ids

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def _unknown(model: Any, tokenizer: Any, seen: _Seen) -> PlanError:
    message = f"llama.cpp's converter does not know this tokenizer's pre-tokenizer (hash {seen.hash})"
    try:
        ranked, lines = nearest(model, tokenizer)
    except (QuantizeError, ValueError, KeyError, TypeError, AttributeError, OSError) as exc:
        hint = f"choose one with `pre_tokenizer`; trying llama.cpp's own failed: {first_line(exc)}"
        return PlanError(message, hint=hint)
    shown = ", ".join(f"{name} ({_share(count, lines)})" for name, count in ranked[:SHOWN])
    best, count = ranked[0]
    if count == lines:
        advice = f"write `pre_tokenizer: {best}` in the variant; the built file is checked on more text"
    else:
        advice = "none of them fits: a file made with any would be refused, as its token ids are not the model's"
    return PlanError(f"{message}; of {lines:,} lines llama.cpp tokenizes as the model does: {shown}", hint=advice)


def _share(count: int, lines: int) -> str:
    return "all" if count == lines else f"{count:,}"


def nearest(model: Any, tokenizer: Any) -> tuple[list[tuple[str, int]], int]:
    """llama.cpp's pre-tokenizers, best first, each with its count of lines that have the ids of `tokenizer`; all lines.

    A name of each set of rules is tried. Raises VerifyError: llama.cpp does not load the vocabulary.
    """
    lines = token_lines()[::TRIED_LINES]
    wanted = tokenizer(lines, add_special_tokens=False)["input_ids"]
    with _vocabulary(model) as template, tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "vocabulary.gguf"
        counts = []
        for name, *_ in PRE_TOKENIZERS:
            path.write_bytes(_renamed(template, name))
            found = _tokenized(path, lines)
            if found is not None:
                counts.append((name, sum(ids == own for ids, own in zip(found, wanted, strict=True))))
    if not counts:
        raise ValueError("llama.cpp loads the vocabulary under no name")
    return sorted(counts, key=lambda item: -item[1]), len(lines)


@contextlib.contextmanager
def _vocabulary(model: Any) -> Iterator[bytes]:
    """A GGUF file of the model's vocabulary alone, with PLACEHOLDER for the name."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "placeholder.gguf"
        other = type(model)(model.dir_model, model.ftype, out, hparams=dict(model.hparams))
        other.get_vocab_base_pre = lambda _: PLACEHOLDER
        other.write_vocab()
        yield out.read_bytes()


def _renamed(template: bytes, name: str) -> bytes:
    old, new = (len(text).to_bytes(8, "little") + text.encode() for text in (PLACEHOLDER, name))
    assert template.count(old) == 1
    return template.replace(old, new)


def _tokenized(path: Path, lines: Sequence[str]) -> list[list[int]] | None:
    """The ids of each line in llama.cpp; None where it does not load the vocabulary."""
    import ctypes

    import llama_cpp

    keep_log(llama_cpp, 100)
    parameters = llama_cpp.llama_model_default_params()
    parameters.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(os.fsencode(path), parameters)
    if not model:
        return None
    try:
        vocab = llama_cpp.llama_model_get_vocab(model)
        found = []
        for line in lines:
            raw = line.encode()
            ids = (ctypes.c_int32 * (len(raw) + 8))()
            count = llama_cpp.llama_tokenize(vocab, raw, len(raw), ids, len(raw) + 8, False, True)
            found.append(ids[: max(0, count)])
        return found
    finally:
        llama_cpp.llama_model_free(model)
