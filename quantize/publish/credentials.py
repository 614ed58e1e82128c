"""What `docker login` left for a registry: user and password, or an identity token. Read only, and never shown.

In: a host. Out: a Credential or None. Looked at in this order: $DOCKER_AUTH_CONFIG (the text of a config.json, as CI
systems give it), $REGISTRY_AUTH_FILE, $DOCKER_CONFIG/config.json, ~/.docker/config.json, podman's auth.json; in each
of them the host's credential helper, then what is stored.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantize.errors import UsageError

DOCKER_HUB = ("registry-1.docker.io", "docker.io", "index.docker.io", "https://index.docker.io/v1/")
HELPER_SECONDS = 30
IDENTITY = "<token>"  # the user name by which helpers say that the secret is an identity token


@dataclass(frozen=True)
class Credential:
    """Either user and password, or an identity token."""

    user: str = field(default="", repr=False)
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)

    def basic(self) -> str:
        """The value of a Basic Authorization header."""
        return "Basic " + base64.b64encode(f"{self.user}:{self.password}".encode()).decode()


def credential_for(host: str, environment: Mapping[str, str] = os.environ) -> Credential | None:
    """What is stored for HOST[:PORT]. Raises UsageError: a file or helper can't be read."""
    names = DOCKER_HUB if host in DOCKER_HUB else (host, f"https://{host}", f"https://{host}/v2/", f"http://{host}")
    for where, config in _configs(environment):
        if not isinstance(config, dict):
            raise UsageError(f"{where}: not a docker configuration", hint="log in again: docker login " + host)
        helpers, stored = config.get("credHelpers") or {}, config.get("auths") or {}
        for name in names:
            helper = helpers.get(name) or (config.get("credsStore") if name in stored else None)
            found = _from_helper(helper, name) if helper else _stored(stored.get(name), where)
            if found is not None:
                return found
    return None


def _configs(environment: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    if text := environment.get("DOCKER_AUTH_CONFIG"):
        yield "$DOCKER_AUTH_CONFIG", _parse("$DOCKER_AUTH_CONFIG", text)
    home = Path(environment.get("HOME") or "~").expanduser()
    paths = [Path(environment.get("DOCKER_CONFIG") or home / ".docker") / "config.json"]
    if given := environment.get("REGISTRY_AUTH_FILE"):
        paths.insert(0, Path(given))
    if runtime := environment.get("XDG_RUNTIME_DIR"):
        paths.append(Path(runtime) / "containers" / "auth.json")
    for path in paths:
        if path.is_file():
            yield str(path), _parse(str(path), path.read_text(encoding="utf-8"))


def _parse(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise UsageError(f"{where}: not JSON", hint="log in again with docker login") from None  # it holds secrets


def _stored(entry: Any, where: str) -> Credential | None:
    if not isinstance(entry, dict):
        return None
    if entry.get("identitytoken"):
        return Credential(identity_token=str(entry["identitytoken"]))
    if entry.get("username") and entry.get("password"):
        return Credential(str(entry["username"]), str(entry["password"]))
    if not entry.get("auth"):
        return None
    try:
        user, colon, password = base64.b64decode(str(entry["auth"])).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        colon = ""
    if not colon:
        raise UsageError(f"{where}: an `auth` in it can't be read", hint="log in again with docker login")
    return Credential(user, password.rstrip("\0"))


def _from_helper(name: str, host: str) -> Credential | None:
    command = f"docker-credential-{name}"
    try:
        done = subprocess.run(
            [command, "get"], input=host.encode(), capture_output=True, timeout=HELPER_SECONDS, check=False
        )
        if done.returncode:
            return None  # helpers say so when they have nothing for this host
        answer = json.loads(done.stdout)
        user, secret = str(answer["Username"]), str(answer["Secret"])
    except (OSError, ValueError, KeyError, TypeError, subprocess.TimeoutExpired) as exc:
        hint = "log in again, or take the helper out of docker's config.json"
        raise UsageError(f"{command} failed for {host} ({type(exc).__name__})", hint=hint) from None
    return Credential(identity_token=secret) if user == IDENTITY else Credential(user, secret)
