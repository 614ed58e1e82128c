"""Golden prompts -> token ids, by the source's own tokenizer and chat template; token ids -> text.

In: a GoldenSet, the source's folder, how many tokens of context there are. Out: one Prompted a prompt, the same for the
source and for every artifact of it, so that answers differ by the weights alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.calibration.text import load_tokenizer
from quantize.errors import UsageError
from quantize.evaluate.golden import PLACE, GoldenSet, Haystack, Prompt
from quantize.model.checkpoint import read_json
from quantize.runtimes.base import Prompted

_END_TOKENS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "</s>", "<|end_of_text|>")
_REMARK = "Entry {number}: {sentence}"


@dataclass(frozen=True)
class Asked:
    """What is asked: one request and one readable prompt for each prompt of the set, in its order."""

    requests: tuple[Prompted, ...]
    prompts: tuple[str, ...]
    context: int


class PromptTokenizer:
    """The tokenizer of a model folder, as evaluation needs it."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = load_tokenizer(folder)
        self.stop = frozenset(_stop_tokens(self._tokenizer, folder))

    @property
    def prefix(self) -> list[int]:
        """What the tokenizer puts before any text: the BOS token, or nothing."""
        ids: list[int] = self._tokenizer("")["input_ids"]
        eos = self._tokenizer.eos_token_id
        return ids[:-1] if len(ids) > 1 and ids[-1] == eos else ids if ids != [eos] else []

    def encode(self, text: str) -> list[int]:
        """Token ids without special tokens."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def chat(self, user: str, system: str | None) -> list[int]:
        """Token ids of one turn up to where the model answers; without a chat template the bare text."""
        folded = user if system is None else f"{system}\n\n{user}"
        if self._tokenizer.chat_template is None:
            return [*self.prefix, *self.encode(folded + "\n")]
        import jinja2

        messages = [{"role": "user", "content": folded}]
        if system is not None and self._shows(system):
            messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        try:
            return self._render(messages)
        except (jinja2.TemplateError, ValueError, TypeError) as exc:
            raise UsageError(f"the source's chat template fails: {str(exc)[:200]}") from exc

    def decode(self, ids: Sequence[int]) -> str:
        """Text of an answer, without special tokens."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text.strip()

    def pieces(self, ids: Sequence[int]) -> list[str | None]:
        """The tokens' own texts, as the vocabulary has them; None for an id that it does not have."""
        known = len(self._tokenizer)
        tokens: list[str | None] = self._tokenizer.convert_ids_to_tokens([i if i < known else 0 for i in ids])
        return [token if i < known else None for i, token in zip(ids, tokens, strict=True)]

    def _shows(self, system: str) -> bool:
        """Whether the chat template takes a system role: some refuse it, others leave it out without a word."""
        messages = [{"role": "system", "content": system}, {"role": "user", "content": "?"}]
        try:
            return system.strip() in self._tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception:  # noqa: BLE001 - a template is a program, and may refuse in any way
            return False

    def _render(self, messages: list[dict[str, str]]) -> list[int]:
        ids: list[int] = self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        return ids


def ask(golden: GoldenSet, tokenizer: PromptTokenizer, context: int) -> Asked:
    """Turn every prompt into token ids that leave room for the answer.

    context: tokens of prompt and answer together. Raises UsageError: a prompt is longer than that.
    """
    requests, texts = [], []
    for item in golden.prompts:
        text, ids = _fill(item.prompt, tokenizer, context)
        if len(ids) + item.prompt.max_tokens > context:
            raise UsageError(
                f"golden prompt {item.key}: {len(ids)} tokens and {item.prompt.max_tokens} for the answer are more "
                f"than the context of {context}",
                hint="shorten the prompt, or evaluate with a larger context",
            )
        requests.append(Prompted(tuple(ids), item.prompt.max_tokens, tokenizer.stop))
        texts.append(text)
    return Asked(tuple(requests), tuple(texts), context)


def _fill(prompt: Prompt, tokenizer: PromptTokenizer, context: int) -> tuple[str, list[int]]:
    if prompt.haystack is None:
        return prompt.prompt, tokenizer.chat(prompt.prompt, prompt.system)
    bare = len(tokenizer.chat(prompt.prompt.replace(PLACE, prompt.haystack.needle), prompt.system))
    room = context - prompt.max_tokens - bare
    target = min(int(context * prompt.haystack.share) - bare, room)
    text = prompt.prompt.replace(PLACE, build_haystack(prompt.haystack, tokenizer, target))
    ids = tokenizer.chat(text, prompt.system)
    return text, ids


def build_haystack(haystack: Haystack, tokenizer: PromptTokenizer, tokens: int) -> str:
    """Numbered filler sentences of at most `tokens` tokens in all, with the needle among them at its depth."""
    lines: list[str] = []
    used = 0
    while True:
        number = len(lines) + 1
        line = _REMARK.format(number=number, sentence=haystack.filler[(number - 1) % len(haystack.filler)])
        used += len(tokenizer.encode(line + "\n")) + 1  # joined text may be cut elsewhere: one token to be safe
        if used > tokens:
            break
        lines.append(line)
    lines.insert(round(haystack.depth * len(lines)), haystack.needle)
    return "\n".join(lines)


def _stop_tokens(tokenizer: Any, folder: Path) -> list[int]:
    """The end-of-sequence tokens of the tokenizer and generation config, and those that end a turn."""
    found = [tokenizer.eos_token_id]
    ends = read_json(folder / "generation_config.json").get("eos_token_id")
    found += ends if isinstance(ends, list) else [ends]
    vocabulary = tokenizer.get_vocab()
    found += [vocabulary.get(token) for token in _END_TOKENS]
    return [token for token in found if isinstance(token, int)]
