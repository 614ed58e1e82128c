"""Rotations stretched for longer contexts, written as people have them: GGUF answers as the model does, or is refused.

Judged by llama.cpp's logits against transformers', at places within and beyond the original context.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quantize.errors import PlanError
from quantize.events import Reporter, SilentReporter
from quantize.model.architecture import block_layouts
from quantize.runtimes.llama_cpp.convert import ConvertRequest, convert
from quantize.runtimes.llama_cpp.model import BatchToken, ModelSettings, OpenModel
from quantize.system.process import run_step
from quantize.testing import write_json
from tests.canary import EXACT_KL, divergence
from tests.families import family_named, make_family

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers and its plugins warn on import
PROMPT = [12 + (7 * place * place + 11 * place + 5) % 370 for place in range(96)]
ORIGINAL = {"factor": 4.0, "original_max_position_embeddings": 32}
TABLES = {
    "short_factor": [1 + place / 20 for place in range(16)],
    "long_factor": [1.5 + place / 3 for place in range(16)],
}
LINEAR = {"rope_type": "linear", "factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0}
YARN = {"rope_type": "yarn", **ORIGINAL}
LLAMA_3 = {"rope_type": "llama3", **ORIGINAL, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"rope_type": "longrope", **ORIGINAL, **TABLES}
STYLES = ("rope_parameters", "rope_type", "type")


def source(name: str, folder: Path, rope: dict[str, Any], style: str = "rope_parameters") -> Path:
    """A family's tiny checkpoint with such rotations; style: how config.json says so, as it is now or was before."""
    make_family(family_named(name), folder)
    config = json.loads((folder / "config.json").read_text())
    known = config.pop("rope_parameters")
    if style == "rope_parameters":
        config[style] = {**known, **rope}
    else:
        config["rope_theta"] = known["rope_theta"]
        config["rope_scaling"] = {style if key == "rope_type" else key: value for key, value in rope.items()}
    if rope["rope_type"] == "longrope":  # which is where Phi-3 has it
        config["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    write_json(folder / "config.json", config)
    return folder


def logits_of(_reporter: Reporter, file: Path) -> Any:
    """llama.cpp's logits of the prompt, float32 [places, vocabulary]."""
    model = OpenModel(file, ModelSettings(context=128, threads=1))
    model.decode(BatchToken(token, place, 0, True) for place, token in enumerate(PROMPT))
    found = np.array(model.logits(len(PROMPT)))
    model.close()
    return found


def converted(name: str, folder: Path, out: Path) -> Path:
    """The float32 GGUF file. Raises PlanError."""
    request = ConvertRequest(folder, "F32", {"general.name": "tiny"}, family_named(name).pre_tokenizer)
    convert(SilentReporter(), request, out)
    return out


def divergence_of(name: str, folder: Path, out: Path) -> float:
    """How far llama.cpp's answers are from transformers', in nats."""
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        wanted = model(torch.tensor([PROMPT])).logits[0].numpy()
    return divergence(wanted, run_step("running", SilentReporter(), logits_of, converted(name, folder, out)))


RIGHT = [
    ("Llama", LLAMA_3, "type"),
    ("Llama", {**YARN, "mscale": 0.7, "mscale_all_dim": 0.5}, "rope_type"),
    ("Phi-3", LONG, "rope_parameters"),
]
MORE = [
    ("Llama", LINEAR, "type"),
    ("Llama", DYNAMIC, "type"),
    ("Llama", YARN, "type"),
    ("Llama", {**YARN, "attention_factor": 1.3}, "rope_parameters"),
    ("Phi-3", LONG, "type"),
    ("DeepSeek V3", {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}, "rope_parameters"),
    ("Ministral 3", {**YARN, "mscale": 0.7, "mscale_all_dim": 0.5}, "rope_parameters"),
    ("Granite", {**YARN, "attention_factor": 1.3}, "rope_parameters"),
    *((name, rope, style) for name in ("Qwen3", "SmolLM3") for rope in (LINEAR, YARN) for style in STYLES),
]


@pytest.mark.parametrize(
    ("name", "rope", "style"), [*RIGHT, *(pytest.param(*row, marks=pytest.mark.every_class) for row in MORE)]
)
def test_scaled_rotations_are_the_models(name: str, rope: dict[str, Any], style: str, tmp_path: Path) -> None:
    folder = source(name, tmp_path / "model", rope, style)
    assert divergence_of(name, folder, tmp_path / "x.gguf") < EXACT_KL


def test_tables_of_longrope_are_shrunk_with_the_heads(tmp_path: Path) -> None:
    """So that Phi-3's and Phi-4's can be calibrated: a table has a value for each pair that is rotated."""
    folder = source("Phi-3", tmp_path / "model", LONG)
    config = json.loads((folder / "config.json").read_text())
    assert [len(layout.linears) for layout in block_layouts(config)] == [4, 4]


@pytest.mark.parametrize(
    ("name", "rope", "said"),
    [
        ("Qwen3", LLAMA_3, "rotations are scaled by `llama3`, and llama.cpp does not do that for a Qwen3ForCausalLM"),
        ("Llama", LONG, "rotations are scaled by `longrope`, and llama.cpp does not do that for a LlamaForCausalLM"),
        ("Llama", {**YARN, "beta_fast": 16.0}, "rotations are scaled by `yarn` with beta_fast 16, and llama.cpp does"),
        ("DeepSeek V3", YARN, "rotations are scaled by `yarn` without one mscale and the same mscale_all_dim, and"),
    ],
    ids=["llama3", "longrope", "betas", "latent"],
)
def test_what_llama_cpp_would_rotate_otherwise_is_refused(
    name: str, rope: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(PlanError, match=rf"^config\.json: {said}"):
        converted(name, source(name, tmp_path / "model", rope), tmp_path / "x.gguf")
