"""The desk of a folder in the Hugging Face layout: its tokenizer and chat template, without transformers and torch.

In: the tokenizer as transformers made it, as text. Out: what a ForkServer serves. Nothing is held to a grammar.
"""

from __future__ import annotations

import os

import orjson

from quantize.runtimes.desk import Desk
from quantize.system.forks import Serve


def open_desk(options: bytes) -> tuple[Serve, bytes]:
    """Set up a process: see forks.py."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads would not be there in a copy
    from tokenizers import Tokenizer

    given = orjson.loads(options)
    tokenizer = Tokenizer.from_str(given["tokenizer"])
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def tokenize(text: str, chat: bool) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=not chat).ids)

    desk = Desk(tokenize, given["template"], given["special"])
    return desk.serve, desk.told()
