"""Whether transformers has a model's classes by itself, so that the code which the model brings is not needed.

In: config.json. Out: yes or no, told by the files of the installed package: nothing is imported.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MODEL_TYPE = re.compile(r"[A-Za-z0-9_-]+")
CLASS = re.compile(r"^class (\w+)", re.MULTILINE)


def known_without_code(config: Mapping[str, Any]) -> bool:
    """Whether each class that `auto_map` names is one that transformers has for the `model_type`."""
    asked = config.get("auto_map")
    if not isinstance(asked, Mapping):
        return False
    listed = [name for value in asked.values() for name in (value if isinstance(value, list) else [value]) if name]
    wanted = {str(name).rpartition(".")[2] for name in listed} | set(map(str, config.get("architectures") or ()))
    return bool(wanted) and wanted <= classes_of(config.get("model_type"))


def classes_of(model_type: object) -> set[str]:
    """The classes of configs, models and tokenizers of a model type; none where transformers is not installed."""
    if not isinstance(model_type, str) or not MODEL_TYPE.fullmatch(model_type):
        return set()
    spec = importlib.util.find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        return set()
    folder = Path(next(iter(spec.submodule_search_locations))) / "models" / model_type.replace("-", "_")
    texts = (path.read_text(encoding="utf-8", errors="replace") for path in sorted(folder.glob("*.py")))
    return {name for text in texts for name in CLASS.findall(text)}
