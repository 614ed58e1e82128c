"""Memory of a server on this machine while it is measured: RAM of its processes, and of the GPUs.

In: a process id, or the port that it listens on. Out: MemoryUse, or None where it can't be seen. RAM is the resident
memory of the process and its children, mapped weights included; pages that several of them share count several times.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import threading
from dataclasses import dataclass
from typing import Literal, Self

import psutil

from quantize.bench.result import MemoryUse
from quantize.system.gpus import Gpus
from quantize.system.machine import resident_bytes

EVERY_SECONDS = 0.1


def is_local(host: str) -> bool:
    """Whether a host name means this machine's loopback, or one of its own addresses."""
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(host).is_loopback:
            return True
    if host == "localhost":
        return True
    own = {item.address for items in psutil.net_if_addrs().values() for item in items}
    with contextlib.suppress(OSError):
        return socket.gethostbyname(host) in own
    return False


def listener(port: int) -> int | None:
    """Process id of whoever listens on a TCP port here; None where it is not seen, or not allowed to be."""
    with contextlib.suppress(psutil.Error, OSError):
        for item in psutil.net_connections(kind="tcp"):
            if item.status == psutil.CONN_LISTEN and item.laddr and item.laddr.port == port and item.pid:
                return int(item.pid)
    return None


def family(pid: int) -> list[psutil.Process]:
    """A process and all below it; empty when it is gone."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []


def family_bytes(pid: int) -> int:
    """RAM of a process and all below it."""
    return sum(resident_bytes(process.pid) for process in family(pid))


@dataclass(frozen=True)
class _MemorySample:
    """Bytes at one moment."""

    ram: int
    vram: int | None
    device: int


class MemoryWatch:
    """Looks at a server's memory every tenth of a second, in a thread; `mark` keeps what it is at a moment."""

    def __init__(self, pid: int | None, gpus: Gpus | None = None) -> None:
        self.pid, self.gpus = pid, gpus if gpus is not None else Gpus()
        self._marks: dict[str, _MemorySample] = {}
        self._peak = _MemorySample(0, None, 0)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        if self.pid is not None:
            self.mark("before load")
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def mark(self, name: str) -> None:
        """Remember the memory now as "before load" or "after warm-up"."""
        if self.pid is not None:
            self._marks[name] = self._look()

    def ram(self) -> MemoryUse | None:
        """RAM of the server; None where it was not seen."""
        before, after = self._ends()
        if before is None or after is None or not self._peak.ram:
            return None
        return _use("process", before.ram, after.ram, self._peak.ram)

    def vram(self) -> MemoryUse | None:
        """Memory of the GPUs; None without any."""
        before, after = self._ends()
        if not self.gpus or before is None or after is None:
            return None
        if before.vram is not None and after.vram is not None and self._peak.vram is not None:
            return _use("process", before.vram, after.vram, self._peak.vram)
        return _use("device", before.device, after.device, self._peak.device)

    def _ends(self) -> tuple[_MemorySample | None, _MemorySample | None]:
        before = self._marks.get("before load")
        return before, self._marks.get("after warm-up", before)

    def _look(self) -> _MemorySample:
        pid, peak = self.pid or 0, self._peak
        vram, device = self.gpus.used({item.pid for item in family(pid)}) if self.gpus else (None, 0)
        seen = _MemorySample(family_bytes(pid), vram, device)
        most = max((item for item in (peak.vram, vram) if item is not None), default=None)
        self._peak = _MemorySample(max(peak.ram, seen.ram), most, max(peak.device, device))
        return seen

    def _run(self) -> None:
        while not self._over.wait(EVERY_SECONDS):
            self._look()


def _use(scope: Literal["process", "device"], before: int, after: int, peak: int) -> MemoryUse:
    return MemoryUse(scope=scope, before_load_bytes=before, after_warm_up_bytes=after, peak_bytes=peak)
