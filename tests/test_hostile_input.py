"""What a hostile file can do to a reader: be refused in the reader's own words, soon, and nothing else."""

from __future__ import annotations

import gc
import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import quantize.files.gguf
import quantize.files.safetensors
import quantize.model.checkpoint
import quantize.system.untrusted
from quantize.calibration.datasets import find_dataset
from quantize.errors import CheckpointError, QuantizeError, RecipeError, UsageError, VerifyError
from quantize.evaluate.gates import sign_test
from quantize.evaluate.golden import Grade, load_golden
from quantize.evaluate.graders import grade
from quantize.evaluate.metrics import Summary
from quantize.files.gguf import read_gguf
from quantize.files.imatrix import read_imatrix
from quantize.files.safetensors import INDEX_NAME, read_header
from quantize.formats import option_models
from quantize.model.architecture import block_layout
from quantize.model.checkpoint import check_finite, open_checkpoint, read_chat_template, tensor_table
from quantize.model.shape import ModelShape
from quantize.model.source import card_metadata
from quantize.publish.pack import read_pack
from quantize.publish.pins import read_pins
from quantize.recipe.calibration import CalibrationSpec
from quantize.recipe.model import load_recipe
from quantize.recipe.yaml import parse_document, read_document
from quantize.store.artifact import read_measurements
from quantize.store.manifest import Manifest, read_manifest
from quantize.store.store import Store
from quantize.system.untrusted import open_regular, parse_json, read_limited, time_limit
from tests.bad_checkpoints import WEIGHTS, change_header, change_json, empty_header, point_first_to, shard
from tests.fuzz import seeds

Damage = Callable[[Path], object]


@pytest.fixture
def _no_collector() -> Iterator[None]:
    """Hypothesis has a callback in the collector, which swallows what a signal raises in it, and pytest objects."""
    gc.disable()
    yield
    gc.enable()


# --- files that are none ----------------------------------------------------------------------------------------------


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.mkdir()


READERS: dict[str, Callable[[Path], object]] = {
    "safetensors": read_header,
    "gguf": read_gguf,
    "imatrix": read_imatrix,
    "yaml": read_document,
    "manifest": read_manifest,
    "golden": lambda path: load_golden([path]),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("make", [pipe, device])
@pytest.mark.parametrize("reader", READERS)
def test_pipes_and_devices_are_refused_at_once(reader: str, make: Damage, tmp_path: Path) -> None:
    make(tmp_path / "file.yaml")
    with pytest.raises(QuantizeError, match="not a file"):
        READERS[reader](tmp_path / "file.yaml")


@pytest.mark.parametrize("reader", [name for name in READERS if name not in ("yaml", "golden")])
def test_a_folder_is_no_file(reader: str, tmp_path: Path) -> None:
    with pytest.raises(QuantizeError, match="not a file"):
        READERS[reader](tmp_path)


@pytest.mark.parametrize("reader", READERS)
def test_a_file_without_permission(reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, _flags: int) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "file").write_bytes(b"{}")
    monkeypatch.setattr("quantize.system.untrusted.os.open", refuse)
    with pytest.raises(QuantizeError, match="Permission denied"):
        READERS[reader](tmp_path / "file")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("make", [pipe, device, folder])
@pytest.mark.parametrize(
    ("name", "message"),
    [("config.json", "no config.json"), (WEIGHTS, "no model.safetensors"), ("tokenizer.json", "no tokenizer")],
)
def test_a_checkpoint_with_something_else_in_the_place_of_a_file(
    name: str, message: str, make: Damage, own_tiny: Path
) -> None:
    (own_tiny / name).unlink()
    make(own_tiny / name)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(own_tiny)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("make", [pipe, device, folder])
def test_a_shard_that_is_no_file(make: Damage, own_tiny: Path) -> None:
    point_first_to(own_tiny, "other.safetensors")
    make(own_tiny / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"other\.safetensors is missing|leaves the folder"):
        open_checkpoint(own_tiny)


def test_names_that_no_system_takes(tmp_path: Path) -> None:
    for name in ("a\0b", "\ud800"):
        with pytest.raises(OSError, match="not a file name"):
            open_regular(tmp_path / name)
    with pytest.raises(OSError, match="too long"):
        open_regular(tmp_path / ("x" * 300))


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    assert read_limited(tmp_path / "a", 5) == b"12345"
    with pytest.raises(OSError, match="5 bytes is too large, at most 4 are read"):
        read_limited(tmp_path / "a", 4)


# --- files that change while they are read ----------------------------------------------------------------------------


def longer(monkeypatch: pytest.MonkeyPatch, module: str, by: int) -> None:
    """Have files seem to have been longer when they were opened than they are when they are read."""
    real = os.fstat

    def fstat(handle: int) -> os.stat_result:
        found = list(real(handle))
        found[6] += by
        return os.stat_result(found)

    monkeypatch.setattr(f"{module}.os.fstat", fstat)


def test_a_header_that_becomes_shorter(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = (tiny / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(raw[:200])
    (tmp_path / "a.gguf").write_bytes(seeds.gguf(tmp_path)[:100])
    longer(monkeypatch, "quantize.files.safetensors", len(raw))
    with pytest.raises(CheckpointError, match="became shorter while it was read"):
        read_header(tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match="truncated at byte 100"):
        read_gguf(tmp_path / "a.gguf")


@pytest.mark.parametrize("left", [-1, -3, -5000])
def test_weights_that_become_shorter(left: int, own_tiny: Path) -> None:
    checkpoint = open_checkpoint(own_tiny)
    os.truncate(own_tiny / WEIGHTS, (own_tiny / WEIGHTS).stat().st_size + left)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated in tensor"):
        list(check_finite(checkpoint))


def test_weights_that_are_gone(own_tiny: Path) -> None:
    checkpoint = open_checkpoint(own_tiny)
    (own_tiny / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: can't be read: No such file"):
        list(check_finite(checkpoint))


# --- links ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "LICENSE", "README.md"])
def test_links_out_of_the_folder(name: str, own_tiny: Path) -> None:
    (own_tiny / name).rename(own_tiny.parent / "secret")
    (own_tiny / name).symlink_to("../secret")
    with pytest.raises(CheckpointError, match=f"the folder: '{name}' leaves the folder"):
        open_checkpoint(own_tiny)


def test_a_hub_cache_may_keep_its_files_in_blobs(own_tiny: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / ("0" * 40), tmp_path / "models--a--b" / "blobs"
    shutil.copytree(own_tiny, blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    assert open_checkpoint(snapshot).parameters == open_checkpoint(own_tiny).parameters


def test_a_folder_called_blobs_is_not_enough(own_tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(own_tiny, tmp_path / "x" / "y" / "model")
    (tmp_path / "x" / "blobs").mkdir()
    (tmp_path / "x" / "y" / "model" / WEIGHTS).rename(tmp_path / "x" / "blobs" / "w")
    (tmp_path / "x" / "y" / "model" / WEIGHTS).symlink_to("../../blobs/w")
    with pytest.raises(CheckpointError, match="leaves the folder"):
        open_checkpoint(tmp_path / "x" / "y" / "model")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x" * 300 + ".safetensors", "is missing"),
        ("circle", "can't be followed|is missing"),
        ("a\0b", "is not a file name"),
        ("..", "leaves the folder"),
        (".", "is missing"),
    ],
)
def test_names_of_shards(name: str, message: str, own_tiny: Path) -> None:
    (own_tiny / "circle").symlink_to("circle")
    point_first_to(own_tiny, name)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(own_tiny)


def test_half_a_surrogate_pair_is_no_name_of_a_shard(own_tiny: Path) -> None:
    shard(own_tiny)
    text = (own_tiny / INDEX_NAME).read_text()
    (own_tiny / INDEX_NAME).write_text(text.replace("model-00001", "\\ud800", 1))
    with pytest.raises(CheckpointError, match=f"{INDEX_NAME}: not JSON"):
        open_checkpoint(own_tiny)


def test_links_to_one_shard_are_not_read_again_and_again(own_tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight_map = shard(own_tiny)
    first = min(weight_map.values())
    for number in range(50):
        (own_tiny / f"{number}.safetensors").symlink_to(first)
    more = {f"t{number}": f"{number}.safetensors" for number in range(50)}
    change_json(own_tiny / INDEX_NAME, weight_map={**weight_map, **more})
    read: list[Path] = []
    real = read_header
    monkeypatch.setattr(quantize.model.checkpoint, "read_header", lambda path: (read.append(path), real(path))[1])
    with pytest.raises(CheckpointError, match="is not where the index says"):
        tensor_table(own_tiny)
    assert len(read) == 1


def test_an_index_of_too_many_tensors_or_shards(own_tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard(own_tiny)
    for limit in ("MAX_TENSORS", "MAX_SHARDS"):
        with monkeypatch.context() as patch:
            patch.setattr(quantize.model.checkpoint, limit, 1)
            with pytest.raises(CheckpointError, match="too many tensors or shards"):
                tensor_table(own_tiny)


# --- JSON -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b'{"a": 1, "a": 2}', "a name is there twice"),
        (b"[" * 200 + b"]" * 200, "nested too deeply"),
        (b"[" * 100_000, "nested too deeply"),
        (b'"\\ud800"', "surrogates not allowed"),
        (b'{"\\udfff": 1}', "surrogates not allowed"),
        (b"\xff\xfe{}", "can't decode byte"),
        (b"9" * 5000, "4300 digits"),
        (b"", "Expecting value"),
        (b"{}{}", "Extra data"),
    ],
)
def test_json_that_is_refused(raw: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_json(raw)


def test_json_that_is_read() -> None:
    assert parse_json('\ufeff{"a": [1, {"b": "\\ud83d\\ude00 é"}]}'.encode()) == {"a": [1, {"b": "😀 é"}]}
    assert parse_json(b"[" * 100 + b"]" * 100) is not None


def test_json_of_too_many_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize.system.untrusted, "MAX_VALUES", 10)
    with pytest.raises(ValueError, match="more than 10 values"):
        parse_json(b"[1,1,1,1,1,1,1,1,1,1,1]")


# --- safetensors and GGUF ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": "", "data_offsets": [0, 2]}, "impossible shape or offset"),
        ({"shape": {}, "data_offsets": [0, 2]}, "impossible shape or offset"),
        ({"data_offsets": [2**63, 2**63]}, "impossible shape or offset"),
        ({"data_offsets": [10**4000, 10**4000]}, "impossible shape or offset"),
        ({"shape": [True, 1]}, "impossible shape or offset"),
        ({"shape": [384.0, 256]}, "impossible shape or offset"),
    ],
)
def test_impossible_tensors(change: dict[str, Any], message: str, own_tiny: Path) -> None:
    change_header(own_tiny / WEIGHTS, lambda header: header["lm_head.weight"].update(change))
    with pytest.raises(CheckpointError, match=message):
        read_header(own_tiny / WEIGHTS)


@pytest.mark.parametrize("metadata", [[], {"a": 1}, "x", None])
def test_metadata_is_an_object_of_texts(metadata: Any, tmp_path: Path) -> None:
    (tmp_path / WEIGHTS).write_bytes(empty_header(json.dumps({"__metadata__": metadata}).encode()))
    with pytest.raises(CheckpointError, match="`__metadata__` is not an object of texts"):
        read_header(tmp_path / WEIGHTS)


def test_a_header_of_too_many_tensors(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize.files.safetensors, "MAX_TENSORS", 3)
    with pytest.raises(CheckpointError, match="tensors are too many"):
        read_header(tiny / WEIGHTS)


def gguf_bytes(fields: bytes = b"", tensors: bytes = b"", *, counts: tuple[int, int]) -> bytes:
    """A GGUF file by hand: what its own writer would not write. counts: of tensors, of fields."""
    raw = b"GGUF" + struct.pack("<IQQ", 3, *counts) + fields + tensors
    return raw + bytes(-len(raw) % 32) + bytes(64)


def text(value: str) -> bytes:
    """A GGUF string."""
    return struct.pack("<Q", len(value.encode())) + value.encode()


def tensor(name: str, offset: int) -> bytes:
    """A table entry of eight float32."""
    return text(name) + struct.pack("<IQIQ", 1, 8, 0, offset)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (gguf_bytes((text("a") + struct.pack("<IB", 0, 1)) * 2, counts=(0, 2)), "key 'a' is there twice"),
        (gguf_bytes(b"", tensor("a", 0) + tensor("b", 16), counts=(2, 0)), "tensor 'b' overlaps the one before it"),
        (gguf_bytes(b"", tensor("a", 0) * 2, counts=(2, 0)), "tensor 'a' is there twice"),
        (gguf_bytes(text("a") + struct.pack("<I", 77), counts=(0, 1)), "unknown type of value 77"),
        (gguf_bytes(text("a") + struct.pack("<IIQ", 9, 77, 1), counts=(0, 1)), "unknown type of value 77"),
        (gguf_bytes(text("a") + struct.pack("<IIQ", 9, 9, 1), counts=(0, 1)), "an array of arrays"),
        (gguf_bytes(struct.pack("<Q", 2) + b"\xff\xff", counts=(0, 1)), "can't decode byte"),
        (gguf_bytes(b"", tensor("a", 2**64 - 1), counts=(1, 0)), "truncated in tensor 'a'"),
    ],
)  # fmt: skip
def test_hostile_gguf(raw: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(raw)
    with pytest.raises(CheckpointError, match=message):
        read_gguf(tmp_path / "a.gguf")


@pytest.mark.parametrize("limit", ["MAX_FIELDS", "MAX_VALUES", "MAX_TENSORS", "MAX_HEADER_BYTES", "MAX_STRINGS"])
def test_limits_of_gguf(limit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize.files.gguf, limit, 1)
    if limit == "MAX_STRINGS":
        monkeypatch.setattr(quantize.files.gguf, "MAX_ARRAY", 1)
    (tmp_path / "a.gguf").write_bytes(seeds.gguf(tmp_path))
    with pytest.raises(CheckpointError, match=r"too many|more than 1"):
        read_gguf(tmp_path / "a.gguf")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a.in_sum2": np.ones(4, np.float32)}, "'a' has no counts"),
        ({"a.in_sum2": np.ones(4, np.float16), "a.counts": np.ones(1, np.float32)}, "is of type F16, not F32"),
        ({"a.in_sum2": np.ones(4, np.float32), "a.counts": np.ones(3, np.float32)}, "has 4 sums and 3 counts"),
        ({"a.in_sum2": np.full(4, np.nan, np.float32), "a.counts": np.ones(1, np.float32)}, "no sums of squares"),
        ({"a.in_sum2": -np.ones(4, np.float32), "a.counts": np.ones(1, np.float32)}, "no sums of squares"),
    ],
)
def test_importance_matrices(tensors: dict[str, Any], message: str, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "imatrix")
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=message):
        read_imatrix(tmp_path / "a.gguf")


# --- config.json ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**18},
        {"hidden_size": -8},
        {"num_key_value_heads": 10**30},
        {"kv_lora_rank": "a"},
        {"num_kv_shared_layers": [1]},
        {"head_dim": -1},
        {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": "x"},
    ],
)
def test_shapes_that_can_not_be(changes: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        ModelShape.from_config({**seeds.CONFIG, **changes})


def test_shapes_that_are_odd() -> None:
    assert ModelShape.from_config({**seeds.CONFIG, "text_config": [1], "architectures": 3}).layers == 1
    assert ModelShape.from_config({**seeds.CONFIG, "num_kv_shared_layers": 10**6}).kv_layers == ()


@pytest.mark.parametrize(
    "fields",
    [
        {"llama.attention.head_count": 0},
        {"llama.attention.head_count": [1, "a"]},
        {"llama.attention.kv_lora_rank": 4, "llama.attention.key_length_mla": "x"},
        {"llama.vocab_size": "many"},
        {"llama.block_count": 2**63},
    ],
)
def test_gguf_metadata_that_can_not_be(fields: dict[str, Any]) -> None:
    good = {"general.architecture": "llama", "llama.attention.head_count": 2, "llama.embedding_length": 8}
    good |= {"llama.block_count": 1, "llama.vocab_size": 6}
    assert ModelShape.from_gguf(good).heads == 2
    with pytest.raises(CheckpointError):
        ModelShape.from_gguf({**good, **fields})


@pytest.mark.parametrize(
    "changes",
    [
        {"num_experts": 10**9},
        {"decoder_sparse_step": "a"},
        {"decoder_sparse_step": 1, "mlp_only_layers": 3},
        {"num_key_value_heads": -1},
        {"head_dim": "a"},
        {"architectures": [["LlamaForCausalLM"]]},
        {"architectures": 7},
        {"moe_intermediate_size": [8]},
    ],
)
def test_layouts_that_can_not_be(changes: dict[str, Any]) -> None:
    import torch  # noqa: F401 - what has it loaded looks for itself, and starts no process for each of these

    config = {**seeds.MIXTURE, "mlp_only_layers": [], **changes}
    with pytest.raises(CheckpointError):
        block_layout(config, 1)


def test_a_chat_template_that_is_no_text(own_tiny: Path) -> None:
    (own_tiny / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: can't be read"):
        read_chat_template(own_tiny)


# --- YAML -------------------------------------------------------------------------------------------------------------

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9)
)
MERGES = "a0: &a0 {k: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 12))
WIDE = "(?i)" + "[a-\U0010ffff]" * 80
LONG_TEXT = f"a: &a {'x' * 100_000}\nb: [{', '.join(['*a'] * 10_000)}]\n"


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "too many values"),
        (LONG_TEXT, "too many values"),
        (MERGES, "merge keys are not read"),
        ("a: &a [*a]\n", "too many values, or nested too deeply"),
        ("[" * 100_000, "nested too deeply"),
        ("- " * 100_000, "nested too deeply"),
        ("[" + "1," * 100_000 + "]", "too many values"),
        ('a: "\\UFFFFFFFF"\n', "not valid YAML"),
        ("%YAML 1." + "9" * 5000 + "\n--- a\n", "not valid YAML"),
        ('a: "\\ud800"\n', "half of a surrogate pair"),
        ('"\\ud800": 1\n', "half of a surrogate pair"),
        ("a: !!bool maybe\n", "not a plain value"),
        ("a: !!timestamp now\n", "not a plain value"),
        ('a: !!int ""\n', "not a plain value"),
        ("a: 1" + ":59" * 300_000 + "\n", "too long for a number"),
        ("a: 0x" + "f" * 5000 + "\n", "too long for a number"),
        ("a: " + "9" * 5000 + "\n", "too long for a number"),
        ("a: !!python/object/apply:os.system [x]\n", "is not allowed"),
        ("a: \x00\n", "not valid YAML"),
    ],
    ids=range(19),
)
def test_yaml_that_is_refused(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_document(text, "a.yaml")


@pytest.mark.usefixtures("_no_collector")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("calibration: ~nobody-is-called-this/x", "no such file"),
        ("calibration: " + "x" * 300, "no such file"),
        ('calibration: "a\\0b"', "no such file"),
        ("calibration: /dev/zero", "not a file"),
        ("defaults: {overrides: {'a{99999999999}': F16}}", "not a regular expression"),
        (f"defaults: {{overrides: {{'{WIDE}': F16}}}}", "take more than 0.05 s"),
        ("gates: {max_kl: .inf}", "`max_kl`"),
        ("gates: {max_kl: .nan}", "`max_kl`"),
        ("gates: {max_kl: 1e999}", "`max_kl`"),
        ("calibration: {dataset: a, seed: 0xffffffffffffffffffffffff}", "more than 9,007,199,254,740,991"),
    ],
)
def test_recipes_that_are_refused(change: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "0.05 s" in message:
        monkeypatch.setattr("quantize.recipe.yaml.MAX_SECONDS", 0.05)
    (tmp_path / "a.yaml").write_text(f"{seeds.SHORT_RECIPE}{change}\n")
    with pytest.raises(RecipeError, match=message):
        load_recipe(tmp_path / "a.yaml", option_models())


@pytest.mark.timeout(60)
def test_a_recipe_of_ten_thousand_variants(tmp_path: Path) -> None:
    types = ", ".join(["Q8_0"] * 10_000)
    (tmp_path / "a.yaml").write_text(seeds.SHORT_RECIPE.replace("type: Q8_0", f"types: [{types}]"))
    with pytest.raises(RecipeError, match="more than 500 variants"):
        load_recipe(tmp_path / "a.yaml", option_models())


# --- golden prompts ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_no_collector")
@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"kind": "regex", "pattern": "a{99999999999}"}, "no regular expression"),
        ({"kind": "regex", "pattern": "a" * 1001}, "more than 1,000 characters"),
        ({"kind": "regex", "pattern": "a["}, "no regular expression: unterminated character set"),
        ({"kind": "regex", "pattern": WIDE}, "take more than 0.05 s"),
        ({"kind": "json", "schema": {"pattern": "a{99999999999}"}}, "no JSON Schema"),
        ({"kind": "json", "schema": {"$ref": "http://192.0.2.1/x"}}, "refers to another document"),
        ({"kind": "json", "schema": {"anyOf": [{"$dynamicRef": "file:///etc/passwd"}]}}, "refers to another document"),
        ({"kind": "json", "schema": {"maximum": math.nan}}, "no words for"),
    ],
    ids=range(8),
)
def test_golden_prompts_that_are_refused(
    rule: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "0.05 s" in message:
        monkeypatch.setattr("quantize.recipe.yaml.MAX_SECONDS", 0.05)
    data = {"name": "a", "prompts": [{"id": "a", "prompt": "b", "grade": rule}]}
    (tmp_path / "a.yaml").write_text(json.dumps(data, ensure_ascii=False).replace("NaN", ".nan"))
    with pytest.raises(RecipeError, match=message):
        load_golden([tmp_path / "a.yaml"])


def test_a_date_is_no_json(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(seeds.GOLDEN_SCHEMA.replace("required: [a]", "const: 2026-01-01"))
    with pytest.raises(RecipeError, match="put dates between quotes"):
        load_golden([tmp_path / "a.yaml"])


def test_a_schema_without_end_fails_the_answer_only() -> None:
    rule = Grade.model_validate({"kind": "json", "schema": {"$ref": "#"}})
    assert "nested without end" in grade(rule, "{}").reason


@pytest.mark.usefixtures("_no_collector")
@pytest.mark.timeout(60)
def test_a_pattern_without_end_fails_the_answer_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantize.evaluate.graders.MAX_SECONDS", 0.2)
    rule = Grade.model_validate({"kind": "regex", "pattern": "^(a|a)*$"})
    assert "the pattern takes more than 0.2 s" in grade(rule, "a" * 60 + "b").reason
    assert grade(rule, "aaa").passed


def test_a_limit_of_time_ends_with_its_block() -> None:
    with time_limit(0.01):
        pass
    assert sum(range(3_000_000)) > 0


# --- manifests, records, cards, pins ----------------------------------------------------------------------------------


def sealed(changes: dict[str, Any]) -> bytes:
    """A manifest with other values and, where that can be, the digest that belongs to them."""
    data = {**json.loads(seeds.manifest()), **changes}
    return json.dumps(data).encode()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "../../elsewhere"}, "not the name of a folder"),
        ({"variant": ".staging"}, "not the name of a folder"),
        ({"variant": "a\\b"}, "not the name of a folder"),
        *(
            ({"files": [{"path": path, "size_bytes": 1, "sha256": ""}]}, "outside the artifact")
            for path in ("/etc/passwd", "a/../../b", "..\\b", "", "a\0b")
        ),
        ({"bits_per_weight": math.nan}, "altered"),
        ({"options": {"a": 2**60}}, "altered"),
        ({"options": {"a": math.inf}}, "altered"),
        ({"options": [1]}, "`options`"),
        ({"schema_version": 10**30}, "newer than this program"),
    ],
)
def test_manifests_that_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(sealed(changes))
    with pytest.raises(VerifyError, match=message):
        read_manifest(tmp_path / "manifest.json")


def test_a_key_of_the_manifest_twice(tmp_path: Path) -> None:
    raw = seeds.manifest().replace(b'"variant": "q8_0"', b'"variant": "q8_0", "variant": "q8_0"')
    (tmp_path / "manifest.json").write_bytes(raw)
    with pytest.raises(VerifyError, match="a name is there twice"):
        read_manifest(tmp_path / "manifest.json")


def test_the_manifest_that_the_others_are_made_of_is_good(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(seeds.manifest())
    assert isinstance(read_manifest(tmp_path / "manifest.json"), Manifest)


@pytest.mark.parametrize(
    "changes",
    [
        {"verdict": None},
        {"verdict": "perfect"},
        {"quality": []},
        {"quality": {"mean_kl": "a"}},
        {"golden": {"artifact_passed": [], "source_passed": 1}},
        {"findings": [1]},
        {"figures": {"size_bytes": 10**30}},
        {"figures": {"error_rate": 10**400}},
        {"limits": {"max_kl": -1}},
        {"findings": [{"gate": "size", "outcome": "perhaps", "reason": ""}]},
        {"limits": 3},
        {"machine": None},
    ],
)
def test_a_damaged_record_is_none(changes: dict[str, Any]) -> None:
    good = json.loads(seeds.record())["evaluation"]
    assert Summary.of({"evaluation": good}).verdict == good["verdict"]
    assert Summary.of({"evaluation": {**good, **changes}}).verdict == "not evaluated"


@pytest.mark.timeout(20)
@pytest.mark.parametrize("make", [pipe, device, folder, lambda path: path.write_bytes(b"[" * 100_000)])
def test_measurements_that_can_not_be_read_are_none(make: Damage, tmp_path: Path) -> None:
    make(tmp_path / "measurements.json")
    assert read_measurements(tmp_path) == {}


def test_the_sign_test_of_many_prompts() -> None:
    """Against the sum that defines it; and 5,000 changed answers, whose number of ways no float can hold."""
    for lost, gained in ((0, 0), (3, 1), (8, 2), (0, 5)):
        changed = lost + gained
        ways = sum(math.comb(changed, k) for k in range(lost, changed + 1))
        assert sign_test(lost, gained) == ways / 2**changed
    assert sign_test(2500, 2500) == pytest.approx(0.5, abs=0.01)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "front",
    ["d: 2026-99-99", MERGES, BOMB, "- " * 10_000, "\n" * 400_000, "---", "a: 1\n---\n" * 50_000, '"\\ud800": 1'],
    ids=range(8),
)
def test_cards_that_say_nothing(front: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"---\n{front}", encoding="utf-8")
    assert card_metadata(tmp_path / "README.md") in ({}, {"a": 1})
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n", encoding="utf-8")
    assert card_metadata(tmp_path / "README.md") in ({}, {"a": 1})


def test_a_card_is_read(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---  \nlicense: mit\ndate: 2026-01-01\n---\n\n---\n# A\n")
    assert card_metadata(tmp_path / "README.md")["license"] == "mit"


@pytest.mark.timeout(20)
@pytest.mark.parametrize("text", [MERGES, BOMB, "artifacts: [{digest: 123456789012}]", "\ud800", "artifacts: {a: 1}"])
def test_pins_that_can_not_be_read_stop_everything(text: str, tmp_path: Path) -> None:
    (tmp_path / "artifacts.lock").write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(UsageError, match="so nothing is removed"):
        Store(tmp_path / "artifacts").pinned()
    with pytest.raises(UsageError):
        read_pins(tmp_path / "artifacts.lock")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("make", [pipe, device, folder])
def test_pins_that_are_no_file(make: Damage, tmp_path: Path) -> None:
    make(tmp_path / "artifacts.lock")
    with pytest.raises(UsageError, match="so nothing is removed"):
        Store(tmp_path / "artifacts").pinned()
    with pytest.raises(UsageError):
        read_pins(tmp_path / "artifacts.lock")


def test_a_publication_with_half_a_surrogate_pair_in_a_path() -> None:
    assert [blob.path for blob in read_pack(seeds.pack()).files] == ["manifest.json", "model/a.gguf"]
    with pytest.raises(VerifyError, match="surrogates not allowed"):
        read_pack(seeds.pack().replace(b"model/a", b"model/\\ud800"))


# --- calibration text -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("a.jsonl", b'{"text": "\\ud800"}\n', "a.jsonl:1:1: not JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "' + b"x" * 100, "a.jsonl:2:1: not JSON .more than 50 bytes"),
        ("a.jsonl", b"[" * 45, "not JSON"),
        ("a.txt", b"\xff\xfe", "a.txt: the text is UTF-16, and UTF-8 is read"),
        ("a.txt", b"caf\xe9", "a.txt: not UTF-8 text"),
        ("a.parquet", b"PAR1 not really PAR1", "a.parquet can't be read"),
    ],
)
def test_calibration_text_that_is_refused(
    name: str, raw: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantize.calibration.datasets.local_file.MAX_LINE_BYTES", 50)
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(RecipeError, match=message):
        list(find_dataset(CalibrationSpec(dataset=name), tmp_path).rows(tmp_path))


# --- messages ---------------------------------------------------------------------------------------------------------


def test_messages_are_safe_to_print() -> None:
    error = QuantizeError("a \x1b[2J\x9b \ud800 \u202e\r b\n c\td é", hint="\x07")
    assert str(error) == "a \\x1b[2J\\x9b \\ud800 \\u202e\\r b\n c\td é\n  \\x07"
    assert len(str(QuantizeError("x" * 10_000_000))) < 5000
