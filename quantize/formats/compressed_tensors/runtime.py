"""What compressed-tensors artifacts run in: transformers, with the library of that name beside it."""

from __future__ import annotations

from dataclasses import dataclass

from quantize.model.checkpoint import read_json
from quantize.model.quantized import schemes_of
from quantize.runtimes.base import ModelRef
from quantize.runtimes.devices import DevicePlace
from quantize.runtimes.probe import Probe
from quantize.runtimes.transformers.kind import Transformers
from quantize.runtimes.transformers.load import LoadedModel, load_causal_lm

EXTRA = "compressed-tensors"
# Weights alone are dequantized as they are read: it is the same product. Left as they are, transformers 5.23 finds zero
# points of another shape, and FP4 is bfloat16 whatever the model computes in.
DEQUANTIZED = {"dequantize": True}


@dataclass(frozen=True)
class CompressedTransformers(Transformers):
    """See RuntimeKind."""

    def load(self, model: ModelRef, device: str) -> LoadedModel:
        """See TransformersLoader. Where activations are rounded too, it is the library that does it."""
        settings = read_json(model.folder / "config.json").get("quantization_config", {})
        alone = not any(scheme.get("input_activations") for scheme in schemes_of(settings))
        dtype = self.computes_in(DevicePlace(device))
        return LoadedModel(load_causal_lm(model.folder, device, dtype=dtype, reading=DEQUANTIZED if alone else None))


COMPRESSED_TENSORS = CompressedTransformers(EXTRA, helper="compressed_tensors", chooses_dtype=True)


def try_compressed_tensors() -> str:
    """Its import, as loading an artifact does it."""
    COMPRESSED_TENSORS.import_torch("the compressed-tensors format")
    import compressed_tensors

    return f"imported, as version {compressed_tensors.__version__}"


COMPRESSED_TENSORS_PROBE = Probe("compressed-tensors", "compressed-tensors", try_compressed_tensors)
