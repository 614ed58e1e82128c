"""A model in transformers, asked the same twice: what a check of an artifact ends with.

In: a loaded model, token ids. Out: the tokens of its greedy answer, or VerifyError. Call it in a worker.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quantize.errors import VerifyError

TOKENS = 16
PROMPT = "The capital of France is"


def read_prompt(folder: Path) -> Any:
    """Token ids [1, length] of what the model is asked, by the artifact's tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)(PROMPT, return_tensors="pt")["input_ids"]


def generate_twice(model: Any, folder: Path, prompt: Any) -> list[int]:
    """Greedy tokens after a prompt. Raises VerifyError: logits not finite, or two runs differ."""
    import torch

    limit = model.config.get_text_config().vocab_size
    prompt = prompt[prompt < limit].reshape(1, -1) if bool((prompt >= limit).any()) else prompt
    prompt = prompt.to(model.device)
    runs = []
    with torch.inference_mode():
        for _ in range(2):
            ids, cache, chosen = prompt, None, []
            for _ in range(TOKENS):
                output = model(input_ids=ids, past_key_values=cache, use_cache=True)
                logits, cache = output.logits[0, -1].float(), output.past_key_values
                if not bool(torch.isfinite(logits).all()):
                    raise VerifyError(f"{folder.name}: the logits are not finite", hint="a tensor is damaged")
                ids = logits.argmax().reshape(1, 1)
                chosen.append(int(ids))
            runs.append(chosen)
    if runs[0] != runs[1]:
        raise VerifyError(f"{folder.name}: two greedy runs differ ({runs[0][:8]} and {runs[1][:8]})")
    return runs[0]
