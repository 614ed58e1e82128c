"""The GPUs that a runtime can use, without loading it here.

In: a kind of runtime, the device that is wanted. Out: the GPUs, asked in a process of its own.
"""

from __future__ import annotations

from quantize.events import Reporter, SilentReporter
from quantize.runtimes.base import RuntimeKind
from quantize.runtimes.devices import CPU, Accelerator, check_name
from quantize.system.process import run_step


def find_gpus(kind: RuntimeKind, device: str) -> tuple[Accelerator, ...]:
    """The GPUs that a runtime can use, asked in a process of its own, which takes no memory of them afterwards.

    Raises UsageError: no name of a device. QuantizeError: the runtime can't be asked.
    """
    if check_name(device) == CPU or not kind.knows_gpus:
        return ()
    return run_step(f"looking for GPUs with {kind.name}", SilentReporter(), _found, kind)


def _found(_reporter: Reporter, kind: RuntimeKind) -> tuple[Accelerator, ...]:
    return kind.find_gpus()
