"""One face for the runtimes that artifacts really run in.

In: where a model is and its format. Out: a Runtime, that gives next-token log-probabilities and greedy answers for
token ids. What token ids mean is left to the tokenizer of the source, so that both models are asked the same.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from quantize.errors import MissingExtraError, NotFiniteError
from quantize.runtimes.devices import Accelerator, DevicePlace
from quantize.runtimes.served import Progress, ServedModel, Serving

if TYPE_CHECKING:
    from torch import Tensor

    LogProbs = Tensor

BLOCK_BYTES = 256 * 2**20
"""Log-probabilities that are in memory at once; longer windows come in several blocks."""


@dataclass(frozen=True)
class ModelRef:
    """A model to run: its folder, the name of its format, and where the format is one file, that file in the folder."""

    folder: Path
    format: str
    main_file: str | None = None

    @property
    def path(self) -> Path:
        """The file, or the folder."""
        return self.folder / self.main_file if self.main_file else self.folder


@dataclass(frozen=True)
class Prompted:
    """Token ids to answer, greedily, with at most `max_tokens` more; `stop` are the ids that end an answer."""

    token_ids: tuple[int, ...]
    max_tokens: int
    stop: frozenset[int] = frozenset()


def in_groups(requests: Sequence[Prompted], fits: Callable[[Sequence[Prompted]], bool]) -> Iterator[list[int]]:
    """Places of the requests that are answered together: by the length of their prompts, as many as fit.

    One that does not fit alone is a group of its own.
    """
    members: list[int] = []
    for index in sorted(range(len(requests)), key=lambda place: len(requests[place].token_ids)):
        if members and not fits([requests[place] for place in (*members, index)]):
            yield members
            members = []
        members.append(index)
    if members:
        yield members


def goes_on(request: Prompted, chosen: list[int], token: int) -> bool:
    """Add a token to an answer, unless it ends it; whether more is to come."""
    if token in request.stop:
        return False
    chosen.append(token)
    return len(chosen) < request.max_tokens


class Runtime(Protocol):
    """A loaded model. name and version say what it runs in; `vocabulary` is the width of its distribution.

    warnings: what is not as its library would have it.
    """

    name: str
    version: str
    vocabulary: int
    warnings: tuple[str, ...]

    def log_probs(self, window: Sequence[int]) -> Iterator[LogProbs]:
        """Blocks of rows, in order, float32 [rows, vocabulary]: row i is the distribution of token i + 1.

        They are where the model is: what is made of them is computed there. There are len(window) - 1 rows in all. A
        block is valid until the next one. Raises VerifyError if not finite.
        """

    def read(self, windows: Sequence[Sequence[int]]) -> Iterator[Iterator[LogProbs]]:
        """What log_probs gives, for each window in order: a runtime that has all of them at hand may need to.

        Use up one window's blocks before asking for the next window. Raises VerifyError.
        """

    def answer(self, requests: Sequence[Prompted]) -> list[list[int]]:
        """The new token ids of each answer, without the stop token."""

    def close(self) -> None:
        """Give the memory back."""


class OneWindowAtATime(ABC):
    """The part of a Runtime whose model is whole in memory: windows are read one after the other."""

    @abstractmethod
    def log_probs(self, window: Sequence[int]) -> Iterator[LogProbs]:
        """See Runtime."""

    def read(self, windows: Sequence[Sequence[int]]) -> Iterator[Iterator[LogProbs]]:
        """See Runtime."""
        return (self.log_probs(window) for window in windows)


class ServingKind(Protocol):
    """What the gateway needs of a RuntimeKind. Picklable: it is sent to the process that the model is to live in."""

    @property
    def name(self) -> str: ...

    def serve(self, model: ModelRef, serving: Serving, progress: Progress) -> ServedModel:
        """Load a model for the gateway. progress is told the share that is loaded, 0 to 1.

        Raises VerifyError: it does not load. MissingExtraError: its runtime is not installed. Refused: it can't be
        served so.
        """


class RuntimeKind(ServingKind, Protocol):
    """What models of a format run in, before any is loaded.

    packages: distributions whose versions say which runtime it is. extra: of this program, that installs them.
    memory: the runtime of estimate/vram.py that takes as much memory. devices: what it can compute on, in words, told
    without loading it. knows_gpus: its build may have a GPU to use here, told without loading it. for_gpus: the line
    that installs a build that does. splits: a model can be on several GPUs, or in part on the CPU. first_load: what
    takes long the first time that a model is loaded on a GPU, in words; "" for nothing. kv_bits: those of
    Serving.kv_bits that it can serve with.
    """

    @property
    def packages(self) -> tuple[str, ...]: ...
    @property
    def extra(self) -> str: ...
    @property
    def memory(self) -> str: ...
    @property
    def devices(self) -> str: ...
    @property
    def knows_gpus(self) -> bool: ...
    @property
    def for_gpus(self) -> str: ...
    @property
    def splits(self) -> bool: ...
    @property
    def first_load(self) -> str: ...
    @property
    def kv_bits(self) -> Collection[str]: ...

    def find_gpus(self) -> tuple[Accelerator, ...]:
        """The GPUs that it can use here. It loads the runtime: call it in a process of its own.

        Raises MissingExtraError: its runtime is not installed.
        """

    def computes_in(self, place: DevicePlace) -> str:
        """The type of the numbers that it computes in at a place, as far as that is known before loading."""

    def open(self, model: ModelRef, *, context: int, threads: int, place: DevicePlace) -> Runtime:
        """Load a model; see formats.open_runtime."""


def runtime_version(kind: RuntimeKind, feature: str) -> str:
    """Which runtime is installed: "package version, package version". Raises MissingExtraError: it is not."""
    try:
        return ", ".join(f"{package} {version(package)}" for package in kind.packages)
    except PackageNotFoundError as exc:
        raise MissingExtraError(feature, kind.extra) from exc


def block_rows(vocabulary: int) -> int:
    """Rows of float32 log-probabilities that fit a block."""
    return max(16, BLOCK_BYTES // (4 * vocabulary))


def log_softmax(logits: Any, what: str) -> LogProbs:
    """Row-wise log-softmax of finite logits [rows, vocabulary], float32, where they are: on a GPU, or by all threads.

    logits: a tensor, or an array of the computer's memory. Raises VerifyError.
    """
    import torch

    values = torch.as_tensor(logits)
    if not bool(values.amax(dim=-1).isfinite().all()):  # of a row with NaN it is NaN
        raise NotFiniteError(f"{what}: the logits are not finite", hint="a tensor is damaged; quantize verify names it")
    return torch.log_softmax(values, -1, dtype=torch.float32)
