"""Memory arithmetic: what a model takes in its runtime, at a context length and a concurrency.

In: a ModelShape, the bytes of the weights, a runtime, a KV type. Out: bytes, all integers, the same on every machine:
weights, KV cache, overhead, an expected figure and a safe-upper one; a table. They are opinions: made anew for whoever
asks, and in no manifest. Nothing is read or measured here, and nothing heavy is imported. Whether it fits a card is for
fit.py; docs/estimates.md holds these formulas against llama.cpp's own log.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

from quantize.errors import UsageError
from quantize.model.shape import KvLayer, ModelShape
from quantize.system.sizes import GIB

__all__ = [
    "CONCURRENCIES",
    "CONTEXTS",
    "IN_LLAMA_CPP",
    "KV_TYPES",
    "RUNTIMES",
    "Estimate",
    "EstimateSettings",
    "KvLayer",
    "MemoryTable",
    "ModelShape",
    "VramProfile",
    "compute_buffer_bytes",
    "estimate",
    "kv_bytes",
    "kv_bytes_per_token",
    "memory_table",
    "repacked_bytes",
    "vram_table",
]  # fmt: skip

MIB = 2**20
CONTEXTS = (2048, 4096, 8192, 16384, 32768)
CONCURRENCIES = (1, 2, 4, 8)
RUNTIMES = ("llama.cpp", "transformers", "vllm")

# Bytes a value. q8_0 is 34 bytes for 32 values (a half-precision scale each), q4_0 is 18: ggml-common.h.
KV_TYPES = {"f16": Fraction(2), "q8_0": Fraction(34, 32), "q4_0": Fraction(18, 32)}

# llama.cpp, ggml-cpu/repack.cpp: on an x86 CPU with AVX2 or AVX-512 these are kept twice, as mapped and as repacked.
_REPACKED_TYPES = frozenset({"Q4_0", "Q4_K", "Q2_K", "IQ4_NL", "MXFP4"})

# (expected, upper) bytes that a process pays before its first tensor. The GPU figures are from vendors' documentation
# and reports of other people's cards; no GPU was at hand when this was written.
_GPU_CONTEXT = {
    "llama.cpp": (400 * MIB, 700 * MIB),
    "transformers": (500 * MIB, 900 * MIB),
    "vllm": (800 * MIB, 1600 * MIB),
}
_CPU_PROCESS = {"llama.cpp": (32 * MIB, 128 * MIB), "transformers": (600 * MIB, 1200 * MIB), "vllm": (GIB, 2 * GIB)}
_VLLM_BATCH_TOKENS = 8192  # vLLM's max_num_batched_tokens for serving
_VLLM_SEQUENCES = 256  # vLLM's max_num_seqs: its profiling run samples that many
_SHARD_BYTES = 5 * GIB  # safetensors shards are read through one at a time


@dataclass(frozen=True)
class EstimateSettings:
    """How the model is run.

    ubatch: tokens that llama.cpp computes at once (its n_ubatch). unified_kv: one KV pool for all sequences
    (llama.cpp's kv_unified). device: "gpu" or "cpu".
    """

    runtime: str = "llama.cpp"
    kv_type: str = "f16"
    device: str = "gpu"
    ubatch: int = 512
    flash_attention: bool = True
    unified_kv: bool = False
    full_sliding_cache: bool = False

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("runtime", self.runtime, RUNTIMES),
            ("KV type", self.kv_type, tuple(KV_TYPES)),
            ("device", self.device, ("gpu", "cpu")),
        ):
            if value not in allowed:
                raise UsageError(f"{value!r} is no {name}", hint=f"use one of: {', '.join(allowed)}")


@dataclass(frozen=True)
class Estimate:
    """Bytes on the device that runs the model, and the RAM that loading takes (expected, and to be safe)."""

    context: int
    concurrency: int
    weights_bytes: int
    kv_bytes: int
    overhead_bytes: int
    expected_bytes: int
    upper_bytes: int
    loading_ram_bytes: int
    loading_ram_upper_bytes: int


@dataclass(frozen=True)
class MemoryTable:
    """What one model takes in one runtime, at contexts x concurrencies, contexts first. kv_bytes_per_token: of one
    sequence, while no window is full.
    """

    runtime: str
    kv_type: str
    weights_bytes: int
    kv_bytes_per_token: int
    cells: tuple[Estimate, ...]

    def up_to(self, context: int) -> Estimate:
        """For one sequence, or the fewest in it, at the largest context up to this one; at the smallest if none is."""
        first = [cell for cell in self.cells if cell.concurrency == self.cells[0].concurrency]
        return ([cell for cell in first if cell.context <= context] or first[:1])[-1]


@dataclass(frozen=True)
class VramProfile:
    """What the memory of a model depends on beside its shape and size: how its format is run.

    runtime: what is estimated for where no runtime is named. unpacked_bytes: transformers' scratch for one linear,
    bytes a weight. activation_bytes: more of transformers' activations, bytes a value of the intermediate size and
    token.
    """

    runtime: str = "transformers"
    unpacked_bytes: int = 0
    activation_bytes: int = 0


IN_LLAMA_CPP = VramProfile("llama.cpp")


def estimate(
    shape: ModelShape,
    weights_bytes: int,
    *,
    profile: VramProfile = IN_LLAMA_CPP,
    settings: EstimateSettings | None = None,
    context: int = 4096,
    concurrency: int = 1,
    repacked: int = 0,
) -> Estimate:
    """Memory of one model in one runtime.

    context: tokens of each sequence, prompt and answer. concurrency: sequences in memory at once. repacked: bytes of
    weights that llama.cpp keeps a second time on a CPU (see repacked_bytes). Raises UsageError on a value below 1.
    """
    settings = settings or EstimateSettings(runtime=profile.runtime)
    if min(context, concurrency) < 1 or weights_bytes < 0:
        raise UsageError("context and concurrency must be at least 1 and the weights at least 0 bytes")
    weights = weights_bytes + (repacked if settings.device == "cpu" and settings.runtime == "llama.cpp" else 0)
    kv = kv_bytes(shape, context, concurrency, settings)
    overhead, overhead_upper = _overhead(shape, profile, settings, context, concurrency, kv)
    expected = weights + kv + overhead
    ram, ram_upper = _loading_ram(shape, weights_bytes, settings, expected)
    return Estimate(
        context=context,
        concurrency=concurrency,
        weights_bytes=weights,
        kv_bytes=kv,
        overhead_bytes=overhead,
        expected_bytes=expected,
        upper_bytes=weights + _share(weights, 2) + kv + _share(kv, 3) + overhead_upper,
        loading_ram_bytes=ram,
        loading_ram_upper_bytes=ram_upper,
    )


def kv_bytes_per_token(shape: ModelShape, kv_type: str = "f16", *, expanded: bool = False) -> int:
    """Bytes that one more token of one sequence takes while no window is full (expanded: as transformers stores it)."""
    values = sum(layer.expanded_values if expanded else layer.values for layer in shape.kv_layers)
    return _ceil(values * KV_TYPES[kv_type])


def kv_bytes(shape: ModelShape, context: int, concurrency: int = 1, settings: EstimateSettings | None = None) -> int:
    """Bytes of the KV cache: for each layer, values a token x kept tokens x sequences x bytes a value.

    A sliding-window layer keeps its window. llama.cpp rounds up to 256 tokens and adds a micro-batch to a window
    (llama-kv-cache-iswa.cpp); transformers stores latent attention expanded to all heads.
    """
    settings = settings or EstimateSettings()
    if settings.runtime == "llama.cpp":
        values = _llama_cpp_kv_values(shape, context, concurrency, settings)
    else:
        expanded = settings.runtime == "transformers"
        values = concurrency * sum(
            (layer.expanded_values if expanded else layer.values) * min(context, layer.window or context)
            for layer in shape.kv_layers
        )
    return _ceil(values * KV_TYPES[settings.kv_type])


def _llama_cpp_kv_values(shape: ModelShape, context: int, concurrency: int, settings: EstimateSettings) -> int:
    cells = _pad(context) * concurrency
    total = 0
    for layer in shape.kv_layers:
        if layer.window is None or settings.full_sliding_cache:
            total += layer.values * cells
        elif settings.unified_kv:
            total += layer.values * min(cells, _pad(layer.window * concurrency + settings.ubatch))
        else:
            total += layer.values * min(_pad(context), _pad(layer.window + settings.ubatch)) * concurrency
    return total


def compute_buffer_bytes(
    shape: ModelShape, context: int, settings: EstimateSettings, *, outputs: int | None = None
) -> int:
    """llama.cpp's compute buffer: the largest of what lives at once in the head, the feed-forward and the attention.

    context: tokens of a sequence, or of all when the KV cache is unified. outputs: tokens with logits in a micro-batch;
    llama.cpp reserves for all of them unless told otherwise. Derived from the graphs of 0.3.36; all tensors are float32
    but the mask of flash attention, which is float16.
    """
    tokens, hidden = settings.ubatch, shape.hidden_size
    logits = (tokens if outputs is None else outputs) * shape.vocab_size * 4
    masks = 2 if any(layer.window for layer in shape.kv_layers) else 1
    mask = masks * tokens * _pad(context) * (2 if settings.flash_attention else 4)
    head = logits + 3 * tokens * hidden * 4
    feed_forward = tokens * 4 * (3 * shape.intermediate_size + 4 * hidden) + mask
    if shape.experts_used > 1:  # each expert that a token visits answers for itself before the answers are added
        routed = tokens * 4 * 2 * (shape.intermediate_size + shape.experts_used * hidden) + mask
        feed_forward = max(feed_forward, routed)
    widest = max((layer.values for layer in shape.kv_layers), default=0)
    attention = mask + tokens * 4 * (4 * hidden + shape.heads * shape.head_dim + widest)
    if not settings.flash_attention:
        attention += shape.heads * tokens * _pad(context) * 4
    return max(head, feed_forward, attention)


def repacked_bytes(tensors: Iterable[tuple[str, str, int]], *, tied: bool) -> int:
    """Bytes that llama.cpp needs on an x86 CPU beyond the file, because it keeps rearranged copies of some matrices.

    tensors: (name, ggml type, bytes) in the order of the file. The token embedding is copied only where it also serves
    as the head. What lies before the first and after the last tensor that is used in place is unmapped again.
    """
    table = [(size, kind.upper() in _REPACKED_TYPES, name.startswith("token_embd")) for name, kind, size in tensors]
    in_place = [i for i, (_, copied, embedding) in enumerate(table) if not copied or embedding]
    first, last = (in_place[0], in_place[-1]) if in_place else (0, -1)
    return sum(size for size, copied, embedding in table[first : last + 1] if copied and (tied or not embedding))


def vram_table(
    shape: ModelShape,
    weights_bytes: int,
    *,
    profile: VramProfile = IN_LLAMA_CPP,
    settings: EstimateSettings | None = None,
    contexts: Iterable[int] = CONTEXTS,
    concurrencies: Iterable[int] = CONCURRENCIES,
    repacked: int = 0,
) -> tuple[Estimate, ...]:
    """One Estimate for each context x concurrency, contexts first; contexts beyond the model's own are left out."""
    possible = [context for context in contexts if context <= shape.max_context] or [shape.max_context]
    return tuple(
        estimate(
            shape, weights_bytes,
            profile=profile, settings=settings, context=context, concurrency=concurrency, repacked=repacked,
        )
        for context in possible
        for concurrency in concurrencies
    )  # fmt: skip


def memory_table(
    shape: ModelShape,
    weights_bytes: int,
    *,
    profile: VramProfile = IN_LLAMA_CPP,
    settings: EstimateSettings | None = None,
    contexts: Iterable[int] = CONTEXTS,
    concurrencies: Iterable[int] = CONCURRENCIES,
) -> MemoryTable:
    """The table of one model in one runtime. settings: None is the format's own runtime, with a 16-bit KV cache."""
    settings = settings or EstimateSettings(runtime=profile.runtime)
    return MemoryTable(
        runtime=settings.runtime,
        kv_type=settings.kv_type,
        weights_bytes=weights_bytes,
        kv_bytes_per_token=kv_bytes_per_token(shape, settings.kv_type, expanded=settings.runtime == "transformers"),
        cells=vram_table(
            shape, weights_bytes, profile=profile, settings=settings, contexts=contexts, concurrencies=concurrencies
        ),
    )


def _overhead(
    shape: ModelShape, profile: VramProfile, settings: EstimateSettings, context: int, concurrency: int, kv: int
) -> tuple[int, int]:
    """(expected, upper) bytes beside weights and KV cache."""
    base = (_GPU_CONTEXT if settings.device == "gpu" else _CPU_PROCESS)[settings.runtime]
    if settings.runtime == "llama.cpp":
        work = _llama_cpp_work(shape, settings, context, concurrency)
    elif settings.runtime == "vllm":
        work = _vllm_work(shape, concurrency)
    else:
        work = _transformers_work(shape, profile, context, concurrency, kv)
    return base[0] + work[0], base[1] + work[1]


def _llama_cpp_work(shape: ModelShape, settings: EstimateSettings, context: int, concurrency: int) -> tuple[int, int]:
    pool = context * concurrency
    output = concurrency * shape.vocab_size * 4
    expected = compute_buffer_bytes(shape, pool if settings.unified_kv else context, settings)
    upper = compute_buffer_bytes(shape, pool, settings)  # a server may unify the cache by itself
    return expected + output, upper + _share(upper, 15) + output


def _transformers_work(
    shape: ModelShape, profile: VramProfile, context: int, concurrency: int, kv: int
) -> tuple[int, int]:
    """Prefill of the batch in half precision (prompts of half the context; upper: all of it), logits of the last token
    in float32, one linear's weights unpacked, one layer's KV copied as the cache grows; upper: 15 % for fragmentation.
    """
    per_token = 2 * (3 * shape.intermediate_size + 4 * shape.hidden_size + 2 * shape.heads * shape.head_dim)
    logits = 2 * 4 * concurrency * shape.vocab_size
    layer_kv = kv // max(1, len(shape.kv_layers))
    unpacked = shape.hidden_size * max(shape.intermediate_size, shape.hidden_size)
    scratch = profile.unpacked_bytes * unpacked
    per_token += profile.activation_bytes * shape.intermediate_size
    expected = per_token * concurrency * -(-context // 2) + logits + scratch + layer_kv
    mask = concurrency * context * context  # one byte a pair, once prompts of unequal length are padded
    upper = per_token * concurrency * context + logits + 2 * scratch + 2 * layer_kv + mask
    return expected, upper + _share(upper, 15)


def _vllm_work(shape: ModelShape, concurrency: int) -> tuple[int, int]:
    """What vLLM's profiling run sees, beside its reservation of a share of the card (fit.py keeps that rule)."""
    activations = 2 * _VLLM_BATCH_TOKENS * (2 * shape.intermediate_size + 4 * shape.hidden_size)
    logits = 4 * max(_VLLM_SEQUENCES, concurrency) * shape.vocab_size
    return activations + logits, 2 * (activations + 2 * logits)


def _loading_ram(shape: ModelShape, weights_bytes: int, settings: EstimateSettings, expected: int) -> tuple[int, int]:
    """(needed, comfortable) RAM while loading. llama.cpp maps the file: pages that a GPU has taken can be dropped."""
    process = _CPU_PROCESS[settings.runtime]
    if settings.device == "cpu":
        return expected, expected + min(weights_bytes, _SHARD_BYTES) + process[1]
    if settings.runtime == "llama.cpp":
        embedding = min(weights_bytes, shape.vocab_size * shape.hidden_size)  # stays on the CPU
        return embedding + 512 * MIB, weights_bytes + GIB
    return min(weights_bytes, _SHARD_BYTES) + process[1], weights_bytes + 2 * process[1]


def _pad(tokens: int, multiple: int = 256) -> int:
    return -(-tokens // multiple) * multiple


def _share(value: int, percent: int) -> int:
    return _ceil(Fraction(value * percent, 100))


def _ceil(value: Fraction) -> int:
    return -(-value.numerator // value.denominator)
