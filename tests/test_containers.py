"""Our readers of GGUF and safetensors headers against those of the packages that define the formats."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from quantize.errors import CheckpointError
from quantize.files.gguf import TENSOR_TYPES, read_gguf
from quantize.files.gguf_split import read_summary
from quantize.files.safetensors import header_bytes, read_header
from quantize.formats.gguf.types import BITS, ELEMENT_TYPES, FTYPES
from quantize.model.checkpoint import open_checkpoint
from quantize.testing import TinyModel, make_checkpoint, read_array
from tests.conftest import Built

UNREADABLE_TYPES = {"Q2_0"}  # llama.cpp writes it, but the gguf package, with which everybody reads, does not know it


# --- tables -----------------------------------------------------------------------------------------------------------


def test_tensor_types_are_those_of_the_gguf_package() -> None:
    theirs = {kind.value: (kind.name, *gguf.GGML_QUANT_SIZES[kind]) for kind in gguf.GGMLQuantizationType}
    assert theirs == TENSOR_TYPES


def test_bits_a_weight_are_block_bytes_over_block_values() -> None:
    sizes = {name: 8 * block_bytes / block for name, block, block_bytes in TENSOR_TYPES.values()}
    assert {name: sizes[name] for name in ELEMENT_TYPES} == ELEMENT_TYPES


def test_file_types_are_those_of_llama_cpp() -> None:
    prefix = "LLAMA_FTYPE_"
    theirs = {name.removeprefix(prefix) for name in vars(llama_cpp) if name.startswith(prefix)}
    theirs = {name.removeprefix("MOSTLY_").removeprefix("ALL_") for name in theirs if name != "GUESSED"}
    assert theirs - UNREADABLE_TYPES == set(FTYPES)


def test_each_file_type_has_a_tensor_type_and_whole_bits() -> None:
    for name, (tensor_type, bits) in FTYPES.items():
        assert tensor_type in ELEMENT_TYPES, name
        assert BITS[name] == bits == int(re.search(r"\d+", name)[0]), name  # type: ignore[index]
        assert bits <= ELEMENT_TYPES[tensor_type] < bits + 1.1, name


# --- GGUF -------------------------------------------------------------------------------------------------------------


def test_headers_as_the_gguf_package_reads_them(built: Built) -> None:
    for artifact in built.store.artifacts():
        (path,) = artifact.folder.glob("*.gguf")
        ours, theirs = read_gguf(path), gguf.GGUFReader(path)
        assert {name: (item.type, item.shape, item.size_bytes) for name, item in ours.tensors.items()} == {
            item.name: (item.tensor_type.name, tuple(item.shape.tolist()), item.n_bytes) for item in theirs.tensors
        }
        fields = {name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
        assert ours.fields == fields


def write_gguf(path: Path, **fields: int | str | list[str]) -> Path:
    """A small file by the gguf package's writer: one F16 matrix, one F32 vector."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in fields.items():
        key = name.replace("__", ".")
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_uint32(key, value)
    writer.add_tensor("a.weight", np.ones((4, 32), dtype=np.float16))
    writer.add_tensor("a.bias", np.ones(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_long_arrays_are_skipped_and_the_rest_is_read(tmp_path: Path) -> None:
    words = [f"word {index}" for index in range(3000)]
    file = read_gguf(write_gguf(tmp_path / "a.gguf", tokenizer__words=words, tokenizer__few=["a", "b"], after=7))
    assert file.fields["tokenizer.words"] is None
    assert file.fields["tokenizer.few"] == ["a", "b"]
    assert file.fields["after"] == 7
    assert file.tensors["a.weight"].shape == (32, 4)


def test_an_own_alignment_is_kept_to(tmp_path: Path) -> None:
    file = read_gguf(write_gguf(tmp_path / "a.gguf", general__alignment=32))
    assert set(file.tensors) == {"a.weight", "a.bias"}


def test_summary(tmp_path: Path) -> None:
    summary = read_summary(write_gguf(tmp_path / "a.gguf", general__name="A", general__license="mit"))
    assert (summary.name, summary.license, summary.architecture) == ("A", "mit", "llama")
    assert (summary.quantized_type, summary.size_bytes) == (None, 4 * 32 * 2 + 4 * 4)


def test_a_quantized_file_says_so(built: Built) -> None:
    for artifact in built.store.artifacts():
        (path,) = artifact.folder.glob("*.gguf")
        expected = {"q8_0": "Q8_0", "f16": None, "q4_0": "Q4_0"}
        if artifact.manifest.variant in expected:
            assert read_summary(path).quantized_type == expected[artifact.manifest.variant]


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, b"GGML", "it does not start with GGUF"),
        (4, struct.pack("<I", 9), "version 9"),
        (8, struct.pack("<Q", 1 << 40), "passes the end"),
        (16, struct.pack("<Q", 1 << 62), "passes the end"),
        (24, struct.pack("<Q", 1 << 50), "passes the end"),
    ],
)
def test_damaged_header(at: int, value: bytes, message: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf")
    raw = bytearray(path.read_bytes())
    raw[at : at + len(value)] = value
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=rf"a\.gguf: not a GGUF file that can be read \(.*{message}.*\)"):
        read_gguf(path)


def test_empty_and_truncated_files(tmp_path: Path) -> None:
    (tmp_path / "empty.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"empty\.gguf: not a GGUF file"):
        read_gguf(tmp_path / "empty.gguf")
    path = write_gguf(tmp_path / "a.gguf")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match=r"truncated in tensor 'a\.bias'"):
        read_gguf(path)


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_no_damage_does_more_than_refuse(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whatever bytes are changed or cut, the reader answers or raises CheckpointError, and quickly."""
    path = tmp_path_factory.mktemp("fuzz", numbered=True) / "a.gguf"
    raw = bytearray(write_gguf(path, tokenizer__few=["a", "b"], general__name="A").read_bytes())
    for at in data.draw(st.lists(st.integers(0, len(raw) - 1), max_size=6)):
        raw[at] = data.draw(st.integers(0, 255))
    path.write_bytes(raw[: data.draw(st.integers(0, len(raw)))])
    message = "a.gguf"
    try:
        read_gguf(path)
    except CheckpointError as exc:
        message = exc.message
    assert message.startswith("a.gguf")


# --- safetensors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("shards", [1, 3])
def test_headers_and_values_as_safetensors_reads_them(dtype: str, shards: int, tmp_path: Path) -> None:
    model = TinyModel(hidden=32, intermediate=64, blocks=1, tied=True)
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "model", model, dtype=dtype, shards=shards))
    wanted, seen = model.weights(), set()
    for path in sorted((tmp_path / "model").glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                theirs, info = file.get_tensor(name), checkpoint.tensors[name]
                assert tuple(theirs.shape) == info.shape
                assert np.array_equal(theirs.float().numpy(), read_array(info))
                assert np.array_equal(theirs.float().numpy(), checkpoint.read(name).float().numpy())
                assert np.allclose(read_array(info), wanted[name], rtol=2**-8 if dtype == "BF16" else 2**-10, atol=1e-6)
                seen.add(name)
    assert seen == set(checkpoint.tensors) == set(wanted)
    assert checkpoint.dtype == dtype
    assert checkpoint.parameters == sum(array.size for array in wanted.values())


def test_nothing_that_safetensors_refuses_is_read(tmp_path: Path) -> None:
    """And the other way round: what we write, it reads."""
    path = tmp_path / "a.safetensors"
    path.write_bytes(header_bytes({"a": ("F16", (2, 3)), "b": ("F32", ())}) + bytes(16))
    with safe_open(path, framework="np") as file:
        assert {name: list(file.get_tensor(name).shape) for name in file.keys()} == {"a": [2, 3], "b": []}  # noqa: SIM118
    assert {name: item.shape for name, item in read_header(path).items()} == {"a": (2, 3), "b": ()}


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_no_safetensors_damage_passes_that_the_reference_refuses(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("fuzz", numbered=True) / "a.safetensors"
    header = {
        name: {
            "dtype": data.draw(st.sampled_from(["F16", "F32", "U8"])),
            "shape": data.draw(st.lists(st.integers(0, 3), max_size=2)),
            "data_offsets": sorted(data.draw(st.lists(st.integers(0, 12), min_size=2, max_size=2))),
        }
        for name in ("a", "b")
    }
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data.draw(st.integers(0, 12))))
    try:
        ours = {name: item.shape for name, item in read_header(path).items()}
    except CheckpointError:
        return  # we may be stricter
    with safe_open(path, framework="np") as file:
        assert {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()} == ours  # noqa: SIM118
