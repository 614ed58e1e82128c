"""Who may ask, how often, and how many at once.

In: hashed keys, rates, slots. Out: a pass, or a Failure: 401, 429 with the seconds to wait. Times are in seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import math
import re
import secrets
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from quantize.errors import UsageError
from quantize.serve.failures import Failure

KEY_PREFIX = "qk-"
HASH_LINE = re.compile(r"([A-Za-z0-9_.-]{1,64}):sha256:([0-9a-f]{64})")
KEYS_VARIABLE = "QUANTIZE_API_KEYS"
MAX_RETRY_AFTER = 600


def new_key() -> str:
    """A fresh random key of 256 bits."""
    return KEY_PREFIX + secrets.token_urlsafe(32)


def key_line(name: str, key: str) -> str:
    """What stands for a key in a file: its name and its hash. A random key of 256 bits needs no slow hash."""
    line = f"{name}:sha256:{_digest(key).hex()}"
    if HASH_LINE.fullmatch(line) is None:
        raise UsageError(f"{name!r} is no name for a key", hint="use letters, digits, dots, dashes; at most 64")
    return line


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


class Keys:
    """Known keys by their hashes; empty: nobody needs one."""

    def __init__(self, hashes: Mapping[str, bytes]) -> None:
        self._hashes = tuple(hashes.items())

    def __bool__(self) -> bool:
        return bool(self._hashes)

    def owner(self, authorization: bytes | None) -> str:
        """Name of the key in an Authorization header. Raises Failure 401. Every key is compared, in constant time."""
        scheme, _, key = (authorization or b"").partition(b" ")
        found = None
        if scheme.lower() == b"bearer" and key:
            given = hashlib.sha256(key.strip()).digest()
            for name, known in self._hashes:
                if hmac.compare_digest(given, known):
                    found = name
        if found is None:
            what = "is not known" if authorization else "is missing: send it as `Authorization: Bearer KEY`"
            raise Failure(401, "invalid_api_key", f"the API key {what}")
        return found


def load_keys(path: Path | None, environment: Mapping[str, str]) -> Keys:
    """Keys from a file of `name:sha256:hash` lines, and from QUANTIZE_API_KEYS: such entries, or keys, with commas.

    Raises UsageError: a file that can't be read, or that has a key in it that is not hashed.
    """
    hashes: dict[str, bytes] = {}
    if path is not None:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as exc:
            raise UsageError(f"{path}: the keys can't be read ({type(exc).__name__})") from exc
        hashes.update(_parse_lines(path, lines))
        if not hashes:
            raise UsageError(f"{path}: no keys in it", hint="make one with: quantize serve --new-key NAME")
    entries = [entry.strip() for entry in environment.get(KEYS_VARIABLE, "").split(",") if entry.strip()]
    for number, entry in enumerate(entries, start=1):
        match = HASH_LINE.fullmatch(entry)
        if match is None and len(entry) < 16:
            raise UsageError(f"{KEYS_VARIABLE}: key {number} is too short", hint="use at least 16 characters")
        name, digest = (match[1], bytes.fromhex(match[2])) if match else (f"env{number}", _digest(entry))
        hashes[name] = digest
    return Keys(hashes)


def _parse_lines(path: Path, lines: Iterable[str]) -> dict[str, bytes]:
    hashes: dict[str, bytes] = {}
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        match = HASH_LINE.fullmatch(text)
        if match is None:
            hint = "keys are kept as hashes only: make a line with quantize serve --new-key NAME"
            raise UsageError(f"{path}:{number}: not `name:sha256:hash`", hint=hint)
        if match[1] in hashes:
            raise UsageError(f"{path}:{number}: a second key named {match[1]}", hint="give each its own name")
        hashes[match[1]] = bytes.fromhex(match[2])
    return hashes


@dataclass
class _Bucket:
    left: float
    at: float


class Rates:
    """Requests a minute for each key, as a token bucket that holds one minute's worth; 0 is no limit."""

    def __init__(self, per_minute: int) -> None:
        self._per_minute = per_minute
        self._buckets: dict[str, _Bucket] = {}

    def spend(self, owner: str, now: float | None = None) -> None:
        """Count one request. Raises Failure 429."""
        if not self._per_minute:
            return
        now = time.monotonic() if now is None else now
        bucket = self._buckets.setdefault(owner, _Bucket(self._per_minute, now))
        per_second = self._per_minute / 60
        bucket.left = min(self._per_minute, bucket.left + (now - bucket.at) * per_second)
        bucket.at = now
        if bucket.left < 1:
            wait = math.ceil((1 - bucket.left) / per_second)
            message = f"more than {self._per_minute} requests a minute with this key"
            raise Failure(429, "rate_limit_exceeded", message, retry_after=max(1, wait))
        bucket.left -= 1


class Slots:
    """At most `concurrency` answers at once and `queue` requests that wait for one, first come, first served."""

    def __init__(self, concurrency: int, queue: int) -> None:
        self.concurrency = concurrency
        self.queue = queue
        self.active = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._seconds = 1.0  # of an answer, a moving mean

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    async def acquire(self) -> None:
        """Take a slot, now or in turn. Raises Failure 429 if the queue is full."""
        if self.active < self.concurrency and not self._waiting:
            self.active += 1
            return
        if len(self._waiting) >= self.queue:
            message = f"{self.active} requests are running and {len(self._waiting)} are waiting"
            raise Failure(429, "queue_full", message, retry_after=self.retry_after(), elsewhere=False)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._pass_on()
            else:
                with contextlib.suppress(ValueError):
                    self._waiting.remove(turn)
            raise

    def release(self, seconds: float) -> None:
        """Give a slot back after an answer that took `seconds`."""
        self._seconds += (seconds - self._seconds) * 0.2
        self._pass_on()

    def _pass_on(self) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self.active -= 1

    def retry_after(self) -> int:
        """Whole seconds after which the queue has probably moved."""
        wait = self._seconds * (len(self._waiting) + 1) / self.concurrency
        return min(MAX_RETRY_AFTER, max(1, math.ceil(wait)))
