"""The table of readers: a name, the seeds, and a function of bytes that reads them as the program does.

Each gets a folder of its own, with what it needs beside the file in question, and a few traps: links out of the folder
and in a circle, a pipe, a device.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from quantize.build.lockfile import read_lock
from quantize.calibration.datasets import find_dataset
from quantize.errors import UsageError
from quantize.evaluate.gates import decide
from quantize.evaluate.golden import load_golden
from quantize.evaluate.metrics import Summary
from quantize.evaluate.page import render_page
from quantize.evaluate.record import read_record
from quantize.files.gguf import read_gguf
from quantize.files.gguf_split import read_summary
from quantize.files.imatrix import read_imatrix
from quantize.files.safetensors import INDEX_NAME, read_header, write_sparse
from quantize.formats import option_models
from quantize.model.architecture import check_config
from quantize.model.belonging import check_headers
from quantize.model.checkpoint import open_checkpoint, read_model, tensor_table
from quantize.model.mended import open_tensors
from quantize.model.mending import find_mending
from quantize.model.shape import ModelShape, gguf_shape
from quantize.model.source import card_metadata
from quantize.publish.pack import read_pack
from quantize.publish.pins import read_pins
from quantize.recipe.calibration import CalibrationSpec, load_calibration
from quantize.recipe.model import load_recipe
from quantize.runtimes.llama_cpp.schema.compile import gbnf_of
from quantize.runtimes.llama_cpp.schema.refused import SchemaRefused
from quantize.store.artifact import read_measurements
from quantize.store.manifest import MEASUREMENTS_NAME, read_manifest
from quantize.store.store import Store
from quantize.system.digest import canonical_hash
from quantize.system.untrusted import parse_json
from tests.fuzz import seeds
from tests.fuzz.mutate import Form


class Kind(str):
    """What a reader returns where it refuses nothing: tells one way of reading from another."""


Read = Callable[[bytes], object]


@dataclass(frozen=True)
class Target:
    """One reader. names_paths: what it reads may name files anywhere, as a recipe does."""

    form: Form
    seeds: Callable[[Path], list[bytes]]
    prepare: Callable[[Path], Read]
    names_paths: bool = False


def _safetensors(folder: Path) -> Read:
    return _reading(folder / "model.safetensors", read_header)


def _index(folder: Path) -> Read:
    _checkpoint(folder)
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    return _reading(folder / INDEX_NAME, lambda _: tensor_table(folder))


def _config(folder: Path) -> Read:
    _checkpoint(folder)

    def read(_: Path) -> None:
        mending = find_mending(folder, *read_model(folder))
        if mending is not None:
            open_tensors(mending)
        checkpoint = open_checkpoint(folder)
        check_headers(checkpoint)
        ModelShape.from_config(checkpoint.config)
        check_config(checkpoint.config)

    return _reading(folder / "config.json", read)


def _adapter(folder: Path) -> Read:
    """The settings of a LoRA adapter of one of the checkpoint's matrices."""
    _checkpoint(folder)
    beside = folder / "adapter"
    beside.mkdir()
    name, (out, width) = next((name, info.shape) for name, info in tensor_table(folder).items() if len(info.shape) == 2)
    stem = f"base_model.model.{name.removesuffix('.weight')}"
    factors = {f"{stem}.lora_A.weight": ("F32", (2, width)), f"{stem}.lora_B.weight": ("F32", (out, 2))}
    write_sparse(beside / "adapter_model.safetensors", factors)

    def read(_: Path) -> None:
        mending = find_mending(folder, *read_model(folder), adapter=beside)
        assert mending is not None
        open_tensors(mending)

    return _reading(beside / "adapter_config.json", read)


def _generation(folder: Path) -> Read:
    _checkpoint(folder)
    return _reading(folder / "generation_config.json", lambda _: check_headers(open_checkpoint(folder)))


def _tokenizer(folder: Path) -> Read:
    _checkpoint(folder)
    return _reading(folder / "tokenizer.json", lambda _: open_checkpoint(folder))


def _tokenizer_config(folder: Path) -> Read:
    _checkpoint(folder)
    return _reading(folder / "tokenizer_config.json", lambda _: open_checkpoint(folder).chat_template)


def _gguf(folder: Path) -> Read:
    def read(path: Path) -> None:
        read_summary(path)
        gguf_shape(read_gguf(path))

    return _reading(folder / "model.gguf", read)


def _recipe(folder: Path) -> Read:
    _traps(folder)

    def read(path: Path) -> None:
        recipe = load_recipe(path, option_models())
        canonical_hash([variant.normalized() for variant in recipe.variants])
        canonical_hash(recipe.evaluation.model_dump(mode="json"))

    return _reading(folder / "recipe.yaml", read)


def _calibration(folder: Path) -> Read:
    return _reading(folder / "spec.yaml", lambda path: canonical_hash(load_calibration(path).model_dump(mode="json")))


def _rows(folder: Path) -> Read:
    spec = CalibrationSpec(dataset="rows.jsonl")
    return _reading(folder / "rows.jsonl", lambda _: list(find_dataset(spec, folder).rows(folder)))


def _golden(folder: Path) -> Read:
    return _reading(folder / "golden.yaml", lambda path: load_golden([path]).hash)


def _manifest(folder: Path) -> Read:
    return _reading(folder / "manifest.json", lambda path: read_manifest(path).to_json())


def _pins(folder: Path) -> Read:
    store = Store(folder / "artifacts")

    def read(path: Path) -> None:
        store.pinned()
        read_pins(path)

    return _reading(folder / "artifacts.lock", read)


def _recipe_lock(folder: Path) -> Read:
    return _reading(folder / "recipe.yaml.lock", lambda path: read_lock(path).to_yaml())


def _pack(folder: Path) -> Read:
    def read(data: bytes) -> None:
        pack = read_pack(data)
        for blob in pack.files:
            (folder / blob.path).resolve(strict=False).relative_to(folder)
            blob.path.encode()

    return read


def _record(folder: Path) -> Read:
    def read(path: Path) -> object:
        measurements = read_measurements(path.parent)
        Summary.of(measurements).cells()
        record = read_record(measurements)
        if record is not None:
            decision = decide(record, record.limits)
            render_page(record, "a page")
            json.dumps(record.to_data(), allow_nan=False)
            return Kind("; ".join(finding.outcome for finding in decision.findings))
        return Kind("no record")

    return _reading(folder / MEASUREMENTS_NAME, read)


def _card(folder: Path) -> Read:
    return _reading(folder / "README.md", lambda path: Kind(", ".join(map(str, card_metadata(path)))[:40]))


def _imatrix(folder: Path) -> Read:
    return _reading(folder / "imatrix.gguf", read_imatrix)


def _json_schema(folder: Path) -> Read:
    """Of a request to the gateway: it comes as text, and what is refused is told to a client."""

    def read(data: bytes) -> object:
        try:
            schema = parse_json(data)
        except ValueError as exc:
            raise UsageError("not JSON") from exc
        try:
            return Kind("a grammar" if gbnf_of(schema) else "")
        except SchemaRefused as exc:
            raise UsageError(str(exc)) from exc
        except RecursionError as exc:
            raise UsageError("nested too deeply") from exc

    return read


def _reading(path: Path, read: Callable[[Path], object]) -> Read:
    def run(data: bytes) -> object:
        path.write_bytes(data)
        return read(path)

    return run


def _checkpoint(folder: Path) -> None:
    for name, data in (("config.json", seeds.CONFIG), ("tokenizer.json", seeds.TOKENIZER)):
        (folder / name).write_bytes(seeds.dumped(data))
    (folder / "model.safetensors").write_bytes(seeds.safetensors())
    _traps(folder)


def _traps(folder: Path) -> None:
    (folder.parent / "secret").write_bytes(seeds.safetensors())
    (folder / "link").symlink_to("../secret")
    (folder / "zero").symlink_to("/dev/zero")
    (folder / "circle").symlink_to("circle")
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")


def _plain(*data: object) -> Callable[[Path], list[bytes]]:
    return lambda _: [item.encode() if isinstance(item, str) else seeds.dumped(item) for item in data]


TARGETS: dict[str, Target] = {
    "safetensors header": Target("safetensors", lambda _: [seeds.safetensors()], _safetensors),
    "safetensors index": Target("json", lambda _: [seeds.index()], _index),
    "config.json": Target("json", _plain(seeds.CONFIG, seeds.MIXTURE, seeds.LATENT), _config),
    "adapter_config.json": Target("json", _plain(seeds.ADAPTER), _adapter),
    "generation_config.json": Target("json", _plain(seeds.GENERATION), _generation),
    "tokenizer.json": Target("json", _plain(seeds.TOKENIZER), _tokenizer),
    "tokenizer_config.json": Target("json", _plain(seeds.TOKENIZER_CONFIG), _tokenizer_config),
    "GGUF header": Target("gguf", lambda folder: [seeds.gguf(folder)], _gguf),
    "importance matrix": Target("gguf", lambda folder: [seeds.imatrix(folder)], _imatrix),
    "recipe": Target("yaml", _plain(seeds.RECIPE, seeds.OWN_RECIPE, seeds.SHORT_RECIPE), _recipe, names_paths=True),
    "calibration spec": Target("yaml", _plain(seeds.CALIBRATION, seeds.MIX), _calibration),
    "calibration rows": Target("lines", _plain(seeds.ROWS), _rows),
    "golden prompts": Target("yaml", _plain(seeds.GOLDEN, seeds.GOLDEN_SCHEMA, seeds.GOLDEN_PATTERN), _golden),
    "manifest.json": Target("json", lambda _: [seeds.manifest(), seeds.older_manifest()], _manifest),
    "artifacts.lock": Target("yaml", _plain(seeds.PINS), _pins),
    "recipe lock": Target("yaml", lambda _: [seeds.recipe_lock()], _recipe_lock),
    "ModelPack manifest": Target("json", lambda _: [seeds.pack()], _pack),
    "evaluation record": Target("json", lambda _: [seeds.record()], _record),
    "JSON schema": Target("json", _plain(*seeds.JSON_SCHEMAS), _json_schema),
    "model card": Target("card", _plain(seeds.CARD), _card),
}
