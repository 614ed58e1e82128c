"""GGUF of the same bytes, made in several ways: llama.cpp with an importance matrix beside error feedback, in one run.

    python benchmarks/gguf_quality.py [--types Q4_K_M Q4_0 …] [--ways imatrix solved guided fitted]
                                      [--calibration NAME] [--effort full|quick] [--checkpoint FOLDER] [--work FOLDER]

Builds each type of the dithered demo model (benchmarks/models.py), or of another checkpoint, with `imatrix: true`,
which is llama.cpp's own rounding, and with `gptq: true`, from one calibration pass; `guided` also from another one
whose statistics are guided, and `fitted` from that one with types chosen for the bytes of the type's file. All are
measured in llama.cpp against its 16-bit file on the held-out texts that come along, and on those of python-docs, if it
is calibrated on them. Prints a Markdown table: bits a weight, the mean KL divergence on each kind of text with 95 %
intervals where there are windows enough and its ratio to llama.cpp's, what solving left of llama.cpp's loss on the
calibration text (the median of the matrices), and seconds. The rows of the demo model are no multiples of 256, so most
of its matrices are in blocks of 32. With --work everything is kept there, and a second run builds nothing.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

TYPES = ("Q4_K_M", "Q4_0")
DOCS = "python-docs"
DEMO_MIX = {
    "mix": [
        {"dataset": str(ROOT / "calibration" / f"{name}.txt"), "samples": samples, "minimum_tokens": 32}
        for name, samples in (("prose", 46), ("code", 23), ("vietnamese", 18))
    ],
    "sequence_length": 512,
}
WAYS = {
    "imatrix": "llama.cpp, importance matrix", "solved": "solved", "guided": "solved, guided",
    "fitted": "types chosen, solved, guided",
}  # fmt: skip
Row = dict[str, Any]


def build(
    work: Path, checkpoint: Path, calibration: str, variants: Sequence[Row], effort: str, guided: bool, threads: int
) -> str:
    """Build and measure variants from one calibration pass; the name that the store has them by."""
    import yaml

    from benchmarks.formats import REFUSE_NOTHING

    name = f"gguf-quality-{calibration}{'-guided' if guided else ''}"
    known = {"demo": DEMO_MIX, DOCS: {"dataset": DOCS, "samples": 32, "sequence_length": 512}}
    named = ROOT / "calibration" / f"{calibration}.yaml"
    text = known[calibration] if calibration in known else yaml.safe_load(named.read_text(encoding="utf-8"))
    kinds = {name: name for name in ("prose", "code", "vietnamese")} | ({"docs": DOCS} if calibration == DOCS else {})
    recipe = {
        "name": name,
        "source": {"model": str(checkpoint), "license": "apache-2.0"},
        "calibration": text | ({"guided": True} if guided else {}),
        "variants": [{"format": "gguf", **item} for item in variants],
        "evaluation": {"text": kinds, "effort": effort, "golden": []},
        "gates": REFUSE_NOTHING,
    }
    path = work / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    environment = os.environ | {"QUANTIZE_STORE": str(work / "store"), "QUANTIZE_CACHE": str(work / "cache")}
    command = [sys.executable, "-m", "quantize", "build", str(path), "--threads", str(threads)]
    if subprocess.run(command, env=environment, cwd=ROOT, stdout=sys.stderr, check=False).returncode:
        raise SystemExit(f"the build of {path} failed")
    return name


def variants_of(types: Sequence[str], ways: Sequence[str], sizes: dict[str, int]) -> list[Row]:
    """What is built of each type. sizes: of the files that fitted ones have to fit, by type."""
    found: list[Row] = []
    for kind in types:
        found += [{"type": kind, "imatrix": True}] if "imatrix" in ways else []
        found += [{"type": kind, "gptq": True}] if "solved" in ways or "guided" in ways else []
        found += [{"fit": {"size": sizes[kind]}, "gptq": True, "name": f"fitted-{kind}"}] if "fitted" in ways else []
    return found


def file_sizes(store: Path, name: str) -> dict[str, int]:
    """Type -> bytes of its model file."""
    from quantize.store.store import Store

    found = {}
    for artifact in Store(store).current_artifacts(name):
        files = [
            item for item in artifact.manifest.files if item.path.endswith(".gguf") and ".imatrix.gguf" not in item.path
        ]
        found[artifact.manifest.options["type"]] = files[0].size_bytes
    return found


def way_of(options: Row, name: str) -> str:
    """Which of WAYS made an artifact."""
    if "fit" in options:
        return "fitted"
    return "imatrix" if not options.get("gptq") else "guided" if name.endswith("-guided") else "solved"


def read(store: Path, name: str) -> list[Row]:
    """A row of figures for each artifact."""
    from quantize.evaluate.record import read_record
    from quantize.store.store import Store

    rows = []
    for artifact in Store(store).current_artifacts(name):
        measured = artifact.measurements()
        record = read_record(measured)
        if record is None or record.quality is None:
            raise SystemExit(f"{artifact.ref} was not measured")
        layers = [item for item in measured.get("layers", {}).values() if item["nearest_loss"]]
        rows.append(
            {
                "type": artifact.manifest.options.get("type") or artifact.manifest.variant.removeprefix("fitted-"),
                "way": way_of(artifact.manifest.options, name),
                "bits": artifact.manifest.bits_per_weight,
                "weights_bytes": artifact.manifest.weights_bytes,
                "kinds": {
                    item.kind: (item.mean_kl, item.mean_kl_interval.half_width if item.mean_kl_interval else None)
                    for item in record.quality.kinds
                },
                "left": statistics.median(item["loss"] / item["nearest_loss"] for item in layers) if layers else None,
                "seconds": measured.get("solve_seconds"),
            }
        )
    return rows


def table(rows: Sequence[Row]) -> str:
    """Markdown: a row an artifact, a column a kind of text; ratios are to llama.cpp's of the same type."""
    kinds = list(rows[0]["kinds"])
    lines = [
        f"| type | made by | bits | {' | '.join(f'KL, {kind}' for kind in kinds)} | loss left | seconds |",
        f"|---|---|---:|{'---:|' * len(kinds)}---:|---:|",
    ]
    for row in rows:
        first = next(item for item in rows if item["type"] == row["type"])
        if first["weights_bytes"] < row["weights_bytes"] or (row["way"] != "fitted" and row["bits"] != first["bits"]):
            raise SystemExit(f"{row['type']}: not the same number of bytes")
        cells = [_cell(*row["kinds"][kind], first["kinds"][kind][0], row is first) for kind in kinds]
        left = "" if row["left"] is None else f"{row['left']:.3f}"
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.0f}"
        lines.append(
            f"| {row['type']} | {WAYS[row['way']]} | {row['bits']:.2f} | {' | '.join(cells)} | {left} | {seconds} |"
        )
    return "\n".join(lines)


def _cell(value: float, around: float | None, first: float, is_first: bool) -> str:
    text = f"{value:.4f}" if around is None else f"{value:.4f} ± {around:.4f}"
    return text if is_first else f"{text} ({value / first:.2f})"


def main() -> None:
    """Build, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--types", nargs="+", default=list(TYPES), help="llama.cpp's file types")
    parser.add_argument("--calibration", default="demo", help=f"`demo` (the demo recipe's), {DOCS}, or a mix by name")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=["imatrix", "solved"], help="how to make them")
    parser.add_argument("--effort", default="full", help="how much text: full, or quick for about a ninth of it")
    parser.add_argument("--checkpoint", type=Path, help="another one than the dithered demo model")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--work", type=Path, help="folder for checkpoints, cache and store, kept")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = (args.work or Path(scratch)).resolve()
        work.mkdir(parents=True, exist_ok=True)

        from benchmarks.formats import dithered_demo

        checkpoint = args.checkpoint.resolve() if args.checkpoint else dithered_demo(work)
        rows: list[Row] = []
        sizes: dict[str, int] = {}
        for guided in (False, True):
            ways = [way for way in ("imatrix", *args.ways) if (way in ("guided", "fitted")) == guided]
            if ways:
                variants = variants_of(args.types, ways, sizes)
                name = build(work, checkpoint, args.calibration, variants, args.effort, guided, args.threads)
                sizes = sizes or file_sizes(work / "store", name)
                rows += read(work / "store", name)
        order = {kind: place for place, kind in enumerate(args.types)}
        print(table(sorted(rows, key=lambda row: (order[row["type"]], list(WAYS).index(row["way"])))))


if __name__ == "__main__":
    main()
