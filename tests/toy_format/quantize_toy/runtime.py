"""What the toy runs in: transformers' own layers, with linears that keep their codes.

In: where an artifact is. Out: the loaded model. Nothing heavy is imported before.
"""

from __future__ import annotations

from dataclasses import dataclass

from quantize.errors import VerifyError, first_line
from quantize.runtimes.base import ModelRef
from quantize.runtimes.devices import DevicePlace
from quantize.runtimes.probe import Probe, check_alike
from quantize.runtimes.transformers.kind import Transformers
from quantize.runtimes.transformers.load import LOAD_ERRORS, LoadedModel

DISTRIBUTION = "quantize-toy-format"


@dataclass(frozen=True)
class ToyKind(Transformers):
    """See RuntimeKind. transformers does the rest: measuring, answering and serving differ in nothing but `load`."""

    name: str = "toy rows"

    @property
    def packages(self) -> tuple[str, ...]:
        """What tells which runtime it is."""
        return (*super().packages, DISTRIBUTION)

    def computes_in(self, place: DevicePlace) -> str:
        """See RuntimeKind."""
        return "float32"

    def load(self, model: ModelRef, device: str) -> LoadedModel:
        """See TransformersLoader."""
        from quantize_toy.modules import open_model

        try:
            return LoadedModel(open_model(model.path, device))
        except LOAD_ERRORS as exc:
            raise VerifyError(f"{model.folder.name}: it does not load: {first_line(exc)}") from exc


def try_rounding() -> str:
    """A matrix to codes and back."""
    import numpy as np

    from quantize_toy.rounding import round_rows

    weight = np.random.default_rng(0).standard_normal((8, 64), dtype=np.float32)
    codes, scales = round_rows(weight)
    check_alike(codes * scales[:, None], weight, "a matrix to codes and back")
    return "a matrix to codes and back"


TOY_PROBE = Probe("toy rows", DISTRIBUTION, try_rounding)
