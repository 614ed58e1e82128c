"""What a checkpoint says that a GGUF file of it must hold and must compute: the side of the source in verification.

In: a checkpoint and how it was converted. Out: an Expected: the tensors and fields that llama.cpp's converter makes
now, with some rows of each tensor, the token ids of the check's lines, and what the model itself, in transformers,
predicts for a probe. Runs in a worker process. The side of the file is formats/gguf/check.py and try_out.py.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.errors import CheckpointError, VerifyError, first_line
from quantize.events import Reporter, status
from quantize.model.checkpoint import Checkpoint
from quantize.model.config import first_number, text_part
from quantize.runtimes.llama_cpp.left_out import Followed
from quantize.runtimes.token_lines import token_lines
from quantize.system.machine import ram

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SAMPLED_VALUES = 65_536  # of a tensor, at most, where its rows are not longer
SAMPLED_ROWS = (4, 64)
PROBE_TOKENS = 64
ROOM = 1.2  # memory that a loaded model takes, beside its weights
NAMELESS = {"general.name": "source"}
PROBE_LINES = slice(100, 160)  # prose


@dataclass(frozen=True)
class ExpectedTensor:
    """One tensor as the converter makes it: shape, input width first; the rows that were looked at; their values."""

    shape: tuple[int, ...]
    rows: tuple[int, ...]
    values: NDArray[np.float32]


@dataclass(frozen=True)
class Expected:
    """What the source says.

    fields: the converter's key-values without arrays. left_out: the source's tensors that it gave no place, and why.
    lines: the text that both tokenizers read; of them `plain_lines`, the first ones, have nothing of the model in them,
    as its added tokens or a conversation. line_ids: their ids by each reader of the source's tokenizer; transformers
    comes first, and may read tokenizer.json otherwise than it stands there. probe: token ids to run.
    log_probs: float32 [probe, vocabulary], by transformers; None, and `unmeasured` says why, where it can't run here.
    towers: the tensors of the file beside it with what reads images or sound; empty if there is none.
    """

    tensors: Mapping[str, ExpectedTensor]
    fields: Mapping[str, Any]
    left_out: Mapping[str, str]
    lines: tuple[str, ...]
    plain_lines: int
    line_ids: Mapping[str, Sequence[Sequence[int]]]
    probe: tuple[int, ...]
    log_probs: NDArray[np.float32] | None
    unmeasured: str | None
    towers: Mapping[str, ExpectedTensor] = field(default_factory=dict)


def expected_of(reporter: Reporter, checkpoint: Checkpoint, pre_tokenizer: str | None) -> Expected:
    """Ask the source. pre_tokenizer: the name that the file has, if any.

    Raises what converting raises; VerifyError: the tokenizer does not load.
    """
    status(reporter, "", "asking the source what a GGUF file of it holds")
    tensors, fields, left_out = _converted(checkpoint, pre_tokenizer)
    towers, left_out = _towers(checkpoint, left_out)
    tokenizer = load_tokenizer(checkpoint.folder)
    lines = token_lines(added_tokens(tokenizer), _chats(tokenizer))
    line_ids = {"transformers": tokenizer(lines, add_special_tokens=False)["input_ids"]}
    if (plain := checkpoint.folder / "tokenizer.json").is_file():
        line_ids[plain.name] = _read_plainly(plain, lines)
    probe = _probe(tokenizer, line_ids["transformers"], checkpoint)
    log_probs, unmeasured = _predicted(reporter, checkpoint, probe)
    plain_lines, said = len(token_lines()), tuple(lines)
    return Expected(tensors, fields, left_out, said, plain_lines, line_ids, probe, log_probs, unmeasured, towers)


def load_tokenizer(folder: Path) -> Any:
    """The source's own tokenizer. Raises VerifyError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as exc:  # tokenizers raises bare Exceptions
        raise VerifyError(
            f"{folder.name}: transformers does not load its tokenizer: {first_line(exc)}",
            hint="copy all tokenizer files from where the model was published",
        ) from exc


def _read_plainly(path: Path, lines: Sequence[str]) -> list[list[int]]:
    """The ids of each line by tokenizer.json as it stands."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return [item.ids for item in tokenizer.encode_batch(list(lines), add_special_tokens=False)]


def added_tokens(tokenizer: Any) -> list[str]:
    """The texts of special and other added tokens, by id."""
    return [token.content for _, token in sorted(tokenizer.added_tokens_decoder.items())]


def _chats(tokenizer: Any) -> list[str]:
    """A conversation as the chat template writes it; none where there is no template, or it takes no such one."""
    turns = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4."}]
    found = []
    for conversation, prompt in ((turns[:1], True), (turns, False)):
        try:
            found.append(str(tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=prompt)))
        except Exception:  # noqa: BLE001 - templates are programs, and may refuse a conversation for any reason
            continue
    return found


def _converted(
    checkpoint: Checkpoint, pre_tokenizer: str | None
) -> tuple[dict[str, ExpectedTensor], dict[str, Any], dict[str, str]]:
    from quantize.runtimes.llama_cpp.convert import ConvertRequest, opened_converter

    request = ConvertRequest(checkpoint.folder, checkpoint.dtype, NAMELESS, pre_tokenizer)
    with tempfile.TemporaryDirectory() as scratch, opened_converter(request, Path(scratch) / "source.gguf") as model:
        placed = Followed(model, checkpoint)
        model.prepare_tensors()
        model.prepare_metadata(vocab_only=False)
        writer = model.gguf_writer
        fields = {key: item.value for shard in writer.kv_data for key, item in shard.items()}
        tensors = {name: _sampled(info) for shard in writer.tensors for name, info in shard.items()}
    left_out = placed.left_out(sum(math.prod(item.shape) for item in tensors.values()))
    return tensors, {key: value for key, value in fields.items() if not isinstance(value, (list, tuple))}, left_out


def _towers(checkpoint: Checkpoint, missing: dict[str, str]) -> tuple[dict[str, ExpectedTensor], dict[str, str]]:
    """The tensors of the file with a model's towers, and what neither file holds. missing: what the first does not."""
    from quantize.runtimes.llama_cpp.convert import ConvertRequest
    from quantize.runtimes.llama_cpp.mmproj import convert_towers, has_towers

    if not has_towers(checkpoint, missing):
        return {}, missing
    tensors: dict[str, ExpectedTensor] = {}

    def sample(model: Any) -> None:
        tensors.update({name: _sampled(info) for shard in model.gguf_writer.tensors for name, info in shard.items()})

    request = ConvertRequest(checkpoint.folder, checkpoint.dtype, NAMELESS)
    with tempfile.TemporaryDirectory() as scratch:
        found = convert_towers(request, checkpoint, missing, Path(scratch) / "towers.gguf", sample)
    return tensors, found.left_out(missing)


def sampled_rows(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Indices of some rows of a tensor, spread evenly, the first and the last among them. shape: input width first."""
    rows, (least, most) = math.prod(shape[1:]), SAMPLED_ROWS
    count = min(rows, max(least, min(most, SAMPLED_VALUES // max(1, shape[0]))))
    return tuple(sorted({round(index * (rows - 1) / max(1, count - 1)) for index in range(count)}))


def _sampled(info: Any) -> ExpectedTensor:
    """Some rows of a tensor that the converter has ready but not computed."""
    import gguf
    import numpy as np

    data = gguf.LazyNumpyTensor.to_eager(info.tensor)
    shape = tuple(reversed(info.shape)) or (1,)
    rows = sampled_rows(shape)
    part = data.reshape(-1, data.shape[-1] if data.ndim else 1)[list(rows)]
    values = gguf.quants.dequantize(part, info.dtype).astype(np.float32).reshape(len(rows), shape[0])
    return ExpectedTensor(shape, rows, values)


def _probe(tokenizer: Any, ids: list[list[int]], checkpoint: Checkpoint) -> tuple[int, ...]:
    """Token ids of prose, as many as the model's context has room for, begun as the tokenizer begins a sequence."""
    limit = first_number(text_part(checkpoint.config), ("max_position_embeddings",))
    count = min(PROBE_TOKENS, limit or PROBE_TOKENS)
    start = [tokenizer.bos_token_id] if isinstance(tokenizer.bos_token_id, int) else []
    return tuple([*start, *(number for line in ids[PROBE_LINES] for number in line)][:count])


def _predicted(
    reporter: Reporter, checkpoint: Checkpoint, probe: tuple[int, ...]
) -> tuple[NDArray[np.float32] | None, str | None]:
    """The source's predictions in transformers, or why there are none."""
    import numpy as np

    from quantize.runtimes.transformers.kind import Transformers
    from quantize.runtimes.transformers.load import load_causal_lm

    torch = Transformers().import_torch("verifying a GGUF file")

    _, free = ram()
    single, own = ROOM * 4 * checkpoint.parameters, ROOM * checkpoint.weights_bytes
    if min(single, own) > free:
        needed = math.ceil(min(single, own) / 2**30)
        return None, f"the source takes {needed:,} GiB of memory in transformers, {free / 2**30:.0f} GiB are free"
    status(reporter, "", "asking the source for its predictions")
    try:
        model = load_causal_lm(checkpoint.folder, "cpu", dtype=torch.float32 if single <= free else "auto")
        with torch.no_grad():
            logits = model(torch.tensor([probe]), use_cache=False).logits[0].float()
    except (VerifyError, CheckpointError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as exc:
        return None, f"the source does not run in transformers: {first_line(exc)}"
    if not bool(torch.isfinite(logits).all()):
        return None, "the source's own logits are not finite in transformers"
    return np.asarray(torch.log_softmax(logits, -1).numpy(), np.float32), None
