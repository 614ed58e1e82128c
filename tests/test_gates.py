"""A build measures what it made and holds the recipe's gates: what passes, what is kept aside, what is remembered."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import quantize.build.judge as gates_module
import quantize.formats.gguf.build as gguf_backend
import quantize.formats.gguf.making as making
from quantize.evaluate.decision import RUNS
from quantize.evaluate.structure import NEAR, QUANTIZED, TEMPLATE, Intended, check_structure
from quantize.events import SilentReporter
from quantize.formats.gguf.build import GgufBuilder
from quantize.formats.gguf.format import FORMAT as GGUF
from quantize.formats.safetensors.format import FORMAT as PLAIN
from quantize.model.checkpoint import open_checkpoint
from quantize.runtimes.base import ModelRef
from quantize.runtimes.llama_cpp.quantize import QuantizeSettings
from quantize.store.artifact import REFUSED, UNJUDGED, Artifact
from quantize.store.manifest import read_manifest
from quantize.store.store import Store
from quantize.store.verify import check_files
from quantize.testing import TinyModel, installed_formats, make_checkpoint, write_recipe
from tests.conftest import Built, Run
from tests.test_verify import rewrite, spoil_tensor

pytest.importorskip("torch")
pytest.importorskip("llama_cpp")

GOLDEN = """\
name: mine
prompts:
  - {id: same, prompt: The quick brown fox, max_tokens: 4, grade: {kind: same}}
"""
Q8, Q4 = {"format": "gguf", "type": "Q8_0"}, {"format": "gguf", "type": "Q4_K_M"}
Write = Callable[..., Path]


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps without their workers: a tiny model is measured in less time than torch takes to import."""

    def call(step: str, reporter: Any, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        return function(reporter, *args, **options)

    monkeypatch.setattr(gates_module, "run_step", call)
    monkeypatch.setattr(gguf_backend, "run_step", call)
    monkeypatch.setattr(making, "run_step", call)


@pytest.fixture
def write(tiny: Path, built: Built, tmp_path: Path) -> Write:
    """Recipes for the tiny model; its 16-bit conversion is in the cache already."""
    shutil.copytree(built.cache.root, tmp_path / "cache")
    (tmp_path / "mine.yaml").write_text(GOLDEN)
    evaluation = {"window": 128, "windows": 2, "golden": ["mine.yaml"]}

    def make(*variants: dict[str, Any], **others: Any) -> Path:
        return write_recipe(tmp_path / "tiny.yaml", tiny, variants or [Q8], **{"evaluation": evaluation, **others})

    return make


@pytest.fixture
def no_measuring(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on, whatever is measured or built fails."""

    def forbid() -> None:
        def fail(*_: Any) -> Any:
            raise AssertionError("nothing is left to measure or to build")

        monkeypatch.setattr(gates_module, "run_step", fail)
        monkeypatch.setattr(GgufBuilder, "build", fail)

    return forbid


def outcome(run: Run, path: Path, *options: str) -> tuple[dict[str, Any], int]:
    result = run("build", path, "--json", *options)
    assert result.stdout, result.stderr
    (item,) = json.loads(result.stdout)
    return item, result.exit_code


def listed(run: Run, *options: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(run("list", "artifacts", "--json", *options).stdout)
    return found


def record(folder: str | Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(folder) / "measurements.json").read_text())["evaluation"]
    return found


def refused_gates(folder: str | Path) -> set[str]:
    return {item["gate"] for item in record(folder)["findings"] if item["outcome"] == "refused"}


IMPOSSIBLE = {"max_kl": 1e-9}


# --- what passes ------------------------------------------------------------------------------------------------------


def test_a_build_is_measured_and_says_with_what(write: Write, run: Run, store: Store) -> None:
    item, code = outcome(run, write())
    assert (item["state"], code) == ("built", 0)
    found = record(item["folder"])
    assert found["quality"]["mean_kl"] < 0.001
    quality, conversion = found["quality"], found["conversion"]
    assert (quality["runtime"], quality["source_runtime"]) == ("llama.cpp", "llama.cpp"), "quantization alone"
    assert (conversion["runtime"], conversion["source_runtime"]) == ("llama.cpp", "transformers")
    assert 0 < conversion["mean_kl"] < 0.001
    assert (quality["runtime_device"], quality["source_device"]) == ("cpu", "cpu")
    assert [item["kind"] for item in quality["kinds"]] == ["prose", "code", "vietnamese", "chat"]
    assert sum(item["predictions"] for item in quality["kinds"]) == quality["predictions"]
    assert re.match(r"llama-cpp-python \d", found["quality"]["runtime_version"])
    assert len(found["quality"]["text_hash"]) == len(found["source"]["digest"]) == 64
    assert found["machine"]["cores"] >= 1
    assert [result["key"] for result in found["golden"]["results"]] == ["mine/same"]
    assert {QUANTIZED, NEAR, TEMPLATE, RUNS} <= {finding["gate"] for finding in found["findings"]}
    (artifact,) = store.artifacts()
    check_files(artifact, SilentReporter())
    (row,) = listed(run)
    assert row["evaluation"]["verdict"] == found["verdict"]
    assert row["evaluation"]["perplexity_ratio"] == found["quality"]["perplexity_ratio"]
    shown = run("show", "tiny/q8_0").stdout
    assert "KL divergence" in shown
    assert found["quality"]["text_hash"][:12] in shown
    assert f"{found['quality']['perplexity_ratio']:.4f}" in run("list", "artifacts").stdout
    assert (
        f"| perplexity ratio | {found['quality']['perplexity_ratio']:.4f}"
        in (artifact.folder / "evaluation.md").read_text()
    )


def test_a_second_build_measures_nothing(write: Write, run: Run, no_measuring: Callable[[], None]) -> None:
    path = write()
    outcome(run, path)
    no_measuring()
    item, code = outcome(run, path)
    assert (item["state"], code) == ("up to date", 0)


def test_measuring_changes_no_byte_of_the_manifest(write: Write, run: Run, tmp_path: Path) -> None:
    manifests = []
    for number, options in enumerate(([], ["--no-eval"])):
        item, _ = outcome(run, write(), "--store", str(tmp_path / str(number)), *options)
        manifests.append((Path(item["folder"]) / "manifest.json").read_bytes())
    assert manifests[0] == manifests[1]


def test_what_was_not_evaluated_says_so_until_it_is(write: Write, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write()
    item, code = outcome(run, path, "--no-eval")
    assert (item["evaluation"]["verdict"], code) == ("not evaluated", 0)
    assert "not evaluated" in run("list", "artifacts").stdout
    assert "not evaluated" in run("show", "tiny/q8_0").stdout
    assert outcome(run, path, "--no-eval")[0]["state"] == "up to date"
    monkeypatch.setattr(GgufBuilder, "build", None)
    item, _ = outcome(run, path)
    assert item["state"] == "evaluated"
    assert item["evaluation"]["mean_kl"] is not None


def test_other_text_is_measured_anew(write: Write, run: Run) -> None:
    first, _ = outcome(run, write())
    second, _ = outcome(run, write(evaluation={"window": 64, "windows": 1, "golden": []}))
    assert second["state"] == "evaluated"
    assert first["evaluation"]["mean_kl"] != second["evaluation"]["mean_kl"]
    assert second["evaluation"]["golden"] is None


# --- what is refused --------------------------------------------------------------------------------------------------


def test_a_refused_build_is_kept_aside_with_its_report(write: Write, run: Run, store: Store) -> None:
    path = write(gates=IMPOSSIBLE)
    result = run("build", path)
    assert result.exit_code == 3
    assert re.search(
        r"tiny/q8_0 is refused: KL divergence: mean \d\.\d{4} nats on [a-z]+ is over the limit of 1e-09", result.stderr
    )
    assert store.artifacts() == []
    assert {item.name for item in (store.root / "tiny" / "q8_0").iterdir()} == {REFUSED}, "no `current`, nothing else"
    (refused,) = store.refused()
    check_files(refused, SilentReporter())
    assert "is over the limit" in (refused.folder / "evaluation.md").read_text()
    assert listed(run) == []
    assert [row["evaluation"]["verdict"] for row in listed(run, "--all")] == ["refused"]
    assert run("show", "tiny/q8_0").exit_code == 2
    assert "refused" in run("show", refused.folder).stdout
    assert [item["reason"] for item in json.loads(run("gc", "--delete", "--json").stdout)] == ["refused by its gates"]
    assert store.refused() == []


def test_the_good_build_before_it_stays_current(
    write: Write, run: Run, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, _ = outcome(run, write())
    monkeypatch.setattr(import_module("quantize.build.plan"), "tool_versions", lambda _: {"llama-cpp-python": "99.0"})
    refused, code = outcome(run, write(gates=IMPOSSIBLE))
    assert (refused["state"], code) == ("refused", 3)
    (artifact,) = store.artifacts()
    assert str(artifact.folder) == good["folder"]
    assert store.is_current(artifact)


def test_gates_that_change_move_what_is_built(
    write: Write, run: Run, store: Store, no_measuring: Callable[[], None]
) -> None:
    """Down and up again, on the figures that are there: nothing is measured or built a second time."""
    item, _ = outcome(run, write())
    no_measuring()
    again, code = outcome(run, write(gates=IMPOSSIBLE))
    assert (again["state"], code) == ("refused", 3)
    assert Path(again["folder"]).parent.name == REFUSED
    assert outcome(run, write(gates=IMPOSSIBLE), "--no-eval")[1] == 3, "a known refusal holds without measuring, too"
    assert not (store.root / "tiny" / "q8_0" / "current").exists()
    back, code = outcome(run, write())
    assert (back["state"], back["folder"], code) == ("evaluated", item["folder"], 0)
    assert store.is_current(store.find("tiny/q8_0"))
    assert "max_kl" not in (Path(back["folder"]) / "recipe.yaml").read_text()


def test_a_record_of_fewer_figures_stays_as_it_is(write: Write, run: Run, no_measuring: Callable[[], None]) -> None:
    """As an older version wrote it: a figure that came later makes no build write it anew and undo a signature."""
    item, _ = outcome(run, write())
    path = Path(item["folder"]) / "measurements.json"
    measured = json.loads(path.read_text())
    del measured["evaluation"]["quality"]["max_kl"]
    path.write_text(json.dumps(measured))
    before = path.read_bytes()
    no_measuring()
    again, code = outcome(run, write())
    assert (again["state"], code) == ("up to date", 0)
    assert path.read_bytes() == before


def test_a_forced_build_that_is_refused_takes_the_good_one_with_it(write: Write, run: Run, store: Store) -> None:
    outcome(run, write())
    item, _ = outcome(run, write(gates=IMPOSSIBLE), "--force")
    assert item["state"] == "refused"
    assert store.artifacts() == []
    assert outcome(run, write(), "--force")[0]["state"] == "built"
    assert len(store.artifacts()) == 1


def test_an_accepted_risk_is_in_the_manifest(
    write: Write, run: Run, store: Store, no_measuring: Callable[[], None]
) -> None:
    path = write(gates=IMPOSSIBLE)
    refused, _ = outcome(run, path)
    no_measuring()
    taken, code = outcome(run, path, "--accept-risk", "for load tests only")
    assert (taken["state"], code) == ("evaluated", 0)
    manifest = read_manifest(Path(taken["folder"]) / "manifest.json")
    assert manifest.accepted_risk is not None
    assert manifest.accepted_risk.model_dump() == {"reason": "for load tests only", "gates": ("KL divergence",)}
    assert manifest.digest != refused["digest"], "whoever pins or pulls it sees another artifact"
    assert manifest.model_copy(update={"accepted_risk": None}).sealed().digest == refused["digest"]
    assert "for load tests only" in (Path(taken["folder"]) / "README.md").read_text()
    assert listed(run)[0]["evaluation"]["verdict"] == "risk accepted"
    assert "for load tests only" in run("show", "tiny/q8_0").stdout
    assert outcome(run, path)[0]["state"] == "up to date"
    assert store.refused() == []


def test_a_risk_without_a_reason_is_none(write: Write, run: Run) -> None:
    result = run("build", write(), "--accept-risk", " ")
    assert result.exit_code == 2
    assert "--accept-risk needs a reason" in result.stderr


# --- what goes wrong on the way ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [KeyboardInterrupt, MemoryError])
def test_a_build_that_ends_while_measuring_is_only_measured_later(
    stop: type[BaseException], write: Write, run: Run, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write()
    with monkeypatch.context() as patch:
        patch.setattr("quantize.evaluate.session.evaluate", lambda *_: (_ for _ in ()).throw(stop()))
        assert run("build", path).exit_code in (1, 130)
    assert store.artifacts() == []
    assert [entry.name for entry in (store.root / "tiny" / "q8_0").iterdir()] == [UNJUDGED]
    (store.root / ".staging" / "tiny--q8_0.0a1b2c3d.scratch").mkdir(parents=True)  # kill -9 leaves it
    assert listed(run, "--all") == []
    monkeypatch.setattr(GgufBuilder, "build", None)
    item, _ = outcome(run, path)
    assert item["state"] == "evaluated"
    assert {entry.name for entry in (store.root / "tiny" / "q8_0").iterdir()} == {"current", Path(item["folder"]).name}
    assert {entry.name for entry in store.root.iterdir()} == {"tiny"}


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ({"text": "empty.txt"}, "empty.txt: no text to measure on"),
        ({"text": "short.txt"}, "tokens are less than one window of 512"),
        ({"text": "none.txt"}, "`evaluation`: no such text: none.txt"),
        ({"golden": ["none"]}, "`evaluation`: no such golden prompts: none"),
        ({"golden": ["wrong.yaml"]}, "wrong.yaml:2:16: `id`: String should match pattern"),
    ],
)
def test_wrong_text_and_prompts_end_a_build_before_it_starts(
    evaluation: dict[str, Any], message: str, write: Write, run: Run, tmp_path: Path, store: Store
) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("Too short.")
    (tmp_path / "wrong.yaml").write_text("name: wrong\nprompts: [{id: A B, prompt: x, grade: {kind: same}}]\n")
    result = run("build", write(evaluation=evaluation))
    assert result.exit_code == 2, result.stderr
    assert message in result.stderr
    assert store.artifacts() == []


def test_text_that_is_calibrated_on_ends_a_build_before_it_starts(write: Write, run: Run, tmp_path: Path) -> None:
    (tmp_path / "seen.txt").write_text("\n\n".join(f"Part {n} of a text that is used for both. " * 8 for n in range(9)))
    calibration = {"dataset": "./seen.txt", "samples": 9, "sequence_length": 128, "packing": True}
    evaluation = {"text": "seen.txt", "window": 64, "golden": []}
    result = run("build", write({**Q4, "imatrix": True}, calibration=calibration, evaluation=evaluation))
    assert result.exit_code == 3
    assert re.search(r"seen\.txt: \d+% of the held-out text was calibrated on", result.stderr)


# --- seeded defects ---------------------------------------------------------------------------------------------------


class Spoilt(GgufBuilder):
    """llama.cpp's builds, with a defect put into each before anything looks at it."""

    def __init__(self, spoil: Callable[[Path], object]) -> None:
        self.spoil = spoil

    def build(self, context: Any, reporter: Any) -> Any:
        result = super().build(context, reporter)
        self.spoil(context.staging)
        return result


def weights(folder: Path) -> Path:
    (path,) = folder.glob("*.gguf")
    return path


def nan_in_one_tensor(folder: Path) -> None:
    spoil_tensor(Artifact(folder, None), "blk.0.ffn_up.weight", np.float16("nan").tobytes())  # type: ignore[arg-type]


def wrong_scale_in_one_group(folder: Path) -> None:
    """The first 32 weights of one matrix, three times as large: two bytes of the file."""
    import gguf

    (item,) = [item for item in gguf.GGUFReader(weights(folder)).tensors if item.name == "blk.1.attn_v.weight"]
    scale = np.frombuffer(item.data.tobytes()[:2], np.float16)[0]
    spoil_tensor(Artifact(folder, None), item.name, np.float16(3 * scale).tobytes())  # type: ignore[arg-type]


def no_chat_template(folder: Path) -> None:
    rewrite(weights(folder), lambda fields: fields.pop("tokenizer.chat_template"))


def vocabulary_cut(folder: Path) -> None:
    """A whole, valid file of the same model with fewer tokens."""
    import gguf

    path = weights(folder)
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(path.with_suffix(".new"), "llama")
    for name, entry in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value = entry.contents()
        if name in ("tokenizer.ggml.tokens", "tokenizer.ggml.scores", "tokenizer.ggml.token_type"):
            value = value[:-64]
        kind = entry.types[0]
        writer.add_key_value(name, value, kind, sub_type=entry.types[-1] if kind == gguf.GGUFValueType.ARRAY else None)
    for item in reader.tensors:
        rows = item.data[:-64] if item.name in ("token_embd.weight", "output.weight") else item.data
        writer.add_tensor(item.name, rows, raw_dtype=item.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.with_suffix(".new").replace(path)


@pytest.fixture
def spoilt_by(write: Write, run: Run, store: Store) -> Callable[..., dict[str, Any]]:
    """Build Q8_0 with a defect; the record of the refused artifact."""

    def build(spoil: Callable[[Path], object]) -> dict[str, Any]:
        with installed_formats(replace(GGUF, builder=Spoilt(spoil)), PLAIN):
            item, code = outcome(run, write())
        assert (item["state"], code) == ("refused", 3)
        assert store.artifacts() == []
        return record(item["folder"])

    return build


def reasons(found: dict[str, Any]) -> dict[str, str]:
    return {item["gate"]: item["reason"] for item in found["findings"] if item["outcome"] == "refused"}


def test_a_nan_is_refused(spoilt_by: Callable[..., dict[str, Any]]) -> None:
    refused = reasons(spoilt_by(nan_in_one_tensor))
    assert set(refused) == {RUNS}
    assert "tiny-Q8_0.gguf: llama.cpp does not load it" in refused[RUNS]


def test_a_lost_chat_template_is_refused(spoilt_by: Callable[..., dict[str, Any]]) -> None:
    refused = reasons(spoilt_by(no_chat_template))
    assert refused == {RUNS: "tiny-Q8_0.gguf: the chat template is lost"}


def test_a_cut_vocabulary_is_refused(spoilt_by: Callable[..., dict[str, Any]]) -> None:
    refused = reasons(spoilt_by(vocabulary_cut))
    assert set(refused) == {RUNS}
    assert "weight has the shape (256, 320), the source's (256, 384)" in refused[RUNS]


def test_a_wrong_scale_in_one_group_is_refused_by_its_own_gate(spoilt_by: Callable[..., dict[str, Any]]) -> None:
    found = spoilt_by(wrong_scale_in_one_group)
    assert set(reasons(found)) == {NEAR}
    assert (
        "layers.1.self_attn.v_proj.weight has a group of 32 weights at 3.00 times the source's" in reasons(found)[NEAR]
    )
    assert found["quality"]["mean_kl"] < 0.05, "no other gate would have seen it"


def test_a_layer_left_unquantized_is_refused(
    spoilt_by: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = making.settings_of

    def settings(*args: Any) -> QuantizeSettings:
        made = real(*args)
        return QuantizeSettings(**{**made.__dict__, "overrides": (("blk\\.0\\.ffn_down", "F16"),)})

    for module in (making, gguf_backend):
        monkeypatch.setattr(module, "settings_of", settings)
    assert reasons(spoilt_by(lambda _: None)) == {QUANTIZED: "left unquantized: blk.0.ffn_down.weight (F16)"}


def test_weights_of_another_model_are_refused(
    spoilt_by: Callable[..., dict[str, Any]], tmp_path: Path, run: Run
) -> None:
    other = make_checkpoint(tmp_path / "elsewhere" / "tiny", TinyModel(seed=1))
    recipe = write_recipe(tmp_path / "elsewhere" / "tiny.yaml", other, [Q8])
    run("build", recipe, "--no-eval", "--store", tmp_path / "elsewhere" / "store")
    path = tmp_path / "elsewhere" / "store" / "tiny" / "q8_0" / "current" / "tiny-Q8_0.gguf"
    refused = reasons(spoilt_by(lambda folder: shutil.copyfile(path, weights(folder))))
    assert set(refused) == {RUNS}
    assert "is not the source's: a cosine of" in refused[RUNS]


def test_what_did_not_run_is_built_again_by_other_checks(
    write: Write, run: Run, store: Store, spoilt_by: Callable[..., dict[str, Any]]
) -> None:
    """And only then: a newer program may know better, and the same one says what it said before."""
    spoilt_by(nan_in_one_tensor)
    again, code = outcome(run, write())
    assert (again["state"], code) == ("refused", 3), "a good builder is not even asked"
    with installed_formats(replace(GGUF, checks=GGUF.checks + 1), PLAIN):
        better, code = outcome(run, write())
        assert (better["state"], code) == ("built", 0)
        assert outcome(run, write())[0]["state"] == "up to date"
    assert store.is_current(store.find("tiny/q8_0"))


def test_overrides_of_the_recipe_are_intended(write: Write, run: Run) -> None:
    item, code = outcome(run, write({**Q8, "overrides": {"ffn_down": "F16"}}))
    assert code == 0, record(item["folder"])["findings"]


def test_a_folder_that_lost_its_template_or_left_a_linear_alone(tiny: Path, tmp_path: Path) -> None:
    """The full-precision folder itself, taken for an INT8 one: every linear is left."""
    copy = Path(shutil.copytree(tiny, tmp_path / "copy"))
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    found = check_structure(SilentReporter(), ModelRef(copy, "bitsandbytes"), tiny, Intended(8))
    assert found[TEMPLATE] == "it is lost"
    assert found[QUANTIZED].startswith("left unquantized: model.layers.0.self_attn.q_proj.weight, ")
    assert found[QUANTIZED].endswith(" and 11 more")
    assert len(open_checkpoint(tiny).tensors) == 21


def test_a_read_only_refusal_leaves_the_link(write: Write, run: Run, store: Store) -> None:
    """`current` never points at what is not there, at any moment of a move."""
    outcome(run, write())
    outcome(run, write(gates=IMPOSSIBLE))
    links = [path for path in store.root.rglob("current") if path.is_symlink()]
    assert [link for link in links if not os.path.exists(link)] == []
