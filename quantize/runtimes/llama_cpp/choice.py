"""Choosing a token from llama.cpp's logits ourselves: with log-probabilities, or among the tokens that fit.

In: logits, and masks of what may come. Out: tokens. What a mask allows is known to the process beside the model: here
no grammar is run, so that none can end the process that all share.
"""

from __future__ import annotations

import ctypes
from typing import Any

from quantize.runtimes.llama_cpp.model import OpenModel
from quantize.runtimes.served import Chosen, NextTokens, Refused


def logits_of(model: OpenModel, row: int) -> Any:
    """float32 [vocabulary] of a row of the last batch, copied."""
    import numpy as np

    pointer = model.library.llama_get_logits_ith(model.context, row)
    return np.ctypeslib.as_array(pointer, (model.vocabulary,)).copy()


def with_logprobs(token: int, logits: Any, count: int) -> Chosen:
    """A token with its log-probability, and the `count` likeliest beside it."""
    import numpy as np

    wide = logits.astype(np.float64)
    highest = float(wide.max())
    logprobs = wide - highest - np.log(np.exp(wide - highest).sum())
    best = np.argpartition(logprobs, -count)[-count:] if 0 < count < len(logprobs) else np.arange(len(logprobs))
    best = best[np.argsort(logprobs[best])[::-1]][:count].tolist()
    return Chosen(token, float(logprobs[token]), tuple((item, float(logprobs[item])) for item in best))


def choose_fitting(model: OpenModel, sampler: Any, masks: NextTokens | None, logits: Any) -> int | None:
    """The next token of those that fit, told to the masks; None: what fits is not known yet. Raises Refused."""
    import numpy as np

    mask = masks.poll() if masks is not None else None
    if masks is None or mask is None:
        return None
    fitting = np.flatnonzero(np.frombuffer(mask, np.uint8) == 0)
    if not len(fitting):
        message = "no token of the model's vocabulary goes on with what the answer must fit"
        raise Refused(422, "no_token_fits", message, masks.param)
    library = model.library
    rows = np.zeros(len(fitting), np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)]))
    rows["id"], rows["logit"] = fitting, logits[fitting]
    data = rows.ctypes.data_as(ctypes.POINTER(library.llama_token_data))
    candidates = library.llama_token_data_array(data, len(rows), -1, False)
    library.llama_sampler_apply(sampler, ctypes.byref(candidates))
    token = int(candidates.data[candidates.selected].id)
    library.llama_sampler_accept(sampler, token)
    masks.accept(token)
    return token
