"""The package as others use it: its name, what `import quantize` offers, and README's example as it stands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

import quantize
from quantize.errors import MissingExtraError, QuantizeError, RecipeError, UsageError
from quantize.events import ListReporter
from quantize.formats import formats, runtime_kind
from quantize.provenance.statement import pypi_url
from quantize.runtimes.base import runtime_version
from quantize.testing import write_recipe

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
README = (ROOT / "README.md").read_text(encoding="utf-8")
Q8 = [{"format": "gguf", "type": "Q8_0"}]
GOLDEN = """\
name: mine
prompts:
  - {id: same, prompt: The quick brown fox, max_tokens: 4, grade: {kind: same}}
"""


# --- the distribution -------------------------------------------------------------------------------------------------


def test_one_name_of_the_distribution() -> None:
    assert PROJECT["name"] == quantize.DISTRIBUTION
    assert pypi_url("quantize", "0.1.0") == f"pkg:pypi/{quantize.DISTRIBUTION}@0.1.0"
    assert pypi_url("llama_cpp_python", "1") == "pkg:pypi/llama-cpp-python@1"


def test_every_extra_refers_to_this_distribution() -> None:
    texts = [text for extra in PROJECT["optional-dependencies"].values() for text in extra]
    own = [text for text in texts if text.startswith("quantize")]
    assert own
    assert all(text.startswith(f"{quantize.DISTRIBUTION}[") for text in own)


def test_nothing_tells_to_install_the_other_project() -> None:
    places = [README, *(path.read_text() for folder in ("docs", "deploy") for path in (ROOT / folder).glob("*.*")
                        if path.suffix in (".md", ".yaml", ".sh"))]  # fmt: skip
    assert [found for text in places for found in re.findall(r"\bquantize\[[a-z,]+\]|pypi/quantize[@#]", text)] == []


@pytest.mark.parametrize("format", [*formats()])
def test_the_extra_in_a_hint_is_one_that_there_is(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("quantize.runtimes.base.version", missing)
    with pytest.raises(MissingExtraError) as caught:
        runtime_version(runtime_kind(format), "evaluating a model")
    extra = re.fullmatch(r"install it with: .*pip install .*'quantize-models\[([\w-]+)\]'", str(caught.value.hint))
    assert extra is not None
    assert extra[1] in PROJECT["optional-dependencies"]


# --- import quantize --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", quantize.__all__)
def test_every_public_name_is_there_and_says_what_it_is(name: str) -> None:
    found = getattr(quantize, name)
    assert name == "__version__" or found.__doc__
    assert name in dir(quantize)


@pytest.mark.parametrize("first", ["import quantize.build.execute", "import quantize", "import quantize.api"])
def test_build_is_the_function_and_the_folder(first: str) -> None:
    """Whoever imports what, in whatever order."""
    code = (
        f"{first}\nimport quantize\nfrom quantize import build, plan, rebuild\n"
        "import quantize.build.execute as module\n"
        "assert module.execute and build is quantize.build\n"
        "try:\n    build('no-such-recipe')\n"
        "except quantize.errors.UsageError as error:\n    print(error.message)\n"
        "print(plan.__module__, rebuild.__module__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout == "no recipe 'no-such-recipe'\nquantize.api quantize.api\n"


def test_an_unknown_name_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="module 'quantize' has no attribute 'no_such'"):
        quantize.no_such  # noqa: B018


def test_import_is_quick_and_imports_nothing_of_its_own() -> None:
    code = "import sys, quantize; print(*(name for name in sys.modules if name.startswith('quantize')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "quantize\n"


def test_the_package_is_typed() -> None:
    assert (Path(quantize.__path__[0]) / "py.typed").is_file()


# --- the functions ----------------------------------------------------------------------------------------------------


def test_a_recipe_by_path_text_and_name(tiny: Path, tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "mine.yaml", tiny, Q8)
    assert quantize.load_recipe(path) == quantize.load_recipe(str(path))
    assert quantize.load_recipe("smollm2-135m").name == "smollm2-135m"
    with pytest.raises(RecipeError, match=r"no-such\.yaml"):
        quantize.load_recipe("no-such.yaml")


def test_plan_and_build_take_the_places_that_they_are_given(tiny: Path, tmp_path: Path) -> None:
    path, reporter = write_recipe(tmp_path / "mine.yaml", tiny, Q8), ListReporter()
    places = {"store": tmp_path / "mine", "cache": tmp_path / "scratch"}
    plan = quantize.plan(path, **places, reporter=reporter)  # type: ignore[arg-type]
    (job,) = plan.jobs
    assert job.size is not None
    (outcome,) = quantize.build(path, evaluate=False, reporter=reporter, **places)  # type: ignore[arg-type]
    assert (outcome.state, outcome.error) == ("built", None)
    assert outcome.artifact is not None
    assert outcome.artifact.folder.is_relative_to(tmp_path / "mine")
    assert (tmp_path / "scratch").is_dir()
    assert sum(item.size_bytes for item in outcome.artifact.manifest.files if item.path.endswith(".gguf")) == (
        job.size.file_bytes
    )
    assert reporter.events


def test_wrong_limits_are_usage_errors(tiny: Path, tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "mine.yaml", tiny, Q8)
    with pytest.raises(UsageError, match="'lots' is no size"):
        quantize.plan(path, memory_budget="lots")
    with pytest.raises(UsageError, match="device 'tpu' is none"):
        quantize.plan(path, device="tpu")
    with pytest.raises(UsageError, match="the recipe has no variant 'q9'"):
        quantize.build(path, only=["q9"])


def test_rebuild_keeps_what_it_is_told_to(tiny: Path, tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "mine.yaml", tiny, Q8)
    quantize.build(path, evaluate=False)
    kept = quantize.rebuild("mine/q8_0", keep=tmp_path / "kept")
    assert (kept.identical, kept.rebuilt.folder) == (True, tmp_path / "kept")
    with pytest.raises(UsageError, match="kept: is there already"):
        quantize.rebuild("mine/q8_0", keep=tmp_path / "kept")
    assert not quantize.rebuild(kept.artifact).rebuilt.folder.exists()


# --- README -----------------------------------------------------------------------------------------------------------


def test_the_example_in_readme_runs_as_it_stands(tiny: Path, tmp_path: Path) -> None:
    """With a tiny checkpoint under the name of the demo recipe: a file of the user's wins."""
    section = README.partition("\n## From Python\n")[2].partition("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "mine.yaml").write_text(GOLDEN)
    write_recipe(
        tmp_path / "recipes" / "smollm2-135m.yaml", tiny, [{"format": "gguf", "types": ["Q8_0", "Q4_0"]}],
        evaluation={"window": 128, "windows": 2, "golden": ["mine.yaml"]},
    )  # fmt: skip
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[:2]] == ["q8_0", "q4_0"]
    assert all(int(line.split()[1]) > 100_000 for line in lines[:2])
    assert lines[2] == "q8_0 built"
    assert re.fullmatch(r".*/smollm2-135m/q8_0/[0-9a-f]{12} sha256:[0-9a-f]{64}", lines[3])
    assert lines[4:] == ["True"]


def test_errors_have_one_base() -> None:
    assert issubclass(quantize.errors.GateError, QuantizeError)
