"""One build of GGUF variants of a tiny checkpoint, from a calibration text: what several test modules look at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantize.build.execution import RunOptions
from quantize.events import ListReporter
from quantize.formats import option_models
from quantize.model.checkpoint import open_checkpoint
from quantize.recipe.model import load_recipe
from quantize.store.artifact import Artifact
from quantize.store.store import Store
from quantize.store.workspace import Workspace
from quantize.system.cache import Cache
from quantize.testing import TinyModel, make_checkpoint, write_recipe
from tests.conftest import build


class GgufBuild:
    """All variants, none of which failed, and what was said meanwhile."""

    def __init__(
        self, root: Path, variants: Sequence[dict[str, Any]], calibration: dict[str, Any],
        options: RunOptions = RunOptions(),  # noqa: B008 - it is frozen
    ) -> None:  # fmt: skip
        self.root, self.said = root, ListReporter()
        self.checkpoint = open_checkpoint(make_checkpoint(root / "tiny", TinyModel()))
        text = [f"Paragraph {index}: the quick brown fox jumps over the lazy dog. " * 3 for index in range(40)]
        (root / "text.txt").write_text("\n\n".join(text))
        path = write_recipe(root / "tiny.yaml", self.checkpoint.folder, variants, calibration=calibration)
        self.recipe = load_recipe(path, option_models())
        self.workspace = Workspace(Store(root / "store"), Cache(root / "cache"), self.said)
        outcomes = build(self.recipe, self.workspace, options, evaluate=False)
        assert [item.error for item in outcomes if item.error] == []
        self.artifacts = {item.variant: item.artifact for item in outcomes if item.artifact}

    def artifact(self, variant: str) -> Artifact:
        return self.artifacts[variant]

    def file(self, variant: str) -> Path:
        return min(path for path in self.artifact(variant).folder.glob("*.gguf") if ".imatrix.gguf" not in path.name)
