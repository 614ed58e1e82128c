"""Embeddings of a local model: each input of a request is an order of its own to the model's process.

In: an EmbeddingRequest. Out: OpenAI's list of vectors, as numbers or as base64 of little-endian float32.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Collection
from contextlib import aclosing
from typing import Any

from quantize.serve.engines.base import Call
from quantize.serve.engines.link import Link
from quantize.serve.failures import Failure, refuse_unknown, unsupported
from quantize.serve.protocol import EmbeddingRequest

MAX_TEXTS = 2048  # as OpenAI has it


async def embed(
    call: Call, request: EmbeddingRequest, link: Link, model: str, runtime: str, supports: Collection[str]
) -> dict[str, Any]:
    """The whole answer. Raises Failure."""
    if "embeddings" not in supports:
        raise unsupported("input", runtime, ": this model makes no embeddings")
    refuse_unknown(request.model_extra, runtime)
    data = []
    for index, text in enumerate(_texts(request)):
        encoded = await _vector(call, link, text)
        raw = base64.b64decode(encoded)
        width = len(raw) // 4
        if request.dimensions not in (None, width):
            raise unsupported("dimensions", runtime, f": this model's vectors have {width}")
        found = list(struct.unpack(f"<{width}f", raw)) if request.encoding_format != "base64" else encoded
        data.append({"object": "embedding", "index": index, "embedding": found})
    usage = {"prompt_tokens": call.prompt_tokens, "total_tokens": call.prompt_tokens}
    return {"object": "list", "model": model, "data": data, "usage": usage, "trace_id": call.trace_id}


async def _vector(call: Call, link: Link, text: str | list[int]) -> str:
    limits = {"max_tokens": None, "max_input_tokens": call.max_input_tokens, "max_output_tokens": None}
    async with aclosing(link.frames({"prompt": text, **limits})) as frames:
        async for frame in frames:
            if "start" in frame:
                call.prompt_tokens += frame["start"]["prompt_tokens"]
            elif "end" in frame:
                call.saw_token()
                return str(frame["end"]["embedding"])
    raise AssertionError("frames end with an end, or with a Failure")


def _texts(request: EmbeddingRequest) -> list[str | list[int]]:
    """What is to be embedded, each text or list of tokens on its own. Raises Failure: nothing, or too many."""
    given: Any = request.input
    items: list[Any] = [given] if isinstance(given, str) or isinstance(given[0], int) else given
    if len(items) > MAX_TEXTS:
        raise Failure(422, "invalid_value", f"input: more than {MAX_TEXTS} texts a request", param="input")
    if not all(items):
        raise Failure(422, "invalid_value", "input: a text is empty", param="input")
    return items
