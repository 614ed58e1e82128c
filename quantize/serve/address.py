"""Where to listen: a host's name or number, made a socket, with errors that name the option which is wrong.

In: host and port. Out: a bound socket, or whether only this machine can reach it. Raises UsageError.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
from dataclasses import dataclass

from quantize.errors import UsageError

HINT = "127.0.0.1 for this machine alone, 0.0.0.0 for every network that it is in"


@dataclass(frozen=True)
class Address:
    """Where to listen; port 0 takes a free one. grace_seconds: for answers under way when the gateway is to end."""

    host: str = "127.0.0.1"
    port: int = 8000
    grace_seconds: int = 30


def is_loopback(host: str) -> bool:
    """Whether only programs of this machine reach what listens there. Raises UsageError: it is no address."""
    return all(ipaddress.ip_address(number.partition("%")[0]).is_loopback for _, number in _numbers(host))


def bind(address: Address) -> socket.socket:
    """A socket bound to the first address that the host has. Raises UsageError: that can't be."""
    family, number = _numbers(address.host)[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((number, address.port))
    except OSError as exc:
        listener.close()
        raise _refused(address, exc) from exc
    listener.set_inheritable(False)
    return listener


def written(host: str, port: int) -> str:
    """host:port as URLs have it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _refused(address: Address, exc: OSError) -> UsageError:
    why = exc.strerror or str(exc)
    if exc.errno in (errno.EADDRINUSE, errno.EACCES):
        hint = "choose another --port" + (": those below 1024 are for root" if exc.errno == errno.EACCES else "")
        return UsageError(f"can't listen on {written(address.host, address.port)}: {why}", hint=hint)
    return UsageError(f"--host {address.host}: this machine can't listen there: {why}", hint=HINT)


def _numbers(host: str) -> list[tuple[socket.AddressFamily, str]]:
    """The addresses of a host. Raises UsageError: it has none."""
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    try:
        found = socket.getaddrinfo(bare or None, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as exc:
        why = getattr(exc, "strerror", None) or "no address"
        raise UsageError(f"--host {host}: no address of this machine: {why}", hint=HINT) from exc
    return [(item[0], str(item[4][0])) for item in found]
