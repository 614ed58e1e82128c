"""A config.json as transformers' own objects: the class, the tiny model with random weights, the real one without any.

In: a config as a dictionary. Out: models, or CheckpointError that says why there is none. Runs no code but that of the
installed transformers, and what was registered with it.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from quantize.errors import CheckpointError

SEED = 20
MOST_WEIGHTS = 40_000_000  # of a small model
MOST_SAID = 300  # characters of what transformers says of a config
_NOISE = 0.3
_MOST = 10.0  # of an initial value that noise is added to; what is beyond was never initialized


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without what transformers says of a model that nobody trains."""
    loggers = [logging.getLogger(name) for name in ("transformers", "torch")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def load_config(config: Mapping[str, Any]) -> Any:
    """The config as an object of its class. Raises CheckpointError: transformers knows none, or refuses it."""
    import transformers
    from transformers import CONFIG_MAPPING

    names = _names(config)
    kind = config.get("model_type")
    if kind is None and names:
        kind = getattr(getattr(getattr(transformers, names[0], None), "config_class", None), "model_type", None)
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        said = names[0] if names else "the architecture"
        raise CheckpointError(
            f"{said} is unknown to transformers {transformers.__version__} (model_type {kind!r})",
            hint="a newer transformers may have it: pip install -U transformers",
        )
    try:
        return CONFIG_MAPPING[kind].from_dict({**_decoded(dict(config)), "quantization_config": None})
    except Exception as exc:  # what a config class raises of a strange config is anything
        raise CheckpointError(f"config.json: transformers refuses it: {_said(exc)}") from exc


def check_causal(settings: Any, config: Mapping[str, Any]) -> None:
    """Raises CheckpointError: the config is of no model that writes text on, alone or as a part of it."""
    names = _names(config)
    known = _known(settings)
    if known and (not names or any(each.__name__ in names for each in known)):
        return
    if _class_of(settings, names) is not None:
        return
    said = names[0] if names else type(settings).__name__
    others = f"; of this kind, {known[0].__name__} is one" if known else ""
    raise CheckpointError(f"{said} is no causal language model", hint=f"calibration runs causal decoders{others}")


def _known(settings: Any) -> tuple[Any, ...]:
    """The classes that transformers has for a config: causal language models, else those that read more than text."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING

    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING):
        if type(settings) in mapping:
            found = mapping[type(settings)]
            return found if isinstance(found, tuple) else (found,)
    return ()


def _class_of(settings: Any, names: list[str]) -> Any:
    """The class that a config names, if it is one for it: a larger model, or the text part of one."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    writers = {*auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(), *auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.values()}
    found = getattr(transformers, names[0], None) if names and names[0] in writers else None
    return found if getattr(found, "config_class", None) is type(settings) else None


def _model(settings: Any, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    own = copy.deepcopy(settings)  # a model changes its config: what kernel it has, for one
    found = _class_of(own, getattr(own, "architectures", None) or [])
    build = AutoModelForCausalLM.from_config if found is None else found._from_config
    return build(own, **options).eval()


def meta_model(settings: Any, **options: Any) -> Any:
    """The model without weights. Raises CheckpointError."""
    try:
        with torch.device("meta"), quietly():
            return _model(settings, **options)
    except Exception as exc:
        raise CheckpointError(f"transformers can't build {type(settings).__name__}: {_said(exc)}") from exc


def random_model(settings: Any, **options: Any) -> Any:
    """The model with random weights, all away from 0 and 1, the same ones every time; to be called in `doubles`."""
    size = sum(parameter.numel() for parameter in meta_model(settings, **options).parameters())
    if size > MOST_WEIGHTS:
        raise CheckpointError(f"a small one still has {size:,} weights")
    torch.manual_seed(SEED)
    try:
        with quietly():
            model = _model(settings, dtype=torch.float64, **options)
    except Exception as exc:
        raise CheckpointError(f"transformers can't build a small one: {_said(exc)}") from exc
    take_plain_experts(model)
    generator = torch.Generator().manual_seed(SEED)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            _randomize(module, parameter, generator)
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point() and name not in module._non_persistent_buffers_set:
                buffer += _NOISE * torch.randn(buffer.shape, generator=generator)
    return model


def take_plain_experts(model: Any) -> None:
    """Have routed experts computed one after the other: the faster ways have no float64."""
    with contextlib.suppress(AttributeError, ValueError):
        model.set_experts_implementation("eager")


def _randomize(module: nn.Module, parameter: nn.Parameter, generator: torch.Generator) -> None:
    noise = torch.randn(parameter.shape, generator=generator)
    if parameter.dim() < 2:
        sane = torch.isfinite(parameter) & (parameter.abs() < _MOST)
        parameter.data = torch.where(sane, parameter.data, torch.zeros_like(parameter)) + _NOISE * noise
    elif isinstance(module, nn.Embedding):
        parameter.data = noise / 2
    else:
        parameter.data = noise / parameter.shape[-1] ** 0.5


def _decoded(value: Any) -> Any:
    """Infinity, which JSON has no word for, is {"__float__": "Infinity"} in a config.json of transformers."""
    if isinstance(value, dict):
        if set(value) == {"__float__"} and isinstance(value["__float__"], str):
            return float(value["__float__"])
        return {key: _decoded(each) for key, each in value.items()}
    return [_decoded(each) for each in value] if isinstance(value, list) else value


def _said(exc: Exception) -> str:
    """What transformers says, on one line: a validator's own words are on its second."""
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    return " ".join(lines[:2])[:MOST_SAID] or type(exc).__name__


def _names(config: Mapping[str, Any]) -> list[str]:
    found = config.get("architectures")
    return [str(name) for name in found] if isinstance(found, list) else []
