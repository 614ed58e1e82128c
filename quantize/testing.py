"""What tests of quantize and of its plugins need: a tiny checkpoint, a tiny recipe, a builder that needs no engine.

In: a folder. Out: a Llama-style model of about a million random, seeded weights with a tokenizer that really works,
in the Hugging Face layout. The same arguments give the same bytes. Needs numpy, and `tokenizers` for the vocabulary.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal
from unittest import mock

from pydantic import Field

import quantize.formats
from quantize.errors import BuildError, PlanError, QuantizeError, VerifyError
from quantize.events import Reporter, progress
from quantize.files.safetensors import INDEX_NAME, TensorInfo, header_bytes, read_header
from quantize.formats.base import Builder, BuildResult, Context, KeptTensor, RunLimits, SizePlan, UncalibratedBuilder
from quantize.formats.folder import FolderLayout
from quantize.formats.format import Format
from quantize.model.checkpoint import Checkpoint
from quantize.recipe.model import FormatOptions

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.floating[Any]]

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TOKENIZER_TEXT = (
    "What is the capital of France? The capital of France is Paris. "
    "A recipe names a model and the formats that it becomes; a store keeps what was built. "
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all. "
)
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")


@dataclass(frozen=True)
class TinyModel:
    """The shape of a tiny Llama. Widths of 256 let every llama.cpp type apply; 96 makes K-quants fall back."""

    hidden: int = 256
    intermediate: int = 512
    blocks: int = 2
    heads: int = 4
    kv_heads: int = 2
    vocabulary: int = 384
    tied: bool = False
    seed: int = 0

    def config(self, dtype: str) -> dict[str, Any]:
        """config.json of the model."""
        names = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
        return {
            "architectures": ["LlamaForCausalLM"],
            "bos_token_id": 1,
            "dtype": names[dtype],
            "eos_token_id": 2,
            "head_dim": self.hidden // self.heads,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": 512,
            "model_type": "llama",
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.blocks,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": 1e-05,
            "rope_theta": 10000.0,
            "tie_word_embeddings": self.tied,
            "vocab_size": self.vocabulary,
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor, in the order of the file."""
        narrow = self.hidden // self.heads * self.kv_heads
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        for block in range(self.blocks):
            inner: dict[str, tuple[int, ...]] = {
                "input_layernorm": (self.hidden,),
                "self_attn.q_proj": (self.hidden, self.hidden),
                "self_attn.k_proj": (narrow, self.hidden),
                "self_attn.v_proj": (narrow, self.hidden),
                "self_attn.o_proj": (self.hidden, self.hidden),
                "post_attention_layernorm": (self.hidden,),
                "mlp.gate_proj": (self.intermediate, self.hidden),
                "mlp.up_proj": (self.intermediate, self.hidden),
                "mlp.down_proj": (self.hidden, self.intermediate),
            }
            shapes.update({f"model.layers.{block}.{name}.weight": shape for name, shape in inner.items()})
        shapes["model.norm.weight"] = (self.hidden,)
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocabulary, self.hidden)
        return shapes

    def weights(self) -> dict[str, Array]:
        """Every tensor in float32: norms near one, the rest normal with standard deviation 0.05."""
        import numpy as np

        random = np.random.default_rng(self.seed)
        weights: dict[str, Array] = {}
        for name, shape in self.shapes().items():
            values = random.standard_normal(shape, dtype=np.float32)
            weights[name] = 1 + values / 50 if len(shape) == 1 else values / 20
        return weights


def make_checkpoint(
    folder: Path, model: TinyModel | None = None, *, dtype: str = "F16", shards: int = 1, license_id: str = "apache-2.0"
) -> Path:
    """Write a tiny checkpoint into a new folder and return the folder. dtype: F16, BF16 or F32."""
    model = model or TinyModel()
    folder.mkdir(parents=True)
    write_json(folder / "config.json", model.config(dtype))
    write_weights(folder, model.weights(), dtype=dtype, shards=shards)
    write_tokenizer(folder, model.vocabulary)
    (folder / "README.md").write_text(f"---\nlicense: {license_id}\n---\n\n# A tiny model\n", encoding="utf-8")
    (folder / "LICENSE").write_text("The licence of a tiny model.\n", encoding="utf-8")
    return folder


def write_weights(folder: Path, weights: Mapping[str, Array], *, dtype: str = "F16", shards: int = 1) -> None:
    """Write weights as model.safetensors, or as several shards and their index."""
    if shards == 1:
        write_safetensors(folder / "model.safetensors", weights, dtype)
        return
    names, weight_map = list(weights), {}
    for index in range(shards):
        file = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        part = names[index * len(names) // shards : (index + 1) * len(names) // shards]
        write_safetensors(folder / file, {name: weights[name] for name in part}, dtype)
        weight_map.update(dict.fromkeys(part, file))
    size = sum(array.size for array in weights.values()) * (4 if dtype == "F32" else 2)
    write_json(folder / INDEX_NAME, {"metadata": {"total_size": size}, "weight_map": weight_map})


def write_safetensors(path: Path, weights: Mapping[str, Array], dtype: str) -> None:
    """Write one safetensors file; float32 values are rounded to nearest for F16 and BF16."""
    with path.open("wb") as file:
        file.write(header_bytes({name: (dtype, array.shape) for name, array in weights.items()}))
        for array in weights.values():
            file.write(_encoded(array, dtype))


def read_array(tensor: TensorInfo) -> Array:
    """The values of a tensor in float32, whatever its dtype on disk (F16, BF16, F32)."""
    import numpy as np

    with tensor.path.open("rb") as file:
        file.seek(tensor.offset)
        raw = file.read(tensor.size_bytes)
    if tensor.dtype == "BF16":
        values = (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        values = np.frombuffer(raw, "<f2" if tensor.dtype == "F16" else "<f4").astype(np.float32)
    return values.reshape(tensor.shape)


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    """Write a byte-fallback BPE tokenizer, as Llama 2 has it, with at most `vocabulary` tokens and a chat template."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    alphabet = [*SPECIAL_TOKENS, *(f"<0x{value:02X}>" for value in range(256))]
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary - len(alphabet), show_progress=False)
    trained.train_from_iterator([TOKENIZER_TEXT], trainer)
    learned = json.loads(trained.to_str())["model"]
    pieces = [piece for piece, _ in sorted(learned["vocab"].items(), key=lambda item: item[1])]
    ids = {token: number for number, token in enumerate([*alphabet, *pieces])}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    ]  # SentencePiece joins any two pieces that make a third, the lowest id first
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": CHAT_TEMPLATE,
    }
    write_json(folder / "tokenizer_config.json", settings)


def write_json(path: Path, data: Any) -> None:
    """Write data as JSON text."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_recipe(path: Path, model: Path, variants: Sequence[Mapping[str, Any]], **others: Any) -> Path:
    """Write a recipe for a local checkpoint and return its path; `others` are further top-level keys."""
    import yaml

    data = {"name": path.stem, "source": {"model": str(model)}, "variants": [dict(item) for item in variants], **others}
    path.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    return path


class FakeOptions(FormatOptions):
    """Options of the fake format; `fail` names the step that refuses."""

    bits: Annotated[int, Field(ge=2, le=8)] = 8
    fail: Literal["check", "sizes", "build", "verify"] | None = None

    def variant_name(self) -> str:
        """`int8`, and the step that fails."""
        return f"int{self.bits}" + (f"-{self.fail}" if self.fail else "")


class FakeBuilder(UncalibratedBuilder):
    """Rounds every matrix to signed integers with one scale a tensor: a whole builder in a page, and no engine.

    `built` lists the variants that it really built, in order.
    """

    name = "fake"
    Options = FakeOptions

    def __init__(self) -> None:
        self.built: list[str] = []

    def tools(self, options: FakeOptions) -> Sequence[str]:
        """numpy does the rounding."""
        return ["numpy"]

    def check(self, checkpoint: Checkpoint, options: FakeOptions) -> None:
        """Refuse if told to."""
        if options.fail == "check":
            raise PlanError("the fake format refuses this checkpoint", hint="as it was told to")

    def sizes(
        self, context: Context, options: Sequence[FakeOptions], reporter: Reporter
    ) -> Sequence[SizePlan | QuantizeError]:
        """One byte a weight, four for norms, and the header."""
        refusal = PlanError("the fake format can't size this", hint="as it was told to")
        return [refusal if item.fail == "sizes" else _size(context.checkpoint) for item in options]

    def build(self, context: Context, reporter: Reporter) -> BuildResult:
        """Write model.safetensors into staging."""
        import numpy as np

        checkpoint, options = context.checkpoint, context.options
        path = context.staging / "model.safetensors"
        entries = {name: (_stored_dtype(item), item.shape) for name, item in checkpoint.tensors.items()}
        if options.fail == "verify":
            entries.popitem()
        largest = 2 ** (options.bits - 1) - 1
        with path.open("wb") as file:
            file.write(header_bytes(entries))
            for done, name in enumerate(entries, start=1):
                values = read_array(checkpoint.tensors[name])
                if entries[name][0] == "I8":
                    values = np.rint(values / np.abs(values).max() * largest).astype(np.int8)
                file.write(values.tobytes())
                progress(reporter, context.variant, "rounding tensors", done, len(entries))
                if options.fail == "build":
                    raise BuildError("the fake format failed half-way", hint="as it was told to")
        self.built.append(context.variant)
        size = _size(checkpoint)
        return BuildResult((path.name,), size.weights_bytes, options.bits, None, size.bits_per_weight, size.kept)

    def verify(self, folder: Path, checkpoint: Checkpoint, limits: RunLimits, reporter: Reporter) -> Mapping[str, Any]:
        """The same tensors as the source has."""
        written = read_header(folder / "model.safetensors")
        if list(written) != list(checkpoint.tensors):
            raise VerifyError("the tensors are not the source's")
        return {"runtime": "none"}


def plain_format(builder: Builder[Any], extra: str = "torch") -> Format:
    """A format that is built and nothing else: no runtime is known for it."""
    return Format(builder.name, extra, FolderLayout(None), builder)


@contextlib.contextmanager
def installed_formats(*found: Format) -> Iterator[None]:
    """Have the given formats, and no others, installed as plugins for a while."""
    points = [mock.Mock(load=mock.Mock(return_value=item)) for item in found]
    for number, (point, item) in enumerate(zip(points, found, strict=True)):
        point.name, point.value, point.dist = item.name, f"test:{number}", None
    with mock.patch("quantize.formats.entry_points", return_value=points):
        quantize.formats.forget_formats()
        try:
            yield
        finally:
            quantize.formats.forget_formats()


def _encoded(array: Array, dtype: str) -> bytes:
    import numpy as np

    if dtype == "BF16":
        bits = np.ascontiguousarray(array, dtype="<f4").view("<u4")
        nearest = bits + 0x7FFF + ((bits >> 16) & 1)
        return bytes((nearest >> 16).astype("<u2").tobytes())
    return bytes(np.ascontiguousarray(array, dtype="<f2" if dtype == "F16" else "<f4").tobytes())


def _stored_dtype(tensor: TensorInfo) -> str:
    return "I8" if len(tensor.shape) > 1 else "F32"


def _size(checkpoint: Checkpoint) -> SizePlan:
    entries = {name: (_stored_dtype(item), item.shape) for name, item in checkpoint.tensors.items()}
    weights = sum(item.elements * (1 if _stored_dtype(item) == "I8" else 4) for item in checkpoint.tensors.values())
    bits = round(8 * weights / checkpoint.parameters, 4)
    return SizePlan(len(header_bytes(entries)) + weights, weights, len(entries), bits, _kept(checkpoint))


def _kept(checkpoint: Checkpoint) -> tuple[KeptTensor, ...]:
    reason = "norms and biases are not rounded"
    return tuple(KeptTensor(name, "F32", reason) for name, item in checkpoint.tensors.items() if len(item.shape) == 1)
