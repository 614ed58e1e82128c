"""What a recipe says of where its artifacts are to serve: words for the production decision, which nothing here reads.

In: the `serving` section. Out: a ServingContext. Nothing in it enters a build key.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, Field

from quantize.recipe.yaml import STRICT

Words = Annotated[str, Field(min_length=1)]


class ServingContext(BaseModel):
    """Who asks, how much, on what: the head of production_decision.md. What is left out is to be filled in there."""

    model_config = STRICT
    use_case: Words | None = Field(default=None, description="what the answers are for, and who reads them")
    traffic: Words | None = Field(default=None, description="the target: requests a second, tokens in and out")
    sla: Words | None = Field(default=None, description="what is promised: latency, availability, errors")
    hardware: Words | None = Field(default=None, description="what it is to run on")
    runtime: Words | None = Field(default=None, description="what it is to run in, with its version")
