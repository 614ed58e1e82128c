"""The calibration pass's part in fitting: its Gram matrices, and how much each output of each linear matters.

In: blocks of the pass. Out: what GramCollector leaves, and where statistics are guided a file for each block with the
mean square gradients.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.errors import disk_errors
from quantize.formats.gguf.grams import GramCollector
from quantize.formats.gguf.vocabulary import write_vocabulary
from quantize.model.layout import BlockLayout
from quantize.system.cache import are_whole, hash_file
from quantize.system.files import sync

if TYPE_CHECKING:
    import torch

    from quantize.calibration.stream import Block
    from quantize.calibration.vocabulary import VocabularyStatistics

    Solved = tuple[dict[str, torch.Tensor], list[torch.Tensor]]


class FitCollector:
    """Keeps what GramCollector keeps, and the outputs' weights."""

    def __init__(self, folder: Path, imatrix: Path) -> None:
        self._folder, self._grams = folder, GramCollector(folder, imatrix)
        self._files: dict[str, str] = {}  # name -> sha256

    def pieces(self, layout: BlockLayout) -> Sequence[BlockLayout]:
        """The block whole."""
        return self._grams.pieces(layout)

    def solve(self, block: Block) -> tuple[Solved, dict[str, torch.Tensor], VocabularyStatistics | None]:
        """What GramCollector takes, the outputs' weights by linear, and of the last block also of the head."""
        outputs = {name: value.cpu() for name, value in block.outputs.items()}
        return self._grams.solve(block), outputs, block.vocabulary

    def add(
        self, index: int, solved: Sequence[tuple[Solved, dict[str, torch.Tensor], VocabularyStatistics | None]]
    ) -> None:
        """Keep a block's."""
        from safetensors.torch import save_file

        self._grams.add(index, [grams for grams, _, _ in solved])
        outputs = dict(ChainMap(*(each for _, each, _ in solved)))
        ends = next((each for _, _, each in solved if each is not None), None)
        if ends is not None:
            kept = write_vocabulary(self._folder, ends)
            self._files[kept.name] = hash_file(kept)
        path = self._folder / _file_name(index)
        with disk_errors(self._folder):
            save_file(outputs, path)
            sync(path)
        self._files[path.name] = hash_file(path)

    def state(self) -> dict[str, Any]:
        """The blocks' files and their hashes."""
        return {**self._grams.state(), "outputs": dict(self._files)}

    def resume(self, state: Mapping[str, Any]) -> bool:
        """Go on with the files of a stopped build."""
        files = state.get("outputs")
        if not isinstance(files, dict) or not self._grams.resume(state) or not are_whole(self._folder, files):
            return False
        self._files = dict(files)
        return True

    def finish(self) -> None:
        """Nothing more of its own."""
        self._grams.finish()


def read_outputs(folder: Path, layout: BlockLayout) -> dict[str, torch.Tensor]:
    """How much each output of each linear of a block matters, float32 [out]; {} where statistics were not guided."""
    from safetensors.torch import load_file

    with disk_errors(folder):
        found: dict[str, torch.Tensor] = load_file(folder / _file_name(layout.index))
    return found


def _file_name(index: int) -> str:
    return f"outputs.{index:05d}.safetensors"
