"""The library of llama.cpp that llama-cpp-python carries: imported without the rest of it, its log kept.

In: what it is wanted for. Out: its C functions.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from quantize.errors import MissingExtraError
from quantize.files.gguf import EXTRA
from quantize.runtimes.llama_cpp.log import keep_log, log_text, telling_line

LOG_LINES = 2000


def import_bindings_only() -> None:
    """Let llama_cpp's C bindings be imported without the rest of the package, and so without numpy.

    For a process of its own that uses nothing else of it: saves 24 MB and a tenth of a second.
    """
    found = find_spec("llama_cpp")
    if found is None or "llama_cpp" in sys.modules:
        return
    package = types.ModuleType("llama_cpp")
    package.__path__ = list(found.submodule_search_locations or [])
    sys.modules["llama_cpp"] = package


def load_library(feature: str, watch: Callable[[str], None] | None = None) -> Any:
    """llama.cpp's C functions, with its log kept instead of printed. watch: is shown each line as it passes by.

    Raises MissingExtraError, which names the feature.
    """
    try:
        import llama_cpp.llama_cpp as library
    except ImportError as exc:
        raise MissingExtraError(feature, EXTRA) from exc
    keep_log(library, LOG_LINES, watch)
    library.llama_backend_init()
    return library


def last_log_line() -> str:
    """The line of the log that tells most of what went wrong."""
    return telling_line(log_text().splitlines()) or "llama.cpp gave no message"
