"""llama.cpp's log, kept instead of printed.

In: the functions of llama_cpp. Out: what it said since, and each line to who watches it pass by. llama.cpp stores the
address of the function that takes its log, for the whole process: that function is made here once and never freed, and
what changes is where it writes.
"""

from __future__ import annotations

import ctypes
import re
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from quantize.errors import says_out_of_memory

LONGEST = 300
FAILURE = re.compile(r"fail|error|unable|invalid|unknown|unsupported|assert", re.IGNORECASE)
CONSEQUENCE = re.compile(r"(failed|unable) to (load|create|initialize)( the)? (model|context)", re.IGNORECASE)
CAUSE = re.compile(r"\b(found|invalid|missing|unknown|expected|corrupt\w*|nan|inf|out of bounds)\b", re.IGNORECASE)

_callback: Any = None
_lines: deque[str] = deque()
_watch: Callable[[str], None] | None = None
_begun = ""  # of a line that has not ended


def keep_log(library: Any, most: int | None = None, watch: Callable[[str], None] | None = None) -> deque[str]:
    """Let llama.cpp's log go to a new list, of the last `most` pieces, and return it.

    watch: is shown every line as it comes. A model has thousands: what counts is looked for here, not in the last ones.
    """
    global _callback, _lines, _watch, _begun
    if _callback is None:
        _callback = library.llama_log_callback(_keep)
    _lines, _watch, _begun = deque(maxlen=most), watch, ""
    library.llama_log_set(_callback, ctypes.c_void_p(0))
    return _lines


def log_text() -> str:
    """What llama.cpp has said lately."""
    return "".join(_lines)


def telling_line(log: Iterable[str]) -> str:
    """The reason in a log: of memory that ran out, else of the last failure, else the last line; "" if there is none.

    llama.cpp gives a reason and then, a line on, what came of it. A line that only says that nothing was loaded or made
    is passed over, and a cause that stands right above the failure that it led to goes along.
    """
    lines = [line.strip(" .\t\n") for line in log if line.strip(" .\t\n")]
    short = [line for line in lines if says_out_of_memory(line)]  # the reason, not what came of it
    failed = [number for number, line in enumerate(lines) if FAILURE.search(line)]
    telling = [number for number in failed if not CONSEQUENCE.search(lines[number])] or failed
    if short or not telling:
        return (short or lines or [""])[-1][:LONGEST]
    last = telling[-1]
    cause = [lines[last - 1]] if last and CAUSE.search(lines[last - 1]) else []
    return " / ".join([*cause, lines[last]])[:LONGEST]


def _keep(_level: int, text: bytes, _data: Any) -> None:
    global _begun
    piece = text.decode("utf-8", "replace")
    _lines.append(piece)
    if _watch is not None:
        *lines, _begun = (_begun + piece).split("\n")
        for line in lines:
            _watch(line)
