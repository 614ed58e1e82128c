"""A headless Chromium for tests of pages: what it says on its console, and what it asks the network for."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from selenium import webdriver

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


class Browser:
    """One window. Errors and requests are those since the last call of `open`."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, url: str) -> None:
        """Load a page, and forget what was logged before."""
        for kind in ("browser", "performance"):
            self.driver.get_log(kind)  # type: ignore[no-untyped-call]
        self.driver.get(url)

    def console(self) -> list[str]:
        """What the console says: errors, refused requests, warnings."""
        return [entry["message"] for entry in self.driver.get_log("browser")]  # type: ignore[no-untyped-call]

    def requests(self) -> list[str]:
        """URLs that the page asked for, its own first; not data: URLs, nor those of the browser's start page."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]  # type: ignore[no-untyped-call]
        sent = [item["params"] for item in events if item["method"] == "Network.requestWillBeSent"]
        ours = [item["request"]["url"] for item in sent if not item["documentURL"].startswith("chrome")]
        return [url for url in ours if not url.startswith(("data:", "chrome"))]

    def media(self, *, scheme: str = "light", kind: str = "screen") -> None:
        """Show the page in light or dark, on a screen or on paper."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.command("Emulation.setEmulatedMedia", media=kind, features=features)

    def command(self, name: str, **arguments: Any) -> Any:
        """A command of the DevTools protocol."""
        return self.driver.execute_cdp_cmd(name, arguments)

    def run(self, script: str) -> Any:
        """The value that JavaScript returns."""
        return self.driver.execute_script(script)  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def start(profile: Path) -> Iterator[Browser]:
    """Start a browser with a profile folder of its own. Raises FileNotFoundError where none is installed."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    binary = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    driver_path = shutil.which("chromedriver")
    if binary is None or driver_path is None:
        raise FileNotFoundError("no Chromium with its driver is installed")
    driver = webdriver.Chrome(_options(binary, profile), Service(driver_path))
    try:
        yield Browser(driver)
    finally:
        driver.quit()


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Chromium, started once; skipped only where no browser is installed."""
    try:
        with start(tmp_path_factory.mktemp("browser")) as started:
            yield started
    except FileNotFoundError as exc:
        pytest.skip(str(exc))


def _options(binary: str, profile: Path) -> webdriver.ChromeOptions:
    from selenium.webdriver import ChromeOptions

    options = ChromeOptions()
    options.binary_location = binary
    for flag in (*FLAGS, f"--user-data-dir={profile}", "--window-size=1240,900"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return options
