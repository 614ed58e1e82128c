"""make for quantized models: a recipe and a checkpoint go in; pinned, verified, measured artifacts come out.

`load_recipe`, `plan`, `build` and `rebuild` do what the commands of these names do, with the same defaults; `errors`
has what they raise. Each is imported when it is first used, so that `import quantize` is quick.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantize import errors
    from quantize.api import build, load_recipe, plan, rebuild
    from quantize.build.outcome import Outcome, OutcomeState
    from quantize.build.plan import Plan
    from quantize.build.rebuild import Rebuild
    from quantize.build.size import SizedPlan
    from quantize.events import Event, EventKind, Reporter
    from quantize.recipe.model import Recipe
    from quantize.store.artifact import Artifact
    from quantize.store.store import Store

__version__ = "0.1.0"
DISTRIBUTION = "quantize-models"  # what pip installs: `quantize` is another project on PyPI

__all__ = [
    "Artifact",
    "Event",
    "EventKind",
    "Outcome",
    "OutcomeState",
    "Plan",
    "Rebuild",
    "Recipe",
    "Reporter",
    "SizedPlan",
    "Store",
    "__version__",
    "build",
    "errors",
    "load_recipe",
    "plan",
    "rebuild",
]

# Public name -> the module that has it.
_HOMES = {
    "Artifact": "quantize.store.artifact",
    "Event": "quantize.events",
    "EventKind": "quantize.events",
    "Outcome": "quantize.build.outcome",
    "OutcomeState": "quantize.build.outcome",
    "Plan": "quantize.build.plan",
    "Rebuild": "quantize.build.rebuild",
    "Recipe": "quantize.recipe.model",
    "Reporter": "quantize.events",
    "SizedPlan": "quantize.build.size",
    "Store": "quantize.store.store",
    "build": "quantize.api",
    "load_recipe": "quantize.api",
    "plan": "quantize.api",
    "rebuild": "quantize.api",
}

_CALLABLE = frozenset({"build"})  # of these, those that are folders too


def __getattr__(name: str) -> Any:
    """Import a public name when it is asked for (PEP 562)."""
    if name == "errors" or name in _CALLABLE:
        return importlib.import_module(f"quantize.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _CallableFolder(ModuleType):
    """A folder of the package that bears the name of a public function: called, it is that function."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        name = self.__name__.rpartition(".")[2]
        return getattr(importlib.import_module(_HOMES[name]), name)(*arguments, **options)


class _Package(ModuleType):
    """This module, where `quantize.build` is both the folder and the function."""

    def __setattr__(self, name: str, value: object) -> None:
        if name in _CALLABLE and isinstance(value, ModuleType):
            function = f"{_HOMES[name]}.{name}"
            value.__class__ = _CallableFolder
            value.__doc__ = f"{value.__doc__}\n\nCalled, it is {function}: see there."
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
