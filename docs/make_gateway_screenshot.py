"""Writes docs/images/gateway.png, the gateway's page in a chat: python docs/make_gateway_screenshot.py URL.

URL: a gateway that runs, such as http://127.0.0.1:8000. The model's own answer is what is in the picture.
"""

from __future__ import annotations

import base64
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.browser import Browser, start  # noqa: E402

SIZE = {"width": 1000, "height": 720, "deviceScaleFactor": 1, "mobile": False}
IMAGE = Path(__file__).parent / "images" / "gateway.png"
QUESTION = "What is the capital of France?"


def main() -> None:
    """Ask, wait for the whole answer, take the picture."""
    with tempfile.TemporaryDirectory() as folder, start(Path(folder)) as browser:
        browser.command("Emulation.setDeviceMetricsOverride", **SIZE)
        browser.open(sys.argv[1])
        wait(browser, "document.querySelector('#models tr')")
        browser.run("document.querySelector('#temperature').value = 0")
        browser.run(f"document.querySelector('#text').value = '{QUESTION}'")
        browser.run("document.querySelector('#form').requestSubmit()")
        wait(browser, "document.querySelector('#note').textContent")
        time.sleep(2.5)  # the page asks for memory and requests every two seconds
        IMAGE.parent.mkdir(exist_ok=True)
        IMAGE.write_bytes(base64.b64decode(browser.command("Page.captureScreenshot")["data"]))
    print(f"{IMAGE}: {IMAGE.stat().st_size:,} bytes")


def wait(browser: Browser, script: str) -> None:
    """Until JavaScript says yes; gives up after a minute."""
    for _ in range(600):
        if browser.run(f"return Boolean({script})"):
            return
        time.sleep(0.1)
    raise SystemExit(f"the page never came to: {script}")


if __name__ == "__main__":
    main()
