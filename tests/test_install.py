"""How llama.cpp is compiled: every line that installs it, what pip's cache gives, and what make sets up again."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "deploy" / "install-llama-cpp"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
INSTALLERS = [
    ROOT / "Makefile", ROOT / ".ci" / "run", ROOT / "README.md", ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "deploy").iterdir()), *sorted((ROOT / ".github" / "workflows").iterdir()),
    *sorted((ROOT / "ci").iterdir()), *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "quantize").rglob("*.py")),
]  # fmt: skip
FLAG = "GGML_NATIVE=OFF"
HOOK = f"-DCMAKE_PROJECT_llama_cpp_INCLUDE={ROOT / 'deploy' / 'avx512.cmake'}"
ADDED = [HOOK] if platform.machine() == "x86_64" else []  # AVX-512 as well

BACKEND = """
import os, zipfile
def build_wheel(folder, config_settings=None, metadata_directory=None):
    with open(os.environ["BUILDS"], "a") as log:
        log.write("built\\n")
    name = "llama_cpp_python-0.3.36-py3-none-any.whl"
    info = "llama_cpp_python-0.3.36.dist-info/"
    with zipfile.ZipFile(os.path.join(folder, name), "w") as wheel:
        wheel.writestr("llama_cpp.py", os.environ["CMAKE_ARGS"])
        wheel.writestr(info + "METADATA", "Metadata-Version: 2.1\\nName: llama-cpp-python\\nVersion: 0.3.36\\n")
        wheel.writestr(info + "WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(info + "RECORD", "")
    return name
"""


def compiles(line: str) -> bool:
    """Whether a pip line brings llama-cpp-python, by itself or by an extra of this project."""
    if "llama-cpp-python" in line:
        return True
    named = re.findall(r"""(?:quantize|["' ]\.)\[([a-z, ]+)\]""", line)
    return any(_brings(extra.strip()) for extras in named for extra in extras.split(","))


def _brings(extra: str) -> bool:
    for item in map(Requirement, EXTRAS.get(extra, ())):
        if item.name == "llama-cpp-python" or (item.name == "quantize" and any(map(_brings, item.extras))):
            return True
    return False


def unguarded(text: str) -> list[str]:
    """The pip lines of a file that compile llama.cpp for the processor at hand, or take it from pip's common cache.

    Right is a line with the flag itself, or one after a call of the script, which has put it there already.
    """
    found, ours = [], False
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        for command in line.split("&&"):
            ours = ours or bool(re.search(r"deploy/install-llama-cpp \S", command))
            if re.search(r"\bpip3? install\b", command) and compiles(command) and not (ours or FLAG in command):
                found.append(command.strip())
        if line.startswith("FROM "):  # a new stage of an image has nothing of the last
            ours = False
    return found


def test_no_line_compiles_llama_cpp_for_the_processor_at_hand() -> None:
    found = {str(path.relative_to(ROOT)): unguarded(path.read_text()) for path in INSTALLERS if path != SCRIPT}
    assert {path: lines for path, lines in found.items() if lines} == {}


def test_the_search_finds_what_it_looks_for() -> None:
    for bare in ("pip install '.[gguf]'", "x/pip install -c c.txt \\\n  llama-cpp-python", 'pip install -e ".[dev]"'):
        assert len(unguarded(bare)) == 1
    for right in (
        "pip install 'quantize-models[bnb]'",
        "pip install -e .",
        "CMAKE_ARGS=-DGGML_NATIVE=OFF pip install .[all]",
    ):
        assert unguarded(right) == []
    stages = ["FROM a AS b", "RUN deploy/install-llama-cpp python && pip install '.[all]'", "FROM a AS c"]
    assert unguarded("\n".join([*stages, "RUN pip install '.[gguf]'"])) == ["RUN pip install '.[gguf]'"]
    lines = [line for path in INSTALLERS for line in path.read_text().splitlines() if "pip install" in line]
    assert sum(map(compiles, lines)) >= 8, "README, Makefile, Dockerfile, workflows and documents have such lines"


def test_the_script_says_it(tmp_path: Path) -> None:
    """What it gives to pip, by a Python that only writes down its environment."""
    fake = tmp_path / "python"
    asked = 'case "$*" in *"cache dir"*) echo /cache; exit;; esac'
    fake.write_text(f'#!/bin/sh\n{asked}\nenv > "$NOTES"; echo "$@" >> "$NOTES"\n')
    fake.chmod(0o755)
    notes = tmp_path / "notes"
    environment = {**os.environ, "NOTES": str(notes), "CMAKE_ARGS": "-DGGML_CUDA=on", "SOURCE_DATE_EPOCH": "1"}
    subprocess.run([SCRIPT, fake, "-c", "constraints.txt"], env=environment, check=True, cwd=ROOT)
    *lines, command = notes.read_text().splitlines()
    given = dict(line.split("=", 1) for line in lines if "=" in line)
    assert shlex.split(given["CMAKE_ARGS"]) == ["-DGGML_NATIVE=OFF", "-DGGML_CUDA=on", *ADDED]
    assert re.fullmatch(r"/cache/llama\.cpp-\d+", given["PIP_CACHE_DIR"])
    assert "SOURCE_DATE_EPOCH" not in given
    assert command.split()[-3:] == ["-c", "constraints.txt", "llama-cpp-python"]


def key(**environment: str) -> str:
    command = [str(SCRIPT), "--key"]
    return subprocess.check_output(command, env={**os.environ, **environment}, text=True).strip()


def test_what_the_key_depends_on(tmp_path: Path) -> None:
    other = tmp_path / "c++"
    other.write_text("#!/bin/sh\necho 'c++ 99.0'\n")
    other.chmod(0o755)
    others = [{"CMAKE_ARGS": "-DGGML_CUDA=on"}, {"CXXFLAGS": "-march=native"}, {"CFLAGS": "-O1"}, {"CXX": str(other)}]
    assert len({key(), *(key(**environment) for environment in others)}) == 5
    assert key() == key()


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """A folder with a source archive of llama-cpp-python's name and version, whose module says how it was compiled."""
    source = tmp_path / "llama_cpp_python-0.3.36"
    source.mkdir()
    (source / "backend.py").write_text(BACKEND)
    system = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    (source / "pyproject.toml").write_text(f'{system}[project]\nname = "llama-cpp-python"\nversion = "0.3.36"\n')
    (source / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: llama-cpp-python\nVersion: 0.3.36\n")
    folder = tmp_path / "index"
    folder.mkdir()
    with tarfile.open(folder / f"{source.name}.tar.gz", "w:gz") as archive:
        archive.add(source, source.name)
    return folder


def test_a_wheel_in_pips_cache_that_was_compiled_otherwise_is_not_taken(tmp_path: Path, index: Path) -> None:
    site, builds = tmp_path / "site", tmp_path / "builds"
    builds.touch()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    environment |= {"PIP_CONFIG_FILE": os.devnull, "PIP_CACHE_DIR": str(tmp_path / "cache"), "BUILDS": str(builds)}
    options = ["--quiet", "--no-index", "--find-links", str(index), "--target", str(site)]

    def install(*command: str | Path, flags: str) -> tuple[list[str], int]:
        """What the installed module was compiled with, and how often a wheel was built so far."""
        shutil.rmtree(site, ignore_errors=True)
        subprocess.run([*command, *options], env={**environment, "CMAKE_ARGS": flags}, check=True)
        return shlex.split((site / "llama_cpp.py").read_text()), len(builds.read_text().splitlines())

    plain = (sys.executable, "-m", "pip", "install", "llama-cpp-python")
    ours = (SCRIPT, sys.executable)
    assert install(*plain, flags="-DGGML_NATIVE=ON") == (["-DGGML_NATIVE=ON"], 1)
    assert install(*plain, flags="-DGGML_NATIVE=OFF") == (["-DGGML_NATIVE=ON"], 1), "pip alone takes the wrong one"
    assert install(*ours, flags="") == (["-DGGML_NATIVE=OFF", *ADDED], 2)
    assert install(*ours, flags="") == (["-DGGML_NATIVE=OFF", *ADDED], 2), "from its own cache"
    assert install(*ours, flags="-DGGML_CUDA=on") == (["-DGGML_NATIVE=OFF", "-DGGML_CUDA=on", *ADDED], 3)
    wrong = next((tmp_path / "cache" / "wheels").rglob("*.whl"))
    shutil.copy(wrong, index)  # prebuilt, among the links
    assert install(*plain, flags="")[0] == ["-DGGML_NATIVE=ON"]
    assert install(*ours, flags="") == (["-DGGML_NATIVE=OFF", *ADDED], 3)


def test_make_sets_up_again_when_the_flags_change(tmp_path: Path) -> None:
    def planned(*given: str) -> str:
        command = ["make", "-n", "setup", f"VENV={tmp_path}", *given]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    first = planned()
    assert first.index("deploy/install-llama-cpp") < first.index('".[dev]"')
    (tmp_path / ".ready").touch()  # of a version that compiled for the processor at hand
    assert "install-llama-cpp" in planned()
    (tmp_path / f".ready-{key(CMAKE_ARGS='')}").touch()
    assert "install-llama-cpp" not in planned("CMAKE_ARGS=")
    assert "install-llama-cpp" in planned("CMAKE_ARGS=-DGGML_CUDA=on")


def test_the_image_has_what_the_script_needs() -> None:
    stages = (ROOT / "deploy" / "Dockerfile").read_text().split("\nFROM ")
    calling = [stage for stage in stages if "deploy/install-llama-cpp /opt" in stage]
    assert len(calling) == 2
    for stage in calling:
        assert "\nCOPY deploy/install-llama-cpp deploy/avx512.cmake ./deploy/\n" in stage


@pytest.mark.skipif(not ADDED or not shutil.which("cmake"), reason="for x86-64, with CMake")
def test_the_hook_compiles_ggmls_own_sources_with_avx512_and_without_amx(tmp_path: Path) -> None:
    """By CMake itself on a project with a target as ggml's; what it would compile is read from its own database."""
    ggml = tmp_path / "ggml"
    ggml.mkdir()
    (ggml / "cpu.c").write_text("int cpu(void) { return 1; }\n")
    (ggml / "CMakeLists.txt").write_text(
        "add_compile_definitions(FOR_THE_FOLDER)\nadd_library(ggml-cpu SHARED cpu.c)\n"
        "target_compile_options(ggml-cpu PRIVATE -mavx2)\ntarget_compile_definitions(ggml-cpu PRIVATE FOR_IT)\n"
        "set_target_properties(ggml-cpu PROPERTIES SOVERSION 7)\n"
    )
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.21)\nproject(llama_cpp C CXX)\nadd_subdirectory(ggml)\n"
    )

    def configured(name: str, *flags: str) -> dict[str, str]:
        """The command that compiles cpu.c, by the file that it writes."""
        build = tmp_path / name
        database = "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON"
        command = ["cmake", "-S", tmp_path, "-B", build, HOOK, database, "-DSKBUILD_PLATLIB_DIR=/platlib", *flags]
        subprocess.run(command, check=True, capture_output=True)
        found = json.loads((build / "compile_commands.json").read_text())
        return {item["command"].split("CMakeFiles/")[1].split(".dir")[0]: item["command"] for item in found}

    both = configured("both", "-DGGML_NATIVE=OFF")
    assert set(both) == {"ggml-cpu", "ggml-cpu-avx512"}
    assert "avx512" not in both["ggml-cpu"].replace("ggml-cpu-avx512", "")
    words = set(both["ggml-cpu-avx512"].split())
    assert words >= {"-DFOR_THE_FOLDER", "-DFOR_IT", "-mavx2", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"}
    assert not any("amx" in word or "native" in word for word in words)
    installs = (tmp_path / "both" / "cmake_install.cmake").read_text()
    assert "/platlib/llama_cpp/lib/glibc-hwcaps/x86-64-v4" in installs
    assert "libggml-cpu.so.7" in installs
    assert set(configured("native", "-DGGML_NATIVE=ON")) == {"ggml-cpu"}
