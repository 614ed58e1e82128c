"""The importance matrix of a model whose columns the converter moves: each sum lies at the column that it is of.

Judged by gguf's reader, and by a search for each column of the file among the source's.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file

from quantize.events import SilentReporter
from quantize.formats.gguf.imatrix import write_from_scratch
from quantize.model.architecture import block_layouts
from quantize.model.checkpoint import open_checkpoint
from quantize.runtimes.llama_cpp.convert import ConvertRequest, convert
from quantize.store.manifest import CalibrationEntry
from tests.families import family_named, make_family

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers and its plugins warn on import
TEXT = CalibrationEntry(spec={"sequence_length": 64}, hash="", sequences=1, tokens=64, seed=0)
MOVED, IN_PLACE = "linear_attn.out_proj.weight", "mlp.down_proj.weight"


def test_sums_lie_at_the_columns_that_they_are_of(tmp_path: Path) -> None:
    """Qwen3.5 has two value heads for each key head, which llama.cpp puts in another order."""
    family, folder = family_named("Qwen3.5"), tmp_path / "model"
    make_family(family, folder)
    checkpoint = open_checkpoint(folder)
    convert(
        SilentReporter(), ConvertRequest(folder, "F32", {"general.name": "x"}, family.pre_tokenizer), tmp_path / "x"
    )
    sums = {}
    for layout in block_layouts(checkpoint.config):
        for linear in layout.linears:
            sums[linear.tensor] = np.arange(checkpoint.tensors[linear.tensor].shape[1], dtype=np.float32)
            sums[linear.tensor + ":tokens"] = np.ones(1, np.float32)
    save_file(sums, tmp_path / "sums")
    architecture = gguf.GGUFReader(tmp_path / "x").fields["general.architecture"].contents()
    write_from_scratch(tmp_path / "sums", tmp_path / "y", architecture, checkpoint, TEXT, tmp_path / "x")
    matrices = {item.name: item.data for item in gguf.GGUFReader(tmp_path / "x").tensors}
    written = {item.name: item.data for item in gguf.GGUFReader(tmp_path / "y").tensors}
    for name, ours in ((MOVED, "blk.0.ssm_out.weight"), (IN_PLACE, "blk.0.ffn_down.weight")):
        source = checkpoint.read(f"model.layers.0.{name}").numpy()
        places = [int(np.flatnonzero((column == source.T).all(1))[0]) for column in matrices[ours].T]
        assert (places != sorted(places)) == (name == MOVED)
        assert written[f"{ours}.in_sum2"].reshape(-1).tolist() == places
