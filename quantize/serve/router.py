"""Which model answers: by name, by default, for a share of the requests, or instead of one that can't.

In: engines by name and the rules. Out: engines to try, in order. Raises Failure 404 with the names that there are.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from quantize.errors import UsageError
from quantize.serve.engines.base import Engine
from quantize.serve.failures import Failure

PARTS = 10_000  # a canary's share is exact to a hundredth of a percent


@dataclass(frozen=True)
class Rules:
    """default: for requests that name no model. fallback: tried when another fails. canary: name and share (0..1)."""

    default: str
    fallback: str | None = None
    canary: tuple[str, float] | None = None


class Router:
    """Engines by name, under Rules."""

    def __init__(self, engines: Mapping[str, Engine], rules: Rules) -> None:
        self.engines = dict(engines)
        self.rules = rules
        for name in filter(None, (rules.default, rules.fallback, rules.canary and rules.canary[0])):
            if name not in self.engines:
                raise UsageError(f"{name!r} is not served here", hint=f"there are: {', '.join(self.engines)}")

    def candidates(self, model: str | None, trace_id: str) -> list[Engine]:
        """Engines to try, first to last. Raises Failure 404."""
        name = self.find(self._canary_or(model or self.rules.default, trace_id)).name
        names = [name]
        if self.rules.fallback is not None and self.rules.fallback != name:
            names.append(self.rules.fallback)
        return [self.engines[item] for item in names]

    def find(self, name: str) -> Engine:
        """By its name. Raises Failure 404."""
        if name not in self.engines:
            known = ", ".join(self.engines)
            raise Failure(404, "model_not_found", f"no such model; there are: {known}", param="model")
        return self.engines[name]

    def _canary_or(self, name: str, trace_id: str) -> str:
        """The canary for its share of what would go to the default; the same for the same trace id."""
        if self.rules.canary is None or name != self.rules.default:
            return name
        canary, share = self.rules.canary
        return canary if zlib.crc32(trace_id.encode()) % PARTS < share * PARTS else name

    def not_ready(self) -> dict[str, str]:
        """Models that can't answer and have none in their place, with the reasons."""
        fallback = self.engines.get(self.rules.fallback or "")
        saved = fallback is not None and fallback.status.ready
        return {
            name: engine.status.reason or engine.status.state
            for name, engine in self.engines.items()
            if not engine.status.ready and not saved
        }
