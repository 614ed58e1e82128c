"""From a checkpoint to one 16- or 32-bit GGUF file, by llama.cpp's own converter as auto-round bundles it.

In: a checkpoint folder. Out: a GGUF file, or an error that names the architecture, the file and a remedy. Runs in a
worker process. What the file is quantized to afterwards is in runtimes/llama_cpp/quantize.py.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from quantize.errors import (
    MissingExtraError,
    PlanError,
    QuantizeError,
    UsageError,
    disk_full,
    first_line,
    is_disk_full,
    is_out_of_memory,
)
from quantize.events import Reporter, progress
from quantize.files.gguf import EXTRA, READER, padded
from quantize.model.checkpoint import open_checkpoint
from quantize.model.folder_files import PROCESSOR_FILES, read_json
from quantize.runtimes.llama_cpp.config import SAME_MODEL, converter_config
from quantize.runtimes.llama_cpp.images import ProcessorSettings
from quantize.runtimes.llama_cpp.left_out import Followed, write_left_out
from quantize.runtimes.llama_cpp.rope import follow_rope
from quantize.runtimes.llama_cpp.tensors import show_as_published, show_towers_as_published
from quantize.runtimes.llama_cpp.vocabulary import follow_source

PACKAGE = "conversion"  # what the converter's own modules call it when they import each other
PAIR = ("auto-round>=0.14.2,<0.15", "gguf>=0.19,<0.20")  # a converter and the constants that it was written for
KINDS = {"F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16", "F32": "ALL_F32"}
OTHER_FORMATS = "the formats other than GGUF do not need the converter"


@dataclass(frozen=True)
class ConvertRequest:
    """A checkpoint folder, the 16- or 32-bit type to convert to, and the general.* metadata to write.

    pre_tokenizer: llama.cpp's name of the rules that split a text before BPE; None lets the converter recognize them.
    towers: of a model that reads more than text, the parts that text does not pass, in place of those that it does.
    """

    folder: Path
    outtype: str
    metadata: Mapping[str, Any]
    pre_tokenizer: str | None = None
    towers: bool = False


def convert(reporter: Reporter, request: ConvertRequest, out: Path, *, header_only: bool = False) -> None:
    """Write the checkpoint as one unquantized GGUF file; with header_only the weights stay a hole in a sparse file.

    Raises PlanError: the converter does not know the architecture, or fails on it. UsageError: its packages do not
    belong together. MissingExtraError, DiskFullError.
    """
    checkpoint = open_checkpoint(request.folder)
    with opened_converter(request, out) as model:
        placed = Followed(model, checkpoint)
        model.prepare_tensors()
        model.prepare_metadata(vocab_only=False)
        made = write_converted(model, out, request, reporter, header_only=header_only)
        write_left_out(out, placed.left_out(made))


@contextmanager
def opened_converter(request: ConvertRequest, out: Path) -> Iterator[Any]:
    """The converter's model of a checkpoint, which has read no weight yet and would write to `out`.

    What it raises while the context is open becomes what `convert` raises.
    """
    package = converter_package()
    written = read_json(request.folder / "config.json")
    architecture = str(written["architectures"][0])
    model_class = _model_class(package, architecture, towers=request.towers)
    metadata_path = out.with_suffix(".metadata.json")
    where = _Where(architecture, towers=request.towers)
    with where.errors(out), _no_code_of_the_model():
        import gguf

        metadata_path.write_text(json.dumps(_with_name_parts(gguf, request.metadata)), encoding="utf-8")
        try:
            kind = gguf.LlamaFileType[KINDS[request.outtype]]
            loaded = model_class.load_hparams(request.folder, is_mistral_format=False)
            config = converter_config(architecture, loaded, written)
            model = model_class(request.folder, kind, out, metadata_override=metadata_path, hparams=config)
            model = getattr(model, "impl", model)  # what stands for several architectures has the right one inside
            if request.towers:
                show_towers_as_published(model)
                model.preprocessor_config = ProcessorSettings(request.folder, model.preprocessor_config)
            else:
                show_as_published(model, architecture)
                follow_rope(model, architecture, config)
            where.follow(model)
            if not request.towers:
                follow_source(model, request.pre_tokenizer)
            yield model
        finally:
            metadata_path.unlink(missing_ok=True)


@contextmanager
def _no_code_of_the_model() -> Iterator[None]:
    """Modules of the converter load tokenizers with trust_remote_code; code that a checkpoint brings is never run."""
    from unittest import mock

    from transformers import AutoConfig, AutoTokenizer

    with ExitStack() as stack:
        for loader in (AutoConfig, AutoTokenizer):
            stack.enter_context(mock.patch.object(loader, "from_pretrained", _distrusting(loader.from_pretrained)))
        yield


def _distrusting(load: Callable[..., Any]) -> Callable[..., Any]:
    def distrusting(*args: Any, **settings: Any) -> Any:
        return load(*args, **{**settings, "trust_remote_code": False, "local_files_only": True})

    return distrusting


def converter_package() -> ModuleType:
    """llama.cpp's `conversion` package, loaded from auto-round's folder without auto-round's own start-up.

    It takes nothing from auto-round; `import auto_round` would load datasets, pandas and torchao: 2.8 s and 200 MB.
    Raises MissingExtraError, UsageError.
    """
    if PACKAGE in sys.modules:
        return sys.modules[PACKAGE]
    if importlib.util.find_spec(READER) is None:
        raise MissingExtraError("the GGUF format", EXTRA)
    folder = converter_folder()
    os.environ.setdefault("NO_LOCAL_GGUF", "1")  # the installed gguf, not a folder that may lie beside
    spec = importlib.util.spec_from_file_location(
        PACKAGE, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None  # a .py file has one
    package = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = package
    try:
        with _import_errors():
            spec.loader.exec_module(package)
    except BaseException:
        del sys.modules[PACKAGE]
        raise
    return package


def converter_folder() -> Path:
    """Where auto-round keeps the converter's modules. Raises MissingExtraError, UsageError."""
    spec = importlib.util.find_spec("auto_round")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError("the GGUF format", EXTRA)
    folder = Path(next(iter(spec.submodule_search_locations))) / "export" / "export_to_gguf" / PACKAGE
    if not (folder / "__init__.py").is_file():
        raise _mismatch("it has no converter of llama.cpp")
    return folder


def converter_modules() -> dict[str, UsageError | None]:
    """Import every module of the converter: name -> None, or why it can't be used."""
    package = converter_package()
    found: dict[str, UsageError | None] = {}
    for path in sorted(converter_folder().glob("*.py")):
        if path.stem == "__init__":
            continue
        try:
            with _import_errors():
                importlib.import_module(f"{package.__name__}.{path.stem}")
            found[path.stem] = None
        except UsageError as exc:
            found[path.stem] = exc
    return found


def _model_class(package: ModuleType, architecture: str, *, towers: bool = False) -> Any:
    with _import_errors():
        try:
            return package.get_model_class(SAME_MODEL.get(architecture, architecture), towers)
        except NotImplementedError as exc:
            raise PlanError(
                f"config.json: llama.cpp's converter does not know the architecture {architecture}",
                hint=f"docs/architectures.md lists what it knows; {OTHER_FORMATS}",
            ) from exc


@contextmanager
def _import_errors() -> Iterator[None]:
    """A constant that gguf lacks shows as an AttributeError or ImportError while a module is loaded."""
    try:
        yield
    except QuantizeError:
        raise
    except (ImportError, AttributeError, SyntaxError, NameError, TypeError) as exc:
        raise _mismatch(f"{type(exc).__name__}: {first_line(exc)}{_raised_in(exc)}") from exc


def _raised_in(exc: BaseException) -> str:
    """` in qwen.py`: the innermost module of the converter that an exception passed."""
    name, trace = "", exc.__traceback__
    while trace is not None:
        path = Path(trace.tb_frame.f_code.co_filename)
        name = f" in {path.name}" if path.parent.name == PACKAGE else name
        trace = trace.tb_next
    return name


def _mismatch(what: str) -> UsageError:
    found = " and ".join(f"{name} {_version(name)}" for name in ("auto-round", READER))
    wanted = " ".join(f"'{requirement}'" for requirement in PAIR)
    return UsageError(
        f"llama.cpp's converter can't be loaded: {found} do not belong together ({what})",
        hint=f"pip install {wanted}",
    )


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "(not installed)"


class _Where:
    """What of a checkpoint the converter is at, so that its exceptions can be told with a file and a remedy."""

    def __init__(self, architecture: str, *, towers: bool = False) -> None:
        self._architecture = architecture
        self._config = "config.json" if not towers else f"config.json or {PROCESSOR_FILES[0]}"  # sizes are in both
        self._at_config()

    def _at_config(self, *_: Any) -> None:
        self._file = self._config
        self._remedy = f"compare it with the {self._config} that the model was published with; {OTHER_FORMATS}"

    def _at_tokenizer(self, *_: Any) -> None:
        self._file = "the tokenizer's files"
        self._remedy = f"copy all of them from where the model was published, tokenizer.model too; {OTHER_FORMATS}"

    def _at_tensor(self, _data: Any, name: str, *_: Any) -> None:
        self._file = f"tensor {name}"
        self._remedy = (
            f"its name or shape is none that the converter knows of {self._architecture}; save the checkpoint again "
            f"in the layout that the model was published in; {OTHER_FORMATS}"
        )

    def follow(self, model: Any) -> None:
        """Note each step that a model of the converter takes."""
        steps = {
            "set_gguf_parameters": self._at_config,
            "set_vocab": self._at_tokenizer,
            "modify_tensors": self._at_tensor,
        }
        for name, note in steps.items():
            if not hasattr(model, name):  # towers have no vocabulary
                continue
            setattr(model, name, _noted(note, getattr(model, name)))

    @contextmanager
    def errors(self, out: Path) -> Iterator[None]:
        """Turn whatever the converter raises into an error with a name; `out` is the file that it writes.

        Memory that runs out is left to the worker, which knows how much there was.
        """
        try:
            yield
        except QuantizeError:
            raise
        except Exception as exc:
            if is_disk_full(exc):
                raise disk_full(exc, out) from exc
            if is_out_of_memory(exc):
                raise
            what = f"{type(exc).__name__}: {first_line(exc)}{_raised_in(exc)}"
            raise PlanError(
                f"{self._file}: llama.cpp's converter can't convert this {self._architecture} ({what})",
                hint=self._remedy,
            ) from exc


def _noted(note: Callable[..., None], step: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        note(*args)
        return step(*args, **kwargs)

    return call


def _with_name_parts(gguf: Any, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Add what the name says by the GGUF naming convention; null keeps the converter from guessing by folder name."""
    name = str(metadata["general.name"])
    _, _, base, finetune, version, _ = gguf.Metadata.get_model_id_components(name)
    parts = {"general.basename": base or name, "general.finetune": finetune, "general.version": version}
    return {**metadata, **parts, "general.size_label": None}


def write_converted(model: Any, out: Path, request: ConvertRequest, reporter: Reporter, *, header_only: bool) -> int:
    """Write the file of an opened converter that has its tensors ready; returns the weights that it has."""
    writer, license_id = model.gguf_writer, request.metadata.get("general.license")
    if license_id is not None:
        writer.add_license(license_id)  # the converter's metadata file has no key for it
    writer.write_header_to_file(path=out)
    writer.write_kv_data_to_file()
    sizes = [info.nbytes for shard in writer.tensors for info in shard.values()]
    if header_only:
        writer.write_ti_data_to_file()
        file = writer.fout[0]
        file.truncate(padded(file.tell()) + sum(padded(size) for size in sizes))
    else:
        progress(reporter, "", "converting to GGUF", 0, sum(sizes))
        writer.write_tensors_to_file(progress=False)
        progress(reporter, "", "converting to GGUF", sum(sizes), sum(sizes))
    writer.close()
    return sum(math.prod(info.shape) for shard in writer.tensors for info in shard.values())
