"""Which limits a recipe may set, and what each is where it sets none: the only place that says so.

In: the `gates` section of a recipe. Out: GateLimits, every limit filled in; `model_fields_set` has those that the
recipe gave. What the limits are held against, and how, is evaluate/gates.py's.

Default limits and why:
- mean KL divergence 0.05 nats: Q8_0 of the demo model measured 0.004, Q4_K_M 0.056, and that one answers a question for
  the capital of France in broken French. Text that looks right is lost between the two.
- perplexity ratio 1.05: the same files measured 1.004 and 1.084; what is published for 4-bit builds of 7B models is
  1.01 to 1.05, so a larger loss is more than the bits have to cost.
- golden prompts: 95 % of what the source passes, and of its JSON answers nine in ten. Single answers flip by rounding
  alone: with Q8_0 the demo model's "Paris" hangs on whether flash attention is on. So the default limit refuses only
  what chance does not explain (a sign test of lost against gained prompts, 5 %), and flags the rest; a limit that a
  recipe sets itself is taken at its word.
- size below the source's: or there is no point.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from quantize.recipe.yaml import STRICT

MAX_UNQUANTIZED_SIZE_RATIO = 1.1
"""`max_size_ratio` of 16 bit and more: a conversion saves nothing, its file holds the same weights and a header."""
MAX_ERROR_RATE = 0.01
"""`max_error_rate` where a load was measured and the recipe sets none: one failed request in a hundred."""
SERVING_LIMITS = ("max_latency_p95_seconds", "max_error_rate", "max_memory_bytes")
"""Limits on what a load test measures, which a build does not run."""

Positive = Annotated[float, Field(gt=0, strict=False)]
Share = Annotated[float, Field(ge=0, le=1, strict=False)]


def _null_too(schema: dict[str, Any]) -> None:
    """Have the schema say of every limit that it may be null, as the validator has it."""
    for key, limit in schema["properties"].items():
        if "anyOf" not in limit:
            said = {name: limit.pop(name) for name in ("title", "description", "default")}
            schema["properties"][key] = {"anyOf": [limit, {"type": "null"}], **said}


class GateLimits(BaseModel):
    """Limits that an artifact must keep, measured against its source; null stands for the default."""

    model_config = STRICT | ConfigDict(json_schema_extra=_null_too)
    max_kl: Positive = Field(default=0.05, description="mean KL divergence from the source, in nats")
    max_conversion_kl: Positive = Field(
        default=0.02,
        description="mean KL divergence of the source in 16 bits in the artifact's runtime from the source itself, in "
        "nats; where the two are compared",
    )
    max_perplexity_ratio: Positive = Field(default=1.05, description="perplexity over that of the source")
    min_golden_pass_rate: Share = Field(
        default=0.95,
        description="golden prompts passed, over those that the source passes; by default beyond chance",
    )
    max_json_loss: Share = Field(default=0.10, description="share of the source's good JSON answers that are lost")
    max_task_loss: Share | None = Field(
        default=None,
        description="share of the samples that the artifact loses on the worst of the recipe's tasks: 0.02 is two "
        "points; where tasks are measured",
    )
    max_size_ratio: Positive = Field(
        default=1.0,
        description="bytes of the weights over the source's, which they must be under; "
        f"{MAX_UNQUANTIZED_SIZE_RATIO:g} by default for 16 bit and more",
    )
    max_latency_p95_seconds: Positive | None = Field(
        default=None, description="of the slowest load that `quantize bench` measured; looked at by `quantize report`"
    )
    max_error_rate: Share | None = Field(
        default=None,
        description="failed requests of `quantize bench` over all; looked at by `quantize report`, which allows "
        f"{MAX_ERROR_RATE:g} of a load that was measured where none is set",
    )
    max_memory_bytes: Annotated[int, Field(gt=0)] | None = Field(
        default=None,
        description="at the peak of `quantize bench`: of the GPUs, else RAM; looked at by `quantize report`",
    )

    @model_validator(mode="before")
    @classmethod
    def _null_is_the_default(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {key: value for key, value in data.items() if value is not None or key not in cls.model_fields}
