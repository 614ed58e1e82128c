"""A GGUF model -> an FP16 checkpoint in the Hugging Face layout, by transformers' own GGUF loader.

In: the GGUF file, the first if there are several, and an empty folder. Out: config, tokenizer and safetensors in that
folder. Runs in a worker.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from quantize.errors import CheckpointError, MissingExtraError, first_line
from quantize.events import Reporter
from quantize.files.gguf import EXTRA, read_gguf
from quantize.files.gguf_split import shard_paths
from quantize.files.safetensors import write_sparse

SHARD_SIZE = "5GB"
RULES_VERSION = 2  # of what is mended in a tokenizer; enters the key of the checkpoint
FIELDS = "tokenizer.ggml"
# llama.cpp's names of the rules that part every digit from the text before they split it as GPT-2 does.
DIGITS_APART = ("smollm", "codeshell", "exaone", "minerva-7b", "starcoder", "refact", "command-r", "mellum2")


def dequantize_gguf(reporter: Reporter, gguf: Path, out: Path) -> None:
    """Write the weights of `gguf` as FP16 safetensors, with config and tokenizer. Raises CheckpointError."""
    transformers, torch = _libraries()
    try:
        config = transformers.GgufConfig(dequantize=True)
        with _all_files_read(gguf):
            model = transformers.AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, dtype=torch.float16, quantization_config=config
            )
    except (ValueError, KeyError, NotImplementedError) as exc:
        raise _unsupported(gguf, exc) from exc
    model.save_pretrained(out, max_shard_size=SHARD_SIZE)
    _write_rest(transformers, gguf, out)


def skeleton_of_gguf(reporter: Reporter, gguf: Path, out: Path) -> None:
    """Write what dequantize_gguf would, but with a sparse file of zeros for the weights: for planning from headers."""
    transformers, torch = _libraries()
    try:
        with _all_files_read(gguf):  # whether the head is tied is told by the tensors that there are
            config = transformers.AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError, NotImplementedError) as exc:
        raise _unsupported(gguf, exc) from exc
    tied = set(getattr(model, "_tied_weights_keys", None) or ()) if config.tie_word_embeddings else set()
    names = sorted(name for name in model.state_dict() if name not in tied)
    shapes = {name: ("F16", tuple(model.state_dict()[name].shape)) for name in names}
    config.architectures = [type(model).__name__]
    config.dtype = torch.float16
    config.save_pretrained(out)
    write_sparse(out / "model.safetensors", shapes)
    _write_rest(transformers, gguf, out)


@contextmanager
def _all_files_read(path: Path) -> Iterator[None]:
    """Have transformers, which opens one file, see the tensors of all files of the model that `path` begins."""
    from unittest import mock

    import gguf

    others, plain = shard_paths(path)[1:], gguf.GGUFReader

    class AllFiles(plain):  # type: ignore[valid-type, misc]
        def __init__(self, opened: Path | str, mode: Any = "r") -> None:
            super().__init__(opened, mode)
            if Path(opened).name == path.name:
                self.tensors += [tensor for part in others for tensor in plain(part).tensors]

    with mock.patch.object(gguf, "GGUFReader", AllFiles) if others else nullcontext():
        yield


def _write_rest(transformers: Any, gguf: Path, out: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.save_pretrained(out)
    path = out / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    for key in ("is_local", "local_files_only", "name_or_path"):
        settings.pop(key, None)  # where it was loaded from is not part of the model
    path.write_text(json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    fields = read_gguf(gguf).fields
    _mend_tokenizer(fields, out / "tokenizer.json")
    if fields.get(f"{FIELDS}.model") == "llama":
        (out / "tokenizer.model").write_bytes(sentencepiece_model(gguf))


def sentencepiece_model(path: Path) -> bytes:
    """The vocabulary of a GGUF file as SentencePiece's own: what llama.cpp's converter makes the same vocabulary of.

    Pieces have the same scores and kinds in both. Raises MissingExtraError.
    """
    try:
        from gguf import GGUFReader
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as exc:
        raise MissingExtraError("a GGUF file with a SentencePiece vocabulary as source", EXTRA) from exc
    known = GGUFReader(path).fields
    fields = {name.removeprefix(f"{FIELDS}."): field.contents() for name, field in known.items() if FIELDS in name}
    proto: Any = sentencepiece_model_pb2
    model = proto.ModelProto()
    columns = (fields[name] for name in ("tokens", "scores", "token_type"))
    for piece, score, kind in zip(*columns, strict=True):
        model.pieces.add(piece=piece, score=score, type=kind)
    names = {"unk": "unknown_token_id", "bos": "bos_token_id", "eos": "eos_token_id", "pad": "padding_token_id"}
    for name, key in names.items():
        setattr(model.trainer_spec, f"{name}_id", int(fields.get(key, -1)))
    model.trainer_spec.model_type = model.trainer_spec.BPE
    model.trainer_spec.vocab_size = len(model.pieces)
    model.trainer_spec.byte_fallback = any(piece.type == piece.BYTE for piece in model.pieces)
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = fields.get("add_space_prefix") is not False
    model.normalizer_spec.remove_extra_whitespaces = False
    found: bytes = model.SerializeToString(deterministic=True)
    return found


def _mend_tokenizer(fields: Mapping[str, Any], path: Path) -> None:
    """Put back two rules of the file that transformers' loader does not read; without them text gets other ids.

    Digits that stand apart ("   4" in SmolLM2): each byte-level vocabulary gets GPT-2's rules. And the space before a
    text, which SentencePiece adds even where the text begins with one.
    """
    tokenizer = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    found = tokenizer.get("pre_tokenizer")
    kind = found.get("type") if isinstance(found, dict) else None
    if kind == "ByteLevel" and fields.get(f"{FIELDS}.pre") in DIGITS_APART:
        digits = {"type": "Digits", "individual_digits": True}
        tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, found]}
    elif kind == "Metaspace" and fields.get(f"{FIELDS}.model") == "llama":
        if fields.get(f"{FIELDS}.add_space_prefix") is False:
            return
        steps = [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ]
        tokenizer["normalizer"] = {"type": "Sequence", "normalizers": steps}
        tokenizer["pre_tokenizer"] = None
    else:
        return
    path.write_text(json.dumps(tokenizer, indent=2, ensure_ascii=False), encoding="utf-8")


def _libraries() -> tuple[Any, Any]:
    try:
        import torch
        import transformers
    except ImportError as exc:
        raise MissingExtraError("a GGUF file as source", EXTRA) from exc
    return transformers, torch


def _unsupported(gguf: Path, exc: Exception) -> CheckpointError:
    hint = "start from the model's safetensors checkpoint instead"
    return CheckpointError(f"{gguf.name}: transformers can't dequantize it ({first_line(exc)})", hint=hint)
