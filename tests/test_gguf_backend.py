"""The GGUF format: its numbers are llama.cpp's own, its bytes repeat, and what it says of a file is so.

Oracles: gguf.GGUFReader, and llama_model_quantize called directly on the converter's F16 file.
"""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest

from quantize.events import SilentReporter
from quantize.formats import option_models
from quantize.formats.gguf.types import ELEMENT_TYPES, FTYPES
from quantize.recipe.model import load_recipe
from quantize.runtimes.llama_cpp.log import keep_log
from quantize.store.artifact import Artifact
from quantize.store.store import Store
from quantize.store.workspace import Workspace
from quantize.system.cache import Cache
from quantize.testing import CHAT_TEMPLATE, TinyModel, make_checkpoint, write_recipe
from tests.conftest import BUILT_TYPES, Built, build


def reader_of(artifact: Artifact) -> gguf.GGUFReader:
    (path,) = artifact.folder.glob("*.gguf")
    return gguf.GGUFReader(path)


def types_of(artifact: Artifact) -> dict[str, str]:
    return {item.name: item.tensor_type.name for item in reader_of(artifact).tensors}


def artifact_of(store: Store, variant: str) -> Artifact:
    (found,) = [item for item in store.artifacts() if item.manifest.variant == variant]
    return found


def built_with(built: Built, tmp_path: Path, *variants: dict[str, Any]) -> list[Artifact]:
    """More variants of the tiny checkpoint, in a store of their own, from the 16-bit file that is there."""
    path = write_recipe(tmp_path / "more.yaml", Path(str(built.recipe.source.model)), variants)
    workspace = Workspace(Store(tmp_path / "more"), built.cache, SilentReporter())
    outcomes = build(load_recipe(path, option_models()), workspace, evaluate=False)
    assert [item.error for item in outcomes if item.error] == []
    return [item.artifact for item in outcomes if item.artifact]


# --- the numbers ------------------------------------------------------------------------------------------------------


def interleaved(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows of q and k as llama.cpp has them: the two halves of each head's rotary pairs side by side."""
    rows, width = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)


def test_f16_has_the_weights_of_the_source(built: Built) -> None:
    model, tensors = TinyModel(), {item.name: item for item in reader_of(artifact_of(built.store, "f16")).tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.blocks)
    weights = model.weights()
    assert {names.get_name(name, try_suffixes=(".weight",)) for name in weights} == set(tensors)
    for name, weight in weights.items():
        wanted = weight.astype(np.float16)
        if "q_proj" in name or "k_proj" in name:
            wanted = interleaved(wanted, model.heads if "q_proj" in name else model.kv_heads)
        found = tensors[names.get_name(name, try_suffixes=(".weight",))].data
        assert np.array_equal(found.astype(np.float16), wanted), name


@pytest.mark.parametrize("kind", BUILT_TYPES)
def test_dequantized_weights_are_near_the_source(kind: str, built: Built) -> None:
    """Within the step of the type: largest magnitude over half the levels, doubled for two-level scales."""
    exact = {item.name: item.data for item in reader_of(artifact_of(built.store, "f16")).tensors}
    for item in reader_of(artifact_of(built.store, kind.lower())).tensors:
        values = gguf.dequantize(item.data, item.tensor_type).reshape(exact[item.name].shape)
        wanted = exact[item.name].astype(np.float32)
        step = float(np.abs(wanted).max()) / 2 ** (int(ELEMENT_TYPES[item.tensor_type.name]) - 1)
        assert float(np.abs(values - wanted).max()) <= 2 * step + 1e-6, item.name


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("kind", ["Q4_K_M", "Q8_0", "IQ4_XS"])
def test_bytes_are_those_of_llama_cpp_called_directly(kind: str, threads: int, built: Built, tmp_path: Path) -> None:
    """On any number of threads: each of theirs takes 16,384 weights or more, of the 131,072 of a matrix here."""
    (source,) = (built.cache.root / "gguf").glob("*/*-F16.gguf")
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    settings.nthread = threads
    out = tmp_path / "direct.gguf"
    keep_log(llama_cpp)
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(settings)) == 0
    ours = {item.name: item for item in reader_of(artifact_of(built.store, kind.lower())).tensors}
    theirs = {item.name: item for item in gguf.GGUFReader(out).tensors}
    assert ours.keys() == theirs.keys()
    for name, item in theirs.items():
        assert ours[name].tensor_type == item.tensor_type
        assert ours[name].data.tobytes() == item.data.tobytes(), name


# --- the bytes repeat -------------------------------------------------------------------------------------------------


def test_the_same_inputs_elsewhere_give_the_same_digests(built: Built, tmp_path: Path) -> None:
    """Another folder, store, cache, recipe file and number of threads: nothing of them may be in the bytes."""
    from quantize.build.execution import RunOptions
    from quantize.formats.base import RunLimits

    model = Path(shutil.copytree(str(built.recipe.source.model), tmp_path / "elsewhere" / "tiny"))
    path = write_recipe(tmp_path / "tiny.yaml", model, [{"format": "gguf", "types": ["Q4_K_M", "Q8_0"]}])
    workspace = Workspace(Store(tmp_path / "s"), Cache(tmp_path / "c"), SilentReporter())
    run = RunOptions(RunLimits(threads=3))
    outcomes = build(load_recipe(path, option_models()), workspace, run, evaluate=False)
    for outcome in outcomes:
        assert outcome.artifact is not None, outcome.error
        first, second = artifact_of(built.store, outcome.variant), outcome.artifact
        assert (first.folder / "manifest.json").read_bytes() == (second.folder / "manifest.json").read_bytes()
        assert reader_of(first).data.tobytes() == reader_of(second).data.tobytes()
        assert str(tmp_path).encode() not in reader_of(second).data.tobytes()


# --- what is asked for is what is there -------------------------------------------------------------------------------


def test_each_option_is_effective(built: Built, tmp_path: Path) -> None:
    plain, types, pure, overridden = (
        types_of(artifact_of(built.store, "q4_k_m")),
        *(
            types_of(item)
            for item in built_with(
                built, tmp_path,
                {"format": "gguf", "type": "Q4_K_M", "output_type": "F16", "embedding_type": "Q5_0"},
                {"format": "gguf", "type": "Q4_K_M", "pure": True},
                {"format": "gguf", "type": "Q4_K_M", "overrides": {r"blk\.1\..*ffn": "Q8_0", "attn_v": "Q5_K"}},
            )
        ),
    )  # fmt: skip
    assert (plain["output.weight"], plain["token_embd.weight"]) == ("Q6_K", "Q4_K")
    assert (types["output.weight"], types["token_embd.weight"]) == ("F16", "Q5_0")
    assert {kind for name, kind in pure.items() if "norm" not in name} == {"Q4_K"}
    assert len(set(plain.values())) > 2, "a mixture, unless pure"
    for name, kind in overridden.items():
        if name.startswith("blk.1.ffn") and "norm" not in name:
            assert kind == "Q8_0", name
        elif "attn_v" in name:
            assert kind == "Q5_K", name
        else:
            assert kind == plain[name], name


def test_overrides_and_types_are_reasons(built: Built, tmp_path: Path) -> None:
    (item,) = built_with(
        built, tmp_path, {"format": "gguf", "type": "Q4_0", "overrides": {"attn_v": "Q8_0"}, "output_type": "F16"}
    )
    reasons = {entry.tensor: (entry.type, entry.reason) for entry in item.manifest.kept_in_high_precision}
    assert reasons["blk.0.attn_v.weight"] == ("Q8_0", "recipe: overrides")
    assert reasons["output.weight"] == ("F16", "recipe: output_type")
    assert reasons["blk.0.attn_norm.weight"][0] == "F32"


@pytest.mark.parametrize("kind", BUILT_TYPES)
def test_everything_above_the_type_is_named_with_a_reason(kind: str, built: Built) -> None:
    item = artifact_of(built.store, kind.lower())
    base = ELEMENT_TYPES[FTYPES[kind][0]]
    higher = {name: found for name, found in types_of(item).items() if ELEMENT_TYPES[found] > base}
    assert {entry.tensor: entry.type for entry in item.manifest.kept_in_high_precision} == higher
    assert all(entry.reason for entry in item.manifest.kept_in_high_precision)


def test_rows_that_are_no_multiple_of_256_fall_back_and_say_so(
    tmp_path: Path, store: Store, workspace: Workspace
) -> None:
    """And, in one conversion: BF16 source, tied head, shards, name and licence of the recipe."""
    model = TinyModel(hidden=96, intermediate=192, blocks=1, heads=2, kv_heads=1, tied=True)
    folder = make_checkpoint(tmp_path / "narrow", model, dtype="BF16", shards=2)
    path = tmp_path / "narrow.yaml"
    path.write_text(
        "name: narrow\n"
        "source: {model: ./narrow, name: Narrow-1B-v2, base_model: org/Narrow-1B, license: mit}\n"
        "variants: [{format: gguf, types: [Q4_K_M, BF16]}]\n"
    )
    outcomes = build(load_recipe(path, option_models()), workspace, evaluate=False)
    assert [item.error for item in outcomes if item.error] == []
    mixed, plain = artifact_of(store, "q4_k_m"), artifact_of(store, "bf16")
    assert [entry.path for entry in mixed.manifest.files if entry.path.endswith(".gguf")] == [
        "Narrow-1B-v2-Q4_K_M.gguf"
    ]
    reasons = {entry.tensor: entry.reason for entry in mixed.manifest.kept_in_high_precision}
    kind = types_of(mixed)["blk.0.attn_q.weight"]
    assert kind in {"Q5_0", "Q5_1", "Q8_0"}
    assert (
        reasons["blk.0.attn_q.weight"] == f"row of 96 values is no multiple of 256: {kind} instead of a 256-value type"
    )
    tensors = {item.name: item for item in reader_of(plain).tensors}
    assert "output.weight" not in tensors, "a tied head has no tensor of its own"
    wanted = model.weights()["model.layers.0.mlp.down_proj.weight"]
    found = gguf.dequantize(tensors["blk.0.ffn_down.weight"].data, tensors["blk.0.ffn_down.weight"].tensor_type)
    assert np.allclose(found, wanted, rtol=2**-8)
    fields = {name: field.contents() for name, field in reader_of(mixed).fields.items()}
    expected = {
        "general.name": "Narrow-1B-v2",
        "general.license": "mit",
        "general.quantized_by": "quantize",
        "general.source.url": "local:narrow",
        "general.base_model.0.name": "Narrow-1B",
        "general.base_model.0.organization": "org",
        "general.base_model.0.repo_url": "https://huggingface.co/org/Narrow-1B",
        "general.version": "v2",
        "tokenizer.chat_template": CHAT_TEMPLATE,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    assert {name: fields.get(name) for name in expected} == expected
    assert folder.is_dir()
    assert (mixed.manifest.source.license, mixed.manifest.source.architecture) == ("mit", "LlamaForCausalLM")


def test_the_source_folder_is_not_written_to(built: Built) -> None:
    names = {"LICENSE", "README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in Path(str(built.recipe.source.model)).iterdir()} == names


def test_figures_of_the_manifest(built: Built) -> None:
    for item in built.store.artifacts():
        reader, manifest = reader_of(item), item.manifest
        weights = sum(int(tensor.n_bytes) for tensor in reader.tensors)
        elements = sum(int(tensor.n_elements) for tensor in reader.tensors)
        assert manifest.bits_per_weight == round(8 * weights / elements, 4)
        assert manifest.bits == FTYPES[manifest.options["type"]][1]
        assert manifest.size_bytes == sum(entry.size_bytes for entry in manifest.files)
        assert manifest.source.parameters == elements
        tools = {"auto-round", "gguf", "llama-cpp-python", "quantize"}
        assert set(manifest.tools) >= tools
        assert len(item.measurements()["verify"]["tokens"]) == 16
