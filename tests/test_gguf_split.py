"""GGUF models in several files: read as one by everything here, and written so by `split_size`.

Oracles: the gguf package's reader, llama.cpp (names, loading), the same model in one file.
"""

from __future__ import annotations

import json
import shutil
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantize.build.execution import RunOptions
from quantize.build.find_source import find_source
from quantize.build.plan import make_plan
from quantize.build.size import size_plan
from quantize.errors import CheckpointError, RefusedError, VerifyError
from quantize.events import SilentReporter
from quantize.files.gguf import ALIGNMENT, read_gguf
from quantize.files.gguf_split import PlannedTensor, part_bytes, plan_split, read_model, split_file
from quantize.formats import builders, option_models
from quantize.formats.base import RunLimits
from quantize.formats.gguf.options import GgufOptions
from quantize.model.checkpoint import open_checkpoint
from quantize.recipe.model import load_recipe
from quantize.serve.targets import LocalTarget, resolve
from quantize.store.artifact import Artifact
from quantize.store.store import Store
from quantize.store.workspace import Workspace
from quantize.system.cache import Cache
from quantize.testing import write_recipe
from tests.conftest import Built, Run, build
from tests.test_containers import write_gguf

LIMIT = 300 << 10
VARIANTS: list[dict[str, Any]] = [
    {"format": "gguf", "type": "Q8_0", "split_size": "300K"},
    {"format": "gguf", "type": "Q4_K_M", "split_size": "200KB", "overrides": {"attn_v": "Q8_0"}},
    {"format": "gguf", "type": "Q8_0", "split_size": "1G"},
]


class Cut:
    """The variants above, built from the 16-bit file that is there, and what was planned before."""

    def __init__(self, built: Built, root: Path) -> None:
        path = write_recipe(root / "cut.yaml", Path(str(built.recipe.source.model)), VARIANTS)
        self.recipe, self.store = load_recipe(path, option_models()), Store(root / "store")
        empty = Workspace(self.store, Cache(root / "cache"), SilentReporter())
        self.planned = size_plan(make_plan(self.recipe, empty), empty, RunLimits())
        outcomes = build(self.recipe, replace(empty, cache=built.cache), evaluate=False)
        assert [item.error for item in outcomes if item.error] == []
        self.artifacts = [item.artifact for item in outcomes if item.artifact]


@pytest.fixture(scope="module")
def cut(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Cut:
    return Cut(built, tmp_path_factory.mktemp("cut"))


def weights(artifact: Artifact) -> list[Path]:
    return sorted(artifact.folder.glob("*.gguf"))


@pytest.fixture
def parts(cut: Cut, tmp_path: Path) -> list[Path]:
    """The files of the Q8_0 model, to spoil."""
    return [Path(shutil.copy(path, tmp_path / path.name)) for path in weights(cut.artifacts[0])]


# --- written ----------------------------------------------------------------------------------------------------------


def test_the_names_are_llama_cpp_s_and_no_file_is_larger(cut: Cut) -> None:
    first, second, whole = cut.artifacts
    assert [item.manifest.variant for item in cut.artifacts] == [
        "q8_0-split-300k", GgufOptions.model_validate({k: v for k, v in VARIANTS[1].items() if k != "format"})
        .variant_name(), "q8_0-split-1g",
    ]  # fmt: skip
    for artifact, limit in ((first, LIMIT), (second, 200_000)):
        files = weights(artifact)
        assert len(files) >= 3
        for number, path in enumerate(files):
            buffer, prefix = (llama_cpp.llama_cpp.ctypes.create_string_buffer(4096) for _ in range(2))
            stem = path.name.rpartition("-of-")[0].rpartition("-")[0]
            llama_cpp.llama_split_path(buffer, 4096, stem.encode(), number, len(files))
            assert path.name == buffer.value.decode()
            assert llama_cpp.llama_split_prefix(prefix, 4096, path.name.encode(), number, len(files))
            assert path.stat().st_size <= limit
    assert [path.name for path in weights(whole)] == ["tiny-Q8_0.gguf"]


def test_planned_to_the_byte_and_the_room_beside_it(cut: Cut) -> None:
    for job, artifact in zip(cut.planned.jobs, cut.artifacts, strict=True):
        assert job.size is not None
        sizes = [path.stat().st_size for path in weights(artifact)]
        assert job.size.file_bytes == sum(sizes), job.variant.name
        assert job.size.passing_bytes == (max(sizes) if len(sizes) > 1 else 0)
        assert job.build_key == artifact.manifest.build_key
    largest = max(job.size.passing_bytes for job in cut.planned.jobs if job.size)
    assert cut.planned.disk.passing == largest > 0
    without = replace(cut.planned.disk, passing=0)
    assert cut.planned.disk.peak_bytes == without.peak_bytes + largest
    assert cut.planned.disk.store_bytes == without.store_bytes + largest


def test_the_tensors_and_fields_are_those_of_one_file(cut: Cut) -> None:
    whole = gguf.GGUFReader(weights(cut.artifacts[2])[0])
    readers = [gguf.GGUFReader(path) for path in weights(cut.artifacts[0])]
    found = [item for reader in readers for item in reader.tensors]
    assert [item.name for item in found] == [item.name for item in whole.tensors]
    for ours, theirs in zip(found, whole.tensors, strict=True):
        assert (ours.tensor_type, ours.shape.tolist()) == (theirs.tensor_type, theirs.shape.tolist())
        assert ours.data.tobytes() == theirs.data.tobytes(), ours.name
    for number, reader in enumerate(readers):
        fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
        kinds = [reader.fields[f"split.{key}"].types[0].name for key in ("no", "count", "tensors.count")]
        assert kinds == ["UINT16", "UINT16", "INT32"]
        split = {"split.no": number, "split.count": len(readers), "split.tensors.count": len(whole.tensors)}
        rest = {name: field.contents() for name, field in whole.fields.items() if not name.startswith("GGUF.")}
        assert fields == (rest | split if number == 0 else split)


def test_it_was_loaded_by_its_first_file(cut: Cut) -> None:
    one, _, whole = (item.measurements()["verify"] for item in cut.artifacts)
    assert one["tokens"] == whole["tokens"]
    assert one["lines"] == whole["lines"] > 100
    assert (cut.artifacts[0].manifest.bits_per_weight, len(cut.artifacts[0].manifest.kept_in_high_precision)) == (
        cut.artifacts[2].manifest.bits_per_weight, len(cut.artifacts[2].manifest.kept_in_high_precision),
    )  # fmt: skip


def test_a_rebuild_is_identical(cut: Cut, built: Built, tmp_path: Path) -> None:
    other = write_recipe(tmp_path / "again.yaml", Path(str(built.recipe.source.model)), VARIANTS[:1], name="cut")
    workspace = Workspace(Store(tmp_path / "s"), built.cache, SilentReporter())
    run = RunOptions(RunLimits(threads=2))
    (outcome,) = build(load_recipe(other, option_models()), workspace, run, evaluate=False)
    assert outcome.artifact is not None
    ours = {item.path: item.sha256 for item in outcome.artifact.manifest.files if item.path.endswith(".gguf")}
    first = {item.path: item.sha256 for item in cut.artifacts[0].manifest.files if item.path.endswith(".gguf")}
    assert ours == first


def test_without_the_option_nothing_of_it_is_in_the_build_key() -> None:
    assert "split_size" not in GgufOptions(type="Q8_0").model_dump(mode="json")
    sizes = ("4G", "4GiB", 1 << 32)
    assert {GgufOptions(type="Q8_0", split_size=size).model_dump(mode="json")["split_size"] for size in sizes} == {  # type: ignore[arg-type]
        1 << 32
    }


@given(
    st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 4)), min_size=1, max_size=40), st.integers(64, 9000),
    st.sampled_from([8, 32, 64]),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_parts_are_full_and_none_is_too_large(sizes: list[tuple[int, int]], limit: int, alignment: int) -> None:
    tensors = [PlannedTensor(f"blk.{index}.w", dimensions, size) for index, (size, dimensions) in enumerate(sizes)]
    parts = plan_split(tensors, 700, alignment, limit)
    assert [index for part in parts for index in part] == [*range(len(tensors))]
    for number, part in enumerate(parts):
        inside = [tensors[index] for index in part]
        assert len(part) == 1 or part_bytes(inside, 700, alignment, number == 0) <= limit
        if number + 1 < len(parts):
            more = [*inside, tensors[parts[number + 1][0]]]
            assert part_bytes(more, 700, alignment, number == 0) > limit


def test_an_own_alignment_is_kept_in_the_first_part(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", general__alignment=64, more="x" * 99)
    before = {item.name: item.data.tobytes() for item in gguf.GGUFReader(path).tensors}
    names = split_file(path, 300)
    assert len(names) == 2
    assert not path.exists()
    assert {item.name: item.data.tobytes() for name in names for item in gguf.GGUFReader(name).tensors} == before
    assert [read_gguf(name).alignment for name in names] == [64, ALIGNMENT]
    assert read_model(names[0]).fields["more"] == "x" * 99


# --- read -------------------------------------------------------------------------------------------------------------


def test_every_reader_counts_all_files(cut: Cut, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantize.system.machine.nvidia_gpus", lambda: ())
    monkeypatch.setenv("QUANTIZE_STORE", str(cut.store.root))
    one, whole = weights(cut.artifacts[0])[0], weights(cut.artifacts[2])[0]
    tensors = sum(int(item.n_bytes) for item in gguf.GGUFReader(whole).tensors)
    for target in (one, "cut/q8_0-split-300k"):
        (found,) = json.loads(run("estimate", target, "--json").stdout)
        assert found["weights_bytes"] == tensors
    served = [resolve(str(item), cut.store) for item in (one, whole)]
    assert all(isinstance(item, LocalTarget) for item in served)
    assert {(item.weights_bytes, item.repacked_bytes) for item in served if isinstance(item, LocalTarget)} == {
        (tensors, served[1].repacked_bytes)  # type: ignore[union-attr]
    }
    assert sum(item.size_bytes for item in cut.artifacts[0].manifest.files) == cut.artifacts[0].manifest.size_bytes
    result = run("verify", "cut/q8_0-split-300k")
    assert result.exit_code == 0, result.stderr


def test_a_missing_file_is_named(parts: list[Path], run: Run) -> None:
    parts[1].unlink()
    for command in ("estimate", "serve"):
        result = run(command, parts[0])
        assert result.exit_code == CheckpointError.exit_code, command
        wanted = f"is one of {len(parts)} files, and {parts[1].name} is missing from {parts[0].parent}"
        assert f"error: {parts[0].name}: {wanted}" in result.stderr
        assert "\n  download all files of the model into one folder\n" in result.stderr


def test_another_file_than_the_first_says_which_is(parts: list[Path], run: Run) -> None:
    result = run("estimate", parts[1])
    said = f"error: {parts[1].name}: not the first of {len(parts)} files\n  name {parts[0].name}\n"
    assert (result.exit_code, result.stderr) == (CheckpointError.exit_code, said)
    parts[0].unlink()
    with pytest.raises(CheckpointError, match=rf"{parts[0].name} is missing"):
        read_model(parts[1])


def test_files_under_other_names_say_how_they_must_be_called(parts: list[Path]) -> None:
    moved = parts[0].rename(parts[0].with_name("model.gguf"))
    with pytest.raises(
        CheckpointError, match=f"model.gguf: one of {len(parts)} files, which are found by their"
    ) as got:
        read_model(moved)
    assert got.value.hint == f"rename the files as they were published: NAME-00001-of-{len(parts):05d}.gguf"


def test_files_that_do_not_belong_together_are_refused(parts: list[Path]) -> None:
    good = parts[1].read_bytes()
    parts[1].write_bytes(parts[2].read_bytes())
    with pytest.raises(CheckpointError, match=r"is not the part that its name says: it has split.no 2"):
        read_model(parts[0])
    key = b"split.no" + struct.pack("<IH", 2, 0)
    parts[1].write_bytes(parts[0].read_bytes().replace(key, key[:-2] + struct.pack("<H", 1)))
    with pytest.raises(CheckpointError, match=r"has the tensor .* which a file before it has too"):
        read_model(parts[0])
    parts[1].write_bytes(good)
    count = b"split.tensors.count" + struct.pack("<I", 5)
    raw = parts[0].read_bytes()
    at = raw.index(count) + len(count)
    parts[0].write_bytes(raw[:at] + struct.pack("<i", 99) + raw[at + 4 :])
    with pytest.raises(CheckpointError, match=r"is of a model with 99 tensors, and its \d files have 21"):
        read_model(parts[0])


def test_links_to_files_of_other_names_are_followed_by_their_own(parts: list[Path], cut: Cut, tmp_path: Path) -> None:
    """As the Hub's client keeps them."""
    for number, path in enumerate(parts):
        path.rename(tmp_path / f"blob{number}")
        path.symlink_to(f"blob{number}")
    target = resolve(str(parts[0]), cut.store)
    assert isinstance(target, LocalTarget)
    assert len(read_model(target.path).tensors) == 21


def test_a_damaged_later_file_is_refused(cut: Cut, built: Built, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(cut.artifacts[0].folder, tmp_path / "spoilt"))
    last = sorted(folder.glob("*.gguf"))[-1]
    tensor = max(read_gguf(last).tensors.values(), key=lambda item: item.size_bytes)
    raw = bytearray(last.read_bytes())
    raw[tensor.offset : tensor.offset + tensor.size_bytes] = bytes(tensor.size_bytes)
    last.write_bytes(raw)
    checkpoint = open_checkpoint(Path(str(built.recipe.source.model)))
    with pytest.raises(VerifyError, match=rf"tensor {tensor.name} .* is all zeros"):
        builders()["gguf"].verify(folder, checkpoint, RunLimits(), SilentReporter())


def test_ollama_takes_none(cut: Cut, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTIZE_STORE", str(cut.store.root))
    result = run("serve", "cut/q8_0-split-300k", "--print", "ollama")
    assert result.exit_code == RefusedError.exit_code
    assert "Ollama takes no model in several files" in result.stderr
    assert "ollama" not in (cut.artifacts[0].folder / "README.md").read_text().lower()
    result = run("serve", "cut/q8_0-split-300k", "--print", "llama-server")
    assert weights(cut.artifacts[0])[0].name in result.stdout


# --- as a source ------------------------------------------------------------------------------------------------------


def test_a_source_in_several_files_gives_what_the_one_file_gives(cut: Cut, tmp_path: Path, cache: Cache) -> None:
    sources = {"one": weights(cut.artifacts[2])[0], "cut": weights(cut.artifacts[0])[0]}
    made: dict[str, Artifact] = {}
    for name, source in sources.items():
        path = write_recipe(tmp_path / f"{name}.yaml", source, [{"format": "gguf", "type": "Q4_0"}], name=name)
        workspace = Workspace(Store(tmp_path / "store"), cache, SilentReporter())
        recipe = load_recipe(path, option_models())
        (job,) = size_plan(make_plan(recipe, workspace), workspace, RunLimits()).jobs
        (outcome,) = build(recipe, workspace, evaluate=False)
        assert outcome.artifact is not None, outcome.error
        assert job.size is not None
        assert job.size.file_bytes == weights(outcome.artifact)[0].stat().st_size
        made[name] = outcome.artifact
    one, two = ({item.name: item.data.tobytes() for item in gguf.GGUFReader(weights(made[name])[0]).tensors}
                for name in sources)  # fmt: skip
    assert one == two
    assert all(np.frombuffer(data, np.uint8).any() for data in two.values())
    entries = made["cut"].manifest.source.files
    assert [item.path for item in entries] == [path.name for path in weights(cut.artifacts[0])]
    found = find_source(made["cut"], cache, SilentReporter())
    assert found.location == weights(cut.artifacts[0])[0]


def test_a_source_without_one_of_its_files_is_refused(parts: list[Path], tmp_path: Path, run: Run) -> None:
    parts[2].unlink()
    path = write_recipe(tmp_path / "r.yaml", parts[0], [{"format": "gguf", "type": "Q4_0"}])
    result = run("plan", path)
    assert result.exit_code == CheckpointError.exit_code
    assert f"{parts[2].name} is missing" in result.stderr
