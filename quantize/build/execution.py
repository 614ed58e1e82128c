"""What the steps of one execution share: the plan, where they work, how they run, the source.

In: options as commands give them. Out: plain data.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from quantize.build.outcome import Ledger
from quantize.build.plan import Plan
from quantize.build.settle import Gates
from quantize.formats.base import RunLimits
from quantize.model.checkpoint import Checkpoint
from quantize.store.workspace import Workspace


@dataclass(frozen=True)
class RunOptions:
    """How to run a plan; nothing here changes the weights that are built.

    keep_going: begin other variants after a failure. keep_intermediates: leave in the cache what variants share.
    accept_risk: why an artifact that its gates refuse is taken all the same; it goes into the manifest. judge: False
    neither opens nor measures what is built, nor holds the gates, whatever the plan says.
    """

    limits: RunLimits = field(default_factory=RunLimits)
    keep_going: bool = True
    keep_intermediates: bool = False
    accept_risk: str | None = None
    judge: bool = True


@dataclass(frozen=True)
class Execution:
    """One plan on its way. checkpoint: its source, opened."""

    plan: Plan
    workspace: Workspace
    run: RunOptions
    checkpoint: Checkpoint
    gates: Gates
    ledger: Ledger

    @property
    def root(self) -> Path:
        """Of the store."""
        return self.workspace.store.root
