"""The GPUs that llama.cpp sees, by ggml's own list of devices: CUDA0, ROCm0, Vulkan1, SYCL0, MTL0.

In: nothing. Out: an Accelerator for each GPU, in llama.cpp's order, with the memory that is free on it. It opens each
GPU: call it in a process that does not live long, or that runs the model.
"""

from __future__ import annotations

import ctypes
import re
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from quantize.errors import UsageError
from quantize.runtimes.devices import CPU, ON_CPU, Accelerator, DevicePlace

IS_GPU = (1, 2)  # GGML_BACKEND_DEVICE_TYPE_GPU, and _IGPU: one that shares the machine's memory
KIND_OF = {"cuda": "cuda", "rocm": "rocm", "vulkan": "vulkan", "sycl": "sycl", "metal": "metal", "mtl": "metal"}
PACKAGE = "llama-cpp-python"
ALL_LAYERS = -1
SPLIT_NONE, SPLIT_LAYERS = 0, 1  # LLAMA_SPLIT_MODE_NONE: the whole model on main_gpu; LLAMA_SPLIT_MODE_LAYER
MOST_DEVICES = 128  # no fewer than llama_max_devices(), whose length llama.cpp reads
_NAME = re.compile(r"([A-Za-z]+)(\d*)")


def device_name(ggml_name: str) -> str | None:
    """What people call a device of ggml's: CUDA1 is cuda:1, MTL0 and Metal are metal:0; None for what is no GPU."""
    found = _NAME.fullmatch(ggml_name)
    kind = KIND_OF.get(found[1].lower()) if found else None
    return f"{kind}:{int(found[2] or 0)}" if found and kind else None


def build_line(library: str = "CUDA") -> str:
    """The line that builds this version of llama.cpp for GPUs: library is CUDA, VULKAN, HIP or METAL.

    Without GGML_NATIVE=OFF it runs on processors, and with CUDA on cards, like this machine's only. Without
    --no-cache-dir pip takes the wheel that it has built before, for the CPU.
    """
    try:
        pinned = f"{PACKAGE}=={version(PACKAGE)}"
    except PackageNotFoundError:
        pinned = PACKAGE
    options = f"--force-reinstall --no-deps --no-cache-dir --no-binary {PACKAGE}"
    return f'CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_{library}=on" pip install {options} {pinned}'


def find_gpus() -> tuple[Accelerator, ...]:
    """Every GPU that this build of llama.cpp can use here; () for a build without any."""
    library, found = _library(), []
    for name, device in _gpus(library):
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        library.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
        described = library.ggml_backend_dev_description(device).decode("utf-8", "replace")
        found.append(Accelerator(name, described, total.value, free.value))
    return tuple(found)


def is_device(name: str, wanted: str) -> bool:
    """Whether a GPU is the one that is wanted, or of the kind, where no number is named."""
    return wanted in (name, name.partition(":")[0])


def is_there(place: DevicePlace) -> bool:
    """Whether this llama.cpp has what a place is on."""
    return place.device == CPU or bool(_meant(_gpus(_library()), place))


def put_on(params: Any, place: DevicePlace) -> Any:
    """Have a model loaded at a place, and on no other device; what is given back must live until it is loaded.

    Raises UsageError: this llama.cpp has no such GPU. It would take the CPU without a word.
    """
    gpus = _gpus(_library()) if place != ON_CPU else []
    wanted = _meant(gpus, place)
    if place != ON_CPU and not wanted:
        have = ", ".join(name for name, _ in gpus) or "none, by its build or its driver"
        hint = f"use --device cpu, or build it for GPUs: {build_line()}"
        raise UsageError(f"this llama.cpp has no {place.device} (GPUs: {have})", hint=hint)
    devices = (ctypes.c_void_p * (len(wanted) + 1))(*wanted)
    params.devices = ctypes.cast(devices, ctypes.c_void_p)
    params.n_gpu_layers = 0 if place == ON_CPU else ALL_LAYERS if place.gpu_layers is None else place.gpu_layers
    params.split_mode, params.main_gpu = SPLIT_LAYERS if place.shares else SPLIT_NONE, 0
    if not place.shares:
        return devices
    shares = (ctypes.c_float * MOST_DEVICES)(*place.shares)
    params.tensor_split = shares
    return devices, shares


def _gpus(library: Any) -> list[tuple[str, int]]:
    """(name, pointer) of each GPU."""
    found = []
    for number in range(library.ggml_backend_dev_count()):
        device = library.ggml_backend_dev_get(number)
        name = device_name(library.ggml_backend_dev_name(device).decode("utf-8", "replace"))
        if name is not None and library.ggml_backend_dev_type(device) in IS_GPU:
            found.append((name, device))
    return found


def _meant(gpus: list[tuple[str, int]], place: DevicePlace) -> list[int]:
    """Of the GPUs the one of that name, or as many of its kind as layers are dealt to; [] where they are not there."""
    meant = [device for name, device in gpus if is_device(name, place.device)]
    return meant if len(meant) == (len(place.shares) or 1) else []


def _library() -> Any:
    """ggml's functions; libggml brings libggml-base's along."""
    from llama_cpp._ggml import libggml as library

    handle, text = ctypes.c_void_p, ctypes.c_char_p
    library.ggml_backend_dev_count.restype = ctypes.c_size_t
    library.ggml_backend_dev_get.argtypes, library.ggml_backend_dev_get.restype = [ctypes.c_size_t], handle
    for name, result in (("name", text), ("description", text), ("type", ctypes.c_int)):
        function = getattr(library, f"ggml_backend_dev_{name}")
        function.argtypes, function.restype = [handle], result
    size = ctypes.POINTER(ctypes.c_size_t)
    library.ggml_backend_dev_memory.argtypes = [handle, size, size]
    library.ggml_backend_dev_memory.restype = None
    return library
