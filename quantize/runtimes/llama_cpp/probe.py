"""llama.cpp tried out: a tiny model, quantized and run. Nothing heavy is imported until it is."""

from __future__ import annotations

import tempfile
from pathlib import Path

from quantize.events import SilentReporter
from quantize.runtimes.devices import ON_CPU, DevicePlace
from quantize.runtimes.probe import Probe, check_alike

PROMPT_TOKENS = 48  # the kernels of whole batches begin at 32
LLAMA_TYPES = ("Q8_0", "Q4_0", "Q5_0", "Q4_K_M", "Q6_K", "IQ4_XS")


def try_llama_cpp() -> str:
    """Quantize a tiny model and run a prompt in every type, on the CPU and, where llama.cpp has one, the GPU.

    With flash attention once: nothing here uses it, but it is what llama.cpp does by itself.
    """
    from quantize.runtimes.llama_cpp.quantize import QuantizeSettings, quantize

    folder = Path(tempfile.mkdtemp())
    source = folder / "F16.gguf"
    write_tiny_llama(source)
    files = {"F16": source, **{kind: folder / f"{kind}.gguf" for kind in LLAMA_TYPES}}
    for kind in LLAMA_TYPES:
        quantize(SilentReporter(), source, files[kind], QuantizeSettings(kind))
    from quantize.runtimes.llama_cpp.devices import find_gpus

    places = [ON_CPU, *(DevicePlace(gpu.device) for gpu in find_gpus())]
    for place in places:
        for kind, path in files.items():
            _prompt_llama_cpp(path, place, f"{kind} on {place.device}")
        _prompt_llama_cpp(source, place, f"flash attention on {place.device}", flash_attention=True)
    return f"{PROMPT_TOKENS} tokens in {', '.join(files)} on {', '.join(place.device for place in places)}"


def _prompt_llama_cpp(path: Path, place: DevicePlace, what: str, *, flash_attention: bool = False) -> None:
    from quantize.runtimes.llama_cpp.model import BatchToken, ModelSettings, OpenModel

    settings = ModelSettings(2 * PROMPT_TOKENS, threads=1, flash_attention=flash_attention, place=place)
    model = OpenModel(path, settings)
    tokens = [(7 * index) % model.vocabulary for index in range(PROMPT_TOKENS)]
    last = PROMPT_TOKENS - 1
    model.decode(BatchToken(token, index, 0, True) for index, token in enumerate(tokens))
    together = model.logits(PROMPT_TOKENS)[last].copy()
    model.forget()
    for index, token in enumerate(tokens):
        model.decode([BatchToken(token, index, 0, index == last)])
    check_alike(together, model.logits(1)[0], what)
    model.close()


def write_tiny_llama(path: Path) -> None:
    """A Llama of one block and 90,000 random weights in F16, as GGUF, without a tokenizer. Raises ImportError."""
    import gguf
    import numpy as np

    width, head, inner, words = 256, 32, 32, 64  # K-quants take rows of 256, AMX takes 32 rows
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(4 * PROMPT_TOKENS)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(words)
    writer.add_tokenizer_model("none")
    shapes = {
        "token_embd": (words, width), "output": (words, width),
        "blk.0.attn_q": (head, width), "blk.0.attn_k": (head, width), "blk.0.attn_v": (head, width),
        "blk.0.attn_output": (width, head),
        "blk.0.ffn_gate": (inner, width), "blk.0.ffn_up": (inner, width), "blk.0.ffn_down": (width, inner),
    }  # fmt: skip
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", (random.standard_normal(shape) / 8).astype(np.float16))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(width, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


LLAMA_CPP_PROBE = Probe("llama.cpp", "llama-cpp-python", try_llama_cpp)
