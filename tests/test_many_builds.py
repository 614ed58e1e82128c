"""Eight builds of overlapping recipes at once, by the real command; many_builds.py does it with any recipe."""

from __future__ import annotations

from pathlib import Path

from quantize.testing import write_recipe
from tools.many_builds import at_once, halves, problems

TYPES = ["Q8_0", "Q4_0", "F16"]


def test_eight_builds_at_once_build_each_variant_once(tiny: Path, tmp_path: Path) -> None:
    recipes = []
    for number, types in enumerate(halves(TYPES, 8)):
        (tmp_path / str(number)).mkdir()
        variants = [{"format": "gguf", "types": types}]
        recipes.append(write_recipe(tmp_path / str(number) / "shared.yaml", tiny, variants))
    ended = at_once([[str(path), "--no-eval", "--threads", "1"] for path in recipes], tmp_path)
    assert problems(ended, {name.lower() for name in TYPES}, tmp_path) == []
    assert sum("another build has just made it" in item.said for item in ended) > 0
