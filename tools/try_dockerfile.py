"""Runs the Dockerfile's RUN lines where there is no Docker: each stage in a folder with a Debian of its own.

    python -m tools.try_dockerfile FOLDER [STAGE ...] [--bring PATH ...]

As root, on a Debian with debootstrap. FOLDER/base is made once; each stage is a copy of it, FOLDER/STAGE, into which
COPY puts what it puts into an image. --bring: a file or folder of this machine that has to be at the same path there,
such as pip's settings; variables of pip and CMake are there too (CMAKE_ARGS="-DCMAKE_C_FLAGS_RELEASE=-O0
-DCMAKE_CXX_FLAGS_RELEASE=-O0" compiles in much less time). In place of Python's and NVIDIA's images there is Debian 12
with Python 3.11, so it holds that the packages are there, that the users can be made and own what they must, that pip
finds a set of versions, that llama.cpp compiles, and that the entry point starts; what is done in another way is said.
Not held: that Ubuntu's packages have the same names, that CUDA's compiler takes the code, and what NVIDIA's image
brings along.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCKERFILE = ROOT / "deploy" / "Dockerfile"
MIRROR = "http://deb.debian.org/debian"
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PYTHON_IMAGE = (
    "apt-get update && apt-get install -y --no-install-recommends python3 python3-venv && ln -s python3 /usr/bin/python"
)
CUDA_FLAGS = re.compile(r"-DGGML_CUDA=on -DCMAKE_CUDA_ARCHITECTURES=[^\"\s]+")
BROUGHT = ("PIP_", "CMAKE_", "SSL_CERT", "http_proxy", "https_proxy", "DEBIAN_FRONTEND")  # variables of roots, too


@dataclass(frozen=True)
class Stage:
    """A stage: its name, the image that it starts from, its instructions with continued lines joined."""

    name: str
    base: str
    lines: tuple[str, ...]


def stages(text: str) -> Iterator[Stage]:
    """Those of a Dockerfile, in order."""
    joined = re.sub(r"(?m)^#.*\n", "", text).replace("\\\n", " ")
    for part in re.split(r"(?m)^FROM ", joined)[1:]:
        first, *lines = part.splitlines()
        base, _, name = first.split()
        yield Stage(name, base, tuple(line for line in lines if line.strip()))


def stood_in(line: str) -> tuple[str, tuple[str, ...]]:
    """A RUN line as it can run without CUDA, and what is otherwise than in the image."""
    told = []
    line, changed = CUDA_FLAGS.subn("-DGGML_CUDA=off ${CMAKE_ARGS:-}", line)
    if changed:
        told.append("llama.cpp is compiled without CUDA")
    *commands, last = re.split(r"\s&&\s", line)
    if "torch.version.cuda" in last:
        told.append(f"not tried: {' '.join(last.split())}")
    else:
        commands.append(last)
    return " && ".join(commands), tuple(told)


class Roots:
    """Scratch roots that stand in for images."""

    def __init__(self, folder: Path, bring: Sequence[Path] = ()) -> None:
        self._folder, self._bring = folder, bring

    def follow(self, stage: Stage) -> Iterator[tuple[str, float, tuple[str, ...]]]:
        """A stage: (command, seconds, what is otherwise) of each that runs. Raises CalledProcessError."""
        root, there, user, environment = self._begin(stage), "/", "0", {"PATH": SYSTEM_PATH}
        for line in stage.lines:
            word, _, rest = line.partition(" ")
            if word == "WORKDIR":
                there = rest.strip()
                within(root, there).mkdir(parents=True, exist_ok=True)
            elif word == "ENV":
                found = dict(item.split("=", 1) for item in shlex.split(rest))
                environment |= {name: value.replace("$PATH", environment["PATH"]) for name, value in found.items()}
            elif word == "COPY":
                self._copy(shlex.split(rest), within(root, there), root)
            elif word == "USER":
                user = rest.strip()
            elif word in {"RUN", "ENTRYPOINT"}:
                command, otherwise = stood_in(rest if word == "RUN" else f"{shlex.join(json.loads(rest))} --help")
                started = time.perf_counter()
                inside(root, command, environment, there, user)
                yield " ".join(command.split()), time.perf_counter() - started, otherwise

    def _base(self) -> Path:
        """A small Debian; made once."""
        made = self._folder / "base"
        if not (made / "done").exists():
            words = ["debootstrap", "--variant=minbase", "--include=ca-certificates", "bookworm", str(made), MIRROR]
            subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
            for path in (Path("/etc/resolv.conf"), *self._bring):
                copy(path, within(made, str(path)))
            (made / "done").touch()
        return made

    def _begin(self, stage: Stage) -> Path:
        """The root of a stage as its image has it before the first instruction."""
        root = self._folder / stage.name
        if root.exists():
            shutil.rmtree(root)
        copy(self._base(), root)
        if stage.base.startswith("python:"):
            inside(root, PYTHON_IMAGE, {"PATH": SYSTEM_PATH})
        return root

    def _copy(self, words: list[str], there: Path, root: Path) -> None:
        """COPY: files into a folder, or a folder as another; from another stage by absolute paths."""
        *sources, target = words
        if sources[0].startswith("--from="):
            other = self._folder / sources[0].removeprefix("--from=")
            copy(within(other, sources[1]), within(root, target))
            return
        for source in sources:
            name = target if (ROOT / source).is_dir() else f"{target}/{Path(source).name}"
            copy(ROOT / source, there / name)


def within(root: Path, path: str) -> Path:
    """An absolute path of the image, from here."""
    return root / path.lstrip("/")


def copy(source: Path, target: Path) -> None:
    """With owners and modes; links in it stay links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["cp", "-aT", source.resolve(), target], check=True)


def inside(root: Path, command: str, environment: Mapping[str, str], there: str = "/", user: str = "0") -> None:
    """A command in a root, as a shell of the image would run it. Raises CalledProcessError."""
    given = {name: value for name, value in os.environ.items() if name.startswith(BROUGHT)} | dict(environment)
    script = f"cd {shlex.quote(there)} && {command}"
    subprocess.run(["chroot", f"--userspec={user}:{user}", root, "/bin/sh", "-ec", script], check=True, env=given,
                   stdout=subprocess.DEVNULL)  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("stages", nargs="*", help="all of them, if none is named; one that is copied from comes first")
    parser.add_argument("--bring", type=Path, action="append", default=[])
    asked = parser.parse_args()
    roots, found = Roots(asked.folder.resolve(), asked.bring), stages(DOCKERFILE.read_text(encoding="utf-8"))
    for stage in found:
        if asked.stages and stage.name not in asked.stages:
            continue
        try:
            for command, seconds, otherwise in roots.follow(stage):
                print(f"{stage.name}: {seconds:.0f} s: {command}", *otherwise, sep="\n    ", flush=True)
        except subprocess.CalledProcessError as exc:
            sys.exit(f"{stage.name}: exit {exc.returncode}: {exc.cmd[-1]}")


if __name__ == "__main__":
    main()
