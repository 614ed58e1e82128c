"""What a request meets first: HEAD, other origins, a proxy's prefix, slashes; and where the gateway listens."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import openai
import pytest

from quantize.errors import UsageError
from quantize.serve.address import Address, bind, is_loopback
from quantize.serve.front import Front
from tests.browser import Browser
from tests.conftest import Run
from tests.serve.conftest import Running, fakes, gateways, keys_of

KEY = "front-key-0123456789"
SITE = "https://chat.example.com"


@pytest.fixture(scope="module")
def proxied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Behind a proxy that has /llm/v2 for it, with keys, open to one site."""
    keys = keys_of(tmp_path_factory.mktemp("keys"), one=KEY)
    with gateways() as run:
        yield run(fakes(), keys=keys, front=Front.of("/llm/v2/", (SITE,)))


@pytest.mark.parametrize("path", ["/", "/health", "/ready", "/metrics", "/docs", "/openapi.json", "/v1/models"])
def test_head_is_get_without_a_body(gateway: Running, path: str) -> None:
    whole, head = gateway.ask("GET", path), gateway.ask("HEAD", path)
    assert (head.status, head.body) == (200, b"")
    assert head.headers["content-type"] == whole.headers["content-type"]
    assert gateway.ask("HEAD", "/v1/chat/completions").status == 405
    assert gateway.ask("HEAD", "/nowhere").status == 404


@pytest.mark.parametrize("path", ["/docs/", "/health/", "/v1/models/", "/v1/models/fake/", "/assets/page/page.js"])
def test_a_slash_at_the_end_redirects_nobody(gateway: Running, path: str) -> None:
    assert gateway.ask("GET", path).status == 200


@pytest.mark.parametrize("path", ["/assets/page", "/assets/swagger/", "//health", "/v1", "/docs/x"])
def test_what_is_not_there_redirects_nobody_either(gateway: Running, path: str) -> None:
    answer = gateway.ask("GET", path)
    assert (answer.status, answer.headers.get("location")) == (404, None)


@pytest.mark.parametrize("prefix", ["", "/llm/v2"])
def test_a_prefix_may_come_or_be_taken_away(proxied: Running, prefix: str) -> None:
    client = openai.OpenAI(base_url=f"{proxied.url}{prefix}/v1", api_key=KEY, max_retries=0)
    assert [model.id for model in client.models.list()] == ["fake"]
    answer = client.chat.completions.create(model="fake", messages=[{"role": "user", "content": "one"}])
    assert answer.choices[0].message.content == "one "
    assert proxied.ask("GET", f"{prefix}/openapi.json").json["servers"] == [{"url": "/llm/v2"}]


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/", "/v1/models/fake", "/chat", "/chat/", "/v1/generate/"])
@pytest.mark.parametrize("prefix", ["", "/llm/v2"])
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "OPTIONS"])
def test_no_prefix_slash_or_method_gets_around_the_key(proxied: Running, method: str, prefix: str, path: str) -> None:
    assert proxied.ask(method, prefix + path, {} if method == "POST" else None).status == 401


def test_the_page_and_the_documentation_work_below_a_prefix(proxied: Running, browser: Browser) -> None:
    browser.open(f"{proxied.url}/llm/v2/")
    proxied.wait(lambda: bool(browser.run("return document.querySelector('#models tr')")))
    assert browser.console() == []
    browser.open(f"{proxied.url}/llm/v2/docs")
    proxied.wait(lambda: browser.run("return document.querySelectorAll('.opblock').length") == 10)
    assert browser.console() == []
    assert all("/llm/v2" in url for url in browser.requests() if url.startswith(proxied.url))


def test_an_origin_that_is_allowed_may_read_and_no_other(proxied: Running) -> None:
    asks = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,x-stainless-os"}
    allowed = proxied.ask("OPTIONS", "/llm/v2/v1/chat/completions", headers={"origin": SITE, **asks})
    assert allowed.status == 204
    assert allowed.headers["access-control-allow-origin"] == SITE
    assert "POST" in allowed.headers["access-control-allow-methods"]
    assert allowed.headers["access-control-allow-headers"] == asks["access-control-request-headers"]
    for status, key in ((200, KEY), (401, "wrong")):  # an error, too, must be readable
        answer = proxied.ask("GET", "/v1/models", headers={"origin": SITE, "authorization": f"Bearer {key}"})
        assert (answer.status, answer.headers["access-control-allow-origin"]) == (status, SITE)
        assert "x-request-id" in answer.headers["access-control-expose-headers"]
        assert "access-control-allow-credentials" not in answer.headers
    other = proxied.ask("OPTIONS", "/v1/models", headers={"origin": "https://evil.example", **asks})
    assert (other.status, other.headers.get("access-control-allow-origin")) == (401, None)
    assert other.headers["vary"] == "origin"
    assert (
        "access-control-allow-origin" not in proxied.ask("GET", "/health", headers={"origin": SITE + ".evil"}).headers
    )


def test_without_the_option_no_page_of_another_origin_may_read(gateway: Running) -> None:
    asks = {"origin": SITE, "access-control-request-method": "POST"}
    assert gateway.ask("OPTIONS", "/v1/chat/completions", headers=asks).status == 405
    assert not [name for name in gateway.ask("GET", "/health", headers=asks).headers if "access-control" in name]


def test_any_origin() -> None:
    with gateways() as run:
        answer = run(fakes(), front=Front.of("", ("*",))).ask("GET", "/health", headers={"origin": "null"})
    assert answer.headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize("prefix", ["llm", "/a b", "/v1", "/chat/x", "/docs", "/..", "/a/../b", "/<x>", "//a"])
def test_what_is_no_prefix(prefix: str) -> None:
    with pytest.raises(UsageError, match="--root-path"):
        Front.of(prefix, ())


@pytest.mark.parametrize("origin", ["example.com", "https://a/b", "https://a/", "null", "", "ftp://a", "https://*.a"])
def test_what_is_no_origin(origin: str) -> None:
    with pytest.raises(UsageError, match="--cors"):
        Front.of("", (origin,))


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("127.0.0.2", True), ("127.255.255.254", True), ("::1", True), ("[::1]", True),
     ("0:0:0:0:0:0:0:1", True), ("localhost", True), ("0.0.0.0", False), ("::", False), ("192.0.2.1", False),
     ("128.0.0.1", False)],
)  # fmt: skip
def test_loopback_is_loopback(host: str, local: bool) -> None:
    assert is_loopback(host) is local


def test_a_wrong_host_is_named_and_a_port_that_is_taken(run: Run) -> None:
    for host in ("no-such-host.invalid", "192.0.2.1", "300.1.1.1"):  # 192.0.2.0/24 is nobody's
        with pytest.raises(UsageError, match=f"--host {host}"):
            bind(Address(host, 0))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(UsageError, match=r"can't listen on 127\.0\.0\.1") as caught:
            bind(Address("127.0.0.1", taken.getsockname()[1]))
        assert "--port" in str(caught.value.hint)
    done = run("serve", "http://127.0.0.1:9/v1", "--host", "192.0.2.1", "--no-auth")
    assert (done.exit_code, "--host 192.0.2.1" in done.stderr, "another --port" in done.stderr) == (2, True, False)
    wild = run("serve", "http://127.0.0.1:9/v1", "--host", "0.0.0.0")
    assert "there are no API keys" in wild.stderr


def test_loopback_addresses_are_bound() -> None:
    for host in ("127.0.0.2", "localhost"):
        bind(Address(host, 0)).close()
