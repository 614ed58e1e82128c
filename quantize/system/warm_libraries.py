"""Imported by the process that steps are copies of: loads the libraries, in the settings that every step has."""

from __future__ import annotations

import os

from quantize.system.process import settle_libraries
from quantize.system.warm import load_libraries

_nowhere = os.open(os.devnull, os.O_RDWR)
for _stream in (0, 1, 2):  # whoever reads this program's output must not wait for this process
    os.dup2(_nowhere, _stream)
settle_libraries()
load_libraries()
