"""A format in a distribution of its own, through every command: nothing in quantize/ knows that it is there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click.testing
import numpy as np
import pytest

from quantize.cli import main
from quantize.testing import make_checkpoint, write_recipe
from tests.serving import post, serving
from tests.toy import toy_installed

pytest.importorskip("torch")
pytestmark = pytest.mark.filterwarnings("ignore")  # transformers warns on import

PLAIN, SEARCHED = "tiny/toy-int8", "tiny/toy-int8-searched"
VARIANTS = [{"format": "toy"}, {"format": "toy", "search": True}]
CALIBRATION = {
    "dataset": "text.txt", "samples": 8, "sequence_length": 64, "minimum_tokens": 16, "precision": "float32",
}  # fmt: skip
EVALUATION = {"text": "held-out.txt", "window": 64, "windows": 8, "golden": ["any.yaml"]}
GOLDEN = """\
name: any
prompts:
""" + "".join(
    f"  - {{id: p{number}, prompt: Which fox {number}, max_tokens: 2, grade: {{kind: regex, pattern: .}}}}\n"
    for number in range(6)
)


@dataclass(frozen=True)
class Home:
    """Both variants, built and measured by one `quantize build`; what it said."""

    root: Path
    recipe: Path
    checkpoint: Path
    built: click.testing.Result

    def folder(self, name: str) -> Path:
        return (self.root / "artifacts" / name / "current").resolve()

    def manifest(self, name: str) -> dict[str, Any]:
        data: dict[str, Any] = json.loads((self.folder(name) / "manifest.json").read_text())
        return data

    def measured(self, name: str) -> dict[str, Any]:
        data: dict[str, Any] = json.loads((self.folder(name) / "measurements.json").read_text())
        return data


def quantize(*args: object, code: int = 0) -> click.testing.Result:
    """A command in this process, which must end with a code."""
    result = click.testing.CliRunner().invoke(main, [str(arg) for arg in args], prog_name="quantize")
    assert result.exit_code == code, f"{args}: {result.output}"
    return result


def data_of(*args: object) -> Any:
    return json.loads(quantize(*args, "--json").stdout)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    root = tmp_path_factory.mktemp("toy")
    checkpoint = make_checkpoint(root / "tiny-model")
    fox = "the quick brown fox jumps over the lazy dog. "
    (root / "text.txt").write_text("\n\n".join(f"Paragraph {index}: {fox * 3}" for index in range(12)))
    (root / "held-out.txt").write_text("A recipe names a model and the formats that it becomes. " * 40)
    (root / "any.yaml").write_text(GOLDEN)
    recipe = write_recipe(
        root / "tiny.yaml", checkpoint, VARIANTS, calibration=CALIBRATION, evaluation=EVALUATION,
        gates={"max_kl": 0.01, "max_perplexity_ratio": 1.05},
    )  # fmt: skip
    with toy_installed(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUANTIZE_STORE", str(root / "artifacts"))
        patch.setenv("QUANTIZE_CACHE", str(root / "cache"))
        quantize("lock", recipe)
        yield Home(root, recipe, checkpoint, quantize("build", recipe, "--locked", "--threads", 2, "--json"))


@pytest.fixture(autouse=True)
def _at_home(home: Home, _own_folders: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module's store and cache, not folders of the test's own; another store is named by those who write."""
    monkeypatch.setenv("QUANTIZE_STORE", str(home.root / "artifacts"))
    monkeypatch.setenv("QUANTIZE_CACHE", str(home.root / "cache"))


def test_a_process_finds_it_beside_the_built_in_ones() -> None:
    command = [sys.executable, "-m", "quantize", "list", "formats", "--json"]
    found = {
        item["format"]: item for item in json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    }
    assert found["toy"] == {"format": "toy", "extra": "torch", "options": ["search"], "runs": []}
    assert {"awq", "bitsandbytes", "gguf", "gptq"} < set(found)


def test_what_was_planned_is_what_was_built(home: Home, tmp_path: Path) -> None:
    planned = {item["name"]: item for item in data_of("plan", home.recipe, "--store", tmp_path / "none")["variants"]}
    for name in (PLAIN, SEARCHED):
        files = [item["size_bytes"] for item in home.manifest(name)["files"] if item["path"] != "LICENSE"]
        assert planned[name.partition("/")[2]]["file_bytes"] == sum(files)


def test_it_was_measured_and_passed_its_gates_with_figures(home: Home) -> None:
    for name in (PLAIN, SEARCHED):
        record = home.measured(name)["evaluation"]
        outcomes = {item["gate"]: item["outcome"] for item in record["findings"]}
        assert outcomes.pop("JSON answers") == "insufficient evidence", "no JSON is asked of a model of random weights"
        assert set(outcomes.values()) == {"passed"}, record["findings"]
        assert {"KL divergence", "perplexity", "nothing left unquantized", "weights near the source's"} <= set(outcomes)
        assert 0 < record["quality"]["mean_kl"] < 0.01
        assert record["quality"]["runtime"] == "toy rows"
        assert "quantize-toy-format 0.1" in record["quality"]["runtime_version"]


def test_a_gate_that_it_breaks_refuses_it(home: Home, tmp_path: Path) -> None:
    shutil.copytree(home.root / "artifacts", tmp_path / "artifacts", symlinks=True)
    recipe = home.recipe.with_name("tiny-strict.yaml")
    recipe.write_text(home.recipe.read_text().replace("max_kl: 0.01", "max_kl: 1.0e-09"))
    result = quantize("build", recipe, "--only", "toy-int8", "--store", tmp_path / "artifacts", code=3)
    assert "nats is over the limit of 1e-09" in result.stderr


def test_the_search_took_part_in_the_pass(home: Home) -> None:
    assert home.manifest(PLAIN)["calibration"] is None
    assert home.manifest(SEARCHED)["calibration"]["sequences"] == 8
    plain, searched = (np.load(home.folder(name) / "rows.npz") for name in (PLAIN, SEARCHED))
    scales = "model.layers.0.mlp.up_proj/scales"
    assert np.array_equal(plain["model.norm.weight"], searched["model.norm.weight"])
    assert 0 < (searched[scales] != plain[scales]).mean() < 1, "the range of a row is chosen, where another is better"


def test_the_search_loses_less_of_what_it_weighs() -> None:
    from quantize_toy.rounding import round_rows

    random = np.random.default_rng(0)
    weight, importance = random.standard_normal((64, 256), dtype=np.float32), random.random(256)
    plain, searched = (
        (np.square(codes * scales[:, None] - weight) * importance).sum()
        for codes, scales in (round_rows(weight), round_rows(weight, importance))
    )
    assert 0.5 < searched / plain < 0.99


def test_numpy_reads_what_was_written(home: Home) -> None:
    """And every row is within half a step of the source's."""
    from safetensors.numpy import load_file

    source, arrays = load_file(home.checkpoint / "model.safetensors"), np.load(home.folder(PLAIN) / "rows.npz")
    name = "model.layers.1.self_attn.q_proj"
    steps = arrays[f"{name}/scales"][:, None]
    assert (np.abs(arrays[f"{name}/codes"] * steps - source[f"{name}.weight"]) <= 0.501 * steps).all()
    assert np.array_equal(arrays["model.embed_tokens.weight"], source["model.embed_tokens.weight"])


def test_list_and_show(home: Home) -> None:
    listed = {f"{item['name']}/{item['variant']}": item for item in data_of("list", "artifacts")}
    assert {item["format"] for item in listed.values()} == {"toy"}
    assert listed[PLAIN]["digest"] == home.manifest(PLAIN)["digest"]
    assert data_of("show", PLAIN)["manifest"] == home.manifest(PLAIN)
    text = quantize("show", SEARCHED).stdout
    assert "only the matrices of the blocks are rounded" in text
    assert "toy rows (transformers" in text


def test_estimate_knows_how_its_memory_goes(home: Home) -> None:
    for target in (home.recipe, PLAIN):
        found = {item["name"]: item for item in data_of("estimate", target, "--context", 256)}[PLAIN]
        assert (found["format"], found["runtime"]) == ("toy", "transformers")
        assert found["cells"][0]["weights_bytes"] == found["weights_bytes"]
    arrays = np.load(home.folder(PLAIN) / "rows.npz")
    assert found["weights_bytes"] == sum(arrays[name].nbytes for name in arrays.files)


def test_eval_measures_it_again(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home.root)  # where the text is
    copy = shutil.copytree(home.root / "artifacts", tmp_path / "copy", symlinks=True)
    quantize("eval", PLAIN, "--store", copy, "--quiet")
    record = json.loads((copy / PLAIN / "current" / "measurements.json").read_text())["evaluation"]
    assert record["quality"]["mean_kl"] == home.measured(PLAIN)["evaluation"]["quality"]["mean_kl"]


def test_verify_says_good_and_finds_damage(home: Home, tmp_path: Path) -> None:
    assert quantize("verify", SEARCHED, "--quiet").stdout.endswith(": good\n")
    copy = shutil.copytree(home.root / "artifacts", tmp_path / "copy", symlinks=True)
    path = copy / SEARCHED / "current" / "rows.npz"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert "rows.npz has 1,601,705 bytes" in quantize("verify", SEARCHED, "--store", copy, code=3).stderr
    path.write_bytes(whole[:700_000] + bytes([whole[700_000] ^ 1]) + whole[700_001:])
    assert "rows.npz was altered" in quantize("verify", SEARCHED, "--store", copy, code=3).stderr


def test_diff_sees_tensors_that_are_not_safetensors(home: Home) -> None:
    found = {item["what"]: item for item in data_of("diff", PLAIN, SEARCHED)}
    assert (found["options.search"]["first"], found["options.search"]["second"]) == (False, True)
    assert "file rows.npz" in found
    assert not [what for what in found if what.startswith("tensor ")], "of the same types and sizes"


def test_the_card_has_its_ways_and_limits(home: Home) -> None:
    plain, searched = ((home.folder(name) / "README.md").read_text() for name in (PLAIN, SEARCHED))
    assert 'weights = numpy.load("rows.npz")' in plain
    assert "quantize serve ." in plain
    assert "Its rows are rounded to nearest, none looked at twice." in plain
    assert "none looked at twice" not in searched
    assert "Scales and rounding were chosen on text.txt" in searched
    assert "library_name" not in plain


def test_rebuilt_from_its_manifest_it_is_the_same(home: Home) -> None:
    data = data_of("rebuild", home.folder(SEARCHED), "--threads", 1)
    assert (data["tools"], data["manifest_fields"], data["differences"]) == ([], [], [])
    assert data["rebuilt_digest"] == data["digest"] == home.manifest(SEARCHED)["digest"]


def test_published_and_pulled_it_is_what_it_was(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where pins are written
    (sent,) = data_of("publish", PLAIN, "--to", tmp_path / "share")
    packs = [json.loads(path.read_text()) for path in (tmp_path / "share").rglob("modelpack.json")]
    types = {layer["annotations"]["org.cncf.model.filepath"]: layer["mediaType"] for layer in packs[0]["layers"]}
    assert [name for name, kind in types.items() if ".weight.v1" in kind] == ["rows.npz"]
    (config,) = (json.loads(path.read_text()) for path in (tmp_path / "share").rglob("modelpack-config.json"))
    assert config["config"]["format"] == "npz"
    assert config["config"]["quantization"] == "int8-rows"
    quantize("pull", sent["reference"], "--store", tmp_path / "pulled", "--quiet")
    pulled = tmp_path / "pulled" / PLAIN / "current"
    assert (pulled / "rows.npz").read_bytes() == (home.folder(PLAIN) / "rows.npz").read_bytes()
    quantize("verify", PLAIN, "--hashes-only", "--store", tmp_path / "pulled")


def test_served_it_answers(home: Home, tmp_path: Path) -> None:
    with serving(tmp_path, PLAIN, SEARCHED, "--store", str(home.root / "artifacts")) as url:
        wanted = {"model": SEARCHED, "messages": [{"role": "user", "content": "Which fox?"}], "max_tokens": 4}
        chat = post(url, "/v1/chat/completions", wanted)
        assert (chat["model"], chat["usage"]["completion_tokens"]) == (SEARCHED, 4)
        plain = post(url, "/v1/completions", {"model": PLAIN, "prompt": "The quick", "max_tokens": 4, "temperature": 0})
        assert plain["usage"]["completion_tokens"] == 4
        asked = post(url, "/chat", {"message": "Which fox?", "max_tokens": 4})
        assert asked["runtime"].startswith("toy rows (transformers")


def test_what_runs_it_elsewhere_is_asked_of_it() -> None:
    refused = quantize("serve", PLAIN, "--print", "vllm", code=3).stderr
    assert "vLLM does not read .npz files" in refused
    assert "serve it with `quantize serve`" in refused
    assert "takes GGUF files, this is toy" in quantize("serve", PLAIN, "--print", "ollama", code=3).stderr
    compose = quantize("serve", PLAIN, "--print", "compose").stdout
    assert f"{PLAIN}=/model/rows.npz" in compose
    assert "with RUN pip install quantize-toy-format" in compose


def test_a_folder_that_no_manifest_describes_is_one_all_the_same(home: Home, tmp_path: Path) -> None:
    from quantize.serve.targets import LocalTarget, resolve
    from quantize.store.store import Store

    folder = tmp_path / "bare"
    shutil.copytree(home.folder(PLAIN), folder, ignore=shutil.ignore_patterns("manifest.json"))
    for word, path in ((folder, "rows.npz"), (folder / "rows.npz", "rows.npz")):
        found = resolve(str(word), Store(tmp_path / "none"))
        assert isinstance(found, LocalTarget)
        assert (found.format, found.path.name) == ("toy", path)
        assert found.weights_bytes == data_of("estimate", word)[0]["weights_bytes"]


def test_bench_starts_a_server_for_it(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where the table of results is written
    options = ("--shape", "8:4", "--requests", 2, "--concurrency", 1, "--warm-up", 0, "--threads", 1)
    (cell,) = data_of("bench", PLAIN, *options)["cells"]
    assert (cell["requests"], cell["errors"]) == (2, {})


def test_doctor_knows_what_it_needs(home: Home) -> None:
    from quantize.cli.trials import try_engines
    from quantize.formats import find_format

    data = data_of("doctor", "--quick")
    assert data["versions"]["quantize-toy-format"] == "0.1"
    assert data["devices"]["toy rows"] == data["devices"]["transformers"]
    (ability,) = [item for item in data["abilities"] if item["format"] == "toy"]
    assert (ability["build_lacks"], ability["serve_lacks"], ability["install"]) == ([], [], None)
    (trial,) = try_engines([find_format("toy").probes[-1]])
    assert (trial.engine, trial.state, trial.ran) == ("toy rows", "works", "a matrix to codes and back")


def test_doctor_names_the_plugin_where_its_own_requirement_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    real = metadata.version

    def version(name: str) -> str:
        return "1.26" if name == "numpy" else real(name)

    monkeypatch.setattr("quantize.cli.requirements.metadata.version", version)
    (ability,) = [item for item in data_of("doctor", "--quick")["abilities"] if item["format"] == "toy"]
    assert "numpy>=2" in ability["build_lacks"]
    assert ability["install"].endswith("'quantize-models[torch]' quantize-toy-format")


def test_the_pages_show_it(home: Home, tmp_path: Path) -> None:
    quantize("report", "--output", tmp_path / "pages")
    assert any("toy-int8" in path.read_text() for path in (tmp_path / "pages").rglob("*.html"))


def test_the_schema_has_its_options() -> None:
    text = quantize("schema").stdout
    assert "choose each row's range by what the calibration pass saw" in text


@pytest.fixture
def uninstalled(home: Home) -> dict[str, str]:
    """An environment in which the artifacts are, and the plugin is not."""
    paths = [path for path in os.environ["PYTHONPATH"].split(os.pathsep) if "toy_format" not in path]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (("list", "artifacts"), 0, "toy-int8-searched"),
        (("show", PLAIN), 0, "rows.npz"),
        (("verify", PLAIN, "--hashes-only"), 0, ": good"),
        (("verify", PLAIN), 2, "the format 'toy' is not installed here"),
        (("serve", PLAIN), 2, "the format 'toy' is not installed here"),
        (("publish", PLAIN, "--to", "share"), 2, "the format 'toy' is not installed here"),
        (("rebuild", PLAIN), 2, "the format 'toy' is not installed here"),
        (("eval", PLAIN), 2, "unknown format 'toy'"),
        (("bench", PLAIN), 2, "the format 'toy' is not installed here"),
        (("estimate", PLAIN), 2, "the format 'toy' is not installed here"),
    ],
    ids=lambda item: item[0] if isinstance(item, tuple) else None,
)
def test_without_the_plugin_that_is_said(
    uninstalled: dict[str, str], tmp_path: Path, args: tuple[str, ...], code: int, said: str
) -> None:
    command = [sys.executable, "-m", "quantize", *args]
    result = subprocess.run(command, capture_output=True, text=True, env=uninstalled, cwd=tmp_path)
    assert result.returncode == code, result.stdout + result.stderr
    assert said in result.stdout + result.stderr
