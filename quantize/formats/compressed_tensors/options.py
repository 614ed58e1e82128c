"""What a recipe may say of a compressed-tensors variant."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from quantize.formats.compressed_tensors.schemes import GROUPED, SCHEMES, Name, Scheme
from quantize.recipe.model import FormatOptions

AWQ_SCHEMES = ("W4A16", "W4A16_ASYM")
DEFAULT_GROUP, DEFAULT_DAMPING = 128, 0.01
GROUP_SIZES = (32, 64, 128)


class CompressedTensorsOptions(FormatOptions):
    """The recipe section of a compressed-tensors variant."""

    scheme: Name = Field(description="what weights and activations become, as compressed-tensors names it")
    group_size: Literal[32, 64, 128] | None = Field(
        None, description="weights that share a scale, of W4A16, W4A16_ASYM and W8A16: 128 where it is not given"
    )
    method: Literal["gptq", "awq"] = Field(
        "gptq", description="gptq feeds rounding errors forward; awq scales input channels first (W4A16, W4A16_ASYM)"
    )
    smooth: bool = Field(
        False, description="share the range of activations with the weights first (SmoothQuant), of W8A8"
    )
    damping: float = Field(
        DEFAULT_DAMPING, gt=0, lt=1, description="share of the mean diagonal that is added to the Gram matrix"
    )

    @model_validator(mode="before")
    @classmethod
    def _with_its_group(cls, data: Any) -> Any:
        """One way to write the usual group, and one build key."""
        if isinstance(data, dict) and data.get("scheme") in GROUPED and data.get("group_size") is None:
            return {**data, "group_size": DEFAULT_GROUP}
        return data

    @model_validator(mode="after")
    def _go_together(self) -> CompressedTensorsOptions:
        if self.group_size is not None and self.scheme not in GROUPED:
            raise ValueError(f"{self.scheme} has no group size to choose || leave out `group_size`")
        if self.method == "awq" and self.scheme not in AWQ_SCHEMES:
            raise ValueError(f"method: awq works with {' and '.join(AWQ_SCHEMES)} || leave out `method`")
        if self.damping != DEFAULT_DAMPING and (self.method == "awq" or not self.kind.calibrated):
            what = "method: awq" if self.method == "awq" else self.scheme
            raise ValueError(f"{what} has no damping || leave out `damping`")
        if self.smooth and self.scheme != "W8A8":
            raise ValueError(f"smooth: true works with W8A8, not with {self.scheme} || leave out `smooth`")
        return self

    @property
    def folds(self) -> bool:
        """Whether scales go into norms and neighbors."""
        return self.smooth or self.method == "awq"

    @property
    def kind(self) -> Scheme:
        """What the scheme is."""
        return SCHEMES[self.scheme]

    @property
    def bits(self) -> int:
        """Of a weight."""
        return self.kind.bits

    @property
    def shared(self) -> int | None:
        """Weights of a row that share a scale; None where a whole row or a square block does."""
        return self.group_size or self.kind.weights["group_size"] or None

    def variant_name(self) -> str:
        """`ct-w4a16-g128`, `ct-w4a16-g64-awq`, `ct-w8a8-smooth`, `ct-fp8-dynamic`."""
        group = f"-g{self.group_size}" if self.group_size else ""
        how = "-awq" if self.method == "awq" else "-smooth" if self.smooth else ""
        return f"ct-{self.scheme.lower().replace('_', '-')}{group}{how}"
