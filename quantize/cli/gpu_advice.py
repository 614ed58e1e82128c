"""What keeps runtimes from using the GPUs of this machine, and the lines that mend it.

In: the machine, the runtimes of the installed formats. Out: sentences, none where there is no GPU. A runtime is asked
in a process of its own.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable

from quantize.errors import QuantizeError
from quantize.runtimes.base import RuntimeKind
from quantize.runtimes.devices import AUTO
from quantize.runtimes.looking import find_gpus
from quantize.system.gpus import driver_version
from quantize.system.machine import Machine

COMPILERS = ("nvcc", "g++", "ninja")
VULKAN = "where the CUDA toolkit (nvcc) is not there: the same line with -DGGML_VULKAN=on, which takes Vulkan's headers"


def advise_on_gpus(machine: Machine, kinds: Iterable[RuntimeKind], *, quick: bool) -> tuple[str, ...]:
    """quick: no runtime is started, and one that is built for GPUs is taken to use them."""
    if not machine.gpus:
        return ()
    card = machine.gpus[0].name
    installed = [kind for kind in kinds if kind.devices != "not installed"]
    found = []
    for kind in {kind.for_gpus: kind for kind in installed}.values():  # one for all that one line mends
        if not kind.knows_gpus:
            found.append(f"{kind.memory} can't use the {card} ({kind.devices}). A build that can: {kind.for_gpus}")
            if "-DGGML_CUDA" in kind.for_gpus and shutil.which("nvcc") is None:
                found.append(VULKAN)
        elif not quick and not _sees_any(kind):
            driver = driver_version() or "of an unknown version"
            found.append(f"{kind.memory} sees no GPU, though it is built for some and the driver ({driver}) knows the "
                         f"{card}: the driver may be too old for this build, or the device not passed on to a "
                         f"container")  # fmt: skip
    missing = [name for name in COMPILERS if shutil.which(name) is None]
    if missing and any(kind.first_load for kind in installed):
        found.append(f"{', '.join(missing)} not found: the fastest kernels of packed formats are compiled at the first "
                     f"load, by CUDA's toolkit, g++ and ninja; without them slower ones compute")  # fmt: skip
    return tuple(found)


def _sees_any(kind: RuntimeKind) -> bool:
    try:
        return bool(find_gpus(kind, AUTO))
    except QuantizeError:
        return False
