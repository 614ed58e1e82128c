"""What a recipe may say of a GGUF variant.

In: the variant's section. Out: GgufOptions, or pydantic's errors, which the recipe turns into file:line:column.
"""

from __future__ import annotations

import hashlib
from typing import Any

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from quantize.formats.gguf.file_size import FileSize, short_size
from quantize.formats.gguf.fit.spec import FitSpec
from quantize.formats.gguf.types import ELEMENT_TYPES, FTYPES, UNQUANTIZED_TYPES, base_type
from quantize.recipe.model import FormatOptions
from quantize.recipe.yaml import suggest
from quantize.runtimes.llama_cpp.vocabulary import names as pre_tokenizers
from quantize.system.untrusted import check_pattern

LATER = ("split_size", "gptq", "fit")  # options that came after the first artifacts
NOT_FITTED = ("type", "pure", "split_size")  # what does not go with `fit`


class GgufOptions(FormatOptions):
    """The recipe section of a GGUF variant."""

    type: str = Field(
        "", description="llama.cpp file type: Q4_K_M, Q5_K_M, Q8_0, …", json_schema_extra={"enum": [*FTYPES]}
    )
    fit: FitSpec | None = Field(None, description="instead of a type: what must fit, and the types are chosen")
    imatrix: bool = Field(False, description="weigh errors by an importance matrix from the calibration pass")
    gptq: bool = Field(
        False,
        description="solve with error feedback into the same types and bytes; makes its importance matrix by itself",
    )
    overrides: dict[str, str] = Field(
        default_factory=dict, description="type of each tensor whose name matches a regular expression"
    )
    output_type: str | None = Field(None, description="type of the output head")
    embedding_type: str | None = Field(None, description="type of the token embedding")
    pure: bool = Field(False, description="all tensors in one type, no mixture")
    pre_tokenizer: str | None = Field(
        None, description="llama.cpp's name of the rules that split text before BPE, where its converter knows none"
    )
    split_size: FileSize | None = Field(
        None,
        description="cut the model into files of at most this size, such as 4G: NAME-00001-of-00003.gguf and so on",
    )

    @model_validator(mode="before")
    @classmethod
    def _with_its_matrix(cls, data: Any) -> Any:
        """Solving begins with an importance matrix, and so does fitting: one way to write it, and one build key."""
        maker = _maker(data)
        if maker is None:
            return data
        if data.get("imatrix") is False:
            raise ValueError(f"{maker} makes an importance matrix || leave out `imatrix: false`")
        return {**data, "imatrix": True}

    @field_validator("type")
    @classmethod
    def _known_type(cls, value: str) -> str:
        if value and value not in FTYPES:
            raise ValueError(f"unknown type || {suggest(value, [*FTYPES])}")
        return value

    @field_validator("output_type", "embedding_type")
    @classmethod
    def _known_element(cls, value: str | None) -> str | None:
        if value is not None and value not in ELEMENT_TYPES:
            raise ValueError(f"unknown tensor type || {suggest(value, [*ELEMENT_TYPES])}")
        return value

    @field_validator("pre_tokenizer")
    @classmethod
    def _known_pre_tokenizer(cls, value: str | None) -> str | None:
        if value is not None and value not in pre_tokenizers():
            raise ValueError(f"unknown pre-tokenizer || {suggest(value, [*pre_tokenizers()])}")
        return value

    @field_validator("overrides")
    @classmethod
    def _known_overrides(cls, value: dict[str, str]) -> dict[str, str]:
        for pattern, kind in value.items():
            if kind not in ELEMENT_TYPES:
                raise ValueError(f"unknown tensor type {kind!r} for {pattern!r} || {suggest(kind, [*ELEMENT_TYPES])}")
            try:
                check_pattern(pattern)
            except ValueError as exc:
                raise ValueError(f"{pattern!r} is not a regular expression ({exc}) || a dot is written `\\.`") from exc
        return value

    @model_validator(mode="after")
    def _type_or_fit(self) -> GgufOptions:
        if self.fit is None:
            if not self.type:
                raise ValueError("key `type` is missing || give a `type`, or what must `fit`")
            return self
        if given := [name for name in NOT_FITTED if getattr(self, name)]:
            raise ValueError(f"`{given[0]}` does not go with `fit` || leave out one of the two")
        return self

    @model_validator(mode="after")
    def _something_is_solved(self) -> GgufOptions:
        if self.type and self.gptq and not self.overrides and base_type(self.type) in UNQUANTIZED_TYPES:
            raise ValueError(f"nothing in {self.type} is rounded, so nothing is solved || leave out `gptq: true`")
        return self

    def variant_name(self) -> str:
        """`q4_k_m`, `q4_k_m-imatrix`, `q4_k_m-gptq`, `q4_k_m-split-4g`, and a short hash where overrides or types are
        not the plain ones.
        """
        kind = self.fit.label if self.fit is not None else self.type.lower()
        parts = [kind, *([self.made_with] if self.made_with else []), *(["pure"] if self.pure else [])]
        parts += [f"split-{short_size(self.split_size)}"] if self.split_size else []
        special = [f"{key}={kind}" for key, kind in self.overrides.items()]
        special += [f"{name}={kind}" for name in ("output_type", "embedding_type") if (kind := getattr(self, name))]
        if special:
            parts.append(hashlib.sha256("|".join(special).encode()).hexdigest()[:6])
        return "-".join(parts)

    @property
    def made_with(self) -> str:
        """What of the calibration pass goes into it, as names have it; empty for nothing."""
        return "gptq" if self.gptq else "imatrix" if self.imatrix and self.fit is None else ""

    @model_serializer(mode="wrap")
    def _only_what_is_asked_for(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without `split_size`, `gptq` and `fit` where there is none: they came after the first artifacts, whose build
        keys stay.
        """
        data: dict[str, Any] = handler(self)
        left_out = (*LATER, "type") if self.fit is not None else LATER
        return {key: value for key, value in data.items() if key not in left_out or value}


def _maker(data: Any) -> str | None:
    """What in a variant makes an importance matrix by itself; None for nothing."""
    if not isinstance(data, dict):
        return None
    return "gptq: true" if data.get("gptq") is True else "fit" if data.get("fit") is not None else None
