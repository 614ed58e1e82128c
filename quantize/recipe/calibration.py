"""Which text the calibrated formats see, as a recipe or a calibration/*.yaml file says it: one dataset, or a mix.

In: YAML. Out: a CalibrationSpec or a CalibrationMix, or RecipeError with file:line:column. What the datasets hold is
left to calibration.datasets.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Discriminator, Field, Tag, model_validator

from quantize.recipe.yaml import STRICT, Document, Location, read_document, validate
from quantize.system.lookup import is_path_text

MAX_SAMPLES = 100_000
MAX_PARTS = 100
EXAMPLE = "{dataset: python-docs, samples: 32}"

Precision = Annotated[
    Literal["auto", "float32", "bfloat16"],
    Field(
        description="of the matrix products of the pass; `auto` is bfloat16 where the processor multiplies it, which "
        "the manifest records; Gram matrices are float32 always"
    ),
]
Guided = Annotated[
    bool,
    Field(
        exclude_if=lambda value: not value,
        description="weight each token by how much the model's own loss feels it at each linear: a pass forward and "
        "back before the one that solves",
    ),
]
Samples = Annotated[int, Field(ge=1, le=MAX_SAMPLES)]
SequenceLength = Annotated[int, Field(ge=8, le=131_072)]
Seed = Annotated[int, Field(ge=0)]


class _DatasetKeys(BaseModel):
    """What is said of one dataset, alone or in a mix."""

    model_config = STRICT
    dataset: str = Field(
        description="`python-docs`, `self`, `self-chat`, a hub dataset (org/name), or a local .txt, .jsonl, .json or "
        ".parquet file"
    )
    revision: str | None = Field(None, description="commit of a hub dataset")
    subset: str | None = Field(None, description="configuration of a hub dataset")
    split: str = Field("train", description="split of a hub dataset")
    column: str = Field(
        "text",
        description="column with the text, or with the chat messages; where none is named and there is no `text`, the "
        "other columns say what a row is",
    )
    samples: Samples
    packing: bool = Field(False, description="join rows and cut at sequence_length, instead of cutting each row")
    minimum_tokens: Annotated[int, Field(ge=1)] = Field(8, description="rows with fewer tokens are left out")
    shuffle: bool = Field(False, description="take rows in a seeded random order, instead of in their own")


class CalibrationSpec(_DatasetKeys):
    """One dataset: which text the calibrated formats see."""

    samples: Samples = 128
    sequence_length: SequenceLength = 2048
    seed: Seed = 0
    precision: Precision = "auto"
    guided: Guided = False

    @property
    def tokens(self) -> int:
        """The most that it can be."""
        return self.samples * self.sequence_length

    @property
    def parts(self) -> tuple[CalibrationSpec, ...]:
        """Itself: a mix of one."""
        return (self,)

    @property
    def limits(self) -> tuple[int | None, ...]:
        """As of a mix: none."""
        return (None,)

    def with_parts(self, parts: Sequence[CalibrationSpec]) -> CalibrationSpec:
        """The one part that there is."""
        (part,) = parts
        return part


class MixPart(_DatasetKeys):
    """One dataset of a mix. What all of them share is said beside `mix`."""

    up_to_parameters: Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="leave the part out where the source has more parameters: for `self` and `self-chat`, which hold "
        "the whole model in memory",
    )


class CalibrationMix(BaseModel):
    """Several datasets in one calibration set, one after the other in this order."""

    model_config = STRICT
    mix: Annotated[list[MixPart], Field(min_length=1, max_length=MAX_PARTS)] = Field(
        description="the datasets, each with its own number of samples"
    )
    sequence_length: SequenceLength = 2048
    seed: Seed = 0
    precision: Precision = "auto"
    guided: Guided = False

    @model_validator(mode="after")
    def _not_too_many(self) -> CalibrationMix:
        if self.samples > MAX_SAMPLES:
            raise ValueError(f"{self.samples:,} samples in all || take at most {MAX_SAMPLES:,}")
        return self

    @property
    def samples(self) -> int:
        """Sequences of all parts, if each has as many as it asks for."""
        return sum(part.samples for part in self.mix)

    @property
    def tokens(self) -> int:
        """The most that it can be."""
        return self.samples * self.sequence_length

    @property
    def parts(self) -> tuple[CalibrationSpec, ...]:
        """Each part as a spec of its own, with what the mix says of all."""
        shared = self.model_dump(exclude={"mix"})
        return tuple(CalibrationSpec(**part.model_dump(include=DATASET_KEYS), **shared) for part in self.mix)

    @property
    def limits(self) -> tuple[int | None, ...]:
        """For each part, the parameters of the largest source that it is taken for; None: any."""
        return tuple(part.up_to_parameters for part in self.mix)

    def with_parts(self, parts: Sequence[CalibrationSpec]) -> CalibrationMix:
        """The mix with what these specs say of each of its datasets."""
        pairs = zip(self.mix, parts, strict=True)
        return self.model_copy(
            update={"mix": [old.model_copy(update=new.model_dump(include=DATASET_KEYS)) for old, new in pairs]}
        )


DATASET_KEYS = set(_DatasetKeys.model_fields)
SHARED_KEYS = set(CalibrationMix.model_fields) - {"mix"}
Calibration = CalibrationSpec | CalibrationMix


def _form(value: object) -> str:
    """Which of the forms of `calibration` a value is meant as; what is none of them is told about the plainest."""
    if isinstance(value, str):
        return "name"
    is_mix = isinstance(value, CalibrationMix) or (isinstance(value, Mapping) and "mix" in value)
    return CalibrationMix.__name__ if is_mix else CalibrationSpec.__name__


NamedOrWritten = Annotated[
    Annotated[str, Tag("name")]
    | Annotated[CalibrationSpec, Tag(CalibrationSpec.__name__)]
    | Annotated[CalibrationMix, Tag(CalibrationMix.__name__)],
    Discriminator(_form),
]
"""What stands after `calibration:` in a recipe: the name of a file, or what such a file holds."""


def calibration_of(data: Any) -> Calibration:
    """A spec or a mix from plain data, as manifests have it. Raises pydantic's ValidationError."""
    return (CalibrationMix if _form(data) == CalibrationMix.__name__ else CalibrationSpec).model_validate(data)


def load_calibration(path: Path) -> Calibration:
    """Read a calibration/*.yaml file; files of text that it names start from its own folder. Raises RecipeError."""
    document = read_document(path)
    check_mix(document)
    is_mix = _form(document.data) == CalibrationMix.__name__
    spec: Calibration = validate(CalibrationMix, document) if is_mix else validate(CalibrationSpec, document)
    return spec.with_parts([_beside(part, path.parent) for part in spec.parts])


def check_mix(document: Document, at: Location = ()) -> None:
    """Say what to do about a mix that is no list, and keys that stand in the wrong place of it. Raises RecipeError."""
    found = document.data
    for step in at:
        found = found.get(step) if isinstance(found, Mapping) else None
    if not isinstance(found, Mapping) or "mix" not in found:
        return
    for key in found:
        if key in MixPart.model_fields:
            what, hint = f"`mix` and `{key}` together", "write it into a part of the mix, or keep one of the two"
            raise document.error((*at, key), what, hint=hint, key=True)
    if not isinstance(found["mix"], list) or not found["mix"]:
        raise document.error((*at, "mix"), "`mix` must be a list of datasets", hint=f"as in mix: [{EXAMPLE}, …]")
    for index, part in enumerate(found["mix"]):
        if isinstance(part, str):
            raise document.error((*at, "mix", index), f"a part of a mix, found {part!r}", hint=f"as in {EXAMPLE}")
        for key in part if isinstance(part, Mapping) else ():
            where = (*at, "mix", index, key)
            if key == "mix":
                raise document.error(where, "a mix in a mix", hint="list its datasets in the outer one", key=True)
            if key in SHARED_KEYS:
                hint = "write it beside `mix`: all parts share it"
                raise document.error(where, f"`{key}` in a part of a mix", hint=hint, key=True)


def _beside(spec: CalibrationSpec, folder: Path) -> CalibrationSpec:
    """The spec with its file of text by its whole path, if it lies in the folder."""
    path = folder / spec.dataset
    if is_path_text(spec.dataset) and os.path.isfile(path):
        return spec.model_copy(update={"dataset": str(path.resolve())})
    return spec
