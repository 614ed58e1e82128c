"""An open GGUF file in llama.cpp, through the C interface of llama-cpp-python: what measuring and serving share.

In: a GGUF file, how much context for how many sequences. Out: an OpenModel that tokenizes, decodes batches and gives
logits. What to ask it, and how to choose tokens, is left to evaluate and serve.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from quantize.errors import UsageError, VerifyError
from quantize.runtimes.devices import ON_CPU, DevicePlace
from quantize.runtimes.llama_cpp.devices import put_on
from quantize.runtimes.llama_cpp.library import last_log_line, load_library
from quantize.runtimes.llama_cpp.placement import Placed
from quantize.runtimes.llama_cpp.words import Words, load_model
from quantize.system.machine import usable_cores

MICRO_BATCH_TOKENS = 512
NOT_RUN = "free memory, or take a shorter context; another llama-cpp-python may run it"
KV_TYPES = {"f16": 1, "q4_0": 2, "q8_0": 8}  # enum ggml_type
POOLING_NONE = 0  # llama.cpp's LLAMA_POOLING_TYPE_NONE: each token's own output; pooling is the caller's


@dataclass(frozen=True)
class ModelSettings:
    """How to open a model.

    context: tokens of each of `sequences`; of all of them together with `shared`, in the memory of one.
    batch: most tokens of one decode, given the size of the vocabulary.
    threads: 0 leaves one core to others.
    flash_attention: None is llama.cpp's own choice. kv_type: of the KV cache; one that is quantized needs flash
    attention.
    check_tensors: look at every value for NaN and Inf while loading.
    """

    context: int
    sequences: int = 1
    shared: bool = False
    batch: Callable[[int], int] = lambda _: MICRO_BATCH_TOKENS
    threads: int = 0
    flash_attention: bool | None = None
    kv_type: str = "f16"
    place: DevicePlace = ON_CPU
    check_tensors: bool = False


class BatchToken(NamedTuple):
    """One token of a batch: where it stands in its sequence, and whether its logits are wanted."""

    token: int
    position: int
    sequence: int
    logits: bool


class OpenModel(Words):
    """A loaded model with one context. Not for two threads at once."""

    def __init__(
        self, path: Path, settings: ModelSettings, *, progress: Callable[[float], None] | None = None,
        feature: str = "running a GGUF file",
    ) -> None:  # fmt: skip
        """progress: called with 0..1 while loading. feature: what the missing package would be needed for.

        Raises VerifyError: llama.cpp can't load it. UsageError: more context than the model has, or a GPU that is not
        there. MissingExtraError.
        """
        self.placed = Placed()
        library = load_library(feature, self.placed.line)
        super().__init__(library, _load(library, path, settings, progress), path.name)
        self.trained_context = int(library.llama_model_n_ctx_train(self.model))
        self._settings = settings
        self.context: Any = None
        self._open_context()

    def _open_context(self) -> None:
        library, settings = self.library, self._settings
        if self.trained_context and settings.context > self.trained_context:
            self.close()
            raise UsageError(f"{self._name}: {settings.context} tokens are more than its context of "
                             f"{self.trained_context}")  # fmt: skip
        self.size = max(settings.context, 16)
        params = library.llama_context_default_params()
        params.n_ctx = self.size if settings.shared else self.size * settings.sequences
        params.n_seq_max, params.kv_unified = settings.sequences, settings.shared
        params.n_batch = min(params.n_ctx, settings.batch(self.vocabulary))
        params.n_ubatch = min(params.n_batch, MICRO_BATCH_TOKENS)
        # Its threads wait for each other by spinning: one core that is busy elsewhere makes all of them slow.
        params.n_threads = params.n_threads_batch = settings.threads or max(1, usable_cores() - 1)
        if settings.flash_attention is not None:
            params.flash_attn_type = int(settings.flash_attention)
        params.type_k = params.type_v = KV_TYPES[settings.kv_type]
        params.pooling_type = POOLING_NONE
        self.batch_tokens = int(params.n_batch)
        self.context = library.llama_init_from_model(self.model, params)
        if not self.context:
            self.close()
            raise VerifyError(f"{self._name}: llama.cpp makes no context for it: {last_log_line()}", hint=NOT_RUN)
        self._memory = library.llama_get_memory(self.context)

    def decode(self, entries: Iterable[BatchToken]) -> None:
        """Run one batch. Raises VerifyError: a token that the vocabulary lacks, or llama.cpp can't run it."""
        rows = list(entries)
        batch = self.library.llama_batch_init(len(rows), 0, 1)
        try:
            batch.n_tokens = len(rows)
            for index, row in enumerate(rows):
                if not 0 <= row.token < self.vocabulary:
                    raise VerifyError(f"{self._name}: has no token {row.token}; it is not of the same vocabulary")
                batch.token[index], batch.pos[index] = row.token, row.position
                batch.n_seq_id[index], batch.seq_id[index][0] = 1, row.sequence
                batch.logits[index] = row.logits
            if self.library.llama_decode(self.context, batch) != 0:
                raise VerifyError(f"{self._name}: llama.cpp can't run it: {last_log_line()}", hint=NOT_RUN)
        finally:
            self.library.llama_batch_free(batch)

    def logits(self, rows: int) -> Any:
        """float32 [rows, vocabulary] of the last batch: only the tokens that asked for them. Valid until the next."""
        import numpy as np

        return np.ctypeslib.as_array(self.library.llama_get_logits(self.context), (rows, self.vocabulary))

    def decode_hidden(self, rows: list[BatchToken]) -> Any:
        """Run one batch of tokens that all ask for logits; what the last layer makes of each, float64 [rows, width].

        Raises VerifyError, as decode does.
        """
        import numpy as np

        library, width = self.library, int(self.library.llama_model_n_embd_out(self.model))
        library.llama_set_embeddings(self.context, True)
        try:
            self.decode(rows)
            found = np.ctypeslib.as_array(library.llama_get_embeddings(self.context), (len(rows), width))
            return found.astype(np.float64)
        finally:
            library.llama_set_embeddings(self.context, False)

    def forget(self) -> None:
        """Empty the KV cache."""
        self.library.llama_memory_clear(self._memory, True)

    def forget_after(self, sequence: int, position: int) -> bool:
        """Keep only the first `position` tokens of a sequence; False where this kind of model can't."""
        return bool(self.library.llama_memory_seq_rm(self._memory, sequence, position, -1))

    def close(self) -> None:
        """Give the memory back."""
        if self.context:
            self.library.llama_free(self.context)
        if self.model:
            self.library.llama_model_free(self.model)
        self.context = self.model = None


def _load(library: Any, path: Path, settings: ModelSettings, progress: Callable[[float], None] | None) -> Any:
    """llama.cpp's pointer to the model."""
    params = library.llama_model_default_params()
    params.check_tensors = settings.check_tensors
    kept = put_on(params, settings.place)
    if progress is not None:
        params.progress_callback = library.llama_progress_callback(lambda share, _: (progress(share), True)[1])
    model = load_model(library, path, params)
    del kept  # what the parameters point to
    return model
