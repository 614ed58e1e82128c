"""Two compiled llama.cpp libraries beside each other: tokens a second of a prompt and of an answer, in one run.

    python benchmarks/instruction_sets.py LIBRARY LIBRARY MODEL.gguf [MODEL.gguf …] [--rounds 9]

LIBRARY is a virtual environment that has llama-cpp-python, or a folder with libllama.so; both of the same version, for
the same bindings are used. Each round opens each model in each library in a fresh process. One thread, and processor
time instead of the clock's, so that a busy machine does little to the ratio. The tokens are the same for both: 512 of a
prompt in one batch, then 64 one at a time. Prints JSON: least and median seconds turned into tokens a second, the ratio
of the second library to the first, and how far their logits are apart (KL in nats, the most of the 64).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

PROMPT, ANSWER = 512, 64
KINDS = {"prompt": PROMPT, "answer": ANSWER}


def folder_of(library: Path) -> Path:
    """Where libllama.so is: the folder itself, or that of the llama_cpp of a virtual environment."""
    for found in (library / "libllama.so", *library.glob("lib/python3*/site-packages/llama_cpp/lib/libllama.so")):
        if found.is_file():
            return found.parent
    sys.exit(f"{library}: neither a folder with libllama.so nor an environment with llama-cpp-python")


def load_backends(folder: Path) -> None:
    """A library that is built with GGML_BACKEND_DL finds its processor's code only when told where."""
    if list(folder.glob("libggml-cpu-*.so")):
        ctypes.CDLL(str(folder / "libggml.so")).ggml_backend_load_all_from_path(os.fsencode(folder))


def measure(model: Path, kept: Path) -> None:
    """In a process of its own: print the processor seconds of prompt and answer, and keep the answer's logits."""
    import numpy as np

    from quantize.runtimes.llama_cpp.model import BatchToken, ModelSettings, OpenModel

    load_backends(Path(os.environ["LLAMA_CPP_LIB_PATH"]))
    opened = OpenModel(model, ModelSettings(context=PROMPT + ANSWER, threads=1))
    tokens = [index * 7919 % opened.vocabulary for index in range(PROMPT + ANSWER)]
    opened.decode([BatchToken(tokens[0], 0, 0, True)])  # what is made on first use is not measured
    opened.forget()
    started = time.process_time()
    opened.decode([BatchToken(token, at, 0, at == PROMPT - 1) for at, token in enumerate(tokens[:PROMPT])])
    prompt = time.process_time() - started
    rows: list[Any] = []
    started = time.process_time()
    for at in range(PROMPT, PROMPT + ANSWER):
        opened.decode([BatchToken(tokens[at], at, 0, True)])
        rows.append(opened.logits(1)[0].copy())
    answer = time.process_time() - started
    np.save(kept, np.stack(rows))
    print(json.dumps({"prompt": prompt, "answer": answer}))


def run(folder: Path, model: Path, kept: Path) -> dict[str, float]:
    """Seconds of one fresh process with the library of a folder."""
    command = [sys.executable, __file__, "--one", str(model), str(kept)]
    done = subprocess.run(
        command, env={**os.environ, "LLAMA_CPP_LIB_PATH": str(folder)}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{folder} with {model.name} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    seconds: dict[str, float] = json.loads(done.stdout)
    return seconds


def divergence(first: Path, second: Path) -> float:
    """The most of KL(first || second) over the rows of two files of logits, nats."""
    import numpy as np

    logs = []
    for path in (first, second):
        logits = np.load(path).astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        logs.append(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))
    return float((np.exp(logs[0]) * (logs[0] - logs[1])).sum(axis=1).max())


def compare(folders: list[Path], model: Path, rounds: int) -> dict[str, Any]:
    """Rounds of both libraries by turns."""
    seconds: list[list[dict[str, float]]] = [[], []]
    with tempfile.TemporaryDirectory() as scratch:
        kept = [Path(scratch) / f"{index}.npy" for index in range(2)]
        for number in range(rounds):
            for index in (0, 1) if number % 2 == 0 else (1, 0):
                seconds[index].append(run(folders[index], model, kept[index]))
        result: dict[str, Any] = {"model": model.name, "rounds": rounds, "most_kl": divergence(*kept)}
    for kind, tokens in KINDS.items():
        taken = [[item[kind] for item in one] for one in seconds]
        result[kind] = {
            "best_tokens_per_second": [round(tokens / min(one), 1) for one in taken],
            "median_tokens_per_second": [round(tokens / median(one), 1) for one in taken],
            "ratio_of_best": round(min(taken[0]) / min(taken[1]), 3),
            "ratio_of_medians": round(median(taken[0]) / median(taken[1]), 3),
        }
    return result


def main() -> None:
    """Compare, or be one of the processes that are compared."""
    if sys.argv[1:2] == ["--one"]:
        measure(Path(sys.argv[2]), Path(sys.argv[3]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("libraries", nargs=2, type=Path, metavar="LIBRARY")
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL")
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    folders = [folder_of(path) for path in given.libraries]
    for model in given.models:
        print(json.dumps(compare(folders, model, given.rounds), indent=2), flush=True)


if __name__ == "__main__":
    main()
