"""What calibration text costs or saves on each kind of text: the dithered demo model, calibrated in several ways.

    python benchmarks/calibration_mixes.py [--calibration NAME …] [--effort full|quick] [--work FOLDER]

Builds GPTQ, AWQ (as published and with error feedback), and Q4_K_M (with an importance matrix and solved), of the
dithered demo model (benchmarks/models.py) once with each calibration text, by name or as a file (`python-docs`, then
`starter`), and measures all on the held-out texts that come along: prose, code, Vietnamese, and what the source itself
answers. None of them shares a run of ten words with any of the calibration texts. Prints a Markdown table: the mean KL
divergence to the source on each kind, with 95 % intervals where there are windows enough, and for each variant how much
the worst kind changes from the first calibration to each other. With --work everything is kept there, and a second run
builds nothing.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

VARIANTS = [
    {"format": "gptq", "bits": 4, "group_size": 64},
    {"format": "awq", "bits": 4, "group_size": 64},
    {"format": "awq", "bits": 4, "group_size": 64, "rounding": "gptq"},
    {"format": "gguf", "type": "Q4_K_M", "imatrix": True},
    {"format": "gguf", "type": "Q4_K_M", "gptq": True},
]

Kinds = dict[str, tuple[float, float | None]]
"""Kind of text -> mean KL in nats, and half of the width of its interval."""


def build(work: Path, calibration: str, effort: str, environment: dict[str, str]) -> str:
    """Build and measure all variants with one text; the name under which the store has them."""
    import yaml

    from benchmarks import formats

    name = f"dithered-{Path(calibration).stem}"
    recipe = {
        "name": name,
        "source": {"model": str(formats.dithered_demo(work)), "license": "apache-2.0"},
        "calibration": calibration if "/" not in calibration else str(Path(calibration).resolve()),
        "variants": VARIANTS,
        "evaluation": {"text": "mixed", "effort": effort, "golden": []},
        "gates": formats.REFUSE_NOTHING,
    }
    path = work / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    command = [sys.executable, "-m", "quantize", "build", str(path)]
    if subprocess.run(command, env=environment, cwd=ROOT, stdout=sys.stderr, check=False).returncode:
        raise SystemExit(f"the build of {path} failed")
    return name


def read(store: Path, name: str) -> dict[str, Kinds]:
    """Variant -> its divergences by kind of text."""
    from quantize.evaluate.record import read_record
    from quantize.store.store import Store

    found: dict[str, Kinds] = {}
    for artifact in Store(store).current_artifacts(name):
        record = read_record(artifact.measurements())
        if record is None or record.quality is None:
            raise SystemExit(f"{artifact.ref} was not measured")
        found[artifact.manifest.variant] = {
            item.kind: (item.mean_kl, item.mean_kl_interval.half_width if item.mean_kl_interval else None)
            for item in record.quality.kinds
        }
    return found


def table(measured: Sequence[tuple[str, dict[str, Kinds]]]) -> str:
    """Markdown: a row a variant and calibration, a column a kind; the worst kind is held to the first calibration's."""
    first = measured[0][1]
    kinds = list(next(iter(first.values())))
    lines = [
        f"| variant | calibration | {' | '.join(kinds)} | worst kind | change |",
        f"|---|---|{'---:|' * (len(kinds) + 2)}",
    ]
    for variant in first:
        before = max(value for value, _ in first[variant].values())
        for calibration, found in measured:
            cells = [_cell(*found[variant][kind]) for kind in kinds]
            worst = max(value for value, _ in found[variant].values())
            change = f"{worst / before - 1:+.0%}" if found is not first else ""
            lines.append(f"| `{variant}` | {calibration} | {' | '.join(cells)} | {worst:.4f} | {change} |")
    return "\n".join(lines)


def _cell(value: float, around: float | None) -> str:
    return f"{value:.4f}" if around is None else f"{value:.4f} ± {around:.4f}"


def main() -> None:
    """Build, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--calibration", action="append", help="name or .yaml file; others are held to the first")
    parser.add_argument("--effort", default="full", help="how much text: full, or quick for about a ninth of it")
    parser.add_argument("--work", type=Path, help="folder for checkpoints, cache and store, kept")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = (arguments.work or Path(scratch)).resolve()
        environment = os.environ | {"QUANTIZE_STORE": str(work / "store"), "QUANTIZE_CACHE": str(work / "cache")}
        texts = arguments.calibration or ["python-docs", "starter"]
        names = [build(work, text, arguments.effort, environment) for text in texts]
        print(table([(text, read(work / "store", name)) for text, name in zip(texts, names, strict=True)]))


if __name__ == "__main__":
    main()
