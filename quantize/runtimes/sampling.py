"""Text that a model writes itself, for calibration without a dataset; runs in a worker.

The idea: Liu et al., "LLM-QAT: Data-Free Quantization Aware Training" (2023), section 3.1: next tokens are sampled
from the model's own distribution, the first few greedily so that each text starts in its own way.
"""

from __future__ import annotations

from pathlib import Path

BATCH = 8
GREEDY_TOKENS = 4


def sample_from_model(
    folder: Path, prompts: list[str], samples: int, sequence_length: int, seed: int
) -> list[list[int]]:
    """Token ids of `samples` texts, each a prompt and what the model says after it; the same for the same seed."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    rows = [tokenizer(prompts[index % len(prompts)])["input_ids"][:sequence_length] for index in range(samples)]
    by_length: dict[int, list[int]] = {}
    for index, ids in enumerate(rows):
        by_length.setdefault(len(ids), []).append(index)
    with torch.inference_mode():
        for members in by_length.values():
            for start in range(0, len(members), BATCH):
                group = members[start : start + BATCH]
                for index, ids in zip(
                    group, _continue(model, [rows[i] for i in group], sequence_length, generator), strict=True
                ):
                    rows[index] = ids
    return rows


def _continue(model: object, rows: list[list[int]], length: int, generator: object) -> list[list[int]]:
    import torch

    ids = torch.tensor(rows)
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
