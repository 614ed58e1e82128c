"""HTTP as registries need it: logins that are asked for, redirects that are not trusted, tries again.

In: a request. Out: an answer with one of the statuses that are good. Credentials go to the registry's own origin and to
the token service that it names, nowhere else, and never over plain HTTP off this machine.
"""

from __future__ import annotations

import ipaddress
import json
import re
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from quantize.errors import MissingExtraError, RefusedError, TransferError, first_line
from quantize.publish.credentials import Credential
from quantize.publish.retry import Again, Retry, persist

try:
    import httpx2
except ImportError as exc:
    raise MissingExtraError("registries", "publish") from exc

MAX_HOPS = 5
MAX_BODY_BYTES = 4 << 20  # of answers that are read whole
PASSING = {408, 425, 429, 500, 502, 503, 504}
PUT_BY_SOMEBODY = "MANIFEST_BLOB_UNKNOWN"  # what a registry says of a blob that is there and that somebody puts again
REDIRECTS = {301, 302, 303, 307, 308}
TIMEOUT = httpx2.Timeout(60.0, connect=10.0, pool=None)
PARAMETER = re.compile(r'(\w+)="([^"]*)"')

Body = bytes | Callable[[], Iterable[bytes]] | None


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True)
class HttpRequest:
    """What to ask. good: statuses that are an answer. body: bytes, or what makes them anew for each try."""

    method: str
    url: str
    good: Collection[int]
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Body = None


@dataclass(frozen=True)
class Response:
    """A response that was read whole. url: what answered, after redirects."""

    status: int
    headers: httpx2.Headers
    url: httpx2.URL
    data: bytes


class Web:
    """Requests to one registry, from any thread. scope: what a token service is asked for."""

    def __init__(
        self,
        origin: str,
        scope: str,
        find_credential: Callable[[], Credential | None],
        retry: Retry,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        self.origin = httpx2.URL(origin)
        self.host = self.origin.netloc.decode()
        self.retry = retry
        self._scope, self._find_credential = scope, find_credential
        self._authorization, self._lock = "", threading.Lock()
        self._client = httpx2.Client(timeout=TIMEOUT, transport=transport, follow_redirects=False)

    def close(self) -> None:
        """Close what is open."""
        self._client.close()

    def call(self, request: HttpRequest) -> Response:
        """One request, tried again while what goes wrong may pass.

        Raises TransferError: given up, or a status that is not good. RefusedError: a redirect that leaves https.
        """
        return persist(lambda: self.once(request), self.retry, self.host)

    def once(self, request: HttpRequest) -> Response:
        """One try. Raises Again besides what `call` raises."""
        with self.stream(request) as response:
            return Response(response.status_code, response.headers, response.request.url, _read(response))

    @contextmanager
    def stream(self, request: HttpRequest) -> Iterator[httpx2.Response]:
        """One try, whose answer is left to read, as it was sent."""
        with _passing():
            response = self._answer(request)
            try:
                if response.status_code not in request.good:
                    raise self._unexpected(response)
                yield response
            finally:
                response.close()

    def location(self, before: httpx2.URL, headers: Mapping[str, str]) -> str:
        """Where an answer from `before` says to go on, as a whole URL. Raises TransferError, RefusedError."""
        text = headers.get("location")
        if not text:
            raise TransferError(f"{self.host}: an answer without the `Location` that it must have")
        url = before.join(text)
        _check_scheme(before, url)
        return str(url)

    def _answer(self, request: HttpRequest) -> httpx2.Response:
        target, used = httpx2.URL(request.url), self._authorization
        for _ in range(MAX_HOPS):
            response = self._send(request, target, used)
            if response.status_code == 401 and target.origin == self.origin.origin:
                challenge = response.headers.get("www-authenticate", "")
                response.close()
                used = self._log_in(challenge, used)
                response = self._send(request, target, used)
                if response.status_code == 401:
                    response.close()
                    raise self._no_login(self._find_credential())
            if response.status_code not in REDIRECTS or request.method not in ("GET", "HEAD"):
                return response
            response.close()
            target = httpx2.URL(self.location(target, response.headers))
        raise TransferError(f"{self.host}: more than {MAX_HOPS} redirects in a row")

    def _send(self, request: HttpRequest, url: httpx2.URL, authorization: str) -> httpx2.Response:
        own = {"Accept-Encoding": "identity", **request.headers}
        if authorization and url.origin == self.origin.origin:
            own["Authorization"] = authorization
        content = request.body() if callable(request.body) else request.body
        return self._client.send(
            self._client.build_request(request.method, url, headers=own, content=content), stream=True
        )

    def _log_in(self, challenge: str, refused: str) -> str:
        """The header that answers a challenge; `refused` is the one that was not good enough."""
        with self._lock:
            if self._authorization != refused:  # another thread was faster
                return self._authorization
            credential = self._find_credential()
            if credential is not None:
                _check_private(self.origin)
            kind, parameters = challenge.partition(" ")[0].lower(), dict(PARAMETER.findall(challenge))
            if kind == "bearer" and parameters.get("realm"):
                found = f"Bearer {self._token(parameters, credential)}"
            elif kind == "basic" and credential is not None and credential.user:
                found = credential.basic()
            else:
                raise self._no_login(credential)
            if found == refused:
                raise self._no_login(credential)
            self._authorization = found
            return found

    def _token(self, parameters: Mapping[str, str], credential: Credential | None) -> str:
        realm = httpx2.URL(parameters["realm"])
        _check_scheme(self.origin, realm)
        if credential is not None:
            _check_private(realm)
        service = parameters.get("service", "")
        if credential is not None and credential.identity_token:
            form = {
                "grant_type": "refresh_token",
                "service": service,
                "scope": self._scope,
                "client_id": "quantize",
                "refresh_token": credential.identity_token,
            }
            response = self._client.post(realm, data=form)
        else:
            headers = {"Authorization": credential.basic()} if credential is not None else {}
            query = {"service": service, "scope": self._scope}
            response = self._client.get(realm.copy_merge_params(query), headers=headers)
        if response.status_code in PASSING:
            raise Again(f"the token service {realm.host} answers {response.status_code}")
        if response.status_code != 200:
            raise self._no_login(credential)
        try:
            data: dict[str, Any] = response.json()
            return str(data.get("token") or data["access_token"])
        except (ValueError, KeyError, AttributeError):
            raise TransferError(f"the token service {realm.host} of {self.host} gave no token") from None

    def _no_login(self, credential: Credential | None) -> TransferError:
        known = "does not accept the login that is stored for it" if credential else "asks for a login"
        return TransferError(f"{self.host} {known}", hint=f"log in: docker login {self.host}")

    def _unexpected(self, response: httpx2.Response) -> Exception:
        detail, status = _detail(response), response.status_code
        if status in PASSING or PUT_BY_SOMEBODY in detail:
            return Again(f"status {status}{detail}", after=_retry_after(response))
        asked = response.request
        what = f"{self.host}: {asked.method} {asked.url.path}: status {status}{detail}"
        if status == 403:
            return TransferError(what, hint=f"log in as someone who may: docker login {self.host}")
        return TransferError(what)


@contextmanager
def _passing() -> Iterator[None]:
    """A connection that fails or breaks may work the next time."""
    try:
        yield
    except httpx2.UnsupportedProtocol as exc:
        raise TransferError(f"not an address of a registry: {first_line(exc)}") from exc
    except httpx2.TransportError as exc:
        raise Again(f"{type(exc).__name__}: {first_line(exc)}") from exc


def _check_scheme(before: httpx2.URL, after: httpx2.URL) -> None:
    if after.scheme not in ("http", "https"):
        raise RefusedError(f"{before.host} sends us on to {after.scheme}://, which is no web address")
    if before.scheme == "https" and after.scheme == "http":
        raise RefusedError(
            f"{before.host} sends us on to http://{after.host}, out of its encrypted connection",
            hint="behind a proxy that ends TLS, have it pass X-Forwarded-Proto on",
        )


def _check_private(url: httpx2.URL) -> None:
    if url.scheme == "http" and not is_loopback(url.host):
        hint = "give the registry TLS"
        raise RefusedError(f"{url.host} asks for a login over plain HTTP, where anyone can read it", hint=hint)


def _read(response: httpx2.Response) -> bytes:
    """An answer that is small by its nature. Raises TransferError: it is not."""
    data = bytearray()
    for chunk in response.iter_raw():
        data += chunk
        if len(data) > MAX_BODY_BYTES:
            raise TransferError(f"{response.request.url.host} answers with more than {MAX_BODY_BYTES:,} bytes")
    return bytes(data)


def _detail(response: httpx2.Response) -> str:
    """What the registry says, cut to one line; "" if nothing that can be read."""
    try:
        errors = json.loads(_read(response))["errors"]
        text = "; ".join(f"{item.get('code', '')} {item.get('message', '')}".strip() for item in errors)
    except (TransferError, ValueError, KeyError, TypeError, AttributeError):
        return ""
    return f" ({re.sub(r'[^ -~]+', ' ', text)[:200]})"


def _retry_after(response: httpx2.Response) -> float | None:
    text = response.headers.get("retry-after", "")
    return float(text) if text.isdigit() else None
