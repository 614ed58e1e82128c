"""Text that a model writes itself, for calibration without a dataset; runs in a worker.

On a CPU it computes in float32; on a GPU in the type that it is stored in, which writes other texts, and more of them
at a time. The idea: Liu et al., "LLM-QAT: Data-Free Quantization Aware Training" (2023), section 3.1: next tokens are
sampled from the model's own distribution, the first few greedily so that each text starts in its own way.
"""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

from quantize.runtimes.devices import CPU

BATCH = 8
GPU_BATCH = 32  # each step reads all weights, for many rows as for few
GREEDY_TOKENS = 4
CHATS = 16  # rows of chats at a time: they go in step, so that each takes as long as the longest
LONGEST_ANSWER = 160  # tokens, so that a sequence holds several chats


def sample_from_model(
    folder: Path, prompts: list[str], samples: int, sequence_length: int, seed: int, device: str = CPU
) -> list[list[int]]:
    """Token ids of `samples` texts, each a prompt and what the model says after it; the same for the same seed."""
    import torch

    tokenizer, model = _load(folder, device)
    generator, batch = torch.Generator(device=device).manual_seed(seed), BATCH if device == CPU else GPU_BATCH
    rows = [tokenizer(prompts[index % len(prompts)])["input_ids"][:sequence_length] for index in range(samples)]
    by_length: dict[int, list[int]] = {}
    for index, ids in enumerate(rows):
        by_length.setdefault(len(ids), []).append(index)
    with torch.inference_mode():
        for members in by_length.values():
            for start in range(0, len(members), batch):
                group = members[start : start + batch]
                for index, ids in zip(
                    group, _continue(model, [rows[i] for i in group], sequence_length, generator), strict=True
                ):
                    rows[index] = ids
    return rows


def rows_at_once(*, on_gpu: bool) -> int:
    """The most texts that are written together, of either kind."""
    return max(CHATS, GPU_BATCH if on_gpu else BATCH)


def _load(folder: Path, device: str) -> tuple[Any, Any]:
    """The tokenizer, and the model on a device: in float32 on a CPU, else as it is stored."""
    from transformers import AutoTokenizer

    from quantize.runtimes.transformers.load import load_causal_lm

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return tokenizer, load_causal_lm(folder, device, dtype="float32" if device == CPU else "auto")


def _continue(model: object, rows: list[list[int]], length: int, generator: object) -> list[list[int]]:
    import torch

    ids = torch.tensor(rows).to(model.device)  # type: ignore[attr-defined]
    cache, step = None, ids
    for position in range(ids.shape[1], length):
        output = model(input_ids=step, past_key_values=cache, use_cache=True)  # type: ignore[operator]
        cache = output.past_key_values
        chances = torch.softmax(output.logits[:, -1].float(), -1)
        greedy = position - len(rows[0]) < GREEDY_TOKENS
        step = chances.argmax(-1, keepdim=True) if greedy else torch.multinomial(chances, 1, generator=generator)  # type: ignore[arg-type]
        ids = torch.cat([ids, step], 1)
    result: list[list[int]] = ids.tolist()
    return result


def chat_with_model(
    folder: Path, questions: list[str], samples: int, sequence_length: int, seed: int, device: str = CPU
) -> list[list[int]]:
    """Token ids of `samples` rows of `sequence_length`: questions through the model's chat template, and what it
    answers, one chat after the other; the same for the same seed. Without a template each question is a line of text.
    """
    import torch

    tokenizer, model = _load(folder, device)
    asked = [_asked(tokenizer, question) for question in questions]
    generator = torch.Generator(device=device).manual_seed(seed)
    rows: list[list[int]] = []
    with torch.inference_mode():
        for start in range(0, samples, CHATS):
            numbers = range(start, min(samples, start + CHATS))
            rows += _chat(model, asked, numbers, samples, sequence_length, generator, _ends(model, tokenizer))
    return rows


def _asked(tokenizer: Any, question: str) -> list[int]:
    """A question as the model gets it, up to where its answer begins."""
    if tokenizer.chat_template is None:
        ids: list[int] = tokenizer(f"{question}\n")["input_ids"]
        return ids
    messages = [{"role": "user", "content": question}]
    chat: list[int] = tokenizer.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=False
    )
    return chat


def _ends(model: Any, tokenizer: Any) -> set[int]:
    """The tokens with which an answer is over."""
    ends = model.generation_config.eos_token_id
    return {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}


def _chat(
    model: Any, asked: list[list[int]], numbers: range, step: int, length: int, generator: Any, ends: set[int]
) -> list[list[int]]:
    """Rows that go on token by token together, each with questions of its own: number, number + step …"""
    import torch

    coming = [deque(asked[number % len(asked)]) for number in numbers]
    following = [number + step for number in numbers]
    answered = [0] * len(numbers)
    rows: list[list[int]] = [[] for _ in numbers]
    cache, chosen = None, [0] * len(numbers)
    for _ in range(length):
        for index, row in enumerate(rows):
            if coming[index]:
                row.append(coming[index].popleft())
                answered[index] = 0
                continue
            row.append(chosen[index])
            answered[index] += 1
            if chosen[index] in ends or answered[index] == LONGEST_ANSWER:
                coming[index] = deque(asked[following[index] % len(asked)])
                following[index] += step
        ids = torch.tensor([row[-1:] for row in rows]).to(model.device)
        output = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        chances = torch.softmax(output.logits[:, -1].float(), -1)
        chosen = torch.multinomial(chances, 1, generator=generator)[:, 0].tolist()
    return rows
