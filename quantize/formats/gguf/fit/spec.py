"""What must fit, as a recipe says it: a size of the file, bits a weight, or a card with what is run on it.

In: the section `fit` of a variant. Out: FitSpec, or pydantic's errors. The bytes that it comes to are budget.py's.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BaseModel, Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from quantize.errors import UsageError
from quantize.estimate.cards import GraphicsCard, card_of
from quantize.estimate.vram import KV_TYPES
from quantize.formats.gguf.file_size import FileSize, short_size
from quantize.recipe.yaml import STRICT, suggest

ONE_OF = "give one of `size`, `bits`, `gpu` or `vram`"
ON_A_CARD = ("context", "concurrency", "kv")


class FitSpec(BaseModel):
    """The recipe section `fit`."""

    model_config = STRICT
    size: FileSize | None = Field(None, description="of the model file, at most: such as 2.2G")
    bits: Annotated[float, Field(gt=0, le=16)] | None = Field(None, description="a weight, at most, over all tensors")
    gpu: str | None = Field(None, description="the card that it must fit, such as RTX 4060 8GB")
    vram: FileSize | None = Field(None, description="memory of the card, where its name is not known or is shared")
    context: Annotated[int, Field(ge=1)] = Field(4096, description="tokens of a sequence on the card")
    concurrency: Annotated[int, Field(ge=1)] = Field(1, description="sequences at once on the card")
    kv: str = Field("f16", description="type of the KV cache on the card", json_schema_extra={"enum": [*KV_TYPES]})
    check: bool = Field(True, description="make the best stock type map too, and take the better one")

    @field_validator("gpu")
    @classmethod
    def _known_card(cls, value: str | None) -> str | None:
        try:
            card_of(value)
        except UsageError as exc:
            raise ValueError(f"{exc.message} || {(exc.hint or '').replace('--vram ', 'vram: ')}") from exc
        return value

    @field_validator("kv")
    @classmethod
    def _known_kv(cls, value: str) -> str:
        if value not in KV_TYPES:
            raise ValueError(f"unknown type of a KV cache || {suggest(value, [*KV_TYPES])}")
        return value

    @model_validator(mode="after")
    def _one_budget(self) -> FitSpec:
        given = [self.size is not None, self.bits is not None, self.gpu is not None or self.vram is not None]
        if sum(given) != 1:
            raise ValueError(f"{'more than one budget' if any(given) else 'no budget'} || {ONE_OF}")
        for name in ON_A_CARD:
            if not given[2] and name in self.model_fields_set:
                raise ValueError(f"`{name}` goes with `gpu` or `vram` alone || leave it out, or name a card")
        return self

    @property
    def card(self) -> GraphicsCard | None:
        """The card that it must fit; None where a size or bits are given."""
        return card_of(self.gpu, None if self.vram is None else str(self.vram))

    @property
    def label(self) -> str:
        """What must fit, as a part of a name; differs wherever the budget does."""
        if self.size is not None:
            return f"fit-{short_size(self.size)}"
        if self.bits is not None:
            return f"fit-{self.bits:g}bit"
        card = re.sub(r"[^a-z0-9]+", "-", (self.gpu or "").lower()).strip("-")
        parts = [card, short_size(self.vram) if self.vram else "", str(self.context)]
        parts += [f"x{self.concurrency}"] if self.concurrency > 1 else []
        parts += [self.kv] if self.kv != "f16" else []
        return "-".join(["fit", *filter(None, parts)])

    @property
    def words(self) -> str:
        """What must fit, for people."""
        if self.size is not None:
            return f"a file of {self.size:,} bytes"
        if self.bits is not None:
            return f"{self.bits:g} bits a weight"
        card = " ".join(filter(None, [self.gpu, f"{self.vram:,} bytes" if self.vram else ""]))
        at_once = f" x {self.concurrency}" if self.concurrency > 1 else ""
        return f"{card}, context {self.context:,}{at_once}, KV cache {self.kv}"

    @model_serializer(mode="wrap")
    def _only_what_is_said(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """One way to write it in a build key: without what is not given, and a card's workload only with a card."""
        data: dict[str, Any] = handler(self)
        on_card = self.gpu is not None or self.vram is not None
        left_out = () if on_card else ON_A_CARD
        return {key: value for key, value in data.items() if value is not None and key not in left_out}
