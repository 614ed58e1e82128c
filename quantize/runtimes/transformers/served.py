"""transformers as a ServedModel: whatever its kind loads, on one device.

In: a model and how to serve it. Out: tokens for several sequences, a step at a time: on a CPU in turn, each with a KV
cache of its own; on a GPU together, as soon as their prompts are read. Weights are read straight to the device; where
each layer ended up is looked at, not assumed.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from quantize.runtimes.base import ModelRef
from quantize.runtimes.devices import CPU
from quantize.runtimes.intake import Intake
from quantize.runtimes.served import Chosen, Description, Embedding, Progress, PromptTokens, Refused, Sampling, Serving
from quantize.runtimes.tool_style import tool_style
from quantize.runtimes.transformers.load import TransformersLoader, kernels
from quantize.runtimes.transformers.together import Together
from quantize.system.machine import usable_cores

DESK = "quantize.runtimes.transformers.desk:open_desk"
PREFILL_TOKENS = 512
FEW_TOKENS = 1024
NO_TEXT = "\ufffd"
SUPPORTS = ("top_k", "min_p", "penalties", "repetition_penalty", "logprobs", "embeddings")


@dataclass
class TransformersAnswer:
    """One answer in progress. done: tokens that the KV cache has of it."""

    tokens: list[int]
    sampling: Sampling
    generator: Any
    prompt: int
    done: int = 0
    cache: Any = None
    counts: Counter[int] = field(default_factory=Counter)


@dataclass
class TransformersReading:
    """A text that is read for its embedding. total: the sum of what the last layer made of its tokens."""

    tokens: list[int]
    done: int = 0
    cache: Any = None
    total: Any = 0.0


class TransformersModel:
    """See ServedModel."""

    def __init__(self, loader: TransformersLoader, model: ModelRef, serving: Serving, progress: Progress) -> None:
        self._torch = loader.import_torch(f"serving a {model.format} model")
        self._torch.set_num_threads(serving.threads or max(1, usable_cores() - 1))
        self._device = serving.device
        if self._device.startswith("cuda") and not self._torch.cuda.is_available():
            raise Refused(503, "no_gpu", "this torch sees no GPU: install one built for CUDA, or use --device cpu")
        self._tokenizer = _open_tokenizer(model.folder)
        self._intake = Intake(DESK, _desk_options(self._tokenizer))
        with Reporting(progress):
            self._model, self._warnings = loader.load(model, self._device)
        self._ends = _end_tokens(self._model, self._tokenizer)
        self._vocabulary = int(self._model.get_output_embeddings().weight.shape[0])
        self._running: dict[int, TransformersAnswer] = {}
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
        if template := self._intake.warning():
            warnings.append(template)
        return Description(
            runtime, serving.context, serving.slots, self._device, SUPPORTS, devices, warnings,
            tool_style(_template_of(self._tokenizer) or ""), kernels(self._model),
        )  # fmt: skip

    def read(self, order: Mapping[str, Any], cancelled: threading.Event) -> PromptTokens:
        """See ServedModel."""
        return self._intake.read(order, cancelled)

    def begin(self, prompt: PromptTokens, sampling: Sampling) -> int:
        """See ServedModel."""
        self._check(prompt.tokens)
        generator = self._torch.Generator()
        if sampling.seed is None:
            generator.seed()
        else:
            generator.manual_seed(sampling.seed % (1 << 63))
        slot = self._free()
        self._running[slot] = TransformersAnswer(list(prompt.tokens), sampling, generator, len(prompt.tokens))
        return slot

    def begin_embedding(self, tokens: Sequence[int]) -> int:
        """See ServedModel. The mean of the last layer's outputs over all tokens."""
        self._check(tokens)
        slot = self._free()
        self._reading[slot] = TransformersReading(list(tokens))
        return slot

    def _free(self) -> int:
        taken = {*self._running, *self._reading}
        return next(number for number in range(self.description.slots) if number not in taken)

    def _check(self, tokens: Sequence[int]) -> None:
        if any(not 0 <= token < self._vocabulary for token in tokens):
            raise Refused(422, "invalid_value", "the prompt has a token that the vocabulary lacks", "prompt")

    def step(self) -> Mapping[int, Chosen | Embedding]:
        """See ServedModel. Each answer goes one token on; a long prompt, or a text to read, one part.

        done of an answer that goes on together is that of its prompt.
        """
        chosen: dict[int, Chosen | Embedding] = self._read_on()
        alone = [slot for slot in self._running if slot not in self._together]
        pending = {slot: item.tokens[-1] for slot, item in self._running.items() if slot in self._together}
        for slot, logits in self._together.step(pending).items():
            chosen[slot] = self._choose(self._running[slot], logits.float())
        for slot in alone:
            item = self._running[slot]
            output = self._forward(self._model, item, logits_to_keep=1)
            if item.done < len(item.tokens):
                continue
            chosen[slot] = self._choose(item, output.logits[0, -1].float())
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

    def _forward(self, model: Any, item: TransformersAnswer | TransformersReading, **options: Any) -> Any:
        """Run the next tokens of a sequence, at most PREFILL_TOKENS; its cache then has them."""
        stop = min(len(item.tokens), item.done + PREFILL_TOKENS)
        ids = self._torch.tensor([item.tokens[item.done : stop]], device=self._device)
        with self._torch.inference_mode():
            output = model(input_ids=ids, past_key_values=item.cache, use_cache=True, **options)
        item.cache, item.done = output.past_key_values, stop
        return output

    def _choose(self, item: TransformersAnswer, logits: Any) -> Chosen:
        sampling = item.sampling
        scores = _penalized(self._torch, logits, item) if _has_penalties(sampling) else logits
        token = _sample(self._torch, scores, sampling, item.generator)
        item.tokens.append(token)
        item.counts[token] += 1
        if sampling.logprobs is None:
            return Chosen(token)
        logprobs = self._torch.log_softmax(logits, -1)
        best = logprobs.topk(sampling.logprobs) if sampling.logprobs else None
        top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True)) if best is not None else ()
        return Chosen(token, float(logprobs[token]), top)

    def end(self, slot: int) -> None:
        """See ServedModel."""
        if self._reading.pop(slot, None) is None:
            del self._running[slot]
            if slot in self._together:
                self._together.leave(slot)

    def ends(self, token: int) -> bool:
        """See ServedModel."""
        return token in self._ends

    def token_of(self, text: str) -> int | None:
        """See ServedModel."""
        token = self._tokenizer.convert_tokens_to_ids(text)  # that of unknown text, where there is no such token
        known = token in self._tokenizer.all_special_ids and self._tokenizer.convert_ids_to_tokens(token) == text
        return token if known else None

    def detokenizer(self) -> StreamPieces:
        """See ServedModel."""
        return StreamPieces(self._tokenizer)

    def token_bytes(self, token: int) -> bytes:
        """See ServedModel."""
        return str(self._tokenizer.decode([token])).encode("utf-8")

    def close(self) -> None:
        """See ServedModel."""
        self._intake.close()

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


class StreamPieces:
    """A Detokenizer by the tokenizer's own streaming decoder: control tokens write nothing.

    Where a model writes bytes that are no text, that decoder can fail ("Invalid prefix encountered", as in
    vllm-project/vllm#17448), and would go on failing: a new one goes on, after a character for what was lost.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer._tokenizer
        self._begin()

    def _begin(self) -> None:
        from tokenizers.decoders import DecodeStream

        self._stream = DecodeStream(skip_special_tokens=True)

    def add(self, token: int) -> str:
        """See Detokenizer."""
        try:
            return self._stream.step(self._tokenizer, token) or ""
        except Exception:  # noqa: BLE001 - the library raises no other kind
            self._begin()
            return NO_TEXT + (self._stream.step(self._tokenizer, token) or "")

    def flush(self) -> str:
        """See Detokenizer: what is not whole by now never will be."""
        return ""


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


def _open_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _template_of(tokenizer: Any) -> str | None:
    """The template of plain chats; None: there is none."""
    try:
        found: str = tokenizer.get_chat_template()
    except ValueError:
        return None
    return found


def _desk_options(tokenizer: Any) -> bytes:
    """The tokenizer as it was loaded, for the process that reads requests."""
    return orjson.dumps({
        "tokenizer": tokenizer.backend_tokenizer.to_str(),
        "template": _template_of(tokenizer),
        "special": tokenizer.special_tokens_map,
    })  # fmt: skip


def _end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer: the generation config's, and the tokenizer's own."""
    found: set[int] = set()
    for value in (getattr(model.generation_config, "eos_token_id", None), tokenizer.eos_token_id):
        if isinstance(value, int):
            found.add(value)
        elif value is not None:
            found.update(int(item) for item in value)
    return frozenset(found)


def _devices(model: Any) -> dict[str, int]:
    """How many decoder layers are on which device, from where their tensors are; on several: all of them."""
    layers = next((module for name, module in model.named_modules() if name.endswith("layers")), None)
    counts: Counter[str] = Counter()
    for layer in layers if layers is not None else [model]:
        tensors = [*layer.parameters(), *layer.buffers()]
        counts["+".join(sorted({str(tensor.device) for tensor in tensors}))] += 1
    return dict(counts)


def _has_penalties(sampling: Sampling) -> bool:
    return (sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty) != (1.0, 0.0, 0.0)


def _penalized(torch: Any, logits: Any, item: TransformersAnswer) -> Any:
    """OpenAI's penalties over the answer so far; the repetition penalty (arXiv:1909.05858) over the prompt too."""
    scores, sampling = logits.clone(), item.sampling
    if sampling.repetition_penalty != 1.0 and item.tokens:
        seen = torch.tensor(sorted(set(item.tokens))).to(scores.device)
        picked = scores[seen]
        penalty = sampling.repetition_penalty
        scores[seen] = torch.where(picked > 0, picked / penalty, picked * penalty)
    if item.counts:
        chosen, times = torch.tensor([*item.counts.items()]).T
        less = sampling.frequency_penalty * times + sampling.presence_penalty
        scores[chosen.to(scores.device)] -= less.to(scores.device)
    return scores


def _likeliest(torch: Any, scores: Any, sampling: Sampling) -> tuple[Any, Any, Any]:
    """Scores from the highest on, their tokens and their chances: as many as can be chosen, and some that can't.

    A sort of a whole vocabulary takes as long as a step of a small model; nearly always the first few are enough.
    """
    if sampling.top_k:
        values, order = scores.topk(min(sampling.top_k, len(scores)))
        return values, order, torch.softmax(values, -1)
    shares = torch.softmax(scores, -1)
    if len(scores) > FEW_TOKENS and (sampling.top_p < 1 or sampling.min_p):
        values, order = scores.topk(FEW_TOKENS)
        chances = shares[order]
        if chances.sum() >= sampling.top_p or chances[-1] < sampling.min_p * chances[0]:
            return values, order, chances
    values, order = scores.sort(descending=True)
    return values, order, shares[order]


def _sample(torch: Any, scores: Any, sampling: Sampling, generator: Any) -> int:
    """top-k, top-p and min-p on the plain distribution, then temperature: the order of llama.cpp's samplers.

    What can be chosen is looked for where the scores are; that little alone goes to the CPU, where it is drawn.
    """
    if sampling.temperature == 0:
        return int(scores.argmax())
    values, order, chances = (part.cpu() for part in _likeliest(torch, scores, sampling))
    if sampling.top_p < 1:
        before = chances.cumsum(-1) - chances
        kept = int((before < sampling.top_p).sum())
        values, order, chances = values[:kept], order[:kept], chances[:kept]
    if sampling.min_p:
        kept = max(1, int((chances >= sampling.min_p * chances[0]).sum()))
        values, order = values[:kept], order[:kept]
    picked = torch.multinomial(torch.softmax(values / sampling.temperature, -1), 1, generator=generator)
    return int(order[picked])
