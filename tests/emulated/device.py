"""Tensors of the emulated device, and the mode that makes and counts them."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode

import quantize

Model = TypeVar("Model", bound=nn.Module)
PROJECT = f"{Path(quantize.__file__).parent}/"
DEVICE = torch.device("cuda", 0)
aten = torch.ops.aten
# Operations that only describe memory: no kernel runs.
_VIEWS = frozenset(
    {
        "alias", "as_strided", "detach", "diagonal", "empty", "empty_like", "empty_strided", "expand", "lift_fresh",
        "narrow", "new_empty", "new_empty_strided", "permute", "resize_", "select", "set_", "slice", "split",
        "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unfold", "unsqueeze", "view", "_reshape_alias",
        "_unsafe_view",
    }
)  # fmt: skip
# Operations whose result's size, or a Python number, depends on values: the host waits for the device.
_SYNCS = frozenset(
    {
        "_local_scalar_dense", "bincount", "equal", "is_nonzero", "item", "masked_select", "nonzero",
        "unique_consecutive", "unique_dim", "_unique2",
    }
)  # fmt: skip


@dataclass
class Ledger:
    """What the device was asked for. by_line: the project's lines that launched or waited, most first.

    launches: kernels. syncs: times that the host waited for a result. to_host and to_device: bytes copied. converted:
    bytes whose type the CPU changed before they were copied to the device in one call. pinned: bytes put where the
    device copies from without waiting. threads: which asked for work.
    """

    launches: int = 0
    syncs: int = 0
    to_host: int = 0
    to_device: int = 0
    converted: int = 0
    pinned: int = 0
    launched_by: Counter[str] = field(default_factory=Counter)
    synced_by: Counter[str] = field(default_factory=Counter)
    threads: set[int] = field(default_factory=set)

    def launch(self, count: int = 1) -> None:
        self.launches += count
        self.launched_by[_line()] += count
        self.threads.add(threading.get_ident())

    def pin(self, host: Tensor) -> Tensor:
        """A copy that would be in pinned memory."""
        assert not isinstance(host, OnDevice), "only the computer's memory can be pinned"
        self.pinned += host.nbytes
        return host.clone()

    def sync(self) -> None:
        self.syncs += 1
        self.synced_by[_line()] += 1


class OnDevice(Tensor):
    """A tensor that says it is on `cuda:0`; `host` has its values. The two share sizes, strides and offset."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> OnDevice:
        made: OnDevice = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=DEVICE,
        )
        made.host = host
        return made

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __getitem__(self, index: Any) -> Tensor:
        """Lists as indices come as tensors: torch would make them on the device without asking anyone."""
        parts = index if isinstance(index, tuple) else (index,)
        found: Tensor = super().__getitem__(
            tuple(_make_tensor(item) if isinstance(item, list) else item for item in parts)
        )
        return found

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"OnDevice({self.host!r})"

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _run(_current(), function, args, kwargs or {})


class _Emulation(TorchDispatchMode):
    """Catches what makes tensors on the device from nothing."""

    def __torch_dispatch__(
        self, function: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        flat = pytree.arg_tree_leaves(*args, **kwargs)
        wanted = kwargs.get("device")
        on_device = wanted is not None and torch.device(wanted).type == "cuda"
        if on_device or any(isinstance(item, OnDevice) for item in flat):
            return _run(_current(), function, args, kwargs)
        return function(*args, **kwargs)


class _Generator(torch.Generator):
    """Of random numbers on the device: the CPU's, which has the values."""

    def __new__(cls, **_device: object) -> torch.Generator:  # type: ignore[misc]
        return torch._C.Generator()


def _tensor(data: object, *, device: object = None, **options: Any) -> Tensor:
    """torch.tensor, which makes its storage on a device without asking anyone."""
    made = _make_tensor(data, **options)
    return made if device is None else made.to(device)


_make_tensor = torch.tensor


_ledger: Ledger | None = None


def _current() -> Ledger:
    assert _ledger is not None, "a tensor of the emulated device outlived it"
    return _ledger


def _run(ledger: Ledger, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name = function._schema.name.removeprefix("aten::")
    wanted = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else None
    flat = pytree.arg_tree_leaves(*args, **kwargs)
    tensors = [item for item in flat if isinstance(item, Tensor)]
    _count_copy(ledger, name, args, kwargs, wanted)
    if name not in {"copy_", "_to_copy", "_copy_from"}:
        _refuse_mixed(function, tensors)
    if name in _SYNCS:
        ledger.sync()
    if name not in _VIEWS and name not in {"_to_copy", "copy_"}:
        ledger.launch()
    keep_host = wanted == "cpu" or (name == "copy_" and not isinstance(args[0], OnDevice))
    real_args, real_kwargs = pytree.tree_map_only(OnDevice, lambda item: item.host, (args, kwargs))
    if wanted == "cuda":
        real_kwargs["device"] = torch.device("cpu")
    if name in {"_softmax", "_log_softmax"} and real_args[2]:  # from 16 bits to float32 in one kernel, which no CPU has
        real_args = (real_args[0].float(), real_args[1], False)
    if function is aten.mm.dtype:  # of 16 bits with sums in float32, the same
        function, real_args = aten.mm.default, tuple(item.to(real_args[2]) for item in real_args[:2])
    made = function(*real_args, **real_kwargs)
    if name == "_to_copy" and wanted == "cuda":
        made = made.clone() if any(made is item for item in pytree.arg_tree_leaves(*real_args)) else made
    hosts = {id(item.host): item for item in tensors if isinstance(item, OnDevice)}
    if keep_host:
        return made
    return pytree.tree_map_only(Tensor, lambda item: _wrapped(item, hosts), made)


def _wrapped(made: Tensor, hosts: dict[int, OnDevice]) -> Tensor:
    """The result of an operation in place is the tensor that it was done to."""
    if isinstance(made, OnDevice):
        return made
    known = hosts.get(id(made))
    return OnDevice(made) if known is None else known


def _count_copy(ledger: Ledger, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], wanted: str | None) -> None:
    """Copies between the two sides; those within the device are kernels."""
    if name == "_to_copy":
        source, to = args[0], wanted or ("cuda" if isinstance(args[0], OnDevice) else "cpu")
        from_type, to_type = source.dtype, kwargs.get("dtype") or source.dtype
    elif name == "copy_":
        to, source = "cuda" if isinstance(args[0], OnDevice) else "cpu", args[1]
        from_type, to_type = source.dtype, args[0].dtype
    else:
        return
    size = source.numel() * to_type.itemsize
    if isinstance(source, OnDevice) and to == "cpu":
        ledger.to_host += size
        if name == "_to_copy" or not _waits_for_nothing(args, kwargs):
            ledger.sync()
    elif not isinstance(source, OnDevice) and to == "cuda":
        ledger.to_device += size
        ledger.converted += size if from_type != to_type and source.dim() > 0 else 0
        ledger.launch(0)
    else:
        ledger.launch()


def _waits_for_nothing(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether `copy_` was asked not to wait: into pinned memory it then does not."""
    return bool(kwargs.get("non_blocking", args[2] if len(args) > 2 else False))


def _refuse_mixed(function: Any, tensors: list[Tensor]) -> None:
    """As CUDA does: single numbers may come from the CPU, indices too, nothing else."""
    if function._schema.name in {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}:
        tensors = tensors[:1]
    if not any(isinstance(item, OnDevice) for item in tensors):
        return
    strange = [item for item in tensors if not isinstance(item, OnDevice) and item.dim() > 0]
    if strange:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, cuda:0 and {strange[0].device} in {function}"
        )


def _line() -> str:
    """The project's innermost line that is running."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_filename.startswith(PROJECT):
            return f"{frame.f_code.co_filename.removeprefix(PROJECT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


def put_on_gpu(model: Model) -> Model:
    """A model whose weights are on the device from now on; call it inside `emulated_gpu()`."""
    for module in model.modules():
        for name, weight in [*module.named_parameters(recurse=False)]:
            module._parameters[name] = nn.Parameter(weight.detach().to("cuda"), requires_grad=False)
        for name, buffer in [*module.named_buffers(recurse=False)]:
            module._buffers[name] = buffer.to("cuda")
    return model


@cache
def _load_guard() -> ctypes.CDLL:
    """Compile and load the device guard that torch's CPU wheel lacks."""
    from torch.utils.cpp_extension import include_paths

    source = Path(__file__).with_name("guard.cpp")
    library = Path(tempfile.mkdtemp(prefix="emulated-gpu-")) / "guard.so"
    includes = [f"-I{path}" for path in include_paths()]
    torch_libraries = Path(torch.__file__).parent / "lib"
    command = ["g++", "-shared", "-fPIC", "-std=c++20", "-O1", *includes, str(source), "-o", str(library)]
    subprocess.run([*command, f"-L{torch_libraries}", "-lc10"], check=True)
    return ctypes.CDLL(str(library))


@contextmanager
def emulated_gpu(*, vram_bytes: int = 8 << 30, peak_bytes: int = 0, name: str = "Emulated GPU") -> Iterator[Ledger]:
    """Have torch see one CUDA device in this block; tensors of it must not outlive the block."""
    global _ledger
    _load_guard()
    _device_constructors()  # torch keeps the first answer, which must have its own functions
    answers = {
        "is_available": True, "device_count": 1, "current_device": 0, "get_device_name": name,
        "is_bf16_supported": True,
        "mem_get_info": (vram_bytes, vram_bytes), "empty_cache": None, "synchronize": None, "_lazy_init": None,
        "max_memory_allocated": peak_bytes, "max_memory_reserved": peak_bytes,
        "memory_allocated": 0, "memory_reserved": 0,
        "reset_peak_memory_stats": None, "get_device_capability": (9, 0), "is_initialized": True,
    }  # fmt: skip
    with ExitStack() as stack:
        for function, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, function, lambda *_args, _is=answer, **_kwargs: _is))
        stack.enter_context(
            mock.patch.object(Tensor, "pin_memory", lambda self: _ledger.pin(self) if _ledger else self)
        )
        stack.enter_context(mock.patch.object(torch, "Generator", _Generator))
        stack.enter_context(mock.patch.object(torch, "tensor", _tensor))
        # in inference mode composite operations come undivided, with devices that nothing here understands
        stack.enter_context(mock.patch.object(torch, "inference_mode", torch.no_grad))
        _ledger = Ledger()
        stack.enter_context(_Emulation())
        try:
            yield _ledger
        finally:
            _ledger = None
