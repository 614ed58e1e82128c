"""A Runtime as lm-evaluation-harness asks models: log-likelihoods of texts, and greedy answers up to a text.

In: a Runtime, the source's tokenizer, how many tokens it may read at a time. Out: an `LM` of the harness. Tokens are
made as the harness's own model class for transformers makes them, so that figures are those that others publish. Import
it late: it needs the harness.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
import torch
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from quantize.calibration.text import load_tokenizer
from quantize.errors import UsageError
from quantize.evaluate.baseline import target_log_probs
from quantize.events import Reporter, progress
from quantize.model.checkpoint import read_json
from quantize.runtimes.base import Prompted, Runtime

if TYPE_CHECKING:
    from quantize.runtimes.base import LogProbs

MAX_NEW_TOKENS = 256  # of an answer, where the task does not say; the harness's own
FIRST_TOKENS = 32  # of an answer that may end at a text: then twice as many, and so on
ANSWERS_AT_ONCE = 64


@dataclass(frozen=True)
class _Question:
    ids: tuple[int, ...]
    until: tuple[str, ...]
    max_tokens: int


class RuntimeModel(TemplateLM):  # type: ignore[misc]
    """A model in its runtime. cut: requests that were longer than `max_length` so far, and lost their beginning."""

    def __init__(self, runtime: Runtime, tokenizer: Path, context: int, reporter: Reporter, label: str) -> None:
        """tokenizer: folder of the source. label: what is read, for progress.

        Raises CheckpointError: no tokenizer. UsageError: it has no token to begin with.
        """
        super().__init__()
        self.tokenizer = load_tokenizer(tokenizer)
        self.max_length, self.cut = context, 0
        self._runtime, self._reporter, self._label = runtime, reporter, label
        ends = read_json(tokenizer / "generation_config.json").get("eos_token_id")
        known = [self.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])]
        self._stop = frozenset(token for token in known if isinstance(token, int))
        if self.prefix_token_id is None:
            raise UsageError("the source's tokenizer has no token that begins or ends a text, which tasks need")

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id  # type: ignore[no-any-return]

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has nothing before it."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else first

    @property
    def tokenizer_name(self) -> str:
        """What the harness would name its cache of requests by, which is not used."""
        return "source"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; with the special ones that the tokenizer adds, unless the text has the first of them already."""
        return self._encode(string, add_special_tokens, self.tokenizer.decode(self.prefix_token_id))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Turns as the source's template writes them. Raises UsageError: it has none, or refuses them."""
        if self.tokenizer.chat_template is None:
            raise UsageError("`chat: true`: the source has no chat template", hint="leave `chat` out of the task")
        try:
            return self._render(chat_history, add_generation_prompt)
        except jinja2.TemplateError:  # some templates refuse a system role
            try:
                return self._render([item for item in chat_history if item["role"] != "system"], add_generation_prompt)
            except jinja2.TemplateError as exc:
                raise UsageError(f"the source's chat template fails: {str(exc)[:200]}") from exc

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts in nats, in windows of `max_length`, each token once."""
        windows, counts = [], []
        for (text,) in (request.args for request in requests):
            rolling = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text), prefix_token=self.prefix_token_id, max_seq_len=self.max_length,
                context_len=1,
            )  # fmt: skip
            found = [(None, *utils.make_disjoint_window(item)) for item in rolling]
            windows += found
            counts.append(len(found))
        each = iter(self._loglikelihood_tokens(windows))
        return [sum(next(each)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers, cut at the first of the texts that end them. Raises UsageError: sampling, no room."""
        questions = [self._question(*request.args[:2]) for request in requests]
        answers: list[str] = []
        for start in range(0, len(questions), ANSWERS_AT_ONCE):
            progress(self._reporter, "", f"{self._label} (answers)", start, len(questions))
            answers += self._answers(questions[start : start + ANSWERS_AT_ONCE])
        progress(self._reporter, "", f"{self._label} (answers)", len(questions), len(questions))
        return answers

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether each token is the likeliest) of continuations; a text is read once for all
        that differ in their last token alone.
        """
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            if not context or not 0 < len(continuation) <= self.max_length:
                limit = f"1 to {self.max_length:,} tokens can be read; `evaluation: context` sets how many"
                raise UsageError(f"{self._label}: a text of {len(continuation):,} tokens to be rated", hint=limit)
            ids = (*context, *continuation)
            self.cut += len(ids) > self.max_length + 1
            groups.setdefault(ids[-(self.max_length + 1) : -1], []).append(index)
        found: dict[int, tuple[float, bool]] = {}
        windows = [[*ids, requests[members[0]][2][-1]] for ids, members in groups.items()]
        parts = zip(groups.items(), self._runtime.read(windows), strict=True)
        for number, ((ids, members), blocks) in enumerate(parts):
            progress(self._reporter, "", f"{self._label} (texts)", number, len(groups))
            rated = _rate(blocks, len(ids), {index: requests[index][2] for index in members})
            found.update(rated)
        progress(self._reporter, "", f"{self._label} (texts)", len(groups), len(groups))
        return [found[index] for index in range(len(requests))]

    def _encode(self, text: str, special: bool | None, first: str | None) -> list[int]:
        if special is None and first and text.startswith(first):
            special = False
        options = {} if special is None else {"add_special_tokens": special}
        ids: list[int] = self.tokenizer(text, verbose=False, **options)["input_ids"]
        return ids

    def _render(self, turns: list[dict[str, str]], is_asked: bool) -> str:
        text: str = self.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=is_asked, continue_final_message=not is_asked
        )
        return text

    def _question(self, text: str, options: dict[str, Any]) -> _Question:
        options = normalize_gen_kwargs(options, MAX_NEW_TOKENS)
        if options.get("do_sample"):
            raise UsageError(f"{self._label}: its answers are sampled, and only greedy ones are measured")
        end = None if self.eot_token_id is None else self.tokenizer.decode(self.eot_token_id)
        until = handle_stop_sequences(options.get("until"), eos=end)
        room = self.max_length - options["max_gen_toks"]
        if room <= 0:
            hint = "`evaluation: context` sets how many tokens a question and its answer have"
            raise UsageError(f"{self._label}: answers of {options['max_gen_toks']} tokens leave no room", hint=hint)
        ids = self._encode(text, None, self.tokenizer.bos_token)
        self.cut += len(ids) > room
        return _Question(tuple(ids[-room:]), tuple(term for term in until if term), options["max_gen_toks"])

    def _answers(self, questions: Sequence[_Question]) -> list[str]:
        """Some tokens at a time, until each answer has what ends it."""
        chosen: list[list[int]] = [[] for _ in questions]
        left, more = list(range(len(questions))), FIRST_TOKENS
        while left:
            asked = [self._request(questions[i], chosen[i], more) for i in left]
            going_on = []
            for i, request, tokens in zip(left, asked, self._runtime.answer(asked), strict=True):
                is_ended = self._extend(chosen[i], tokens, questions[i].until)
                if not is_ended and len(tokens) == request.max_tokens and len(chosen[i]) < questions[i].max_tokens:
                    going_on.append(i)
            left, more = going_on, 2 * more
        return [
            postprocess_generated_text(self._text(tokens), list(question.until), None)
            for question, tokens in zip(questions, chosen, strict=True)
        ]

    def _request(self, question: _Question, chosen: Sequence[int], more: int) -> Prompted:
        return Prompted((*question.ids, *chosen), min(more, question.max_tokens - len(chosen)), self._stop)

    def _extend(self, chosen: list[int], tokens: Sequence[int], until: Sequence[str]) -> bool:
        """Add tokens up to the one that completes a text that ends an answer; whether one did. Token by token, as the
        harness looks: what comes after can change how bytes that are no text are shown.
        """
        for token in tokens:
            chosen.append(token)
            text = self._text(chosen)
            if any(term in text for term in until):
                return True
        return False

    def _text(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text


def _rate(
    blocks: Iterator[LogProbs], rows: int, continuations: Mapping[int, Sequence[int]]
) -> dict[int, tuple[float, bool]]:
    """Log-likelihood, and whether all are the likeliest, of the tokens that end after the last of `rows`."""
    total, likeliest = dict.fromkeys(continuations, 0.0), dict.fromkeys(continuations, True)
    first = rows - max(len(tokens) for tokens in continuations.values())
    at = 0
    for block in blocks:
        start, at = at, at + len(block)
        if at <= first:
            continue
        block = torch.as_tensor(block)  # a runtime of a plugin may give arrays
        best = block[max(0, first - start) :].argmax(dim=1).cpu().numpy()
        for index, tokens in continuations.items():
            begin = max(start, rows - len(tokens))
            if begin >= at:
                continue
            wanted = np.asarray(tokens[begin - (rows - len(tokens)) : at - (rows - len(tokens))])
            part = block[begin - start :]
            total[index] += float(target_log_probs(part[: len(wanted)], wanted).sum(dtype=np.float64))
            likeliest[index] &= bool((best[len(best) - len(wanted) :] == wanted).all())
    return {index: (total[index], likeliest[index]) for index in continuations}
