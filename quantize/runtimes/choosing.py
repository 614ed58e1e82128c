"""Which token comes next, by a model's logits: greedily, or drawn as a request asks for it.

In: logits of one position, on whatever device torch has them. Out: a token, with log-probabilities where asked for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from quantize.runtimes.served import Chosen, Refused, Sampling

FEW_TOKENS = 1024


@dataclass
class Answer:
    """One answer in progress. tokens: of the prompt and of the answer so far. done: tokens that the KV cache has."""

    tokens: list[int]
    sampling: Sampling
    generator: Any
    done: int = 0
    cache: Any = None
    counts: Counter[int] = field(default_factory=Counter)

    @classmethod
    def to(cls, prompt: list[int], sampling: Sampling) -> Any:
        """Begin one, with random numbers of its own."""
        import torch

        generator = torch.Generator()
        if sampling.seed is None:
            generator.seed()
        else:
            generator.manual_seed(sampling.seed % (1 << 63))
        return cls(prompt, sampling, generator)


def check_known(tokens: Sequence[int], vocabulary: int) -> None:
    """Raises Refused: a prompt has a token that a model does not know."""
    if any(not 0 <= token < vocabulary for token in tokens):
        raise Refused(422, "invalid_value", "the prompt has a token that the vocabulary lacks", "prompt")


def choose(torch: Any, item: Answer, logits: Any) -> Chosen:
    """The next token, which the answer then has. logits: float32 [vocabulary]."""
    sampling = item.sampling
    scores = _penalized(torch, logits, item) if _has_penalties(sampling) else logits
    token = _sample(torch, scores, sampling, item.generator)
    item.tokens.append(token)
    item.counts[token] += 1
    if sampling.logprobs is None:
        return Chosen(token)
    logprobs = torch.log_softmax(logits, -1)
    best = logprobs.topk(sampling.logprobs) if sampling.logprobs else None
    top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True)) if best is not None else ()
    return Chosen(token, float(logprobs[token]), top)


def _has_penalties(sampling: Sampling) -> bool:
    return (sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty) != (1.0, 0.0, 0.0)


def _penalized(torch: Any, logits: Any, item: Answer) -> Any:
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
