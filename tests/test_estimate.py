"""The memory arithmetic: by hand for known models, by properties for all, and against llama.cpp's own log."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantize.errors import CheckpointError, UsageError
from quantize.estimate.vram import (
    MIB,
    EstimateSettings,
    ModelShape,
    compute_buffer_bytes,
    estimate,
    kv_bytes,
    kv_bytes_per_token,
    memory_table,
    repacked_bytes,
    vram_table,
)
from quantize.formats import find_format

LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}
DEEPSEEK_V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "num_hidden_layers": 61,
    "hidden_size": 7168,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "vocab_size": 129280,
    "max_position_embeddings": 163840,
}


def shape(**changes: Any) -> ModelShape:
    return ModelShape.from_config({**LLAMA_8B, **changes})


def test_llama_8b_keeps_128_kib_a_token() -> None:
    assert kv_bytes_per_token(shape()) == 131072
    assert kv_bytes(shape(), 8192, 4) == 4 * 2**30
    assert kv_bytes_per_token(shape(), "q8_0") == 131072 * 17 // 32
    assert kv_bytes_per_token(shape(), "q4_0") == 131072 * 9 // 32


def test_latent_attention_is_small_in_llama_cpp_and_large_in_transformers() -> None:
    deepseek = ModelShape.from_config(DEEPSEEK_V3)
    assert deepseek.latent_attention
    assert kv_bytes_per_token(deepseek) == 61 * (512 + 64) * 2
    assert kv_bytes_per_token(deepseek, expanded=True) == 61 * 128 * (192 + 128) * 2
    small = kv_bytes(deepseek, 4096, 1, EstimateSettings(runtime="vllm"))
    assert kv_bytes(deepseek, 4096, 1, EstimateSettings(runtime="transformers")) == small * 128 * 320 // 576


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        ({"sliding_window": 512, "layer_types": ["sliding_attention", "full_attention"] * 2}, [512, None, 512, None]),
        ({"sliding_window": 512, "sliding_window_pattern": 3}, [512, 512, None, 512]),
        ({"sliding_window": 512}, [512] * 4),
        ({"sliding_window": 512, "use_sliding_window": False}, [None] * 4),
        ({"sliding_window": 512, "use_sliding_window": True, "max_window_layers": 3}, [None, None, None, 512]),
        ({"sliding_window": None}, [None] * 4),
    ],
)
def test_sliding_windows(config: dict[str, Any], windows: list[int | None]) -> None:
    assert [layer.window for layer in shape(num_hidden_layers=4, **config).kv_layers] == windows


def test_a_window_caps_what_is_kept() -> None:
    sliding = shape(sliding_window=1024)
    assert kv_bytes(sliding, 32768, 1, EstimateSettings(runtime="vllm")) == 1024 * 131072
    assert kv_bytes(sliding, 32768, 1, EstimateSettings()) == (1024 + 512) * 131072
    assert kv_bytes(sliding, 512, 1, EstimateSettings()) == 512 * 131072
    assert kv_bytes(sliding, 4096, 1, EstimateSettings(full_sliding_cache=True)) == 4096 * 131072


def test_recurrent_and_sharing_layers_keep_nothing() -> None:
    hybrid = shape(num_hidden_layers=4, layer_types=["linear_attention"] * 3 + ["full_attention"])
    assert len(hybrid.kv_layers) == 1
    assert len(shape(num_hidden_layers=30, num_kv_shared_layers=10).kv_layers) == 20


def test_older_and_nested_configs() -> None:
    gpt2 = ModelShape.from_config(
        {"n_layer": 12, "n_embd": 768, "n_head": 12, "n_positions": 1024, "vocab_size": 50257}
    )
    assert (gpt2.kv_heads, gpt2.head_dim, gpt2.intermediate_size, gpt2.max_context) == (12, 64, 3072, 1024)
    assert ModelShape.from_config({"model_type": "gemma3", "text_config": LLAMA_8B}).layers == 32
    falcon = ModelShape.from_config({**LLAMA_8B, "num_key_value_heads": None, "multi_query": True})
    assert falcon.kv_heads == 1


def test_a_config_without_layers_is_refused() -> None:
    config = {key: value for key, value in LLAMA_8B.items() if key != "num_hidden_layers"}
    with pytest.raises(CheckpointError, match="num_hidden_layers or n_layer"):
        ModelShape.from_config(config)


def test_gguf_metadata_without_architecture_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"general\.architecture"):
        ModelShape.from_gguf({})
    with pytest.raises(CheckpointError, match=r"llama\.attention\.head_count"):
        ModelShape.from_gguf({"general.architecture": "llama"})


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"runtime": "tgi"}, "runtime"), ({"kv_type": "q2"}, "KV type"), ({"device": "tpu"}, "device")],
)
def test_unknown_settings_name_what_there_is(settings: dict[str, str], named: str) -> None:
    with pytest.raises(UsageError, match=named) as caught:
        EstimateSettings(**settings)  # type: ignore[arg-type]
    assert "use one of" in str(caught.value)


def test_nonsense_is_refused() -> None:
    with pytest.raises(UsageError, match="at least 1"):
        estimate(shape(), 10**9, context=0)


contexts = st.integers(1, 65536)
sequences = st.integers(1, 16)
settings = st.builds(
    EstimateSettings,
    runtime=st.sampled_from(["llama.cpp", "transformers", "vllm"]),
    kv_type=st.sampled_from(["f16", "q8_0", "q4_0"]),
    device=st.sampled_from(["gpu", "cpu"]),
    ubatch=st.sampled_from([64, 512, 2048]),
    flash_attention=st.booleans(),
    unified_kv=st.booleans(),
)
configs = st.sampled_from([LLAMA_8B, DEEPSEEK_V3, {**LLAMA_8B, "sliding_window": 700, "sliding_window_pattern": 6}])


@given(configs, settings, contexts, sequences)
def test_the_parts_add_up_and_the_upper_figure_is_above(
    config: dict[str, Any], settings: EstimateSettings, context: int, concurrency: int
) -> None:
    cell = estimate(ModelShape.from_config(config), 10**9, settings=settings, context=context, concurrency=concurrency)
    assert cell.expected_bytes == cell.weights_bytes + cell.kv_bytes + cell.overhead_bytes
    assert cell.upper_bytes > cell.expected_bytes
    assert cell.loading_ram_upper_bytes >= cell.loading_ram_bytes > 0


@given(configs, settings, contexts, sequences)
def test_more_context_or_concurrency_never_takes_less(
    config: dict[str, Any], settings: EstimateSettings, context: int, concurrency: int
) -> None:
    model = ModelShape.from_config(config)
    here = estimate(model, 10**9, settings=settings, context=context, concurrency=concurrency)
    for more in ({"context": 2 * context}, {"concurrency": concurrency + 1}):
        there = estimate(model, 10**9, settings=settings, **{"context": context, "concurrency": concurrency, **more})
        assert there.kv_bytes >= here.kv_bytes
        assert there.expected_bytes >= here.expected_bytes
        assert there.upper_bytes >= here.upper_bytes


def test_contexts_beyond_the_model_are_left_out() -> None:
    assert {cell.context for cell in vram_table(shape(max_position_embeddings=8192), 10**9)} == {2048, 4096, 8192}
    assert {cell.context for cell in vram_table(shape(max_position_embeddings=512), 10**9)} == {512}


def test_a_table_has_integers_and_names_only() -> None:
    table = memory_table(shape(), 4_920_000_000)
    assert (table.runtime, table.kv_type, table.weights_bytes) == ("llama.cpp", "f16", 4_920_000_000)
    assert table.kv_bytes_per_token == 131072
    assert len(table.cells) == 20
    assert all(type(value) is int for cell in table.cells for value in asdict(cell).values())
    assert json.loads(json.dumps(asdict(table))) == {**asdict(table), "cells": [asdict(cell) for cell in table.cells]}


def test_a_table_s_cell_for_one_sequence() -> None:
    table = memory_table(shape(), 10**9)
    assert [table.up_to(context).context for context in (4096, 5000, 10**6, 1)] == [4096, 4096, 32768, 2048]
    assert {table.up_to(context).concurrency for context in (1, 4096)} == {1}
    asked = memory_table(shape(), 10**9, contexts=(3000,), concurrencies=(4,))
    assert (asked.up_to(4096).context, asked.up_to(4096).concurrency) == (3000, 4)


def test_latent_attention_in_a_table_follows_the_runtime() -> None:
    deepseek = ModelShape.from_config(DEEPSEEK_V3)
    as_gguf, as_int8 = (memory_table(deepseek, 1, profile=find_format(name).vram) for name in ("gguf", "bitsandbytes"))
    assert as_gguf.kv_bytes_per_token < as_int8.kv_bytes_per_token


def test_without_flash_attention_every_head_sees_every_pair() -> None:
    pairs = 32 * 512 * 8192 * 4
    assert compute_buffer_bytes(shape(), 8192, EstimateSettings(flash_attention=False)) > pairs
    assert compute_buffer_bytes(shape(), 8192, EstimateSettings()) < pairs


def test_only_matrices_that_are_rearranged_count_twice() -> None:
    tensors = [("token_embd.weight", "Q4_0", 100), ("blk.0.a.weight", "Q4_0", 10), ("blk.0.norm.weight", "F32", 1)]
    assert repacked_bytes(tensors, tied=True) == 110
    assert repacked_bytes(tensors, tied=False) == 10
    assert repacked_bytes([*tensors, ("blk.0.last.weight", "Q4_0", 10)], tied=False) == 10  # unmapped after the copy
    assert repacked_bytes([("blk.0.a.weight", "Q8_0", 10)], tied=False) == 0


def test_nothing_heavy_is_imported() -> None:
    heavy = "('torch', 'numpy', 'transformers')"
    modules = "quantize.estimate.fit, quantize.system.machine"
    code = f"import sys, {modules}; print([name for name in {heavy} if name in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


@pytest.mark.parametrize("index", [0, 4, 11, 16, 23, 26, 29])
def test_llama_cpp_logs_what_was_estimated(index: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample of the points of docs/estimates.md; benchmarks/estimate_truth.py has them all."""
    pytest.importorskip("llama_cpp")
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    bench = importlib.import_module("estimate_truth")
    point = bench.POINTS[index]
    path = tmp_path / "shape.gguf"
    bench.write_gguf(path, bench.SHAPES[point.shape], point.kind)
    truth, guess = bench.measure(path, point), bench.predict(path, point)
    assert bench.acceptable(truth, guess), (truth, guess)
    assert guess.kv_bytes == pytest.approx(truth.kv, abs=MIB // 10)
