"""Shared libraries that execute an instruction which no processor has, in the place of llama.cpp's own.

llama-cpp-python takes its library from LLAMA_CPP_LIB_PATH. What is compiled here stands in front of the real one: each
function that it lacks is found there.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest

DIES_AT_ONCE = "void llama_log_set(void) { __builtin_trap(); }"  # the first of its functions that anything calls
DIES_WHEN_LOADED = "__attribute__((constructor)) static void start(void) { __builtin_trap(); }"
# As a library compiled with AMX does: a prompt of 32 tokens takes other kernels than one token does.
DIES_IN_BATCHES = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
struct batch { int32_t tokens; void *token, *embd, *pos, *n_seq_id, *seq_id, *logits; };
int32_t llama_decode(void *context, struct batch batch) {
    if (batch.tokens >= 32) __builtin_trap();
    int32_t (*real)(void *, struct batch) = dlsym(RTLD_NEXT, "llama_decode");
    return real(context, batch);
}
"""


def library(folder: Path, code: str) -> Path:
    """Compile a libllama.so in front of the real one into a new folder; skip the test where there is no gcc."""
    gcc = shutil.which("gcc")
    if gcc is None:
        pytest.skip("needs gcc")
    found = importlib.util.find_spec("llama_cpp")
    assert found is not None
    assert found.submodule_search_locations
    real = Path(found.submodule_search_locations[0]) / "lib"
    folder.mkdir()
    source = folder / "stub.c"
    source.write_text(code, encoding="utf-8")
    links = ["-Wl,--no-as-needed", f"-L{real}", "-lllama", f"-Wl,-rpath,{real}", "-ldl"]
    command = [gcc, "-shared", "-fPIC", "-O1", "-o", folder / "libllama.so", source, *links]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return folder
