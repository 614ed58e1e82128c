"""The page and /docs in headless Chromium with the network outside closed: no error, and a chat that streams."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.browser import Browser
from tests.serve.conftest import Running, fakes, gateways, keys_of

KEY = "page-key-0123456789ab"
OUTSIDE = ["https://*", "wss://*", "ftp://*"]


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    keys = keys_of(tmp_path_factory.mktemp("keys"), page=KEY)
    with gateways() as run:
        yield run(fakes(delay=0.02), keys=keys)


@pytest.fixture
def page(guarded: Running, browser: Browser) -> Browser:
    """The page, open, with nothing but the gateway to be reached."""
    browser.command("Network.enable")
    browser.command("Network.setBlockedURLs", urls=OUTSIDE)
    browser.open(guarded.url)
    return browser


def wait(gateway: Running, browser: Browser, script: str) -> None:
    gateway.wait(lambda: bool(browser.run(f"return {script}")))


def write(browser: Browser, text: str, key: str = KEY) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    field = browser.driver.find_element(By.ID, "key")
    field.clear()
    field.send_keys(key)
    browser.driver.find_element(By.ID, "text").send_keys(text, Keys.ENTER)


def test_the_page_shows_the_model_memory_and_live_requests(page: Browser, guarded: Running) -> None:
    wait(guarded, page, "document.querySelector('#models tr')")
    text = page.run("return document.body.innerText")
    assert "fake" in text
    assert re.search(r"\d+ MB", text)
    assert "RAM:" in text
    assert page.run("return document.querySelector('#live').textContent") == "0"
    assert page.console() == []
    assert all(url.startswith(guarded.url) for url in page.requests())


def test_a_chat_streams_into_the_page(page: Browser, guarded: Running) -> None:
    wait(guarded, page, "document.querySelector('#models tr')")
    page.run(
        "window.seen = new Set(); new MutationObserver(() => window.seen.add(document.querySelector('.assistant')"
        "?.textContent)).observe(document.querySelector('#messages'), {childList: true, subtree: true})"
    )
    write(page, "one two three <b>four</b>")
    wait(guarded, page, "document.querySelector('#note').textContent.includes('4 tokens')")
    answer = page.run("return document.querySelector('.assistant').innerText")
    assert answer.strip() == "one two three <b>four</b>"  # what a model writes is text, never HTML
    assert page.run("return window.seen.size") >= 4
    assert page.console() == []


def test_a_second_message_takes_the_first_along(page: Browser, guarded: Running) -> None:
    wait(guarded, page, "document.querySelector('#models tr')")
    write(page, "one")
    wait(guarded, page, "document.querySelector('#note').textContent.includes('1 tokens')")
    write(page, "two")
    wait(guarded, page, "document.querySelectorAll('.assistant')[1]?.textContent.trim() === 'one one two'")


def test_stop_ends_the_generation(page: Browser, guarded: Running) -> None:
    wait(guarded, page, "document.querySelector('#models tr')")
    write(page, "forever!")
    wait(guarded, page, "document.querySelector('.assistant')?.textContent.length > 20")
    page.run("document.querySelector('#stop').click()")
    guarded.wait(lambda: guarded.ask("GET", "/health").json["active_requests"] == 0)
    wait(guarded, page, "!document.querySelector('#send').disabled")
    assert page.console() == []


def test_a_wrong_key_is_told_in_the_page(page: Browser, guarded: Running) -> None:
    wait(guarded, page, "document.querySelector('#models tr')")
    write(page, "hi", key="wrong")
    wait(guarded, page, "document.querySelector('.error')?.textContent.includes('API key')")
    assert all("401" in line for line in page.console())


def test_the_documentation_is_whole_without_the_network(page: Browser, guarded: Running) -> None:
    page.open(f"{guarded.url}/docs")
    wait(guarded, page, "document.querySelectorAll('.opblock').length === 10")
    page.run("document.querySelector('.opblock-post button').click()")
    wait(guarded, page, "document.querySelector('.opblock-body')")
    assert page.run("return document.querySelector('.info .title').innerText").startswith("quantize gateway")
    assert page.console() == []
    assert all(url.startswith(guarded.url) for url in page.requests())
