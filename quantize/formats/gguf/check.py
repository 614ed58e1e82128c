"""A GGUF file held against what its source says: tensors, values, fields, template, ends, token ids, predictions.

In: the file's header, what llama.cpp makes of it, an Expected of formats/gguf/source.py. Out: facts, or VerifyError
that names what differs. A converter may split, merge, turn or drop a tensor, so no name of the source is looked for:
what the converter makes of the source now must be in the file, and the file must compute what the source computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.errors import VerifyError
from quantize.files.gguf import TOWERS_START, GgufFile, GgufTensor, read_gguf, towers_beside
from quantize.formats.gguf.source import Expected, ExpectedTensor
from quantize.model.checkpoint import Checkpoint
from quantize.model.shape import ModelShape
from quantize.runtimes.llama_cpp.vocabulary import source_ends, tokenizer_end, turn_ends

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

REBUILD = "the file is damaged, or was made by other versions: build it again with --force"
FREE_FIELDS = ("general.", "quantize.", "split.", "tokenizer.ggml.pre", "tokenizer.chat_template")
UNQUANTIZED = ("F32", "F16", "BF16", "F64")
EXACT = 0.01  # relative error of a tensor that is not quantized: BF16 has 8 bits, and small FP16 values fewer
# Bits a weight, at least -> the least cosine between a tensor's rows and the source's. Those of another tensor have
# about 0, and so has a tensor of zeros; Q2_K of normal weights has 0.94, IQ1_S 0.8.
LEAST_COSINE = ((7.5, 0.99), (4.0, 0.9), (3.0, 0.75), (2.0, 0.5), (0.0, 0.3))
LARGEST_SCALE = 2.0
# Bits a weight, at least -> the most that the median divergence from the source may be, as a share of what it is
# between the source's own predictions at other places.
MOST_DIVERGENCE = ((7.5, 0.05), (4.0, 0.4), (3.0, 0.7), (2.0, 1.0), (0.0, math.inf))
SHOWN_IDS = 4
MOST_SPLIT_OTHERWISE = 0.005  # of the lines: the same text in other tokens, where two good tokenizers part ways


def compare_header(file: GgufFile, checkpoint: Checkpoint, expected: Expected) -> None:
    """Raise VerifyError unless names, sizes, fields and chat template are what the converter makes of the source."""
    _compare_tensors(file, expected.tensors)
    _compare_fields(file, expected)
    _compare_template(file, checkpoint)


def _compare_tensors(file: GgufFile, expected: Mapping[str, ExpectedTensor]) -> None:
    found, wanted = set(file.tensors), set(expected)
    if missing := sorted(wanted - found):
        lost = sum(math.prod(expected[name].shape) for name in missing)
        raise VerifyError(
            f"{file.path.name}: {_named(missing)} missing: {lost:,} of the source's weights are lost", hint=REBUILD
        )
    if more := sorted(found - wanted):
        raise VerifyError(f"{file.path.name}: {_named(more)} not the source's", hint=REBUILD)
    for name, tensor in file.tensors.items():
        shape = expected[name].shape
        if _trimmed(tensor.shape) != _trimmed(shape):
            raise VerifyError(f"{file.path.name}: tensor {name} has the shape {tensor.shape}, the source's {shape}",
                              hint=REBUILD)  # fmt: skip


def _trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without the dimensions of 1 behind it, which llama.cpp drops."""
    return _trimmed(shape[:-1]) if len(shape) > 1 and shape[-1] == 1 else shape


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
    return f"tensor{'s' * (len(names) > 1)} {', '.join(names[:3])}{more} {'are' if len(names) > 1 else 'is'}"


def _compare_fields(file: GgufFile, expected: Expected) -> None:
    for name, wanted in expected.fields.items():
        if name.startswith(FREE_FIELDS):
            continue
        found = file.fields.get(name)
        near = (
            isinstance(found, (int, float)) and isinstance(wanted, float) and math.isclose(found, wanted, rel_tol=1e-6)
        )
        if not near and found != wanted:
            what = "is missing" if found is None else f"is {found}"
            raise VerifyError(f"{file.path.name}: {name} {what}, the source has {wanted}", hint=REBUILD)


def _compare_template(file: GgufFile, checkpoint: Checkpoint) -> None:
    template = file.fields.get("tokenizer.chat_template")
    if checkpoint.chat_template is not None and template != checkpoint.chat_template:
        what = "is lost" if template is None else "differs from the source's"
        hint = f"chat would answer nonsense; {REBUILD}"
        raise VerifyError(f"{file.path.name}: the chat template {what}", hint=hint)


def compare_towers(path: Path, expected: Expected) -> None:
    """Hold the file with a model's towers, if it has any, against the source's. Raises VerifyError. path: of the model.

    Only that no tensor is lost and none has other values: whether llama.cpp sees what the model sees is not looked at.
    """
    if not expected.towers:
        return
    found = towers_beside(path)
    if not found:
        raise VerifyError(f"{path.name}: the file with the towers is lost ({TOWERS_START}….gguf)", hint=REBUILD)
    file = read_gguf(found[0])
    _compare_tensors(file, expected.towers)
    compare_values(file, expected.towers)


def compare_values(file: GgufFile, expected: Mapping[str, ExpectedTensor]) -> None:
    """Hold some rows of every tensor, dequantized by the gguf package, against the source's. Raises VerifyError.

    What is not quantized must be equal but for rounding. What is must point where the source points, and be as long:
    how near depends on the bits of the tensor's own type, and is meant to tell nonsense, not quality.
    """
    for name, tensor in file.tensors.items():
        if (found := _rows(tensor, expected[name])) is not None:
            _compare_rows(file, tensor, found, expected[name].values)


def is_finite(expected: Expected) -> bool:
    """Whether the source has no Inf on purpose; llama.cpp's own check of a file takes none."""
    import numpy as np

    return all(bool(np.isfinite(tensor.values).all()) for tensor in expected.tensors.values())


def _rows(tensor: GgufTensor, expected: ExpectedTensor) -> NDArray[np.float32] | None:
    """The rows [rows, width] that the source was asked for; None where the gguf package has no reader for the type."""
    import gguf
    import numpy as np

    count = math.prod(tensor.shape[1:])
    raw = np.memmap(tensor.path, np.uint8, "r", tensor.offset, (count, tensor.size_bytes // count))
    kind = gguf.GGMLQuantizationType[tensor.type]
    part = np.array(raw[list(expected.rows)])
    plain = {"F32": np.float32, "F16": np.float16, "F64": np.float64}.get(tensor.type)
    try:
        values = part.view(plain) if plain is not None else gguf.quants.dequantize(part, kind)
    except NotImplementedError:
        return None
    return values.astype(np.float32).reshape(len(expected.rows), tensor.shape[0])


def _compare_rows(file: GgufFile, tensor: GgufTensor, found: Any, wanted: Any) -> None:
    import numpy as np

    where, finite = f"{file.path.name}: tensor {tensor.name} ({tensor.type})", np.isfinite(found)
    if not np.array_equal(finite, np.isfinite(wanted)):
        raise VerifyError(f"{where} has NaN or Inf", hint=REBUILD)
    found, wanted = found[finite], wanted[finite]  # a factor of Inf takes a frequency out of a rotation
    length, size = float(np.linalg.norm(wanted)), float(np.linalg.norm(found))
    if tensor.type in UNQUANTIZED:
        error = float(np.linalg.norm(found - wanted)) / length if length else size
        if error > EXACT:
            raise VerifyError(f"{where} differs from the source's by {error:.0%} of its length", hint=REBUILD)
        return
    if length == 0:
        if size > 0:
            raise VerifyError(f"{where} has values where the source has zeros", hint=REBUILD)
        return
    if size == 0:
        raise VerifyError(f"{where} is all zeros, the source's is not", hint=REBUILD)
    cosine = float((found * wanted).sum()) / (length * size)
    least = _by_bits(LEAST_COSINE, _bits(tensor))
    if cosine < least or not 1 / LARGEST_SCALE <= size / length <= LARGEST_SCALE:
        raise VerifyError(
            f"{where} is not the source's: a cosine of {cosine:.2f} (at least {least:g} at its bits), "
            f"{size / length:.2f} times its length", hint=REBUILD,
        )  # fmt: skip


def _bits(*tensors: GgufTensor) -> float:
    """Bits a weight."""
    return 8 * sum(item.size_bytes for item in tensors) / sum(math.prod(item.shape) for item in tensors)


def _by_bits(table: Sequence[tuple[float, float]], bits: float) -> float:
    return next(value for least, value in table if bits >= least)


def lowest_bits(file: GgufFile) -> float:
    """Bits a weight of the coarsest type that a hundredth of the weights or more have."""
    by_type: dict[str, list[GgufTensor]] = {}
    for tensor in file.tensors.values():
        by_type.setdefault(tensor.type, []).append(tensor)
    total = sum(math.prod(item.shape) for item in file.tensors.values())
    shares = [(_bits(*group), sum(math.prod(item.shape) for item in group)) for group in by_type.values()]
    return min(bits for bits, count in shares if count * 100 >= total)


# --- tokens -----------------------------------------------------------------------------------------------------------


def compare_tokens(
    name: str, pre_tokenizer: object, expected: Expected, found: Sequence[Sequence[int]],
    decode: Callable[[Sequence[int]], str],
) -> dict[str, Any]:  # fmt: skip
    """Hold the ids of every line in llama.cpp against the source's. Raises VerifyError with the first that differ.

    One reader of the source's tokenizer must agree on all lines, but for very few plain ones that are split otherwise
    and are the same text: `decode`, the source's own, gives it. Returns {"lines": count}; if that reader was not
    transformers, who it was under "tokens_as_in" and how many lines have other ids in transformers; and under
    "split_otherwise" how many lines are, and the first.
    """
    others = {reader: _other_lines(ids, found) for reader, ids in expected.line_ids.items()}
    reader, first = min(others, key=lambda item: len(others[item])), next(iter(others))
    facts: dict[str, Any] = {"lines": len(expected.lines)}
    if reader != first and others[first]:
        facts |= {"tokens_as_in": reader, "lines_otherwise": len(others[first])}
    if not others[reader]:
        return facts
    place = others[reader][0]
    if _is_split_alone(others[reader], expected, expected.line_ids[reader], found, decode):
        return facts | {"split_otherwise": {"lines": len(others[reader]), "first": _shortened(expected.lines[place])}}
    wanted, ids = expected.line_ids[reader][place], found[place]
    differ = (at for at, (a, b) in enumerate(zip(wanted, ids, strict=False)) if a != b)
    at = next(differ, min(len(wanted), len(ids)))
    part = slice(max(0, at - SHOWN_IDS), at + SHOWN_IDS + 1)
    raise VerifyError(
        f"{name}: llama.cpp tokenizes {len(others[reader]):,} of {len(found):,} lines otherwise than the source, first "
        f"{_shortened(expected.lines[place])}: {_ids(ids, part)} instead of {_ids(wanted, part)}",
        hint=_token_hint(pre_tokenizer),
    )


def _is_split_alone(
    places: Sequence[int], expected: Expected, wanted: Sequence[Sequence[int]], found: Sequence[Sequence[int]],
    decode: Callable[[Sequence[int]], str],
) -> bool:  # fmt: skip
    """Whether the lines at `places` are few, plain, and the same text in other tokens."""
    if len(places) > MOST_SPLIT_OTHERWISE * len(found) or places[-1] >= expected.plain_lines:
        return False
    return all(decode(found[place]) == decode(wanted[place]) for place in places)


def _other_lines(wanted: Sequence[Sequence[int]], found: Sequence[Sequence[int]]) -> list[int]:
    return [place for place, (a, b) in enumerate(zip(wanted, found, strict=True)) if list(a) != list(b)]


def _token_hint(pre_tokenizer: object) -> str:
    if isinstance(pre_tokenizer, str) and pre_tokenizer != "default":
        return f"it splits text by the rules of {pre_tokenizer!r}: choose others with `pre_tokenizer` in the variant"
    return "llama.cpp does not have this tokenizer's rules: a model that reads other tokens answers nonsense"


def _shortened(line: str) -> str:
    return repr(line if len(line) <= 80 else f"{line[:80]}…")


def _ids(ids: Sequence[int], part: slice) -> str:
    shown = [str(number) for number in ids[part]]
    return f"[{'…, ' * (part.start > 0)}{', '.join(shown)}{', …' * (part.stop < len(ids))}]"


def said_of_ends(checkpoint: Checkpoint, facts: Mapping[str, Any]) -> Iterator[str]:
    """What whoever builds has to know of where answers end. facts: of compare_ends."""
    ends, own = facts.get("ends", ()), tokenizer_end(checkpoint.folder)
    if ends and own is not None and own not in ends:
        yield f"answers end at {_tokens(ends)}, as the model's settings say; the tokenizer's own eos token is {own}"
    if left_out := facts.get("ends_left_out", ()):
        yield f"llama.cpp does not end at {_tokens(left_out)}, where transformers does too"


def _tokens(numbers: Iterable[int]) -> str:
    return f"token {', '.join(map(str, numbers))}"


def compare_ends(file: GgufFile, checkpoint: Checkpoint, ending: frozenset[int]) -> dict[str, Any]:
    """Hold the tokens that end an answer in llama.cpp against the source's. Raises VerifyError: one would not end.

    ending: those of the source's ends that llama.cpp ends at. Returns {"ends": [ids]}, and under "ends_left_out" those
    at which only transformers ends; it refuses where the chat template writes one of them, or there is no other.
    """
    ends = frozenset(source_ends(checkpoint.folder))
    lost = ends & turn_ends(checkpoint.folder) - ending
    if ends and (lost or not ending):
        shown = " or ".join(map(str, sorted(lost or ends)))
        raise VerifyError(
            f"{file.path.name}: the source's answers end with token {shown}, and would not end in llama.cpp",
            hint=REBUILD,
        )
    return {"ends": sorted(ending)} | ({"ends_left_out": sorted(ends - ending)} if ends - ending else {})


# --- predictions ------------------------------------------------------------------------------------------------------


def compare_predictions(name: str, bits: float, expected: Any, found: Any) -> dict[str, Any]:
    """Hold log-probabilities [probe, vocabulary] of the file against the source's. Raises VerifyError.

    The measure is the median over the probe of the divergence, in nats, beside that between the source's predictions
    and its own at another place: a model of nonsense is as far off as that. Returns both.
    """
    divergence, elsewhere = median_divergence(expected, found), between_places(expected)
    most = _by_bits(MOST_DIVERGENCE, bits)
    if not divergence <= most * elsewhere:
        raise VerifyError(
            f"{name}: it does not compute what the source computes: the predictions are {divergence:.3g} nats from the "
            f"source's in transformers; at most {most * elsewhere:.3g} is rounding at {bits:.1f} bits",
            hint="llama.cpp, or its converter, treats this model otherwise than transformers: another format may do",
        )
    return {"divergence": round(divergence, 6), "divergence_elsewhere": round(elsewhere, 6)}


def between_places(log_probs: Any) -> float:
    """The median divergence between predictions [rows, vocabulary] and those of the same model half of the rows on."""
    import numpy as np

    return median_divergence(log_probs, np.roll(log_probs, len(log_probs) // 2, axis=0))


def median_divergence(reference: Any, other: Any) -> float:
    """Median over rows of KL(reference || other), both log-probabilities [rows, vocabulary], of the common columns."""
    import numpy as np

    width = min(reference.shape[1], other.shape[1])
    a, b = reference[:, :width].astype(np.float64), other[:, :width].astype(np.float64)
    return float(np.median((np.exp(a) * (np.maximum(a, -1e4) - np.maximum(b, -1e4))).sum(axis=1)))


# --- names ------------------------------------------------------------------------------------------------------------


def name_map(architecture: str, checkpoint: Checkpoint) -> Any:
    """llama.cpp's own table from the source's tensor names to its own. Raises VerifyError: no such architecture."""
    return _name_map(architecture, ModelShape.from_config(checkpoint.config).layers)


def converter_name(name: str) -> str:
    """A tensor of the source as llama.cpp's converter calls it, which leaves off that it is of a part of a model."""
    return name.replace("language_model.", "")


@cache
def _name_map(architecture: str, blocks: int) -> Any:
    import gguf

    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in kinds:
        raise VerifyError(f"general.architecture is {architecture!r}, which the gguf package does not know")
    return gguf.get_tensor_name_map(kinds[architecture], blocks)
