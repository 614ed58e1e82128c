"""The files that say how images, video and sound become numbers: whether what reads them can.

In: a model's folder. Out: nothing, or CheckpointError that names the file, the key and what to do. An artifact carries
them as they are, and llama.cpp's converter takes sizes and means from them: one that is cut off or wrong would show
only when somebody sends an image. Reads no images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from quantize.errors import CheckpointError, first_line
from quantize.model.folder_files import PROCESSOR_FILES, processor_files, read_json

PARTS = ("image_processor", "video_processor", "feature_extractor")  # each a section of processor_config.json
AGAIN = "copy it from where the model was published, or remove it if images and sound do not matter"
LOADERS = {PROCESSOR_FILES[0]: ("image_processor_type", "AutoImageProcessor")}


def check_processor(folder: Path) -> None:
    """What JSON alone tells: an object, whose usual keys have values of their kind. Raises CheckpointError."""
    for name in processor_files(folder):
        settings = read_json(folder / name)
        _check_section(name, "", settings)
        for part in PARTS:
            if isinstance(settings.get(part), Mapping):
                _check_section(name, f"{part}.", settings[part])


def check_with_transformers(folder: Path) -> None:
    """Have transformers make an image processor of its file. What it needs for that and is not installed is no fault
    of the file. Raises CheckpointError.
    """
    import transformers

    for name, (key, loader) in LOADERS.items():
        kind = read_json(folder / name).get(key)
        if kind is None:
            continue
        try:
            getattr(transformers, loader).from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except ImportError:
            continue
        except Exception as exc:
            what = f"{name}: transformers makes no {kind} of it: {first_line(exc, 300)}"
            raise CheckpointError(what, hint=AGAIN) from exc


def _check_section(name: str, inside: str, settings: Mapping[str, Any]) -> None:
    for key, (fits, what) in _KINDS.items():
        value = settings.get(key)
        if value is not None and not fits(value):
            raise CheckpointError(f"{name}: `{inside}{key}` must be {what}, found {value!r:.80}", hint=AGAIN)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_side(value: object) -> bool:
    """One number of pixels, two, or each by its name."""
    parts = list(value.values()) if isinstance(value, Mapping) else value if isinstance(value, list) else [value]
    return bool(parts) and all(item is None or _is_count(item) for item in parts)


def _are_channels(value: object) -> bool:
    parts = value if isinstance(value, list) else [value]
    return bool(parts) and all(map(_is_number, parts))


def _are_spreads(value: object) -> bool:
    return _are_channels(value) and all(value if isinstance(value, list) else [value])


def _is_name(value: object) -> bool:
    return isinstance(value, str) and bool(value)


_Kind = tuple[Callable[[object], bool], str]
_NAME: _Kind = (_is_name, "the name of a class")
_COUNT: _Kind = (_is_count, "a whole number above 0")
_SIDE: _Kind = (_is_side, "pixels: a whole number above 0, or several by name")
_KINDS: dict[str, _Kind] = {
    **dict.fromkeys(
        ("image_processor_type", "feature_extractor_type", "video_processor_type", "processor_class"), _NAME
    ),
    **dict.fromkeys(("patch_size", "size", "crop_size"), _SIDE),
    **dict.fromkeys(
        ("temporal_patch_size", "merge_size", "image_seq_length", "min_pixels", "max_pixels", "sampling_rate",
         "feature_size", "hop_length"),
        _COUNT,
    ),
    "image_mean": (_are_channels, "a number for each channel"),
    "image_std": (_are_spreads, "a number other than 0 for each channel"),
    "rescale_factor": (_is_number, "a number"),
}  # fmt: skip
