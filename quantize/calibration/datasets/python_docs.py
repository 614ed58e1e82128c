"""`python-docs`: CPython's own help topics. They are always there; some are held out, and only ever measured on."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from quantize.calibration.datasets.base import Dataset, HeldOutPart
from quantize.errors import PlanError
from quantize.system.cache import hash_file

NAME = "python-docs"
TOPIC_CHARACTERS = 3000
TOPIC_MINIMUM = 1500
HELD_OUT = slice(32, 72)


class PythonDocs(Dataset):
    """The topics as one dataset; pinned by the file that CPython keeps them in."""

    def knows(self) -> bool:
        """One name."""
        return self.spec.dataset == NAME

    def rows(self, model: Path) -> list[str]:
        """The topics that are not held out."""
        return help_topics()

    def content(self) -> str:
        """Hex sha256 of the file."""
        return hash_file(topics_file())

    def held_out(self) -> HeldOutPart:
        """The topics that are held out."""
        return HeldOutPart(NAME, NAME, topics_file(), help_topics(held_out=True), stream=False)


def help_topics(held_out: bool = False) -> list[str]:
    """CPython's help topics over 1,500 characters, cut to 3,000, in their own order: those held out, or the others.

    The 33rd to the 72nd are held out. How many that are is the interpreter's matter: CPython 3.11.7 has 41 such topics,
    so 9 are held out there.
    """
    from pydoc_data.topics import topics

    long = [text[:TOPIC_CHARACTERS] for text in topics.values() if len(text) > TOPIC_MINIMUM]
    return long[HELD_OUT] if held_out else long[: HELD_OUT.start] + long[HELD_OUT.stop :]


def topics_file() -> Path:
    """Where CPython keeps its help topics. Raises PlanError: this Python has none."""
    spec = importlib.util.find_spec("pydoc_data.topics")
    if spec is None or spec.origin is None:
        raise PlanError("this Python has no pydoc_data.topics", hint="name another calibration dataset")
    return Path(spec.origin)
