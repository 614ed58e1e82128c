"""How a calibration pass is spread over a cluster: plain data, without Ray."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class PassSpread:
    """Where a pass finds its workers, and what each takes of its node. None of it may change a bit of the results.

    address: at which work on a node connects to the cluster. workers: as many as there may be. cores, gpus,
    memory_bytes: what one takes of its node. trace: a Chrome trace is written there. watch: say what each worker does.
    """

    address: str
    workers: int
    cores: int
    gpus: int = 0
    memory_bytes: int = 0
    trace: Path | None = None
    watch: bool = False
