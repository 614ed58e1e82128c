"""Logins, tokens and redirects, against a registry that is all answers; and what docker login leaves."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest

from quantize.errors import RefusedError, TransferError, UsageError
from quantize.publish.credentials import Credential, credential_for
from quantize.publish.registry import parse
from quantize.publish.retry import Again, Retry, persist
from quantize.publish.web import HttpRequest, Web
from tests.publish.conftest import QUICK

GET = HttpRequest("GET", "https://registry.test/v2/x/blobs/sha256:1", {200})
LOGIN = Credential("ali", "open sesame")


def reply(status: int, body: bytes = b"", **headers: str) -> httpx2.Response:
    """An answer that is still to be read, as those of a network are."""
    return httpx2.Response(status, content=iter([body]), headers={k.replace("_", "-"): v for k, v in headers.items()})


def web(answer: Callable[[httpx2.Request], httpx2.Response], *, origin: str = "https://registry.test") -> Web:
    return Web(origin, "repository:x:pull", lambda: LOGIN, QUICK, httpx2.MockTransport(answer))


def redirect(to: str) -> Callable[[httpx2.Request], httpx2.Response]:
    return lambda request: reply(307, Location=to) if request.url.host == "registry.test" else reply(200, b"bytes")


def test_a_redirect_out_of_https_is_refused() -> None:
    with pytest.raises(RefusedError, match=r"sends us on to http://store\.test, out of its encrypted connection"):
        web(redirect("http://store.test/blob")).call(GET)
    with pytest.raises(RefusedError, match="file://"):
        web(redirect("file:///etc/passwd")).call(GET)
    with pytest.raises(TransferError, match="more than 5 redirects"):
        web(redirect("/v2/again")).call(GET)
    assert web(redirect("https://store.test/blob")).call(GET).data == b"bytes"


def test_an_upload_s_place_out_of_https_is_refused() -> None:
    found = web(lambda _: reply(202, Location="http://registry.test/upload"))
    answer = found.call(HttpRequest("POST", "https://registry.test/v2/x/blobs/uploads/", {202}))
    with pytest.raises(RefusedError, match="out of its encrypted connection") as caught:
        found.location(answer.url, answer.headers)
    assert "X-Forwarded-Proto" in str(caught.value.hint)


def test_a_token_is_asked_for_and_stays_with_the_registry() -> None:
    asked: list[httpx2.Request] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        asked.append(request)
        if request.url.host == "auth.test":
            assert request.url.params["scope"] == "repository:x:pull"
            assert request.headers["Authorization"] == LOGIN.basic()
            return reply(200, b'{"token": "t0ken"}')
        if request.url.host == "store.test":
            return reply(200, b"bytes")
        if request.headers.get("Authorization") != "Bearer t0ken":
            challenge = 'Bearer realm="https://auth.test/token",service="registry.test"'
            return reply(401, WWW_Authenticate=challenge)
        return reply(307, Location="https://store.test/blob")

    found = web(answer)
    assert found.call(GET).data == b"bytes"
    assert found.call(GET).data == b"bytes"
    assert [request.url.host for request in asked].count("auth.test") == 1
    assert not any("Authorization" in request.headers for request in asked if request.url.host == "store.test")


def test_an_identity_token_is_exchanged() -> None:
    def answer(request: httpx2.Request) -> httpx2.Response:
        if request.url.host == "auth.test":
            form = dict(httpx2.QueryParams(request.content.decode()).items())
            assert (form["grant_type"], form["refresh_token"]) == ("refresh_token", "long-lived")
            return reply(200, b'{"access_token": "t0ken"}')
        good = request.headers.get("Authorization") == "Bearer t0ken"
        return reply(200 if good else 401, WWW_Authenticate='Bearer realm="https://auth.test/token"')

    found = Web(
        "https://registry.test",
        "s",
        lambda: Credential(identity_token="long-lived"),
        QUICK,
        httpx2.MockTransport(answer),
    )
    assert found.call(GET).status == 200


def test_a_login_never_goes_over_plain_http() -> None:
    for challenge in ('Basic realm="r"', 'Bearer realm="http://auth.test/token"'):
        with pytest.raises(RefusedError, match="over plain HTTP"):
            web(lambda _, told=challenge: reply(401, WWW_Authenticate=told), origin="http://registry.test").call(
                HttpRequest("GET", "http://registry.test/v2/", {200})
            )


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (403, {"errors": [{"code": "DENIED", "message": "no\nentry"}]}, r"status 403 \(DENIED no entry\)"),
        (404, "x", "status 404$"),
        (401, "", "does not accept the login that is stored for it|asks for a login"),
    ],
)
def test_a_no_is_said_at_once(status: int, body: object, message: str) -> None:
    asked = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        asked.append(request)
        return reply(status, json.dumps(body).encode())

    with pytest.raises(TransferError, match=message) as caught:
        web(answer).call(GET)
    assert len(asked) == 1
    assert "sesame" not in str(caught.value)


def test_an_answer_without_end_is_not_read() -> None:
    endless = httpx2.Response(200, content=(b"x" * 65536 for _ in range(10_000)))
    with pytest.raises(TransferError, match="answers with more than"):
        web(lambda _: endless).call(GET)


def test_waits_double_have_jitter_and_end() -> None:
    retry = Retry()
    for failures, step in enumerate((0.5, 1, 2, 4, 8, 15, 15), start=1):
        waits = {retry.wait(failures, None) for _ in range(20)}
        assert len(waits) > 1
        assert all(step / 2 <= wait <= step for wait in waits)
    assert retry.wait(1, 30.0) == 30
    assert retry.wait(1, 3600.0) == 60
    assert sum(retry.wait(n, None) for n in range(1, retry.tries)) >= 22


def test_only_failures_without_progress_count() -> None:
    calls = []

    def step() -> str:
        calls.append(1)
        if len(calls) < 10:
            raise Again("cut", moved=True)
        return "done"

    assert persist(step, Retry(tries=2, first_seconds=0), "there") == "done"


@pytest.mark.parametrize(
    ("text", "url", "repository", "tag"),
    [
        ("oci://ghcr.io/me/models", "https://ghcr.io", "me/models", None),
        ("oci://127.0.0.1:5000/a:b", "http://127.0.0.1:5000", "a", "b"),
        ("oci://[::1]:5000/a", "http://[::1]:5000", "a", None),
        ("oci+http://registry.lan:5000/a", "http://registry.lan:5000", "a", None),
        ("oci://docker.io/me/x", "https://registry-1.docker.io", "me/x", None),
        ("oci://localhost.evil.test/a", "https://localhost.evil.test", "a", None),
    ],
)
def test_references(text: str, url: str, repository: str, tag: str | None) -> None:
    found = parse(text)
    assert (found.url, found.repository, found.tag) == (url, repository, tag)
    assert found.text(tag) == text


def encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def test_what_docker_login_left(tmp_path: Path) -> None:
    config = {"auths": {"a.test": {"auth": encoded("u:p:q")}, "https://index.docker.io/v1/": {"identitytoken": "t"}}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    environment = {"DOCKER_CONFIG": str(tmp_path), "HOME": str(tmp_path / "none")}
    assert credential_for("a.test", environment) == Credential("u", "p:q")
    assert credential_for("docker.io", environment) == Credential(identity_token="t")
    assert credential_for("b.test", environment) is None
    given = {**environment, "DOCKER_AUTH_CONFIG": json.dumps({"auths": {"a.test": {"auth": encoded("ci:s")}}})}
    assert credential_for("a.test", given) == Credential("ci", "s")
    assert "p:q" not in repr(credential_for("a.test", environment))


@pytest.mark.parametrize("text", ["{", "[]", '{"auths": {"a.test": {"auth": "not base64"}}}'])
def test_a_docker_configuration_that_is_none(text: str) -> None:
    with pytest.raises(UsageError, match=r"\$DOCKER_AUTH_CONFIG") as caught:
        credential_for("a.test", {"DOCKER_AUTH_CONFIG": text, "HOME": "/none"})
    assert "docker login" in str(caught.value.hint)


def test_a_credential_helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    helper = tmp_path / "docker-credential-vault"
    helper.write_text(
        '#!/bin/sh\nread host\n[ "$host" = a.test ] && echo "{\\"Username\\": \\"u\\", \\"Secret\\": \\"s\\"}"\n'
    )
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    text = json.dumps({"credHelpers": {"a.test": "vault", "b.test": "vault", "c.test": "gone"}})
    environment = {"DOCKER_AUTH_CONFIG": text, "HOME": "/none"}
    assert credential_for("a.test", environment) == Credential("u", "s")
    assert credential_for("b.test", environment) is None
    with pytest.raises(UsageError, match="docker-credential-gone failed"):
        credential_for("c.test", environment)
