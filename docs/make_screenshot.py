"""Writes docs/images/report.png, the top of a recipe's page: python docs/make_screenshot.py [NAME] [--store DIR]."""

from __future__ import annotations

import argparse
import base64
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from quantize.report.render import HTML, write_report  # noqa: E402
from quantize.store.store import Store, default_store_root  # noqa: E402
from tests.browser import Browser, start  # noqa: E402

WIDTH = 1240
MAX_HEIGHT = 2400
IMAGE = Path(__file__).parent / "images" / "report.png"


def main() -> None:
    """Write the page into a temporary folder and take its picture, down to the end of the first section."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", nargs="?", default="smollm2-135m")
    parser.add_argument("--store", type=Path, default=default_store_root())
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_report(Store(arguments.store), arguments.name, Path(folder))
        with start(Path(folder) / "profile") as browser:
            browser.open((Path(folder) / HTML).as_uri())
            IMAGE.parent.mkdir(exist_ok=True)
            IMAGE.write_bytes(picture(browser))
    print(f"{IMAGE}: {IMAGE.stat().st_size:,} bytes")


def picture(browser: Browser) -> bytes:
    """A PNG of the page's top."""
    size = {"width": WIDTH, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.command("Emulation.setDeviceMetricsOverride", **size)
    end = browser.run("return document.querySelector('#artifacts').getBoundingClientRect().bottom + 20")
    clip = {"x": 0, "y": 0, "width": WIDTH, "height": min(end, MAX_HEIGHT), "scale": 1}
    return base64.b64decode(browser.command("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)["data"])


if __name__ == "__main__":
    main()
