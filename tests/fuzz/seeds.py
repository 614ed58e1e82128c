"""Valid files, as small as they come, that mutation starts from: made on the fly, by the formats' own writers."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2,
    "num_hidden_layers": 1, "num_key_value_heads": 1, "head_dim": 4, "vocab_size": 6, "max_position_embeddings": 64,
    "tie_word_embeddings": True, "sliding_window": None,
}  # fmt: skip
MIXTURE = {
    **CONFIG, "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 8, "decoder_sparse_step": 1, "mlp_only_layers": [0], "num_kv_shared_layers": 0,
}  # fmt: skip
LATENT = {**CONFIG, "kv_lora_rank": 4, "qk_rope_head_dim": 2, "qk_nope_head_dim": 2, "v_head_dim": 4,
          "text_config": {}, "layer_types": ["sliding_attention"], "sliding_window": 8}  # fmt: skip
TOKENIZER = {
    "version": "1.0",
    "added_tokens": [{"id": 0, "content": "<s>", "special": True}],
    "model": {"type": "BPE", "vocab": {"<s>": 0, "a": 1, "b": 2, "ab": 3}, "merges": [["a", "b"]]},
}
ADAPTER = {
    "peft_type": "LORA", "base_model_name_or_path": "org/base", "r": 2, "lora_alpha": 4, "use_rslora": True,
    "fan_in_fan_out": False, "alpha_pattern": {"q_proj": 8, ".*layers\\.0.*": 2}, "init_lora_weights": True,
}  # fmt: skip
GENERATION = {"temperature": 0.7, "top_k": 20, "do_sample": True, "eos_token_id": [1, 2]}
TOKENIZER_CONFIG = {"bos_token": "<s>", "chat_template": "{{ messages[0].content }}", "model_max_length": 64}
TENSORS = {"model.embed_tokens.weight": [6, 8], "model.layers.0.input_layernorm.weight": [8]}

RECIPE = """\
name: a
source: {model: ./model, revision: null}
calibration: {dataset: b, samples: 2}
variants:
  - {format: gguf, types: [F16, Q8_0]}
gates: {max_kl: 0.05}
"""
OWN_RECIPE = """\
name: a
source: {model: o/n}
defaults: {group_size: 64}
variants:
  - {format: gptq, bits: 4, name: own}
  - {format: gguf, type: F16, overrides: {"a+|b": F16}}
"""
SHORT_RECIPE = "name: a\nsource: {model: {package: p, file: f.gguf}}\nvariants: [{format: gguf, type: Q8_0}]\n"
CALIBRATION = "dataset: python-docs\nsamples: 4\nsequence_length: 64\npacking: true\nseed: 1\n"
MIX = "mix:\n- {dataset: python-docs, samples: 4}\n- {dataset: self, samples: 2, up_to_parameters: 9}\nseed: 1\n"
GOLDEN = "name: a\nprompts:\n- {id: a, prompt: b, grade: {kind: contains, any: [x]}}\n"
GOLDEN_SCHEMA = "name: a\nprompts:\n- {id: b, prompt: c, grade: {kind: json, schema: {required: [a]}}}\n"
GOLDEN_PATTERN = """\
name: tiny
prompts:
  - id: a
    prompt: "{haystack}?"
    haystack: {needle: n, filler: [f]}
    grade: {kind: regex, pattern: "a+(b|c)"}
"""
PINS = "artifacts:\n- {name: a, variant: b, digest: 'sha256:0123456789ab', published: ['./x']}\n"
CARD = "---\nlicense: mit\nbase_model: org/name\ntags: [a, b]\n---\n\n# A model\n"
ROWS = '{"text": "Some words."}\n{"text": [{"role": "user", "content": "Hello"}]}\n'


JSON_SCHEMAS: tuple[dict[str, Any], ...] = (
    {"type": "object", "propertyNames": {"maxLength": 9}, "additionalProperties": {"type": "null"}, "maxProperties": 3},
    {
        "type": "object", "required": ["name", "age"], "additionalProperties": False, "minProperties": 2,
        "properties": {
            "name": {"type": "string", "minLength": 1, "maxLength": 40, "title": "Name"},
            "code": {"type": "string", "pattern": "^[A-Z]{2}-(\\d{3}|[^a-z])+$"},
            "age": {"type": "integer", "minimum": 0, "exclusiveMaximum": 130.5},
            "when": {"type": "string", "format": "date-time"},
            "kind": {"enum": ["a", "ab", 3, None, {"x": [1.5]}]},
            "child": {"$ref": "#"},
        },
    },
    {
        "$defs": {"leaf": {"$anchor": "leaf", "type": ["number", "null"], "maximum": 1e3}, "pair": {
            "type": "array", "prefixItems": [{"$ref": "#leaf"}, {"const": "x"}], "items": {"$ref": "#/$defs/pair"}}},
        "anyOf": [{"$ref": "#/$defs/pair"}, {"type": "array", "items": {"multipleOf": 2, "minimum": -6, "maximum": 6},
                                             "minItems": 1, "maxItems": 20000, "uniqueItems": False}],
    },
    {
        "allOf": [{"type": "object", "patternProperties": {"^x-": {"type": "boolean"}}}, {"maxProperties": 3}],
        "unevaluatedProperties": False,
    },
    {
        "oneOf": [{"type": "object", "properties": {"k": {"const": key}, key: {"type": "string"}}, "required": ["k"]}
                  for key in ("a", "b")],
    },
)  # fmt: skip


def dumped(data: Any) -> bytes:
    """JSON text, short."""
    return json.dumps(data, separators=(",", ":")).encode()


def safetensors() -> bytes:
    """Two small tensors and their header."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in TENSORS.items():
        end = offset + 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    raw = dumped(header)
    return struct.pack("<Q", len(raw)) + raw + bytes(offset)


def index() -> bytes:
    """The index of one shard; `link` and `model` are names that the folder has too."""
    return dumped({"metadata": {"total_size": 112}, "weight_map": dict.fromkeys(TENSORS, "a.safetensors")})


def gguf(folder: Path) -> bytes:
    """A GGUF file of the gguf package's own writer, with a field of each kind."""
    import gguf as package
    import numpy as np

    writer = package.GGUFWriter(folder / "seed.gguf", "llama")
    for key, value in (("head_count", 2), ("head_count_kv", 1), ("key_length", 4)):
        writer.add_uint32(f"llama.attention.{key}", value)
    for key, value in (("block_count", 1), ("embedding_length", 8), ("feed_forward_length", 16), ("vocab_size", 6)):
        writer.add_uint32(f"llama.{key}", value)
    writer.add_string("general.license", "mit")
    writer.add_array("tokenizer.ggml.tokens", ["<s>", "a"])
    writer.add_float32("a", 0.5)
    writer.add_bool("b", True)
    writer.add_tensor("token_embd.weight", np.ones((6, 8), dtype=np.float16))
    writer.add_tensor("output_norm.weight", np.ones(8, dtype=np.float32))
    return _written(writer, folder / "seed.gguf")


def imatrix(folder: Path) -> bytes:
    """An importance matrix as we write it."""
    import numpy as np

    from quantize.files.imatrix import write_imatrix

    one = (np.ones((2, 4), dtype=np.float32), np.array([3, 0], dtype=np.float32))
    write_imatrix(folder / "seed.gguf", {"blk.0.ffn_up": one}, dataset="text", chunks=1, chunk_tokens=8)
    return (folder / "seed.gguf").read_bytes()


def manifest() -> bytes:
    """A sealed manifest."""
    from quantize.store.manifest import Manifest

    entry = {"path": "model.gguf", "size_bytes": 3, "sha256": "ab"}
    source = {
        "uri": "local:m", "revision": None, "name": "m", "base_model": None, "license": "mit", "architecture": "L",
        "parameters": 3, "weights_bytes": 6, "quantized_before": None, "files": [entry],
    }  # fmt: skip
    data = {
        "schema_version": 2, "name": "tiny", "variant": "q8_0", "format": "gguf", "options": {"type": "Q8_0"},
        "bits": 8, "group_size": None, "bits_per_weight": 8.5, "source": source, "tools": {"quantize": "0"},
        "calibration": {"spec": {}, "hash": "ab", "sequences": 1, "tokens": 2, "seed": 0}, "files": [entry],
        "device": "cpu AVX2", "weights_bytes": 3,
        "kept_in_high_precision": [{"tensor": "a", "type": "F32", "reason": "norm"}], "size_bytes": 3,
        "build_key": "k",
    }  # fmt: skip
    return Manifest.model_validate(data).sealed().to_json().encode()


def older_manifest() -> bytes:
    """One that was stored in schema 1."""
    return (Path(__file__).parents[1] / "older" / "gptq.json").read_bytes()


def recipe_lock() -> bytes:
    """A recipe's lock, sealed."""
    from quantize.build.lockfile import Lock

    source = {
        "uri": "u",
        "revision": None,
        "asked": None,
        "name": "m",
        "base_model": None,
        "license": None,
        "files": [],
    }
    variants = {"a": {"options": {"type": "F16"}, "tools": {"t": "1"}, "build_key": "k"}}
    lock = Lock.model_validate(
        {"schema_version": 1, "recipe": "r", "source": source, "calibration": None, "variants": variants}
    )
    return lock.model_copy(update={"digest": lock.computed_digest()}).to_yaml().encode()


def pack() -> bytes:
    """The manifest of a publication with two files."""
    from quantize.publish.pack import ARTIFACT_TYPE, CONFIG_TYPE, FILEPATH

    def blob(media_type: str, **annotations: str) -> dict[str, Any]:
        found = {"mediaType": media_type, "digest": "sha256:" + "ab" * 32, "size": 2}
        return {**found, "annotations": {FILEPATH: annotations["path"]}} if annotations else found

    layers = [blob("a/b", path="manifest.json"), blob("a/b", path="model/a.gguf")]
    return dumped({"artifactType": ARTIFACT_TYPE, "config": blob(CONFIG_TYPE), "layers": layers})


def record() -> bytes:
    """Measurements with an evaluation's record, as the gates write it."""
    from quantize.evaluate.decision import GateThresholds
    from quantize.evaluate.session import evidence
    from tests.pages.measured import decided, evaluation, prompt

    found = evaluation(prompts=[prompt(1), prompt(2, kind="json", artifact=False)])
    record = decided(evidence(found, size_bytes=3, source_bytes=6), GateThresholds())
    return dumped({"built_at": "", "evaluation": record.to_data()})


def _written(writer: Any, path: Path) -> bytes:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()
