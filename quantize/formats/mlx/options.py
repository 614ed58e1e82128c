"""What a recipe may say of an MLX variant."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from quantize.recipe.model import FormatOptions

FP4_GROUPS = {"mxfp4": 32, "nvfp4": 16}
DEFAULT_BITS = 4
AFFINE_GROUPS = (32, 64, 128)


class MlxOptions(FormatOptions):
    """The recipe section of an MLX variant."""

    mode: Literal["affine", "mxfp4", "nvfp4"] = Field(
        "affine", description="integers with a scale and a bias a group, or FP4 with a scale a group"
    )
    bits: Literal[2, 3, 4, 5, 6, 8] = Field(4, description="of a weight; FP4 has 4")
    group_size: Literal[16, 32, 64, 128] = Field(64, description="weights that share a scale: 32, 64 or 128 of affine")
    damping: float = Field(0.01, gt=0, lt=1, description="share of the mean diagonal that is added to the Gram matrix")

    @model_validator(mode="before")
    @classmethod
    def _with_its_group(cls, data: Any) -> Any:
        """The group of an FP4 mode goes without saying."""
        if isinstance(data, dict) and (group := FP4_GROUPS.get(str(data.get("mode")))) and "group_size" not in data:
            return {**data, "group_size": group}
        return data

    @model_validator(mode="after")
    def _go_together(self) -> MlxOptions:
        group = FP4_GROUPS.get(self.mode)
        if group is not None and (self.group_size, self.bits) != (group, DEFAULT_BITS):
            raise ValueError(f"{self.mode} has 4 bits in groups of {group} || leave out `bits` and `group_size`")
        if group is None and self.group_size not in AFFINE_GROUPS:
            raise ValueError("affine groups are of 32, 64 or 128 || write `group_size: 32`")
        return self

    def variant_name(self) -> str:
        """`mlx-int4-g64`, `mlx-mxfp4`."""
        return f"mlx-int{self.bits}-g{self.group_size}" if self.mode == "affine" else f"mlx-{self.mode}"
