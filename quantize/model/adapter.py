"""A LoRA or DoRA adapter -> the tensors of its base with the adapter merged, each when it is read.

In: PEFT's folder (adapter_config.json, adapter_model.safetensors) and the tensors of the base. Out: the base's table,
and merged tensors, in float32 a few rows at a time: nothing but one tensor of the base is in memory. Methods: Hu et al.
2021, LoRA; Kalajdzievski 2023, rsLoRA; Liu et al. 2024, DoRA; the sums are those of PEFT's merge_and_unload.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from quantize.errors import CheckpointError
from quantize.files.safetensors import TensorInfo, read_header, read_tensor
from quantize.files.shards import torch_dtype
from quantize.model.checkpoint import ADAPTER, FLOAT_DTYPES, read_json
from quantize.model.mending import ADAPTER_WEIGHTS
from quantize.system.untrusted import check_pattern, time_limit

if TYPE_CHECKING:
    from torch import Tensor

PREFIX = "base_model.model."
ROWS = 512  # of a matrix that are merged at once
PATTERN_SECONDS = 5.0
FACTOR = re.compile(r"^(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(\.weight)?$")
WHOLE = re.compile(r"^(.+?)(?:\.base_layer|\.modules_to_save)?\.(weight|bias)$")
# What changes the base itself, or how it is run: its merge is no sum of two factors.
OTHER_METHODS = ("use_qalora", "layer_replication", "target_parameters", "trainable_token_indices", "use_bdlora",
                 "alora_invocation_tokens", "arrow_config", "kasa_config", "velora_config", "monteclora_config",
                 "megatron_config", "lora_bias")  # fmt: skip
CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # as init_lora_weights

Table = Mapping[str, tuple[str, tuple[int, ...]]]


class Tensors(Protocol):
    """Tensors that are computed when they are read: their dtype and shape by name, in the order of the files."""

    @property
    def table(self) -> Table: ...

    def read(self, name: str) -> Tensor:
        """One tensor as its table says. Raises CheckpointError."""


@dataclass(frozen=True)
class Merge:
    """What an adapter has for one tensor of the base, by the names of its own tensors.

    first, second: the factors, B and A of B A. magnitude: of the rows, for DoRA. whole: a tensor in the base's place.
    """

    scale: float = 1.0
    first: str | None = None
    second: str | None = None
    magnitude: str | None = None
    turned: bool = False
    whole: str | None = None


class Merged:
    """The tensors of a base with an adapter merged. Raises CheckpointError: the adapter does not fit the base."""

    def __init__(self, base: Tensors, folder: Path) -> None:
        self._base = base
        self._own = read_header(folder / ADAPTER_WEIGHTS)
        self._changes = changes_of(folder, self._own, base.table)
        whole = {name: self._own[change.whole] for name, change in self._changes.items() if change.whole}
        self.table: Table = {
            name: (dtype, whole[name].shape if name in whole else shape) for name, (dtype, shape) in base.table.items()
        } | {name: (info.dtype, info.shape) for name, info in whole.items() if name not in base.table}

    def read(self, name: str) -> Tensor:
        """One tensor; a merged one is rounded to the base's dtype."""
        change = self._changes.get(name)
        if change is None:
            return self._base.read(name)
        weight = self._own_tensor(change.whole) if change.whole else self._base.read(name)
        if change.first is not None:
            weight = self._merged(weight, change)
        return weight.to(torch_dtype(self.table[name][0]))

    def _merged(self, weight: Tensor, change: Merge) -> Tensor:
        import torch

        assert change.first is not None
        assert change.second is not None
        first, second = self._own_tensor(change.first).float(), self._own_tensor(change.second).float()
        magnitude = None if change.magnitude is None else self._own_tensor(change.magnitude).float().flatten()
        if change.turned:
            first, second = second.T, first.T
        out = torch.empty_like(weight)
        for start in range(0, weight.shape[0], ROWS):
            rows = slice(start, start + ROWS)
            sums = weight[rows].float().add_((first[rows] @ second).mul_(change.scale))
            if magnitude is not None:
                sums *= (magnitude[rows] / torch.linalg.norm(sums, dim=1)).unsqueeze(1)
            out[rows] = sums.to(out.dtype)
        return out

    def _own_tensor(self, name: str) -> Tensor:
        return read_tensor(self._own[name])


def changes_of(folder: Path, own: Mapping[str, TensorInfo], base: Table) -> dict[str, Merge]:
    """What an adapter changes, by the names of the base's tensors.

    Raises CheckpointError: of another method than LoRA and DoRA, or with a tensor that fits none of the base's.
    """
    settings = read_json(folder / ADAPTER)
    _check_method(folder, settings)
    factors: dict[str, dict[str, str]] = {}
    changes: dict[str, Merge] = {}
    for name, info in own.items():
        if info.dtype not in FLOAT_DTYPES:
            raise _odd(folder, name, f"is {info.dtype}")
        plain = name.removeprefix(PREFIX)
        if (match := FACTOR.match(plain)) is not None:
            factors.setdefault(match[1], {})[match[2]] = name
        elif (match := WHOLE.match(plain)) is not None:
            target = _target(f"{match[1]}.{match[2]}", base)
            if target is None:
                raise _odd(folder, name, "belongs to no tensor of the base")
            changes[target] = Merge(whole=name)
        else:
            raise _odd(folder, name, "is of no kind that is merged here")
    scales = _scales(folder, {module: _rank(parts, own) for module, parts in factors.items()}, settings)
    for module, parts in factors.items():
        target = _target(f"{module}.weight", base)
        if target is None:
            raise _odd(folder, f"{PREFIX}{module}", "belongs to no tensor of the base")
        change = _factors(folder, module, parts, settings, scales[module])
        whole = changes[target].whole if target in changes else None
        _check_shape(folder, target, change, own, own[whole].shape if whole else base[target][1])
        changes[target] = Merge(**{**vars(change), "whole": whole})
    if not changes:
        what = f"source: adapter {folder.name}: {ADAPTER_WEIGHTS} has no tensors, so there is nothing to merge"
        raise CheckpointError(what, hint="save the adapter again with PEFT, or leave it out")
    return changes


def _factors(folder: Path, module: str, parts: Mapping[str, str], settings: Mapping[str, Any], scale: float) -> Merge:
    embedding = "lora_embedding_A" in parts
    kind = "lora_embedding_" if embedding else "lora_"
    if f"{kind}A" not in parts or f"{kind}B" not in parts:
        raise _odd(folder, f"{PREFIX}{module}", "lacks one of its two factors")
    magnitude = parts.get("lora_magnitude_vector")
    if magnitude is None and settings.get("use_dora"):
        raise _odd(folder, f"{PREFIX}{module}", f"has no magnitude, and {ADAPTER} says that it is DoRA")
    turned = embedding or bool(settings.get("fan_in_fan_out"))
    if magnitude is not None and turned:
        raise _odd(folder, f"{PREFIX}{module}", "is DoRA of an embedding or a Conv1D, which is not merged here")
    return Merge(scale, parts[f"{kind}B"], parts[f"{kind}A"], magnitude, turned)


def _rank(parts: Mapping[str, str], own: Mapping[str, TensorInfo]) -> int:
    shape = next((own[name].shape for kind, name in parts.items() if kind.endswith("_A")), ())
    return shape[0] if shape else 0


def _scales(folder: Path, ranks: Mapping[str, int], settings: Mapping[str, Any]) -> dict[str, float]:
    """lora_alpha / r, or / sqrt(r) by rsLoRA; `alpha_pattern` has those of single modules, as PEFT matches them."""
    patterns = settings.get("alpha_pattern") or {}
    scales: dict[str, float] = {}
    try:
        for pattern in patterns:
            check_pattern(pattern)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of patterns that later versions of Python read otherwise
            known = [(re.compile(rf"(.*\.)?({pattern})$"), alpha) for pattern, alpha in patterns.items()]
        with time_limit(PATTERN_SECONDS):
            for module, rank in ranks.items():
                found = next(
                    (alpha for pattern, alpha in known if pattern.match(module)), settings.get("lora_alpha", 8)
                )
                scales[module] = float(found) / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    except (ValueError, TypeError, AttributeError, ZeroDivisionError, TimeoutError) as exc:
        what = f"source: adapter {folder.name}: {ADAPTER}: `lora_alpha`, `alpha_pattern` or a rank is none"
        raise CheckpointError(what, hint="save the adapter again with PEFT") from exc
    return scales


def _target(name: str, base: Table) -> str | None:
    """The base's name of a tensor; a part of a larger model may have been trained by another one."""
    tries = (
        name, f"model.{name}", name.removeprefix("model."), name.replace("model.language_model.", "model.", 1),
        name.replace("language_model.model.", "model.", 1), name.replace("model.", "model.language_model.", 1),
    )  # fmt: skip
    return next((item for item in tries if item in base), name if name == "lm_head.weight" else None)


def _check_method(folder: Path, settings: Mapping[str, Any]) -> None:
    kind = settings.get("peft_type")
    other = next((key for key in OTHER_METHODS if settings.get(key)), None)
    start = settings.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGED_BASE):
        raise CheckpointError(
            f"source: adapter {folder.name}: it was trained on a base that `init_lora_weights: {start}` changed",
            hint="save it as plain LoRA first: save_pretrained(…, path_initial_model_for_weight_conversion=…)",
        )
    if kind != "LORA" or other is not None:
        what = f"`{other}`" if kind == "LORA" else f"of type {kind}"
        raise CheckpointError(
            f"source: adapter {folder.name}: {what} is not merged here: LoRA and DoRA are",
            hint="merge it with PEFT (merge_and_unload) and name the result as `model`",
        )


def _check_shape(
    folder: Path, target: str, change: Merge, own: Mapping[str, TensorInfo], shape: tuple[int, ...]
) -> None:
    assert change.first is not None
    assert change.second is not None
    first, second = own[change.first].shape, own[change.second].shape
    fits = len(first) == len(second) == 2 and first[1] == second[0]
    product = (second[1], first[0]) if fits and change.turned else (first[0], second[-1]) if fits else ()
    if product != shape:
        raise CheckpointError(
            f"source: adapter {folder.name} has {list(product)} for {target}, which is {list(shape)} in the base",
            hint="is `model` the one that the adapter was trained on?",
        )


def _odd(folder: Path, name: str, what: str) -> CheckpointError:
    hint = "is `model` the one that the adapter was trained on? Or merge it with PEFT and name the result as `model`"
    return CheckpointError(f"source: adapter {folder.name}: tensor {name} {what}", hint=hint)
