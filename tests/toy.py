"""The toy format of tests/toy_format, installed for as long as a test needs it, as pip would install it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from quantize.formats import forget_formats

ROOT = Path(__file__).parent.parent
FOLDER = Path(__file__).parent / "toy_format"


@contextmanager
def toy_installed() -> Iterator[None]:
    """On the path of this process and of those that it starts."""
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(str(FOLDER))
            patch.setenv("PYTHONPATH", str(FOLDER), prepend=os.pathsep)
            forget_formats()
            yield
    finally:
        forget_formats()
