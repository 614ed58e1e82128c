"""What people do by hand, without a line of quantize: convert a folder with llama.cpp's converter, then quantize.

python tests/demo/direct.py CHECKPOINT OUT TYPE...: writes OUT/F16.gguf and OUT/TYPE.gguf for each type, as an oracle
for what our builds must hold, tensor for tensor.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any


def convert(folder: Path, out: Path) -> None:
    """Checkpoint -> F16 GGUF by the converter that auto-round bundles."""
    import gguf
    from auto_round.export.export_to_gguf.llama_cpp_conversion import get_conversion

    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    model: Any = get_conversion(folder).get_model_class(architecture)(folder, gguf.LlamaFileType.MOSTLY_F16, out)
    model.write()


def quantize(source: Path, out: Path, kind: str) -> None:
    """F16 GGUF -> one of llama.cpp's types, with its defaults."""
    import llama_cpp

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(settings))
    if code != 0:
        raise SystemExit(f"llama_model_quantize: {code}")


def main() -> None:
    """Command line."""
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    convert(folder, out / "F16.gguf")
    for kind in sys.argv[3:]:
        quantize(out / "F16.gguf", out / f"{kind}.gguf", kind)


if __name__ == "__main__":
    main()
