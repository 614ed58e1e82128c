"""llama.cpp's log, kept instead of printed.

In: the functions of llama_cpp. Out: what it said since. llama.cpp stores the address of the function that takes its
log, for the whole process: that function is made here once and never freed, and what changes is where it writes.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Iterable
from typing import Any

from quantize.errors import says_out_of_memory

_callback: Any = None
_lines: deque[str] = deque()


def keep_log(library: Any, most: int | None = None) -> deque[str]:
    """Let llama.cpp's log go to a new list, of the last `most` pieces, and return it."""
    global _callback, _lines
    if _callback is None:
        _callback = library.llama_log_callback(_keep)
    _lines = deque(maxlen=most)
    library.llama_log_set(_callback, ctypes.c_void_p(0))
    return _lines


def log_text() -> str:
    """What llama.cpp has said lately."""
    return "".join(_lines)


def telling_line(log: Iterable[str]) -> str:
    """The last line that speaks of memory that ran out, else of a failure, else the last; "" if there is none."""
    lines = [line.strip() for line in log if line.strip()]
    failed = [line for line in lines if "fail" in line.lower() or "error" in line.lower()]
    short = [line for line in lines if says_out_of_memory(line)]  # the reason, not what came of it
    return (short or failed or lines or [""])[-1][:300]


def _keep(_level: int, text: bytes, _data: Any) -> None:
    _lines.append(text.decode("utf-8", "replace"))
