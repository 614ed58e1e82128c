"""How to run an artifact elsewhere: the exact command, Modelfile or compose file for it.

In: a runtime's name, a target, where to listen. Out: text. Raises RefusedError where a runtime does not take the
format, with what does.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import yaml

from quantize.errors import RefusedError, UsageError
from quantize.estimate.fit import USABLE_PERCENT
from quantize.files.gguf import towers_beside
from quantize.files.gguf_split import is_part
from quantize.formats import find_format, plugin_of
from quantize.formats.format import No
from quantize.runtimes.served import KV_BITS
from quantize.serve.address import written
from quantize.serve.preflight import DEFAULT_CONTEXT
from quantize.serve.targets import LocalTarget
from quantize.system.gpus import nvidia_gpus

KEY = "${QUANTIZE_API_KEY:?set it to the API key}"  # a shell, and Docker, stop where it is not set
VLLM_IMAGE = "vllm/vllm-openai:v0.33.0"
GATEWAY_IMAGE = "quantize-gateway"
MOUNT = "/model"
INSIDE_PORT = "8000"
SPARED_PERCENT = 1  # of a card: what is free now may be a little less when vLLM looks
INSIDE = {"--host": "0.0.0.0", "--port": INSIDE_PORT}  # in a container
HF_HOME, HF_INSIDE = "~/.cache/huggingface", "/root/.cache/huggingface"


@dataclass(frozen=True)
class ContainerSettings:
    """How vLLM's container is run. hf_cache: "" is where the hub's client has it. gpu_memory_utilization: its share of
    the card; None is what may be planned with, or less where less is free on this machine's card now.
    """

    image: str = VLLM_IMAGE
    runtime: str = "nvidia"
    ipc: str = "host"
    hf_cache: str = ""
    gpu_memory_utilization: float | None = None

    @classmethod
    def of(cls, pairs: Sequence[str]) -> ContainerSettings:
        """From NAME=VALUE as on the command line. Raises UsageError: no such name, no such value."""
        found: dict[str, Any] = {}
        for pair in pairs:
            name, equals, value = pair.partition("=")
            field = name.replace("-", "_")
            if not equals or not value or field not in cls.__dataclass_fields__:
                known = ", ".join(item.replace("_", "-") for item in cls.__dataclass_fields__)
                raise UsageError(f"--set {pair!r} is no setting of a container", hint=f"NAME=VALUE, of: {known}")
            found[field] = _share(value) if field == "gpu_memory_utilization" else value
        return cls(**found)

    @property
    def hf_folder(self) -> str:
        """The hub client's cache on this machine."""
        return os.path.abspath(os.path.expanduser(self.hf_cache or os.environ.get("HF_HOME") or HF_HOME))


def _share(value: str) -> float:
    try:
        share = float(value)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise UsageError(f"--set gpu-memory-utilization={value}: not a share of the card", hint="above 0, at most 1")
    return share


@dataclass(frozen=True)
class HandOver:
    """Where to listen, on what, and for how much. device: auto and cuda mean the first GPU. kv_bits: see Serving."""

    host: str = "127.0.0.1"
    port: int = 8000
    device: str = "auto"
    context: int | None = None
    concurrency: int = 2
    kv_bits: str = "16"
    container: ContainerSettings = ContainerSettings()

    def context_of(self, target: LocalTarget) -> int:
        """Tokens of a sequence."""
        return self.context or min(DEFAULT_CONTEXT, target.shape.max_context)

    @property
    def on_cpu(self) -> bool:
        """Whether it is to run without a GPU."""
        return self.device == "cpu"

    @property
    def gpu(self) -> str:
        """Number of the GPU."""
        return self.device.partition(":")[2] or "0"

    @property
    def memory_share(self) -> float:
        """Of the GPU, for vLLM, which does not start where less than its share is free: a display takes some."""
        if self.container.gpu_memory_utilization is not None:
            return self.container.gpu_memory_utilization
        gpus = nvidia_gpus()
        card = gpus[int(self.gpu)] if self.gpu.isdecimal() and int(self.gpu) < len(gpus) else None
        if card is None or not card.vram_bytes:
            return USABLE_PERCENT / 100
        free_percent = 100 * (card.vram_bytes - card.used_bytes) // card.vram_bytes
        return max(1, min(USABLE_PERCENT, free_percent - SPARED_PERCENT)) / 100

    def refuse_small_kv(self, runtime: str) -> None:
        """Raise UsageError: the KV cache is to have fewer bits, in a runtime that has other types for it."""
        if self.kv_bits != "16":
            hint = "leave it out, or use --print llama-server, or `quantize serve`"
            raise UsageError(f"--kv-bits {self.kv_bits}: {runtime} has no such KV cache", hint=hint)


def render(runtime: str, targets: Sequence[LocalTarget], wanted: HandOver) -> str:
    """The text for all artifacts, each on a port of its own from the wanted one up; compose takes them in one file."""
    each = [(target, replace(wanted, port=wanted.port + number)) for number, target in enumerate(targets)]
    if runtime == "compose":
        return _compose(each)
    return "\n\n".join(_RENDERERS[runtime](target, own) for target, own in each)


def _vllm(target: LocalTarget, wanted: HandOver) -> str:
    remark = _check_vllm(target, wanted)
    notes = [f"# {target.name} ({target.format}) in vLLM; the key is read from the environment", _vllm_note(wanted)]
    notes += [f"# {remark}"] if remark else []
    command = [f"CUDA_VISIBLE_DEVICES={wanted.gpu}", "vllm", "serve", str(target.folder.resolve())]
    return "\n".join([*notes, _lines(command, _vllm_options(target, wanted))])


def _vllm_note(wanted: HandOver) -> str:
    """What of the numbers is to be known."""
    share, count = wanted.memory_share, wanted.concurrency
    spare = ", which is what is free on it now" if share < USABLE_PERCENT / 100 else ""
    spare = "" if wanted.container.gpu_memory_utilization is not None else spare
    return f"# {count} answers at once: --concurrency is how many; {share:.0%} of the card's memory{spare}"


def _vllm_options(target: LocalTarget, wanted: HandOver) -> list[tuple[str, ...]]:
    wanted.refuse_small_kv("vLLM")
    return [
        ("--served-model-name", target.name),
        ("--host", wanted.host),
        ("--port", str(wanted.port)),
        ("--gpu-memory-utilization", f"{wanted.memory_share:g}"),
        ("--max-model-len", str(wanted.context_of(target))),
        ("--max-num-seqs", str(wanted.concurrency)),
        ("--api-key", KEY),
    ]


def _docker(target: LocalTarget, wanted: HandOver) -> str:
    """vLLM's own image, whole: a shell runs it as it stands."""
    remark, container = _check_vllm(target, wanted), wanted.container
    notes = [f"# {target.name} ({target.format}) in vLLM's container; the key is read from the environment"]
    notes += [_vllm_note(wanted)]
    notes += [f"# {remark}"] if remark else []
    options: list[tuple[str, ...]] = [
        ("--runtime", container.runtime),
        ("--gpus", f"device={wanted.gpu}"),
        ("--ipc", container.ipc),
        ("--publish", f"{written(wanted.host, wanted.port)}:{INSIDE_PORT}"),
        ("--mount", _mount(container.hf_folder, HF_INSIDE)),
        ("--mount", _mount(str(target.folder.resolve()), MOUNT) + ",readonly"),
        (container.image,),
        ("--model", MOUNT),
    ]
    options += [(item[0], INSIDE.get(item[0], item[1])) for item in _vllm_options(target, wanted)]
    return "\n".join([*notes, _lines(["docker", "run", "--rm"], options)])


def _mount(source: str, target: str) -> str:
    """A --mount, whose fields are those of a line of CSV."""
    field = f"source={source}"
    if re.search(r'[,"\n]', field):
        field = '"' + field.replace('"', '""') + '"'
    return f"type=bind,{field},target={target}"


def _check_vllm(target: LocalTarget, wanted: HandOver) -> str:
    """What to know of the format in vLLM, "" for nothing. Raises RefusedError: it does not run there."""
    answer = _in_vllm(target)
    if isinstance(answer, No):
        raise RefusedError(f"{target.name}: {answer.reason}", hint=answer.hint)
    if wanted.on_cpu:
        raise RefusedError(f"{target.name}: vLLM's quantized formats need a GPU", hint="use `quantize serve`")
    return answer


def _in_vllm(target: LocalTarget) -> str | No:
    options = target.artifact.manifest.options if target.artifact else {}
    return find_format(target.format).handover.vllm(options)


def _ollama(target: LocalTarget, wanted: HandOver) -> str:
    _need_gguf(target, "Ollama")
    wanted.refuse_small_kv("a Modelfile")
    if is_part(target.path):
        hint = "join them with llama.cpp's llama-gguf-split --merge, or use --print llama-server, or `quantize serve`"
        raise RefusedError(f"{target.name}: Ollama takes no model in several files", hint=hint)
    name = target.name.replace("/", "-").lower()
    return "\n".join([
        f"# Modelfile of {target.name}: save it as Modelfile, then",
        f"#   ollama create {name} -f Modelfile && ollama run {name}",
        "# Ollama has no API keys: keep it on this machine, or put `quantize serve` in front of it:",
        f"#   quantize serve http://127.0.0.1:11434/v1#{name} --keys FILE",
        "# The chat template is the file's own.",
        *(f"# It reads text only: {towers.name} is not in it." for towers in towers_beside(target.path)),
        f"FROM {os.path.abspath(target.path)}",
        f"PARAMETER num_ctx {wanted.context_of(target)}",
        *(["PARAMETER num_gpu 0"] if wanted.on_cpu else []),
    ])  # fmt: skip


def _llama_server(target: LocalTarget, wanted: HandOver) -> str:
    _need_gguf(target, "llama-server")
    command = ["llama-server", "--model", os.path.abspath(target.path)]
    if not wanted.on_cpu:
        command = [f"CUDA_VISIBLE_DEVICES={wanted.gpu}", *command]
    options: list[tuple[str, ...]] = [
        *(("--mmproj", os.path.abspath(towers)) for towers in towers_beside(target.path)),
        ("--alias", target.name),
        ("--host", wanted.host),
        ("--port", str(wanted.port)),
        ("--ctx-size", str(wanted.context_of(target) * wanted.concurrency)),
        ("--parallel", str(wanted.concurrency)),
        ("--n-gpu-layers", "0" if wanted.on_cpu else "999"),
        *_kv_options(wanted.kv_bits),
        ("--jinja",),
        ("--api-key", KEY),
    ]
    note = "# --ctx-size is shared by all sequences"
    note += "; flash attention changes answers, so it is off" if wanted.kv_bits == "16" else ""
    return f"{note}\n{_lines(command, options)}"


def _sglang(target: LocalTarget, wanted: HandOver) -> str:
    answer = find_format(target.format).handover
    if not answer.sglang:
        hint = "build a compressed-tensors, awq or gptq variant, or use `quantize serve`"
        raise RefusedError(f"{target.name}: SGLang is not known to take {target.format} artifacts", hint=hint)
    if wanted.on_cpu:
        raise RefusedError(f"{target.name}: SGLang's quantized formats need a GPU", hint="use `quantize serve`")
    wanted.refuse_small_kv("SGLang")
    command = [f"CUDA_VISIBLE_DEVICES={wanted.gpu}", "python", "-m", "sglang.launch_server"]
    options: list[tuple[str, ...]] = [
        ("--model-path", str(target.folder.resolve())),
        ("--served-model-name", target.name),
        ("--host", wanted.host),
        ("--port", str(wanted.port)),
        ("--mem-fraction-static", f"{wanted.memory_share:g}"),
        ("--context-length", str(wanted.context_of(target))),
        ("--max-running-requests", str(wanted.concurrency)),
        ("--api-key", KEY),
    ]
    remark = _in_vllm(target)
    notes = [f"# {target.name} ({target.format}) in SGLang; the key is read from the environment"]
    notes += [f"# {remark}"] if isinstance(remark, str) and remark else []
    return "\n".join([*notes, _lines(command, options)])


def _mlx(target: LocalTarget, wanted: HandOver) -> str:
    if not find_format(target.format).handover.mlx:
        hint = "build an mlx variant, or use `quantize serve`"
        raise RefusedError(f"{target.name}: mlx-lm takes MLX artifacts, this is {target.format}", hint=hint)
    wanted.refuse_small_kv("mlx_lm.server")
    options: list[tuple[str, ...]] = [
        ("--model", str(target.folder.resolve())),
        ("--host", wanted.host),
        ("--port", str(wanted.port)),
        ("--decode-concurrency", str(wanted.concurrency)),
    ]
    note = "# mlx_lm.server asks for no key: whoever reaches the port is answered"
    return f"{note}\n{_lines(['mlx_lm.server'], options)}"


def _kv_options(bits: str) -> list[tuple[str, ...]]:
    if bits == "16":
        return [("--flash-attn", "off")]
    return [("--flash-attn", "on"), ("--cache-type-k", KV_BITS[bits]), ("--cache-type-v", KV_BITS[bits])]


def _need_gguf(target: LocalTarget, runtime: str) -> None:
    if not _in_llama_cpp(target):
        hint = "build a gguf variant, or use --print vllm, or `quantize serve`"
        raise RefusedError(f"{target.name}: {runtime} takes GGUF files, this is {target.format}", hint=hint)


def _compose(each: Sequence[tuple[LocalTarget, HandOver]]) -> str:
    notes: list[str] = []
    services: dict[str, Any] = {}
    for target, wanted in each:
        note, service = _service(target, wanted)
        name = "model" if len(each) == 1 else re.sub(r"[^a-z0-9]+", "-", target.name.lower()).strip("-") or "model"
        services[name if name not in services else f"{name}-{len(services)}"] = service
        notes += note
    notes.append("# QUANTIZE_API_KEY=… docker compose up")
    return "\n".join(notes) + "\n" + yaml.safe_dump({"services": services}, sort_keys=False, width=120).rstrip()


def _service(target: LocalTarget, wanted: HandOver) -> tuple[list[str], dict[str, Any]]:
    """vLLM where it takes the format and there is a GPU; else this gateway's own image (deploy/Dockerfile)."""
    answer = _in_vllm(target)
    if find_format(target.format).handover.mlx:
        hint = "use --print mlx, or `quantize serve`"
        raise RefusedError(f"{target.name}: MLX runs on Apple silicon, which no container reaches", hint=hint)
    in_vllm = not wanted.on_cpu and not isinstance(answer, No)
    service = _vllm_service(target, wanted) if in_vllm else _gateway_service(target, wanted)
    service |= {
        "ports": [f"{written(wanted.host, wanted.port)}:8000"],
        "volumes": [
            {"type": "bind", "source": _plain(str(target.folder.resolve())), "target": MOUNT, "read_only": True}
        ],
        "restart": "unless-stopped",
    }
    if not wanted.on_cpu:
        device = {"driver": "nvidia", "device_ids": [wanted.gpu], "capabilities": ["gpu"]}
        service["deploy"] = {"resources": {"reservations": {"devices": [device]}}}
    note = [
        f"# {target.name} ({target.format})"
        + (f": {answer.reason}: this gateway runs it" if isinstance(answer, No) else "")
    ]
    if in_vllm:
        note.append(_vllm_note(wanted))
    if not in_vllm and wanted.on_cpu and not _in_llama_cpp(target):
        note.append("# the cuda image runs on a CPU too; the cpu image has no torch")
    if not in_vllm and (plugin := plugin_of(target.format)) is not None:
        note.append(
            f"# the image needs what brings {target.format}: make one FROM it with RUN pip install {plugin.name}"
        )
    return note, service


def _vllm_service(target: LocalTarget, wanted: HandOver) -> dict[str, Any]:
    options = [(item[0], INSIDE.get(item[0], item[1])) for item in _vllm_options(target, wanted)]
    words = [word if word == KEY else _plain(word) for item in options for word in item]
    return {"image": wanted.container.image, "command": [MOUNT, *words], "ipc": wanted.container.ipc}


def _gateway_service(target: LocalTarget, wanted: HandOver) -> dict[str, Any]:
    mounted = MOUNT if target.path == target.folder else f"{MOUNT}/{target.path.name}"
    command = [
        _plain(f"{target.name}={mounted}"), "--host", "0.0.0.0", "--port", "8000",
        "--context", str(wanted.context_of(target)), "--concurrency", str(wanted.concurrency),
        "--device", "cpu" if wanted.on_cpu else "cuda:0",
        *(["--kv-bits", wanted.kv_bits] if wanted.kv_bits != "16" else []),
    ]  # fmt: skip
    return {
        "image": f"{GATEWAY_IMAGE}:{'cpu' if wanted.on_cpu and _in_llama_cpp(target) else 'cuda'}",
        "command": command,
        "environment": {"QUANTIZE_API_KEYS": KEY},
    }


def _in_llama_cpp(target: LocalTarget) -> bool:
    return find_format(target.format).handover.llama_cpp_file


def _plain(word: str) -> str:
    """Without variables in it, as Docker reads it."""
    return word.replace("$", "$$")


def _lines(command: list[str], options: list[tuple[str, ...]]) -> str:
    """A shell command, one option a line. The key stays a variable for the shell."""
    rows = [" ".join(_quoted(word) for word in command)]
    rows += ["  " + " ".join(_quoted(word) for word in option) for option in options]
    return " \\\n".join(rows)


def _quoted(word: str) -> str:
    return f'"{KEY}"' if word == KEY else shlex.quote(word)


_RENDERERS: dict[str, Callable[[LocalTarget, HandOver], str]] = {
    "vllm": _vllm,
    "docker": _docker,
    "ollama": _ollama,
    "llama-server": _llama_server,
    "sglang": _sglang,
    "mlx": _mlx,
}
