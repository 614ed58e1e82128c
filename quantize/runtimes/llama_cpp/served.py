"""llama.cpp as a ServedModel: continuous batching over one context, sampling by llama.cpp's own samplers.

In: a GGUF file and how to serve it. Out: tokens for several sequences at once. Flash attention is off on the CPU, where
llama.cpp's automatic choice of it changes answers; on a GPU the choice is llama.cpp's; a quantized KV cache needs it.
What a slot still holds of an earlier conversation is not computed again.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any

from quantize.errors import VerifyError
from quantize.runtimes.base import ModelRef
from quantize.runtimes.detokenizer import BytePieces
from quantize.runtimes.devices import ON_CPU
from quantize.runtimes.intake import Intake
from quantize.runtimes.llama_cpp.choice import choose_fitting, logits_of, with_logprobs
from quantize.runtimes.llama_cpp.devices import find_gpus, is_device, is_there
from quantize.runtimes.llama_cpp.library import import_bindings_only
from quantize.runtimes.llama_cpp.model import BatchToken, ModelSettings, OpenModel
from quantize.runtimes.llama_cpp.reading import Readings
from quantize.runtimes.served import (
    KV_BITS,
    Chosen,
    Description,
    Embedding,
    NextTokens,
    Progress,
    PromptTokens,
    Refused,
    Sampling,
    Serving,
)
from quantize.runtimes.tool_style import tool_style

PREFILL_TOKENS = 256  # of one step: longer prompts take turns with answers that are under way
GPU_PREFILL_TOKENS = 512  # a whole micro-batch of llama.cpp's: with less a GPU waits for its own launches
PENALTY_TOKENS = 64  # llama.cpp's own default for how far penalties look back
SUPPORTS = ("top_k", "min_p", "penalties", "repetition_penalty", "logprobs", "json", "grammar")
CPU = "cpu"
DESK = "quantize.runtimes.llama_cpp.desk:open_desk"
# Of the process that reads requests: a vocabulary needs no card, and one that is opened takes its memory.
NO_GPU = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "-1", "GGML_VK_VISIBLE_DEVICES": ""}
WAIT_SECONDS = 0.05


@dataclass
class LlamaAnswer:
    """One answer in progress. position: tokens that the KV cache has of it."""

    tokens: list[int]
    position: int
    sampler: Any
    sampling: Sampling
    masks: NextTokens | None = None
    logits: Any = None  # of the next token, while it is not known what may come

    @property
    def has_logits(self) -> bool:
        """Whether all that is there has been computed."""
        return self.logits is not None


class LlamaCppModel:
    """See ServedModel."""

    def __init__(self, model: ModelRef, serving: Serving, progress: Progress) -> None:
        import_bindings_only()
        slots, there = serving.slots, serving.named or is_there(serving.place)
        place = serving.place if there else ON_CPU
        quantized = serving.kv_bits != "16"
        prefill = PREFILL_TOKENS if place == ON_CPU else GPU_PREFILL_TOKENS
        settings = ModelSettings(
            context=serving.context,
            sequences=slots,
            batch=lambda _: max(prefill, slots),
            threads=serving.threads or 0,
            flash_attention=True if quantized else False if place == ON_CPU else None,
            kv_type=KV_BITS[serving.kv_bits],
            place=place,
        )
        self._intake = Intake(DESK, os.fsencode(model.path), NO_GPU)
        self._open = OpenModel(model.path, settings, progress=progress, feature="serving a GGUF file")
        self._library = self._open.library
        self._sequences: dict[int, LlamaAnswer] = {}
        self._readings = Readings(self._open)
        self._kept: dict[int, list[int]] = {slot: [] for slot in range(slots)}
        self.description = self._describe(serving)
        self._memory = self._gpu_memory(serving.device) if place != ON_CPU else {"gpu": None}

    def _describe(self, serving: Serving) -> Description:
        placed, warnings = self._open.placed, []
        astray = placed.astray(serving.device, serving.gpu_layers)
        if astray:
            if serving.device != CPU and not self._library.llama_supports_gpu_offload():
                astray += ": this llama-cpp-python is built without support for GPUs"
            if serving.named:
                raise Refused(503, "not_on_device", f"{astray}; --device auto takes what there is")
            warnings.append(astray)
        if template := self._intake.warning():
            warnings.append(template)
        return Description(
            "llama.cpp", self._open.size, serving.slots, serving.device,
            SUPPORTS + (("embeddings",) if self._readings.pooling else ()), placed.layers, warnings,
            tool_style(self._open.metadata("tokenizer.chat_template") or ""),
        )  # fmt: skip

    def read(self, order: Mapping[str, Any], cancelled: threading.Event) -> PromptTokens:
        """See ServedModel."""
        return self._intake.read(order, cancelled)

    def begin(self, prompt: PromptTokens, sampling: Sampling) -> int:
        """See ServedModel."""
        tokens = prompt.tokens
        self._check(tokens)
        slot = max(self._free(), key=lambda item: _common(self._kept[item], tokens))
        keep = min(_common(self._kept[slot], tokens), len(tokens) - 1)
        if not self._open.forget_after(slot, keep):
            self._open.forget_after(slot, 0)
            keep = 0
        self._kept[slot] = []
        self._sequences[slot] = LlamaAnswer(list(tokens), keep, self._sampler(sampling), sampling, prompt.masks)
        return slot

    def begin_embedding(self, tokens: Sequence[int]) -> int:
        """See ServedModel."""
        self._check(tokens)
        slot = min(self._free(), key=lambda item: len(self._kept[item]))
        self._kept[slot] = []
        self._readings.begin(slot, tokens)
        return slot

    def _free(self) -> list[int]:
        return [slot for slot in self._kept if slot not in self._sequences and slot not in self._readings]

    def _check(self, tokens: Sequence[int]) -> None:
        if any(not 0 <= token < self._open.vocabulary for token in tokens):
            raise Refused(422, "invalid_value", "the prompt has a token that the vocabulary lacks", "prompt")

    def step(self) -> Mapping[int, Chosen | Embedding | Refused]:
        """See ServedModel. Two batches where texts are read beside answers: one batch is all of one kind."""
        read: Mapping[int, Chosen | Embedding | Refused] = self._readings.step() if self._readings else {}
        return {**read, **self._write_on()} if self._sequences else read

    def _write_on(self) -> dict[int, Chosen | Refused]:
        """One batch: the next token of each answer, and as much of the prompts as there is room for.

        An answer that must fit something takes its token as soon as it is known what may come: the batch after this one
        does not wait for it.
        """
        entries: list[BatchToken] = []
        rows: dict[int, int] = {}
        pending = sorted(self._sequences.items(), key=lambda item: len(item[1].tokens) - item[1].position)
        for slot, item in pending:
            stop = min(len(item.tokens), item.position + self._open.batch_tokens - len(entries))
            if stop == item.position:  # its token is being chosen
                continue
            last = len(item.tokens) - 1
            entries += [BatchToken(item.tokens[p], p, slot, p == last) for p in range(item.position, stop)]
            item.position = stop
            if stop == len(item.tokens):
                rows[slot] = len(entries) - 1
        if entries:
            try:
                self._open.decode(entries)
            except VerifyError as exc:
                raise RuntimeError(exc.message) from exc
        chosen: dict[int, Chosen | Refused] = {}
        for slot, row in rows.items():
            item = self._sequences[slot]
            if item.masks is None:
                chosen[slot] = self._choose(item, row)
            else:
                item.logits = logits_of(self._open, row)
        return {**chosen, **self._choose_fitting(idle=not entries)}

    def _choose(self, item: LlamaAnswer, row: int) -> Chosen:
        token = int(self._library.llama_sampler_sample(item.sampler, self._open.context, row))
        item.tokens.append(token)
        if item.sampling.logprobs is None:
            return Chosen(token)
        return with_logprobs(token, logits_of(self._open, row), item.sampling.logprobs)

    def _choose_fitting(self, *, idle: bool) -> dict[int, Chosen | Refused]:
        """Of the answers that must fit something, those where it is known what may come. idle: nothing else to do."""
        waiting = {slot: item for slot, item in self._sequences.items() if item.masks is not None and item.has_logits}
        if waiting and idle and not self._readings:
            wait([item.masks.pipe for item in waiting.values() if item.masks is not None], WAIT_SECONDS)
        chosen: dict[int, Chosen | Refused] = {}
        for slot, item in waiting.items():
            try:
                token = choose_fitting(self._open, item.sampler, item.masks, item.logits)
            except Refused as exc:
                chosen[slot] = exc
                continue
            if token is None:
                continue
            item.tokens.append(token)
            count = item.sampling.logprobs
            chosen[slot] = Chosen(token) if count is None else with_logprobs(token, item.logits, count)
            item.logits = None
        return chosen

    def end(self, slot: int) -> None:
        """See ServedModel."""
        if slot in self._readings:
            self._readings.end(slot)
            return
        item = self._sequences.pop(slot)
        self._library.llama_sampler_free(item.sampler)
        if item.masks is not None:
            item.masks.close()
        self._kept[slot] = item.tokens[: item.position]

    def ends(self, token: int) -> bool:
        """See ServedModel."""
        return self._open.ends(token)

    def token_of(self, text: str) -> int | None:
        """See ServedModel."""
        tokens = self._open.tokenize(text, special=True, start=False)
        return tokens[0] if len(tokens) == 1 and not self._open.piece(tokens[0]) else None

    def detokenizer(self) -> BytePieces:
        """See ServedModel."""
        return BytePieces(self._open.piece)

    def token_bytes(self, token: int) -> bytes:
        """See ServedModel."""
        return self._open.piece(token)

    def memory(self) -> dict[str, Any]:
        """See ServedModel; llama.cpp allocates everything while loading and reserves no more."""
        return self._memory

    def close(self) -> None:
        """See ServedModel."""
        self._intake.close()
        self._open.close()

    def _gpu_memory(self, device: str) -> dict[str, Any]:
        size = self._open.placed.gpu_bytes
        names = [gpu.name for gpu in find_gpus() if is_device(gpu.device, device)]
        return {"gpu": " and ".join(names) or device, "vram_allocated": size, "vram_reserved": size}

    def _sampler(self, sampling: Sampling) -> Any:
        """llama.cpp's samplers in the order of its own tools."""
        library = self._library
        chain = library.llama_sampler_chain_init(library.llama_sampler_chain_default_params())

        def add(sampler: Any) -> None:
            library.llama_sampler_chain_add(chain, sampler)

        penalties = (sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty)
        if penalties != (1.0, 0.0, 0.0):
            add(library.llama_sampler_init_penalties(self._open.vocabulary, PENALTY_TOKENS, *penalties))
        if sampling.temperature == 0:
            add(library.llama_sampler_init_greedy())
            return chain
        if sampling.top_k:
            add(library.llama_sampler_init_top_k(sampling.top_k))
        if sampling.top_p < 1:
            add(library.llama_sampler_init_top_p(sampling.top_p, 1))
        if sampling.min_p:
            add(library.llama_sampler_init_min_p(sampling.min_p, 1))
        add(library.llama_sampler_init_temp(sampling.temperature))
        seed = (
            0xFFFFFFFF if sampling.seed is None else sampling.seed % 0xFFFFFFFF
        )  # all ones: llama.cpp takes a random one
        add(library.llama_sampler_init_dist(seed))
        return chain


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the common beginning."""
    for index, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return index
    return min(len(first), len(second))
