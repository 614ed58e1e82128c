"""What a format's runtime computes, beside what its weights facet says: run it in a worker, for runtimes patch much."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.events import Reporter
from quantize.formats import find_format, open_runtime, runtime_kind
from quantize.model.checkpoint import open_checkpoint
from quantize.runtimes.base import ModelRef, Prompted
from quantize.runtimes.devices import CPU, DevicePlace
from quantize.runtimes.served import Chosen, PromptTokens, Sampling, Serving

WINDOW = tuple(range(3, 51))
ANSWER = 4


@dataclass(frozen=True)
class Computed:
    """Mean KL divergence, in nats, of the runtime from a model of the weights as they are read, and from the source.

    answered, served: greedy tokens after WINDOW, as evaluation and as the gateway ask for them. runtime: its name, and
    what the gateway calls it. kernel: what computes quantized linears, where there are several. vram_bytes: of the
    served model; None where it is on a CPU.
    """

    from_weights: float
    from_source: float
    answered: tuple[int, ...]
    served: tuple[int, ...]
    runtime: tuple[str, str]
    kernel: str = ""
    vram_bytes: int | None = None


def compute(reporter: Reporter, model: ModelRef, source: Path, device: str = CPU) -> Computed:
    """Open the model in its runtime, twice, and the source in transformers, on the CPU. device: of the former."""
    import numpy as np

    with closing(open_runtime(model, context=128, threads=1, place=DevicePlace(device))) as runtime:
        theirs = np.concatenate([block.cpu().numpy() for block in runtime.log_probs(WINDOW)])
        (answered,) = runtime.answer([Prompted(WINDOW, ANSWER)])
        name = runtime.name
    serving = Serving(context=128, slots=1, device=device, threads=1, named=True)
    served = runtime_kind(model.format).serve(model, serving, lambda _: None)
    slot = served.begin(PromptTokens([*WINDOW]), Sampling(temperature=0))
    tokens: list[int] = []
    while len(tokens) < ANSWER:
        tokens += [chosen.token for chosen in served.step().values() if isinstance(chosen, Chosen)]
    served.end(slot)
    vram_bytes, about = served.memory().get("vram_allocated"), served.description
    served.close()
    plain = _log_probs(source, {})
    distances = (_divergence(ours, theirs) for ours in (_log_probs(source, dict(_weights(model, source))), plain))
    return Computed(*distances, tuple(answered), tuple(tokens), (name, about.runtime), about.kernel, vram_bytes)


def _weights(model: ModelRef, source: Path) -> Iterator[tuple[str, Any]]:
    """Every tensor of the source as the artifact has it: by its weights facet, or as it lies in its files."""
    import numpy as np
    import torch

    found, checkpoint = find_format(model.format), open_checkpoint(source)
    assert found.weights is not None
    read = found.weights.reader(model.path, checkpoint)
    names = found.layout.weight_names(path.name for path in model.folder.iterdir())
    files = [found.layout.read(model.folder / name) for name in names]
    for name in checkpoint.tensors:
        original = checkpoint.read(name).float()
        matrix = read(name, original)
        if matrix is None:
            (file,) = [item for item in files if name in item.tensors]
            item = file.tensors[name]
            assert item.decode is not None
            raw = np.fromfile(file.path, np.uint8, item.size_bytes, offset=item.offset)
            matrix = torch.from_numpy(item.decode(raw)).float().reshape(original.shape)
        yield name, matrix


def _log_probs(source: Path, weights: dict[str, Any]) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    assert not model.load_state_dict(weights, strict=False).unexpected_keys
    with torch.inference_mode():
        return torch.log_softmax(model(torch.tensor([WINDOW[:-1]])).logits[0], -1).numpy()


def _divergence(ours: Any, theirs: Any) -> float:
    import numpy as np

    return float((np.exp(ours) * (ours - theirs)).sum(-1).mean())
