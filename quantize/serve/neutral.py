"""Fields that ask for nothing: what clients send because their types have it, and what an answer is the same without.

In: a field of a request, or of one of its messages, that an engine does not know. Out: whether leaving it aside changes
nothing. What is not in these tables is a question that somebody wants an answer to, and is refused by name.
"""

from __future__ import annotations

from typing import Any

ABOUT_CLIENTS = frozenset({"user", "metadata", "safety_identifier"})  # who asks, for logs that a provider keeps
ABOUT_SPEED = frozenset({"prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "prediction"})
ANY = ABOUT_CLIENTS | ABOUT_SPEED
DEFAULTS: dict[str, tuple[Any, ...]] = {
    # /v1/chat/completions, in the order of OpenAI's reference
    "functions": ([],),
    "function_call": ("none", "auto"),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    # /v1/completions
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    # stream_options
    "include_obfuscation": (False,),
    # what other servers added, at the value that switches it off
    "ignore_eos": (False,),
    "length_penalty": (1,),
    "min_tokens": (0,),
    "repeat_penalty": (1,),
    "skip_special_tokens": (True,),
    "use_beam_search": (False,),
}
ABOUT_OTHERS = frozenset({"provider_specific_fields"})  # LiteLLM's, of whoever wrote that message
MESSAGE_DEFAULTS: dict[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "refusal": ("",),
    "reasoning": ("",),
    "reasoning_content": ("",),
    "tool_calls": ([],),
}


def asks_for_nothing(field: str, value: Any) -> bool:
    """Whether a field of a request, by its value, may be left aside."""
    return value is None or field in ANY or _is_one_of(value, DEFAULTS.get(field, ()))


def says_nothing(field: str, value: Any) -> bool:
    """The same of a field of a message."""
    return value is None or field in ABOUT_OTHERS or _is_one_of(value, MESSAGE_DEFAULTS.get(field, ()))


def _is_one_of(value: Any, known: tuple[Any, ...]) -> bool:
    """Equal, and no bool where a number is meant."""
    return any(value == item and isinstance(value, bool) == isinstance(item, bool) for item in known)
