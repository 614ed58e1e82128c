"""One tiny thing in every engine that is installed, each in a process of its own: what `quantize doctor` runs.

In: nothing but the machine. Out: a Trial for each engine: what ran, or what it died of and the line that repairs it.
The functions that are tried run in workers; nothing heavy is imported here.
"""

from __future__ import annotations

import gc
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from quantize.errors import BuildError, QuantizeError, VerifyError, WorkerDied
from quantize.events import Reporter, SilentReporter
from quantize.system.deaths import LIBRARIES, reinstall_line
from quantize.system.machine import usable_cores
from quantize.system.process import run_step

MOST_SECONDS = 300  # of one engine: what takes longer hangs
PROMPT_TOKENS = 48  # the kernels of whole batches begin at 32
LLAMA_TYPES = ("Q8_0", "Q4_0", "Q5_0", "Q4_K_M", "Q6_K", "IQ4_XS")
ALIKE = 0.99  # correlation of the logits of a batch with those of its tokens one by one


@dataclass(frozen=True)
class Trial:
    """One engine. state: "works", "died" (of a signal) or "fails". ran: what it did; problem, repair: where it did not.

    evidence: what the process wrote last.
    """

    engine: str
    package: str
    version: str
    state: str
    seconds: float
    ran: str | None = None
    problem: str | None = None
    repair: str | None = None
    evidence: str | None = None


def try_engines() -> tuple[Trial, ...]:
    """Run something in each engine that is installed, as many at once as there are cores, the slowest first."""
    there = [engine for engine in ENGINES if _version(engine[0])]
    waiting: queue.SimpleQueue[tuple[str, str, Callable[[], str]]] = queue.SimpleQueue()
    for item in there:
        waiting.put(item)
    found: dict[str, Trial] = {}

    def work() -> None:
        while not waiting.empty():
            try:
                package, engine, function = waiting.get_nowait()
            except queue.Empty:
                return
            found[package] = try_engine(package, engine, function)

    # Daemons: Ctrl-C ends the command, and with it the processes, at once.
    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(usable_cores(), len(there)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return tuple(found[package] for package, *_ in reversed(there))


def try_engine(package: str, engine: str, function: Callable[[], str]) -> Trial:
    """Run one function in a process of its own and say what came of it."""
    started = time.perf_counter()
    version = _version(package) or ""
    with tempfile.TemporaryDirectory(prefix="quantize-doctor-") as folder:
        try:
            ran = run_step(engine, SilentReporter(), _run, function, folder, most_seconds=MOST_SECONDS)
            return Trial(engine, package, version, "works", _since(started), ran)
        except QuantizeError as exc:
            state = "died" if isinstance(exc, WorkerDied) else "fails"
            problem = exc.message.removeprefix(f"{engine}: ")
            evidence = str(exc.__cause__) if exc.__cause__ else None
            return Trial(
                engine, package, version, state, _since(started),
                problem=problem, repair=_repair(exc, package), evidence=evidence,
            )  # fmt: skip


def _run(_reporter: Reporter, function: Callable[[], str], folder: str) -> str:
    """In the process of its own. Temporary files go where they are removed even if it dies."""
    gc.disable()  # what an import makes stays: an eighth of the time is saved
    tempfile.tempdir = folder
    return function()


def _repair(error: QuantizeError, package: str) -> str:
    """One line: what is installed and can't be imported, or computes nonsense, wants to be installed again."""
    if error.hint and (isinstance(error, WorkerDied) or not isinstance(error, BuildError | VerifyError)):
        return error.hint.partition("\n")[0]
    lines = [reinstall_line(library) for library in LIBRARIES if library.package == package]
    return f"reinstall it with: {(lines or [f'pip install --force-reinstall --no-cache-dir {package}'])[0]}"


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
    import llama_cpp

    places = {"CPU": 0, **({"GPU": -1} if llama_cpp.llama_supports_gpu_offload() else {})}
    for place, layers in places.items():
        for kind, path in files.items():
            _prompt_llama_cpp(path, layers, f"{kind} on the {place}")
        _prompt_llama_cpp(source, layers, f"flash attention on the {place}", flash_attention=True)
    return f"{PROMPT_TOKENS} tokens in {', '.join(files)} on the {' and the '.join(places)}"


def _prompt_llama_cpp(path: Path, gpu_layers: int, what: str, *, flash_attention: bool = False) -> None:
    from quantize.runtimes.llama_cpp.model import BatchToken, ModelSettings, OpenModel

    settings = ModelSettings(2 * PROMPT_TOKENS, threads=1, flash_attention=flash_attention, gpu_layers=gpu_layers)
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


def check_alike(together: Any, alone: Any, what: str) -> None:
    """Two arrays of one shape that ought to be equal but for rounding. Raises VerifyError: they are not."""
    import numpy as np

    first, second = (np.asarray(values, dtype=np.float64).reshape(-1) for values in (together, alone))
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise VerifyError(f"{what}: the results are not finite numbers")
    size = np.linalg.norm(first) * np.linalg.norm(second)
    if not size or first @ second / size < ALIKE:
        raise VerifyError(f"{what}: one computation in two ways gives two results")


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


def try_torch() -> str:
    """A matrix product and a factorization in float32, a product in bfloat16, on the CPU and each GPU."""
    import torch

    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 256, 256, generator=generator, dtype=torch.float64)
    wanted = left @ right
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    for device in devices:
        for dtype in (torch.float32, torch.bfloat16):
            product = left.to(device, dtype) @ right.to(device, dtype)
            check_alike(product.double().cpu(), wanted, f"a matrix product in {dtype} on {device}")
        square = (left @ left.T).to(device, torch.float32) + torch.eye(256, device=device)
        factor = torch.linalg.cholesky(square)
        check_alike((factor @ factor.T).cpu(), square.cpu(), f"a Cholesky factorization on {device}")
    return f"products in float32 and bfloat16, a factorization on {', '.join(devices)}"


def try_transformers() -> str:
    """Its import, and the machine code under it: text through tokenizers, an array through safetensors."""
    import numpy as np
    import transformers
    from safetensors.numpy import load_file, save_file
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[UNK]", *(f"w{index}" for index in range(PROMPT_TOKENS))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ids = np.array(tokenizer.encode(" ".join(words[1:])).ids)
    file = Path(tempfile.mkdtemp()) / "tiny.safetensors"
    save_file({"ids": ids}, file)
    check_alike(load_file(file)["ids"], np.arange(1, len(words)), "text to tokens to a file")
    return f"imported, as version {transformers.__version__}; tokenizers and safetensors"


def try_bitsandbytes() -> str:
    """INT8 rows and an NF4 matrix, there and back."""
    import torch
    from bitsandbytes import functional

    values = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    codes, scales, _ = functional.int8_vectorwise_quant(values.half())
    check_alike(codes.float() * scales.float()[:, None] / 127, values, "INT8")
    product = functional.int8_linear_matmul(codes, codes)
    check_alike(product, codes.double() @ codes.double().T, "an INT8 matrix product")
    packed, state = functional.quantize_4bit(values, quant_type="nf4")
    check_alike(functional.dequantize_4bit(packed, state), values, "NF4")
    return "INT8 and NF4 there and back, a product in INT8"


def try_gptqmodel() -> str:
    """Its import, as loading an artifact does it."""
    from quantize.formats.packed.runtime import GPTQMODEL

    GPTQMODEL.import_torch("the GPTQ format")
    import gptqmodel

    return f"imported, as version {gptqmodel.__version__}"


# Package, engine, what is tried; the slowest first.
ENGINES: Sequence[tuple[str, str, Callable[[], str]]] = (
    ("gptqmodel", "gptqmodel", try_gptqmodel),
    ("bitsandbytes", "bitsandbytes", try_bitsandbytes),
    ("transformers", "transformers", try_transformers),
    ("torch", "torch", try_torch),
    ("llama-cpp-python", "llama.cpp", try_llama_cpp),
)


def _since(started: float) -> float:
    return round(time.perf_counter() - started, 2)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
