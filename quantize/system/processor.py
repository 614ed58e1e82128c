"""What bits depend on beside a step's inputs: the processor's instructions, and what torch's libraries make of them.

In: nothing; call `settle_products` before a process multiplies anything. Out: the mode that MKL runs in, and
`device_name`, the words for all that can make the same step give other bits on another device.
"""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

from quantize.events import Reporter

MKL_MODE = "MKL_CBWR"
# Read by the libraries when they load: each makes them choose other kernels than the processor alone would.
CHOOSERS = (
    "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ONEDNN_DEFAULT_FPMATH_MODE",
    "DNNL_DEFAULT_FPMATH_MODE",
)  # fmt: skip
_CPUINFO = Path("/proc/cpuinfo")
_AVX512 = {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_MAKERS = {"GenuineIntel": "Intel", "AuthenticAMD": "AMD"}


def settle_products() -> None:
    """Have MKL give a product the same bits on any number of threads; what the user has set in MKL_CBWR stands.

    MKL looks once, at the first product of the process: call this before. The mode is the best that the processor has:
    on a Xeon with AVX-512 that costs nothing that shows, where AVX2 for all would halve the speed.
    """
    mode = strict_mode()
    if mode is not None:
        os.environ.setdefault(MKL_MODE, mode)


def strict_mode(cpuinfo: Path = _CPUINFO) -> str | None:
    """The best of MKL's reproducible modes for this processor; None where torch has no MKL, off x86-64.

    On a processor that is not Intel's all of them are one: MKL's kernels for it, with a fixed order of sums.
    """
    if platform.machine().lower() not in {"x86_64", "amd64"}:
        return None
    flags = set(cpu_field("flags", cpuinfo).split())
    return "AVX512,STRICT" if flags >= _AVX512 else "AVX2,STRICT"


def name_device(_reporter: Reporter, device: str) -> str:
    """`device_name` as a step, for a process that must not load torch, or has it without the mode."""
    return device_name(device)


def device_name(device: str) -> str:
    """The kind of device that results depend on, as torch in this process has it; other kinds may give other bits.

    A GPU's name, or a processor's: "cpu AVX512 (Intel), bfloat16 by AMX, MKL AVX512,STRICT".
    """
    import torch

    if torch.device(device).type == "cuda":
        return f"cuda {torch.cuda.get_device_name(torch.device(device))}"
    parts, maker = [f"cpu {torch.backends.cpu.get_cpu_capability()}"], cpu_field("vendor_id")
    if maker:
        parts[0] += f" ({_MAKERS.get(maker, maker)})"
    if torch.cpu._is_amx_tile_supported():
        parts.append("bfloat16 by AMX")
    elif torch.cpu._is_avx512_bf16_supported():
        parts.append("bfloat16 by AVX512_BF16")
    if torch.backends.mkl.is_available():  # type: ignore[no-untyped-call]
        parts.append(f"MKL {os.environ.get(MKL_MODE, 'unset')}")
    parts += [f"{name} {os.environ[name]}" for name in CHOOSERS if name in os.environ]
    return ", ".join(parts)


def cpu_field(field: str, cpuinfo: Path = _CPUINFO) -> str:
    """A field of the first processor in /proc/cpuinfo; "" where the system does not tell."""
    try:
        found = re.search(rf"^{field}\s*:\s*(.*)$", cpuinfo.read_text("utf-8"), re.MULTILINE)
    except (OSError, ValueError):
        return ""
    return found.group(1).strip() if found else ""
