"""What a format is: one object that owns all that this program knows of one kind of file.

A facet says how one thing is done with artifacts of the format; None, or an empty one, means that it is not. Who
builds, measures, serves, cards or publishes asks the facet and never the name.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from quantize.estimate.vram import VramProfile

if TYPE_CHECKING:
    from torch import Tensor

    from quantize.events import Reporter
    from quantize.files.compare import WeightFile
    from quantize.formats.base import Builder, Context
    from quantize.model.checkpoint import Checkpoint
    from quantize.model.shape import ModelShape
    from quantize.runtimes.base import RuntimeKind
    from quantize.runtimes.probe import Probe

Reader = Callable[[str, "Tensor"], "Tensor | None"]
Product = Callable[["Tensor", "Tensor | None"], "Tensor"]
"""Of inputs [..., in] and a bias [out], float32 [..., out]."""
Options = Mapping[str, Any]


@dataclass(frozen=True)
class OnDisk:
    """A model as its headers have it: bytes of all tensors, and bytes that its runtime keeps a second time on a CPU."""

    shape: ModelShape
    weights_bytes: int
    repacked_bytes: int = 0


class Layout(Protocol):
    """How a model of the format lies on disk: one file, or a folder in the Hugging Face layout.

    container: what the weights are in, as ModelPack names it. library: what the Hub loads a folder with, if anything.
    """

    @property
    def container(self) -> str: ...
    @property
    def library(self) -> str | None: ...

    def recognizes(self, path: Path) -> bool:
        """Whether a file or folder that no manifest describes is such a model. Raises RefusedError: it is one that
        must not be loaded.
        """

    def main_name(self, names: Iterable[str]) -> str | None:
        """Of the files of an artifact, the one that a runtime opens; None where it opens the folder."""

    def main_file(self, folder: Path) -> Path | None:
        """The one file that a runtime opens; None where it opens the folder. Raises VerifyError: it is not there."""

    def weight_names(self, names: Iterable[str]) -> tuple[str, ...]:
        """Of the files of an artifact, those that hold its weights."""

    def read(self, path: Path) -> WeightFile:
        """One file of weights, by its header. Raises CheckpointError."""

    def measure(self, path: Path) -> OnDisk:
        """From headers, read once, of what `main_file` gives or the folder.

        Raises CheckpointError; RefusedError: there are no weights to load.
        """

    def chat_template(self, path: Path) -> str | None:
        """The chat template that a runtime finds."""


class Weights(Protocol):
    """The matrices of an artifact as the numbers that they stand for.

    folded: factors of whole rows and columns are in neighbors, and to be taken out before a matrix is compared.
    """

    @property
    def folded(self) -> bool: ...

    def reader(self, path: Path, checkpoint: Checkpoint) -> Reader:
        """Gives the float32 [out, in] matrix for a source tensor's name and values; None where it has none of its own.

        The values may be on torch's meta device, which has shapes only: where the layout is that of transformers.
        Raises CheckpointError, VerifyError.
        """

    def left(self, path: Path, names: Sequence[str], options: Options) -> list[str]:
        """Of the source's linears, those that are still in high precision without being asked to."""


class ReferenceMaker(Protocol):
    """Makes the source a model of the format, with nothing quantized. contexts: of the artifact that is measured."""

    def intermediate(self, context: Context) -> tuple[str, Path | None]:
        """What names its content, and the file if it is there."""

    def converted(self, context: Context, reporter: Reporter) -> AbstractContextManager[Path]:
        """The file, which stays as long as the context manager is open. Raises what building raises."""


@dataclass(frozen=True)
class Way:
    """A way to run an artifact from its folder: {file} and {name} in `how` are filled in.

    with_towers: what follows it where a file with towers lies beside the model's; {towers} is that file.
    """

    runtime: str
    language: str
    how: str
    with_towers: str = ""


@dataclass(frozen=True)
class CardText:
    """What a model card says of the format. limits: sentences, by the artifact's options."""

    ways: Callable[[Options], tuple[Way, ...]] = lambda _options: ()
    limits: Callable[[Options], tuple[str, ...]] = lambda _options: ()


@dataclass(frozen=True)
class No:
    """Why another runtime does not take an artifact, and what does."""

    reason: str
    hint: str


@dataclass(frozen=True)
class Handover:
    """Which other runtimes take artifacts of the format: by options, a remark for whoever uses it, or No.

    vllm: runs the folder. llama_cpp_file: llama-server and Ollama run the main file. sglang, mlx: SGLang, mlx-lm runs
    the folder.
    """

    vllm: Callable[[Options], str | No]
    llama_cpp_file: bool = False
    sglang: bool = False
    mlx: bool = False


@dataclass(frozen=True)
class Runs:
    """Where artifacts of one kind run. kind: the options that make it, in words; "" for all of the format. runtimes:
    their names. capability: the least CUDA compute capability that it takes there, as in "7.5"; "" where none is
    needed. remark: what else is to be known, a phrase.
    """

    kind: str
    runtimes: str
    capability: str = ""
    remark: str = ""


def late(where: str) -> Any:
    """A facet that is imported when it is first asked for something. where: module:CLASS, made without arguments.

    A builder brings most of what a build needs, and whoever lists, shows or serves needs none of it.
    """
    return _Late(where)


class _Late:
    def __init__(self, where: str) -> None:
        self._where = where

    @cached_property
    def _made(self) -> Any:
        module, _, kind = self._where.partition(":")
        return getattr(importlib.import_module(module), kind)()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # what pickle and copy look for
            raise AttributeError(name)
        return getattr(self._made, name)


@dataclass(frozen=True)
class CurvePoint:
    """A model file of so many bytes, and what it is predicted to lose; None where that is not known."""

    name: str
    bytes: int
    loss: float | None


@dataclass(frozen=True)
class FitAnswer:
    """What would be built so that it fits.

    words: where the budget comes from. least_bytes: of the smallest file. stock: maps of the runtime's own. best: what
    would be chosen, None where nothing is known of losses. types: how many matrices would have each. unit: of losses,
    `nats` or `share`. curve: of chosen files, by size. basis: what the losses are, or why there are none. written: the
    variant as a recipe says it.
    """

    words: str
    budget_bytes: int
    least_bytes: int
    stock: tuple[CurvePoint, ...]
    best: CurvePoint | None
    types: Mapping[str, int]
    unit: str
    curve: tuple[CurvePoint, ...]
    basis: str
    written: str


class Fitter(Protocol):
    """Says what would be built for a budget, without building."""

    def options(self, asked: Mapping[str, Any], beside: Sequence[Any]) -> Any:
        """The options of a variant that must fit so, made in the way of those beside it in a recipe, which are options
        of the format. Raises UsageError: that can't be meant.
        """

    def answer(self, context: Context, built: Sequence[Path], reporter: Reporter) -> FitAnswer:
        """For the context's options. built: folders of artifacts of the source. Raises UsageError: nothing fits."""


def _nowhere(options: Options) -> str | No:
    return No("is not known to run in vLLM", "serve it with `quantize serve`")


@dataclass(frozen=True)
class Format:
    """One format. revision: enters the build key; raise it when the same inputs give other bytes.

    checks: of what is built and verified; raise it when what was refused before may be good now: builds that did not
    even run are made again then, and others stay as they are.
    extra: of this program, with what building takes; what a plugin needs beyond that, its own distribution requires.
    builder: None for what can be opened but is not built here. runtime: what evaluate, verify, serve and bench open it
    with. reference: what quantization is measured against where the runtime is not the source's own. weights: for the
    check of the structure, and for measuring block by block. probes: the engines that it needs, each tried by doctor,
    those first that others stand on. quantization: what ModelPack calls it, by the options; the format's name where it
    is None. runs: where artifacts run, for `quantize list formats`. advice: what whoever writes a recipe is told at
    plan; "" for nothing. gains: what a group of weights may be as a multiple of the source's, by the options; None for
    the usual. products: how its runtime multiplies by an artifact's weights, by name, where that is no plain product of
    the numbers that the codes stand for; of one sequence at a time. fitter: None where types are not chosen for a
    budget.
    """

    name: str
    extra: str
    layout: Layout
    builder: Builder[Any] | None = None
    revision: int = 1
    checks: int = 1
    runtime: RuntimeKind | None = None
    reference: ReferenceMaker | None = None
    weights: Weights | None = None
    vram: VramProfile = field(default_factory=VramProfile)
    card: CardText = field(default_factory=CardText)
    handover: Handover = field(default_factory=lambda: Handover(_nowhere))
    quantization: Callable[[Options], str] | None = None
    runs: tuple[Runs, ...] = ()
    advice: Callable[[Options], str] = lambda _options: ""
    gains: Callable[[Options], tuple[float, float] | None] = lambda _options: None
    products: Callable[[Path], Callable[[str], Product] | None] | None = None
    probes: tuple[Probe, ...] = ()
    fitter: Fitter | None = None

    @property
    def is_measurable(self) -> bool:
        """Whether a runtime is known to measure its artifacts in; plugins may bring formats of which none is."""
        return self.runtime is not None

    def model_path(self, folder: Path) -> Path:
        """What a runtime opens of an artifact: its main file, or the folder. Raises VerifyError: it is not there."""
        return self.layout.main_file(folder) or folder

    def quantized_as(self, options: Options) -> str:
        """What ModelPack calls the quantization."""
        return self.quantization(options) if self.quantization is not None else self.name
