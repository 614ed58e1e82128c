"""Writes every figure of the demo into the documents, from one run of `make demo`, so that no two can disagree; and the
tables of metrics and limits, from the code.

    make demo
    python docs/make_results.py --demo artifacts --images
    python benchmarks/formats.py --work WORK
    python docs/make_results.py --dithered WORK/store

--demo and --dithered read a store into docs/results.json; then the parts of README.md and docs/*.md between their
markers are written from that file, which happens without options too. --images takes the pictures in docs/images with
the demo's artifacts: the report's page, and a chat with the gateway. A test holds the documents against the file.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT))

from benchmarks.results import (  # noqa: E402
    demo_block,
    formats_table,
    gates_table,
    limits_table,
    metrics_table,
    read,
    report_block,
)
from quantize.store.store import Store  # noqa: E402

RESULTS = DOCS / "results.json"
NAMES = {"demo": "smollm2-135m", "dithered": "dithered"}
SERVED, PORT, READY_SECONDS = "smollm2-135m/q8_0", 8765, 120


def blocks(results: dict[str, Any]) -> dict[tuple[str, str], str]:
    """The text of each part of a document that has figures or limits: (file, name of the part) -> Markdown."""
    return {
        ("README.md", "demo"): demo_block(results["demo"]),
        ("README.md", "formats"): formats_table(results["dithered"], short=True),
        ("docs/calibration.md", "formats"): formats_table(results["dithered"]),
        ("docs/report.md", "decision"): report_block(results["demo"]),
        ("docs/report.md", "gates"): gates_table(),
        ("docs/gates.md", "metrics"): metrics_table(),
        ("docs/gates.md", "limits"): limits_table(),
    }


def between(text: str, name: str, block: str) -> str:
    """The document with another text between the markers of the part `name`; exits if it has no such part."""
    start, end = f"<!-- {name}: written by docs/make_results.py -->", f"<!-- end of {name} -->"
    part = re.compile(f"{re.escape(start)}\n.*?{re.escape(end)}", re.DOTALL)
    changed, count = part.subn(lambda _: f"{start}\n\n{block}\n\n{end}", text)
    if count != 1:
        raise SystemExit(f"{start} … {end} must stand in the document once, and stands there {count} times")
    return changed


def write(results: dict[str, Any]) -> None:
    """Put the figures into the documents."""
    for (file, name), block in blocks(results).items():
        path = ROOT / file
        path.write_text(between(path.read_text(encoding="utf-8"), name, block), encoding="utf-8")


def take_pictures(store: Path) -> None:
    """Both images, of the demo's artifacts in that store."""
    python, environment = sys.executable, os.environ | {"QUANTIZE_STORE": str(store.resolve())}
    subprocess.run([python, str(DOCS / "make_screenshot.py"), NAMES["demo"], "--store", str(store)], check=True)
    command = [python, "-m", "quantize", "serve", SERVED, "--port", str(PORT)]
    gateway, url = subprocess.Popen(command, env=environment, cwd=ROOT), f"http://127.0.0.1:{PORT}"
    try:
        _wait_until_ready(gateway, f"{url}/ready")
        subprocess.run([python, str(DOCS / "make_gateway_screenshot.py"), url], check=True)
    finally:
        gateway.send_signal(signal.SIGINT)
        gateway.wait()


def _wait_until_ready(gateway: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while gateway.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url):
                return
        except (urllib.error.URLError, ConnectionError):  # 503 until the model answers
            time.sleep(0.5)
    raise SystemExit(f"{SERVED} was not ready at {url} within {READY_SECONDS} s")


def main() -> None:
    """Read what is asked for, write the documents, take the pictures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--demo", type=Path, metavar="STORE", help="store after `make demo`")
    parser.add_argument("--dithered", type=Path, metavar="STORE", help="store of benchmarks/formats.py --work")
    parser.add_argument("--images", action="store_true", help="take the pictures too; needs --demo and Chromium")
    arguments = parser.parse_args()
    if arguments.images and arguments.demo is None:
        parser.error("--images needs --demo STORE")
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    for part, name in NAMES.items():
        if (store := getattr(arguments, part)) is not None:
            results[part] = read(Store(store), name)
    RESULTS.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    write(results)
    if arguments.images:
        take_pictures(arguments.demo)


if __name__ == "__main__":
    main()
