"""How far two weight files are apart, by readers that are not ours: safetensors' own, and the gguf package's."""

from __future__ import annotations

import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from quantize.files import compare
from quantize.files.compare import TensorDifference, compare_metadata, compare_weights, gguf_file, safetensors_file
from quantize.files.gguf import read_gguf
from tests.conftest import Built

TYPES = {
    "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "i32": torch.int32, "u8": torch.uint8,
    "i8": torch.int8,
}  # fmt: skip


def tensors() -> dict[str, torch.Tensor]:
    values = torch.arange(-96, 96).reshape(12, 16)
    return {name: (values.abs() if name == "u8" else values).to(kind) for name, kind in TYPES.items()}


def saved(path: Path, values: dict[str, torch.Tensor]) -> Path:
    save_file(values, path)
    return path


def differences(first: Path, second: Path) -> list[TensorDifference]:
    return compare_weights(safetensors_file(first), safetensors_file(second))


def test_the_same_tensors_differ_in_nothing(tmp_path: Path) -> None:
    first = saved(tmp_path / "a.safetensors", tensors())
    assert differences(first, saved(tmp_path / "b.safetensors", tensors())) == []
    named = tmp_path / "c.safetensors"
    save_file(tensors(), named, metadata={"format": "pt"})
    assert named.read_bytes() != first.read_bytes()
    assert differences(first, named) == []


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("chunk_bytes", [7, 1 << 20])
def test_values_of_every_type(name: str, chunk_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "CHUNK_BYTES", chunk_bytes)
    other = tensors()
    other[name][3, 5] += 2
    other[name][11, 15] += 1
    paths = saved(tmp_path / "a.safetensors", tensors()), saved(tmp_path / "b.safetensors", other)
    (found,) = differences(*paths)
    distance = (load_file(paths[0])[name].double() - load_file(paths[1])[name].double()).abs()
    assert (found.tensor, found.values, found.differing) == (name, 192, int((distance > 0).sum()))
    assert found.max_difference == float(distance.max()) == 2.0
    assert str(found) == f"{name}: 2 of 192 values differ, at most by 2"


def test_nan_zeros_and_tensors_of_one_side(tmp_path: Path) -> None:
    first, second = tensors(), tensors()
    first["f32"][0, 0] = float("nan")
    first["f16"][6, 0] = 0.0
    second["f16"][6, 0] = -0.0
    second["i32"] = second["i32"].reshape(16, 12)
    second["i8"] = second["i8"].to(torch.int16)
    second["more"] = second.pop("u8")
    found = differences(saved(tmp_path / "a.safetensors", first), saved(tmp_path / "b.safetensors", second))
    assert {str(item) for item in found} == {
        "f32: 1 of 192 values differ, at most by inf",
        "f16: other bytes for the same values",
        "i32: is I32 [12, 16] in the first file, I32 [16, 12] in the second",
        "i8: is I8 [12, 16] in the first file, I16 [12, 16] in the second",
        "u8: is only in the first file",
        "more: is only in the second file",
    }


# --- GGUF -------------------------------------------------------------------------------------------------------------


def main_file(built: Built, variant: str) -> Path:
    (path,) = built.store.find(f"tiny/{variant}").folder.glob("*.gguf")
    return path


@pytest.mark.parametrize("variant", ["q8_0", "q4_k_m", "iq4_xs", "f16"])
def test_offsets_are_those_of_the_gguf_package(built: Built, variant: str) -> None:
    theirs = {item.name: int(item.data_offset) for item in gguf.GGUFReader(main_file(built, variant)).tensors}
    assert {name: item.offset for name, item in read_gguf(main_file(built, variant)).tensors.items()} == theirs


@pytest.mark.parametrize("variant", ["q8_0", "q4_k_m", "iq4_xs", "f16"])
def test_a_block_that_differs_is_measured_dequantized(built: Built, variant: str, tmp_path: Path) -> None:
    path = main_file(built, variant)
    other = Path(shutil.copy(path, tmp_path / "other.gguf"))
    name = "blk.1.ffn_up.weight"
    (item,) = [item for item in gguf.GGUFReader(path).tensors if item.name == name]
    at = int(item.data_offset) + int(item.n_bytes) - 3
    with other.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x15]))
    (changed,) = [item for item in gguf.GGUFReader(other).tensors if item.name == name]
    ours, theirs = (gguf.dequantize(one.data, one.tensor_type).astype(np.float64) for one in (item, changed))
    distance = np.abs(ours - theirs)
    (found,) = compare_weights(gguf_file(path), gguf_file(other))
    assert (found.tensor, found.values) == (name, distance.size)
    assert found.differing == int((distance > 0).sum()) > 0
    assert found.max_difference == pytest.approx(float(distance.max()), rel=1e-12)


def test_two_types_of_one_model(built: Built) -> None:
    eight, four = (gguf_file(main_file(built, variant)) for variant in ("q8_0", "q4_0"))
    found = compare_weights(eight, four)
    assert len(found) > 10
    assert all("is Q8_0" in item.what for item in found)
    assert compare_metadata(eight, four) == ["general.file_type"]
    assert compare_metadata(eight, eight) == []


def test_without_the_gguf_package_only_bytes_are_compared(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = main_file(built, "q8_0")
    other = Path(shutil.copy(path, tmp_path / "other.gguf"))
    with other.open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    (found,) = compare_weights(gguf_file(path), gguf_file(other))
    assert "its bytes differ" in found.what
