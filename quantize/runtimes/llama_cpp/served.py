"""llama.cpp as a ServedModel: continuous batching over one context, sampling by llama.cpp's own samplers.

In: a GGUF file and how to serve it. Out: tokens for several sequences at once. Flash attention is off: llama.cpp's
automatic choice of it changes answers. What a slot still holds of an earlier conversation is not computed again.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantize.errors import VerifyError
from quantize.runtimes.base import ModelRef
from quantize.runtimes.detokenizer import BytePieces
from quantize.runtimes.llama_cpp.chat_template import ChatTemplate
from quantize.runtimes.llama_cpp.log import log_text
from quantize.runtimes.llama_cpp.model import BatchToken, ModelSettings, OpenModel, import_bindings_only
from quantize.runtimes.llama_cpp.reading import Readings
from quantize.runtimes.served import Chosen, Description, Embedding, Progress, Refused, Sampling, Serving
from quantize.runtimes.tool_style import tool_style

PREFILL_TOKENS = 256  # of one step: longer prompts take turns with answers that are under way
ALL_LAYERS = -1
PENALTY_TOKENS = 64  # llama.cpp's own default for how far penalties look back
SUPPORTS = ("top_k", "min_p", "penalties", "repetition_penalty", "logprobs", "json", "grammar")
_BUFFER = re.compile(r"\s(\S+)\s+(?:model|KV|RS|compute|output) buffer size\s*=\s*([\d.]+) MiB")
_ASSIGNED = re.compile(r"layer\s+\d+ assigned to device (\S+?),?\s")


@dataclass
class LlamaAnswer:
    """One answer in progress. position: tokens that the KV cache has of it."""

    tokens: list[int]
    position: int
    sampler: Any
    sampling: Sampling


class LlamaCppModel:
    """See ServedModel."""

    def __init__(self, model: ModelRef, serving: Serving, progress: Progress) -> None:
        import_bindings_only()
        slots, gpu, layers = serving.slots, serving.device != "cpu", serving.gpu_layers
        settings = ModelSettings(
            context=serving.context,
            sequences=slots,
            batch=lambda _: max(PREFILL_TOKENS, slots),
            threads=serving.threads or 0,
            flash_attention=False,
            gpu_layers=(ALL_LAYERS if layers is None else layers) if gpu else 0,
            main_gpu=int(serving.device.partition(":")[2] or 0) if gpu else None,
        )
        self._open = OpenModel(model.path, settings, progress=progress, feature="serving a GGUF file")
        self._library = self._open.library
        self._sequences: dict[int, LlamaAnswer] = {}
        self._readings = Readings(self._open)
        self._kept: dict[int, list[int]] = {slot: [] for slot in range(slots)}
        self._template_text = self._open.metadata("tokenizer.chat_template")
        self._template: ChatTemplate | None = None
        self.description = self._describe(serving, gpu)
        self._memory = self._gpu_memory(settings.main_gpu or 0) if gpu else {"gpu": None}

    def _describe(self, serving: Serving, gpu: bool) -> Description:
        devices = dict(Counter(_ASSIGNED.findall(log_text())))
        warnings = []
        if gpu and serving.gpu_layers is None and "CPU" in devices:
            why = "" if self._library.llama_supports_gpu_offload() else ": this llama-cpp-python is built without CUDA"
            warnings.append(f"{devices['CPU']} of {sum(devices.values())} layers are on the CPU, not on the GPU{why}")
        if not self._template_text:
            warnings.append("the file has no chat template: only /v1/completions and /v1/generate answer")
        return Description(
            "llama.cpp", self._open.size, serving.slots, serving.device,
            SUPPORTS + (("embeddings",) if self._readings.pooling else ()), devices, warnings,
            tool_style(self._template_text or ""),
        )  # fmt: skip

    def _chat_template(self) -> ChatTemplate:
        """Read when it is first needed: until then the process is without jinja2."""
        if not self._template_text:
            raise Refused(422, "no_chat_template", "the model has no chat template: use /v1/completions")
        if self._template is None:
            names = {"bos_token": self._library.llama_vocab_bos, "eos_token": self._library.llama_vocab_eos}
            numbers = {name: int(get(self._open.vocab)) for name, get in names.items()}
            special = {name: self._open.token_text(token) if token >= 0 else "" for name, token in numbers.items()}
            self._template = ChatTemplate(self._template_text, special)
        return self._template

    def chat_tokens(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = (), lead: str = ""
    ) -> list[int]:
        """See ServedModel."""
        return self._open.tokenize(self._chat_template().render(messages, tools) + lead, special=True, start=False)

    def text_tokens(self, text: str) -> list[int]:
        """See ServedModel."""
        return self._open.tokenize(text, special=True, start=True)

    def begin(self, tokens: Sequence[int], sampling: Sampling) -> int:
        """See ServedModel."""
        self._check(tokens)
        sampler = self._sampler(sampling)
        slot = max(self._free(), key=lambda item: _common(self._kept[item], tokens))
        keep = min(_common(self._kept[slot], tokens), len(tokens) - 1)
        if not self._open.forget_after(slot, keep):
            self._open.forget_after(slot, 0)
            keep = 0
        self._kept[slot] = []
        self._sequences[slot] = LlamaAnswer(list(tokens), keep, sampler, sampling)
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

    def step(self) -> Mapping[int, Chosen | Embedding]:
        """See ServedModel. Two batches where texts are read beside answers: one batch is all of one kind."""
        read: Mapping[int, Chosen | Embedding] = self._readings.step() if self._readings else {}
        return {**read, **self._write_on()} if self._sequences else read

    def _write_on(self) -> dict[int, Chosen]:
        """One batch: the next token of each answer, and as much of the prompts as there is room for."""
        entries: list[BatchToken] = []
        rows: dict[int, int] = {}
        pending = sorted(self._sequences.items(), key=lambda item: len(item[1].tokens) - item[1].position)
        for slot, item in pending:
            stop = min(len(item.tokens), item.position + self._open.batch_tokens - len(entries))
            last = len(item.tokens) - 1
            entries += [BatchToken(item.tokens[p], p, slot, p == last) for p in range(item.position, stop)]
            item.position = stop
            if stop == len(item.tokens):
                rows[slot] = len(entries) - 1
        try:
            self._open.decode(entries)
        except VerifyError as exc:
            raise RuntimeError(exc.message) from exc
        return {slot: self._choose(self._sequences[slot], row) for slot, row in rows.items()}

    def _choose(self, item: LlamaAnswer, row: int) -> Chosen:
        token = int(self._library.llama_sampler_sample(item.sampler, self._open.context, row))
        item.tokens.append(token)
        if item.sampling.logprobs is None:
            return Chosen(token)
        return _with_logprobs(token, self._logits(row), item.sampling.logprobs)

    def _logits(self, row: int) -> Any:
        import numpy as np

        pointer = self._library.llama_get_logits_ith(self._open.context, row)
        return np.ctypeslib.as_array(pointer, (self._open.vocabulary,)).astype(np.float64)

    def end(self, slot: int) -> None:
        """See ServedModel."""
        if slot in self._readings:
            self._readings.end(slot)
            return
        item = self._sequences.pop(slot)
        self._library.llama_sampler_free(item.sampler)
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

    def _gpu_memory(self, number: int) -> dict[str, Any]:
        from quantize.system.machine import detect

        gpus = detect().gpus
        size = sum(size for name, size in buffers(log_text()).items() if not name.startswith("CPU"))
        name = gpus[number].name if number < len(gpus) else f"GPU {number}"
        return {"gpu": name, "vram_allocated": size, "vram_reserved": size}

    def _sampler(self, sampling: Sampling) -> Any:
        """llama.cpp's samplers in the order of its own tools. Raises Refused: the grammar can't be read."""
        library = self._library
        chain = library.llama_sampler_chain_init(library.llama_sampler_chain_default_params())

        def add(sampler: Any) -> None:
            library.llama_sampler_chain_add(chain, sampler)

        grammar = _grammar(sampling)
        if grammar is not None:
            made = library.llama_sampler_init_grammar(self._open.vocab, grammar.encode(), b"root")
            if not made:
                library.llama_sampler_free(chain)
                raise Refused(422, "invalid_grammar", "llama.cpp can't read the grammar", "grammar")
            add(made)
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


def buffers(log: str) -> dict[str, int]:
    """Bytes of all buffers on each device, by llama.cpp's log. Memory that is the host's, for copying, is CPU."""
    found: Counter[str] = Counter()
    for device, mebibytes in _BUFFER.findall(log):
        found["CPU" if device.endswith("_Host") else device] += round(float(mebibytes) * 2**20)
    return dict(found)


def _grammar(sampling: Sampling) -> str | None:
    """GBNF of what an answer must fit. Raises Refused: the schema can't be expressed."""
    if sampling.json_schema is None:
        return sampling.grammar
    import json

    from llama_cpp.llama_grammar import JSON_GBNF, json_schema_to_gbnf

    if not sampling.json_schema:
        return str(JSON_GBNF)
    try:
        return str(json_schema_to_gbnf(json.dumps(sampling.json_schema)))
    except Exception as exc:
        message = f"the JSON schema can't be made a grammar ({type(exc).__name__})"
        raise Refused(422, "invalid_json_schema", message, "response_format") from exc


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the common beginning."""
    for index, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return index
    return min(len(first), len(second))


def _with_logprobs(token: int, logits: Any, count: int) -> Chosen:
    import numpy as np

    highest = float(logits.max())
    logprobs = logits - highest - np.log(np.exp(logits - highest).sum())
    best = np.argsort(logprobs)[::-1][:count].tolist()
    return Chosen(token, float(logprobs[token]), tuple((item, float(logprobs[item])) for item in best))
