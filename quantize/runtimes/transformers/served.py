"""transformers as a ServedModel: whatever its kind loads, on one device.

In: a model and how to serve it. Out: tokens for several sequences, a step at a time: on a CPU in turn, each with a KV
cache of its own; on a GPU together, as soon as their prompts are read. Weights are read straight to the device; where
each layer ended up is looked at, not assumed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantize.runtimes.base import ModelRef
from quantize.runtimes.choosing import Answer, check_known, choose
from quantize.runtimes.devices import CPU
from quantize.runtimes.served import Chosen, Description, Embedding, Progress, PromptTokens, Refused, Sampling, Serving
from quantize.runtimes.transformers.load import TransformersLoader, kernels
from quantize.runtimes.transformers.together import Together
from quantize.runtimes.transformers.words import FolderWords
from quantize.system.machine import usable_cores

PREFILL_TOKENS = 512
SUPPORTS = ("top_k", "min_p", "penalties", "repetition_penalty", "logprobs", "embeddings")


@dataclass
class TransformersReading:
    """A text that is read for its embedding. total: the sum of what the last layer made of its tokens."""

    tokens: list[int]
    done: int = 0
    cache: Any = None
    total: Any = 0.0


class TransformersModel(FolderWords):
    """See ServedModel."""

    def __init__(self, loader: TransformersLoader, model: ModelRef, serving: Serving, progress: Progress) -> None:
        self._torch = loader.import_torch(f"serving a {model.format} model")
        self._torch.set_num_threads(serving.threads or max(1, usable_cores() - 1))
        self._device = serving.device
        if self._device.startswith("cuda") and not self._torch.cuda.is_available():
            raise Refused(503, "no_gpu", "this torch sees no GPU: install one built for CUDA, or use --device cpu")
        super().__init__(model.folder)
        with Reporting(progress):
            self._model, self._warnings = loader.load(model, self._device)
        self.end_with(getattr(self._model.generation_config, "eos_token_id", None))
        self._vocabulary = int(self._model.get_output_embeddings().weight.shape[0])
        self._running: dict[int, Answer] = {}
        self._reading: dict[int, TransformersReading] = {}
        self._together = Together(self._torch, self._model)
        self.description = self._describe(loader.name, serving)

    def _describe(self, runtime: str, serving: Serving) -> Description:
        devices, warnings = _devices(self._model), [*self._warnings]
        elsewhere = {name: count for name, count in devices.items() if name != self._device}
        if elsewhere:
            where = " and ".join(f"{count} on {name}" for name, count in elsewhere.items())
            astray = f"of {sum(devices.values())} layers, {where} instead of {self._device}"
            if serving.named:
                raise Refused(503, "not_on_device", f"{astray}; --device auto takes what there is")
            warnings.append(astray)
        if template := self.warning():
            warnings.append(template)
        return Description(
            runtime, serving.context, serving.slots, self._device, SUPPORTS, devices, warnings,
            self.tool_style(), kernels(self._model),
        )  # fmt: skip

    def begin(self, prompt: PromptTokens, sampling: Sampling) -> int:
        """See ServedModel."""
        check_known(prompt.tokens, self._vocabulary)
        slot = self._free()
        self._running[slot] = Answer.to(list(prompt.tokens), sampling)
        return slot

    def begin_embedding(self, tokens: Sequence[int]) -> int:
        """See ServedModel. The mean of the last layer's outputs over all tokens."""
        check_known(tokens, self._vocabulary)
        slot = self._free()
        self._reading[slot] = TransformersReading(list(tokens))
        return slot

    def _free(self) -> int:
        taken = {*self._running, *self._reading}
        return next(number for number in range(self.description.slots) if number not in taken)

    def step(self) -> Mapping[int, Chosen | Embedding]:
        """See ServedModel. Each answer goes one token on; a long prompt, or a text to read, one part.

        done of an answer that goes on together is that of its prompt.
        """
        chosen: dict[int, Chosen | Embedding] = self._read_on()
        alone = [slot for slot in self._running if slot not in self._together]
        pending = {slot: item.tokens[-1] for slot, item in self._running.items() if slot in self._together}
        for slot, logits in self._together.step(pending).items():
            chosen[slot] = choose(self._torch, self._running[slot], logits.float())
        for slot in alone:
            item = self._running[slot]
            output = self._forward(self._model, item, logits_to_keep=1)
            if item.done < len(item.tokens):
                continue
            chosen[slot] = choose(self._torch, item, output.logits[0, -1].float())
            if self._device != CPU and self._together.takes(item.cache):
                self._together.join(slot, item.cache)
                item.cache = None
        return chosen

    def _read_on(self) -> dict[int, Chosen | Embedding]:
        found: dict[int, Chosen | Embedding] = {}
        for slot, item in self._reading.items():
            output = self._forward(self._model.base_model, item)
            item.total = item.total + output.last_hidden_state[0].double().sum(0).cpu().numpy()
            if item.done == len(item.tokens):
                found[slot] = Embedding.of(item.total)
        return found

    def _forward(self, model: Any, item: Answer | TransformersReading, **options: Any) -> Any:
        """Run the next tokens of a sequence, at most PREFILL_TOKENS; its cache then has them."""
        stop = min(len(item.tokens), item.done + PREFILL_TOKENS)
        ids = self._torch.tensor([item.tokens[item.done : stop]], device=self._device)
        with self._torch.inference_mode():
            output = model(input_ids=ids, past_key_values=item.cache, use_cache=True, **options)
        item.cache, item.done = output.past_key_values, stop
        return output

    def end(self, slot: int) -> None:
        """See ServedModel."""
        if self._reading.pop(slot, None) is None:
            del self._running[slot]
            if slot in self._together:
                self._together.leave(slot)

    def memory(self) -> dict[str, Any]:
        """See ServedModel."""
        if not self._device.startswith("cuda"):
            return {"gpu": None}
        cuda = self._torch.cuda
        return {
            "gpu": cuda.get_device_name(self._device),
            "vram_allocated": cuda.memory_allocated(self._device),
            "vram_reserved": cuda.memory_reserved(self._device),
        }


class Reporting:
    """While it is open, transformers' progress over the weights goes to a Progress."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def __enter__(self) -> None:
        from transformers.utils import logging

        self._before = logging.set_tqdm_hook(self._hook)

    def __exit__(self, *_: object) -> None:
        from transformers.utils import logging

        logging.set_tqdm_hook(self._before)

    def _hook(self, factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        made = factory(*args, **kwargs)
        items = args[0] if args else kwargs.get("iterable")
        return _Counted(made, items, self._progress) if hasattr(items, "__len__") else made


class _Counted:
    """What a progress bar iterates over, counted."""

    def __init__(self, bar: Any, items: Any, progress: Progress) -> None:
        self._bar, self._items, self._progress = bar, items, progress

    def __iter__(self) -> Any:
        for done, item in enumerate(self._items, start=1):
            yield item
            self._progress(done / len(self._items))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bar, name)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        return None


def _devices(model: Any) -> dict[str, int]:
    """How many decoder layers are on which device, from where their tensors are; on several: all of them."""
    layers = next((module for name, module in model.named_modules() if name.endswith("layers")), None)
    counts: Counter[str] = Counter()
    for layer in layers if layers is not None else [model]:
        tensors = [*layer.parameters(), *layer.buffers()]
        counts["+".join(sorted({str(tensor.device) for tensor in tensors}))] += 1
    return dict(counts)
