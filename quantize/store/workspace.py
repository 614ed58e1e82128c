"""Where work happens: the store, the cache and the reporter, which every step needs and which travel as one."""

from __future__ import annotations

from dataclasses import dataclass

from quantize.events import Reporter
from quantize.store.store import Store
from quantize.system.cache import Cache


@dataclass(frozen=True)
class Workspace:
    """Artifacts go to the store, what can be made again to the cache, what there is to say to the reporter."""

    store: Store
    cache: Cache
    reporter: Reporter
