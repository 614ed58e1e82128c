"""Ways to damage a good checkpoint, and what must be said about each."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.files.safetensors import INDEX_NAME
from quantize.testing import TinyModel, write_json, write_weights

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class BadCheckpoint:
    """`damage` spoils a folder with a good tiny checkpoint; `message` is then part of stderr."""

    name: str
    message: str
    damage: Callable[[Path], object]
    only_build: bool = False


BAD_CHECKPOINTS: list[BadCheckpoint] = []


def says(message: str, *, only_build: bool = False) -> Callable[[Callable[[Path], object]], None]:
    """Add a function that damages a folder to the list, under the function's name."""

    def add(damage: Callable[[Path], object]) -> None:
        BAD_CHECKPOINTS.append(BadCheckpoint(damage.__name__, message, damage, only_build))

    return add


def change_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    data = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    write_json(path, {key: value for key, value in data.items() if value is not None})


def change_header(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite the header of a safetensors file; the bytes of the tensors stay as they are."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def shard(folder: Path) -> dict[str, str]:
    """Split the weights in two shards with an index; returns its weight_map."""
    (folder / WEIGHTS).unlink()
    write_weights(folder, TinyModel().weights(), shards=2)
    weight_map: dict[str, str] = json.loads((folder / INDEX_NAME).read_text())["weight_map"]
    return weight_map


def point_first_to(folder: Path, target: str) -> None:
    """Say in the index that the first tensor is in another file."""
    weight_map = shard(folder)
    change_json(folder / INDEX_NAME, weight_map={**weight_map, next(iter(weight_map)): target})


def spoil_value(folder: Path, value: bytes) -> None:
    """Overwrite one half-precision weight in the middle of the file."""
    raw = bytearray((folder / WEIGHTS).read_bytes())
    at = len(raw) // 2 // 2 * 2
    raw[at : at + 2] = value
    (folder / WEIGHTS).write_bytes(raw)


def empty_header(file: bytes) -> bytes:
    """A safetensors file of a header only."""
    return struct.pack("<Q", len(file)) + file


@says("no config.json\n  is this a Hugging Face model folder?")
def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


@says("config.json: not JSON (Expecting")
def config_not_json(folder: Path) -> None:
    (folder / "config.json").write_text("{'architectures': }")


@says("error: config.json: not a JSON object")
def config_is_a_list(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


@says("config.json: no `architectures`\n  add it, for example")
def no_architectures(folder: Path) -> None:
    change_json(folder / "config.json", architectures=None)


@says("config.json: `auto_map` asks to run code that the model brings along\n  remote code is never run")
def remote_code(folder: Path) -> None:
    change_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling_own.Own"})


@says("config.json: the weights are quantized already (awq)\n  start from the full-precision model")
def already_quantized(folder: Path) -> None:
    change_json(folder / "config.json", quantization_config={"quant_method": "awq", "bits": 4})


@says("config.json: `quantization_config` is not an object")
def quantization_config_is_text(folder: Path) -> None:
    change_json(folder / "config.json", quantization_config="int8")


@says("config.json: `vocab_size` must be a whole number")
def vocabulary_is_text(folder: Path) -> None:
    change_json(folder / "config.json", vocab_size="many")


@says("llama.cpp's converter does not know the architecture MysteryForCausalLM")
def unknown_architecture(folder: Path) -> None:
    change_json(folder / "config.json", architectures=["MysteryForCausalLM"])


@says("no model.safetensors\n  name a folder with safetensors weights")
def no_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


@says("the weights are pickled (pytorch_model.bin); opening them could run any code\n  convert them where")
def pickle_only(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


@says(f"shards without {INDEX_NAME}\n  download the index too")
def no_index(folder: Path) -> None:
    shard(folder)
    (folder / INDEX_NAME).unlink()


@says(f"{INDEX_NAME}: no `weight_map`")
def index_without_map(folder: Path) -> None:
    shard(folder)
    change_json(folder / INDEX_NAME, weight_map=None)


@says(f"{INDEX_NAME}: '../other.safetensors' leaves the folder\n  this checkpoint can't be trusted")
def index_leaves_the_folder(folder: Path) -> None:
    point_first_to(folder, "../other.safetensors")


@says(f"{INDEX_NAME}: '/etc/passwd' leaves the folder")
def index_names_an_absolute_path(folder: Path) -> None:
    point_first_to(folder, "/etc/passwd")


@says(f"{INDEX_NAME}: 'linked.safetensors' leaves the folder")
def index_names_a_link_out(folder: Path) -> None:
    (folder / "linked.safetensors").symlink_to("/etc/passwd")
    point_first_to(folder, "linked.safetensors")


@says(f"{INDEX_NAME}: 7 is not a file name")
def index_names_a_number(folder: Path) -> None:
    weight_map: dict[str, Any] = shard(folder)
    change_json(folder / INDEX_NAME, weight_map={**weight_map, next(iter(weight_map)): 7})


@says(f"{INDEX_NAME}: ['a'] is not a file name")
def index_names_a_list(folder: Path) -> None:
    weight_map: dict[str, Any] = shard(folder)
    change_json(folder / INDEX_NAME, weight_map={**weight_map, next(iter(weight_map)): ["a"]})


@says(
    "the folder: 'model.safetensors' leaves the folder\n  this checkpoint can't be trusted; if you trust it, copy what "
    "its links lead to: cp -rL "
)
def weights_are_a_link_out(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder.parent / "elsewhere.safetensors")
    (folder / WEIGHTS).symlink_to(folder.parent / "elsewhere.safetensors")


@says(f"{INDEX_NAME}: shard model-00002-of-00002.safetensors is missing\n  download the model again")
def shard_missing(folder: Path) -> None:
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


@says("model-00001-of-00002.safetensors: tensor 'model.extra.weight' is in the index, not in the shard")
def tensor_not_in_its_shard(folder: Path) -> None:
    weight_map = shard(folder)
    change_json(folder / INDEX_NAME, weight_map={**weight_map, "model.extra.weight": next(iter(weight_map.values()))})


@says("model-00001-of-00002.safetensors: tensor 'model.embed_tokens.weight' is not where the index says")
def tensor_not_in_the_index(folder: Path) -> None:
    weight_map = shard(folder)
    del weight_map["model.embed_tokens.weight"]
    change_json(folder / INDEX_NAME, weight_map=weight_map)


@says("model.safetensors: truncated: 100 bytes are missing at the end")
def truncated(folder: Path) -> None:
    raw = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(raw[:-100])


@says("model.safetensors: only 3 bytes long")
def nearly_empty(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"abc")


@says("model.safetensors: 5 bytes follow the last tensor")
def trailing_bytes(folder: Path) -> None:
    with (folder / WEIGHTS).open("ab") as file:
        file.write(b"extra")


@says("model.safetensors: its header claims 99,999,999 bytes")
def header_claims_too_much(folder: Path) -> None:
    raw = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 99_999_999) + raw[8:])


@says("model.safetensors: its header claims 18,446,744,073,709,551,615 bytes")
def header_claims_absurdly_much(folder: Path) -> None:
    raw = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(b"\xff" * 8 + raw[8:])


@says("model.safetensors: its header is not JSON (Expecting")
def header_not_json(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(empty_header(b"{tensors}"))


@says("model.safetensors: its header is not JSON (a name is there twice)")
def header_names_a_tensor_twice(folder: Path) -> None:
    entry = b'"a":{"dtype":"F16","shape":[0],"data_offsets":[0,0]}'
    (folder / WEIGHTS).write_bytes(empty_header(b"{" + entry + b"," + entry + b"}"))


@says("model.safetensors: its header is not a JSON object")
def header_is_a_list(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(empty_header(b"[]"))


@says("model.safetensors: has no tensors")
def no_tensors(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(empty_header(b"{}"))


@says("model.safetensors: tensor 'lm_head.weight' has no dtype, shape or offsets")
def tensor_without_offsets(folder: Path) -> None:
    change_header(folder / WEIGHTS, lambda header: header["lm_head.weight"].pop("data_offsets"))


@says("model.safetensors: tensor 'lm_head.weight' has an impossible shape or offset")
def negative_shape(folder: Path) -> None:
    change_header(folder / WEIGHTS, lambda header: header["lm_head.weight"].update(shape=[-384, -256]))


@says("model.safetensors: tensor 'lm_head.weight' has a shape that overflows")
def shape_overflows(folder: Path) -> None:
    change_header(folder / WEIGHTS, lambda header: header["lm_head.weight"].update(shape=[2**40, 2**40, 0]))


@says("model.safetensors: tensor 'lm_head.weight' is [1, 256] F16 but has 196,608 bytes")
def shape_disagrees_with_bytes(folder: Path) -> None:
    change_header(folder / WEIGHTS, lambda header: header["lm_head.weight"].update(shape=[1, 256]))


@says("model.safetensors: tensor 'model.layers.0.input_layernorm.weight' overlaps the one before it")
def tensors_overlap(folder: Path) -> None:
    move(folder, -2)


@says("model.safetensors: there is a gap before tensor 'model.layers.0.input_layernorm.weight'")
def gap_between_tensors(folder: Path) -> None:
    move(folder, 2)


def move(folder: Path, by: int) -> None:
    """Shift the second tensor of the file in its header, without any other change."""

    def change(header: dict[str, Any]) -> None:
        entry = header["model.layers.0.input_layernorm.weight"]
        entry["data_offsets"] = [number + by for number in entry["data_offsets"]]

    change_header(folder / WEIGHTS, change)


@says("model.safetensors: tensor 'lm_head.weight' is F64; full precision is F16, BF16 or F32")
def double_precision(folder: Path) -> None:
    change_header(folder / WEIGHTS, lambda header: header["lm_head.weight"].update(dtype="F64", shape=[96, 256]))


@says("model.safetensors: tensor 'lm_head.weight' is I8; full precision is F16, BF16 or F32")
def integer_weights(folder: Path) -> None:
    change_header(folder / WEIGHTS, lambda header: header["lm_head.weight"].update(dtype="I8", shape=[768, 256]))


@says("model.safetensors: tensor 'lm_head.weight' has dtype 'Q4'\n  known: BOOL")
def unknown_dtype(folder: Path) -> None:
    change_header(folder / WEIGHTS, lambda header: header["lm_head.weight"].update(dtype="Q4"))


@says("the weights have no embedding tensor\n  is this a whole model, not an adapter?")
def adapter(folder: Path) -> None:
    weights = TinyModel().weights()
    write_weights(folder, {name: weights[name] for name in weights if "q_proj" in name})


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Write the weights again with some of them changed."""
    weights: dict[str, Any] = dict(TinyModel().weights())
    change(weights)
    write_weights(folder, weights)


@says("this is an adapter of org/base, not a model\n  name org/base as `model` and this folder as `adapter`")
def adapter_folder(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / WEIGHTS).rename(folder / "adapter_model.safetensors")
    write_json(folder / "adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": "org/base"})


@says("the files lack what a LlamaForCausalLM by config.json has: lm_head.weight, model.embed_tokens.weight, model")
def unknown_prefix(folder: Path) -> None:
    write_weights(folder, {f"student.{name}": values for name, values in TinyModel().weights().items()})


@says("the head is missing: there is no lm_head.weight, and config.json says `tie_word_embeddings`: false")
def no_head(folder: Path) -> None:
    rewrite(folder, lambda weights: weights.pop("lm_head.weight"))


@says("the files lack what a LlamaForCausalLM by config.json has: model.norm.weight")
def no_final_norm(folder: Path) -> None:
    rewrite(folder, lambda weights: weights.pop("model.norm.weight"))


@says("the files lack what a LlamaForCausalLM by config.json has: model.layers.1.self_attn.k_proj.weight")
def no_key_projection(folder: Path) -> None:
    rewrite(folder, lambda weights: weights.pop("model.layers.1.self_attn.k_proj.weight"))


@says("model.layers.0.mlp.up_proj.weight is [256, 512] in the files, a LlamaForCausalLM by config.json has it as [512")
def turned_matrix(folder: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(folder, lambda weights: weights.update({name: weights[name].T.copy()}))


@says("config.json says `vocab_size` 400, the embedding has 384 rows\n  write 384 if the embedding is right")
def vocabulary_larger(folder: Path) -> None:
    change_json(folder / "config.json", vocab_size=400)


@says("config.json says `vocab_size` 370, the embedding has 384 rows")
def vocabulary_smaller(folder: Path) -> None:
    change_json(folder / "config.json", vocab_size=370)


@says("config.json says 3 blocks (`num_hidden_layers`), the files have 2")
def more_blocks(folder: Path) -> None:
    change_json(folder / "config.json", num_hidden_layers=3)


@says("config.json says 1 blocks (`num_hidden_layers`), the files have 2")
def fewer_blocks(folder: Path) -> None:
    change_json(folder / "config.json", num_hidden_layers=1)


@says("config.json: transformers does not take it: Class validation error for validator 'validate_layer_type'")
def layer_types_of_another_length(folder: Path) -> None:
    change_json(folder / "config.json", layer_types=["full_attention"] * 3)


@says("generation_config.json: `temperature` must be a number, found '0.7'\n  write it without quotes")
def temperature_is_text(folder: Path) -> None:
    write_json(folder / "generation_config.json", {"temperature": "0.7", "do_sample": True})


@says("generation_config.json: transformers does not take it: Invalid `cache_implementation` (magic)")
def unknown_cache(folder: Path) -> None:
    write_json(folder / "generation_config.json", {"cache_implementation": "magic"})


@says("config.json: LlamaForSequenceClassification is no causal language model: it does not write text on\n  a Llama")
def classifier(folder: Path) -> None:
    change_json(folder / "config.json", architectures=["LlamaForSequenceClassification"])


@says("in model.safetensors has NaN or Inf weights", only_build=True)
def not_a_number(folder: Path) -> None:
    spoil_value(folder, b"\x00\x7e")


@says("has NaN or Inf weights\n  the training run or the download went wrong", only_build=True)
def infinite(folder: Path) -> None:
    spoil_value(folder, b"\x00\xfc")


@says("no tokenizer (tokenizer.json, tokenizer.model, vocab.json)\n  save it beside the weights")
def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


@says("the tokenizer has ids up to 383, the embedding only 300 rows\n  they are of different models")
def tokenizer_too_large(folder: Path) -> None:
    write_weights(folder, TinyModel(vocabulary=300).weights())


@says("; there is no tokenizer_config.json\n  copy all tokenizer files from where the model was published")
def no_tokenizer_config(folder: Path) -> None:
    """tokenizer.json would do alone; with what it is made of somebody must say how."""
    for name in ("tokenizer_config.json", "tokenizer.json"):
        (folder / name).unlink()
    write_json(folder / "vocab.json", {"a": 0})


@says("tokenizer.json: not JSON")
def tokenizer_not_json(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("")


@says("tokenizer_config.json: not a JSON object")
def tokenizer_config_is_text(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text('"LlamaTokenizer"')


@says("preprocessor_config.json: not JSON")
def processor_cut_off(folder: Path) -> None:
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5')


@says("video_preprocessor_config.json: not a JSON object")
def video_processor_is_a_list(folder: Path) -> None:
    (folder / "video_preprocessor_config.json").write_text("[]")


@says(
    "processor_config.json: `image_processor.image_std` must be a number other than 0 for each channel, found [0.5, 0]"
)
def processor_divides_by_zero(folder: Path) -> None:
    write_json(folder / "processor_config.json", {"image_processor": {"image_std": [0.5, 0]}})


@says(
    "preprocessor_config.json: `size` must be pixels: a whole number above 0, or several by name, found {'height': '56'"
)
def processor_with_text_for_a_number(folder: Path) -> None:
    write_json(folder / "preprocessor_config.json", {"size": {"height": "56"}})


@says("preprocessor_config.json: transformers makes no NoImageProcessor of it: Unrecognized image processor")
def processor_of_no_known_class(folder: Path) -> None:
    write_json(folder / "preprocessor_config.json", {"image_processor_type": "NoImageProcessor"})
