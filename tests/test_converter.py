"""llama.cpp's converter as auto-round bundles it: it is whole, fits gguf, and says with a remedy what it can't do."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import gguf
import pytest
from packaging.requirements import Requirement
from safetensors.torch import save_file

from quantize.errors import CheckpointError, PlanError
from quantize.events import Reporter, SilentReporter
from quantize.runtimes.llama_cpp.config import converter_config
from quantize.runtimes.llama_cpp.convert import (
    PAIR,
    ConvertRequest,
    convert,
    converter_folder,
    converter_modules,
    converter_package,
)
from quantize.system.process import run_step
from quantize.testing import write_recipe
from tests.conftest import Run
from tests.families import family_named, make_family

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers and its plugins warn on import
ROOT = Path(__file__).parent.parent
STACKED = (
    "Mixtral", "Qwen2-MoE", "Qwen3-MoE", "Qwen3-Next", "DeepSeek V2", "DeepSeek V3", "GLM-4-MoE", "OLMoE",
    "Granite-MoE", "Granite hybrid", "ERNIE 4.5-MoE", "LFM2-MoE", "MiniMax-M2", "Jamba", "AFMoE",
)  # fmt: skip


# --- the two packages -------------------------------------------------------------------------------------------------


def import_all(reporter: Reporter) -> dict[str, str | None]:
    """In a worker: why each module of the converter can't be imported."""
    return {name: error and str(error) for name, error in converter_modules().items()}


def test_every_module_of_the_converter_imports() -> None:
    found = run_step("importing", SilentReporter(), import_all)
    assert {"llama", "qwen", "gemma", "deepseek", "glm", "granite", "mistral3", "lfm2"} <= set(found)
    assert {name: error for name, error in found.items() if error} == {}


def modules_of_auto_round(reporter: Reporter) -> list[str]:
    """In a worker: what of auto-round is loaded with the converter."""
    converter_package()
    return [name for name in sys.modules if name.partition(".")[0] == "auto_round"]


def test_the_converter_needs_nothing_else_of_auto_round() -> None:
    assert run_step("loading", SilentReporter(), modules_of_auto_round) == []


def test_both_packages_are_bounded_and_pinned_inside_the_bounds() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(PAIR) <= set(extras["gguf"])
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    for requirement in map(Requirement, PAIR):
        assert requirement.specifier.contains(pinned[requirement.name])


# --- faults inside it -------------------------------------------------------------------------------------------------


def quantize_beside(folder: Path, addition: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a command where auto-round is a version 0.16.1 whose qwen.py ends with `addition`."""
    root = folder / "packages"
    if not root.exists():
        shutil.copytree(converter_folder(), root / "auto_round" / "export" / "export_to_gguf" / "conversion")
        (root / "auto_round" / "__init__.py").touch()
        (root / "auto_round-0.16.1.dist-info").mkdir()
        (root / "auto_round-0.16.1.dist-info" / "METADATA").write_text("Name: auto-round\nVersion: 0.16.1\n")
        with (root / "auto_round/export/export_to_gguf/conversion/qwen.py").open("a") as file:
            file.write(f"\n{addition}\n")
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "quantize", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe for GGUF of a tiny Qwen2."""
    folder = tmp_path_factory.mktemp("qwen2")
    make_family(family_named("Qwen2"), folder / "model")
    return write_recipe(folder / "qwen2.yaml", folder / "model", [{"format": "gguf", "type": "Q8_0"}])


PLAN, BUILD = ("plan",), ("build", "--no-eval")


@pytest.mark.parametrize(
    ("addition", "kind", "command"),
    [
        ("gguf.MODEL_ARCH.DFLASH", "AttributeError: DFLASH", PLAN),
        ("gguf.MODEL_ARCH.DFLASH", "AttributeError: DFLASH", BUILD),
        ("from gguf import NEWER", "ImportError: cannot import name 'NEWER' from 'gguf'", PLAN),
    ],
)
def test_packages_that_do_not_fit_are_named_with_the_line_that_mends_it(
    addition: str, kind: str, command: tuple[str, ...], qwen2: Path, tmp_path: Path
) -> None:
    result = quantize_beside(tmp_path, addition, *command, qwen2)
    assert result.returncode == 2, result
    said = result.stdout + result.stderr
    for words in (f"auto-round 0.16.1 and gguf {gguf_version()} do not belong together", kind, "in qwen.py"):
        assert words in said
    assert "pip install 'auto-round>=0.14.2,<0.15' 'gguf>=0.19,<0.20'" in said
    assert "Traceback" not in said


def gguf_version() -> str:
    """The installed version."""
    from importlib.metadata import version

    return version("gguf")


@pytest.mark.parametrize(
    ("addition", "start", "remedy", "command"),
    [
        (
            "Qwen2Model.set_gguf_parameters = lambda self: {}['n_ctx']",
            "config.json: llama.cpp's converter can't convert this Qwen2ForCausalLM (KeyError: 'n_ctx' in qwen.py)",
            "compare it with the config.json that the model was published with",
            PLAN,
        ),
        (
            "Qwen2Model.set_vocab = lambda self: None.fails",
            "the tokenizer's files: llama.cpp's converter can't convert this Qwen2ForCausalLM (AttributeError: ",
            "copy all of them from where the model was published",
            PLAN,
        ),
        (
            "Qwen2Model.modify_tensors = lambda self, data, name, bid: 1 / 0",
            "tensor lm_head.weight: llama.cpp's converter can't convert this Qwen2ForCausalLM (ZeroDivisionError: ",
            "save the checkpoint again in the layout that the model was published in",
            BUILD,
        ),
    ],
)
def test_an_exception_inside_the_converter_names_architecture_file_and_remedy(
    addition: str, start: str, remedy: str, command: tuple[str, ...], qwen2: Path, tmp_path: Path
) -> None:
    result = quantize_beside(tmp_path, addition, *command, qwen2)
    assert result.returncode == 3, result
    said = result.stdout + result.stderr
    assert start in said
    assert remedy in said
    assert "Traceback" not in said


@pytest.mark.parametrize(("name", "command"), [("MiniMax", PLAN), ("MiniMax", BUILD), ("OPT", PLAN)])
def test_an_unknown_architecture_is_refused_by_name(
    name: str, command: tuple[str, ...], run: Run, tmp_path: Path
) -> None:
    family = family_named(name)
    make_family(family, tmp_path / "model")
    recipe = write_recipe(tmp_path / "recipe.yaml", tmp_path / "model", [{"format": "gguf", "type": "Q8_0"}])
    result = run(*command, recipe)
    assert result.exit_code == 3, result.output
    said = result.stdout + result.stderr
    assert f"llama.cpp's converter does not know the architecture {family.architecture}" in said
    assert "docs/architectures.md" in said


@pytest.mark.parametrize("text", ["", "[]", "{", '{"architectures": []}', '{"architectures": null}'])
def test_a_config_without_an_architecture_is_named(text: str, tiny: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json: (not |no `architectures`)"):
        convert(SilentReporter(), ConvertRequest(folder, "F32", {"general.name": "tiny"}), tmp_path / "out.gguf")


def test_a_tensor_that_it_does_not_know_is_named(tiny: Path, tmp_path: Path) -> None:
    import torch

    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    save_file({"model.layers.0.mlp.odd.weight": torch.ones(4, 4)}, folder / "model-odd.safetensors")
    with pytest.raises(PlanError, match=r"^tensor model\.layers\.0\.mlp\.odd\.weight: .* this LlamaForCausalLM"):
        convert(SilentReporter(), ConvertRequest(folder, "F32", {"general.name": "tiny"}), tmp_path / "out.gguf")


def test_code_beside_a_tokenizer_is_not_run(tmp_path: Path) -> None:
    """GLM 4's module of the converter asks for it."""
    family = family_named("GLM 4")
    make_family(family, tmp_path / "model")
    path, ran = tmp_path / "model" / "tokenizer_config.json", tmp_path / "ran"
    settings = json.loads(path.read_text())
    del settings["tokenizer_class"]
    path.write_text(json.dumps({**settings, "auto_map": {"AutoTokenizer": [None, "own.Own"]}}))
    code = f"open({str(ran)!r}, 'w')\nfrom transformers import PreTrainedTokenizerFast as Own\n"
    (tmp_path / "model" / "own.py").write_text(code)
    request = ConvertRequest(tmp_path / "model", "F32", {"general.name": "tiny"}, family.pre_tokenizer)
    with contextlib.suppress(PlanError):
        convert(SilentReporter(), request, tmp_path / "out.gguf")
    assert not ran.exists()


# --- what it is shown -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STACKED)
def test_experts_stacked_as_in_memory_give_the_same_file(name: str, tmp_path: Path) -> None:
    family = family_named(name)
    model = make_family(family, tmp_path / "published")
    shutil.copytree(tmp_path / "published", tmp_path / "stacked")
    tensors = {key: value.clone().contiguous() for key, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    assert any(key.endswith("experts.gate_up_proj") for key in tensors)
    save_file(tensors, tmp_path / "stacked" / "model.safetensors")
    found = []
    for layout in ("published", "stacked"):
        request = ConvertRequest(tmp_path / layout, "F32", {"general.name": "tiny"}, family.pre_tokenizer)
        convert(SilentReporter(), request, tmp_path / f"{layout}.gguf")
        read = gguf.GGUFReader(tmp_path / f"{layout}.gguf")
        found.append({item.name: item.data.tobytes() for item in read.tensors})
    assert found[0] == found[1]


ROPE = {"rope_theta": 5e5, "partial_rotary_factor": 0.25, "rope_type": "default"}
WIDTHS = {"head_dim": 32, "hidden_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("architecture", "loaded", "key", "value"),
    [
        ("LlamaForCausalLM", {"rope_parameters": ROPE}, "rope_theta", 5e5),
        ("StableLmForCausalLM", {"rope_parameters": {**ROPE, "rope_theta": 10000.0}}, "partial_rotary_factor", 0.25),
        ("StableLmForCausalLM", {"rope_parameters": {**ROPE, "rope_theta": 10000.0}}, "rope_scaling", None),
        ("Phi3ForCausalLM", {"rope_parameters": {"rope_type": "longrope"}}, "rope_scaling", {"rope_type": "longrope"}),
        ("Gemma4ForCausalLM", {"rope_parameters": {"full_attention": ROPE}}, "partial_rotary_factor", None),
        ("Cohere2ForCausalLM", {}, "rotary_pct", 1.0),
        ("GPTNeoXForCausalLM", {"rope_parameters": ROPE}, "rotary_pct", 0.25),
        ("MiniMaxM2ForCausalLM", {"rope_parameters": ROPE}, "rotary_dim", 8),
        ("MiniMaxM2ForCausalLM", {}, "scoring_func", "sigmoid"),
        ("DeepseekV3ForCausalLM", {}, "scoring_func", "sigmoid"),
        ("DeepseekV3ForCausalLM", {"scoring_func": "softmax"}, "scoring_func", "softmax"),
        ("BambaForCausalLM", {"rope_parameters": ROPE, "head_dim": None}, "attn_rotary_emb", 8),
        ("GPT2LMHeadModel", {"n_positions": 77}, "n_ctx", 77),
        (
            "GraniteMoeHybridForCausalLM",
            {"layer_types": ["linear_attention", "full_attention", "mamba", "attention"]},
            "layer_types",
            ["mamba", "attention", "mamba", "attention"],
        ),
        (
            "GraniteMoeHybridForCausalLM",
            {"num_local_experts": 0, "intermediate_size": 192, "shared_intermediate_size": 96},
            "intermediate_size",
            96,
        ),
        (
            "Gemma4ForCausalLM",
            {"layer_types": ["sliding_attention", "full_attention"], "per_layer_config": {"1": {"head_dim": 64}}},
            "global_head_dim",
            64,
        ),
    ],
)
def test_keys_that_the_converter_looks_for(
    architecture: str, loaded: dict[str, object], key: str, value: object
) -> None:
    full = {**WIDTHS, "layer_types": ["full_attention"] * 2, **loaded}
    assert converter_config(architecture, full, {}).get(key) == value
    inside = {"text_config": full}
    assert converter_config(architecture, inside, {})["text_config"].get(key) == value


def test_what_only_the_file_has_is_kept_and_transformers_decides_on_the_rest() -> None:
    loaded = {"vocab_size": 8, "text_config": {"a": 1}}
    written = {"vocab_size": 9, "model_max_length": 7, "text_config": {"a": 2, "b": 3}}
    found = converter_config("CohereForCausalLM", loaded, written)
    assert found == {"vocab_size": 8, "model_max_length": 7, "text_config": {"a": 1, "b": 3}}
    assert loaded == {"vocab_size": 8, "text_config": {"a": 1}}, "what was given is not changed"


@pytest.mark.parametrize(
    ("architecture", "config", "said"),
    [
        ("Qwen3MoeForCausalLM", {"norm_topk_prob": False}, "norm_topk_prob is False"),
        ("DeepseekV3ForCausalLM", {"rope_interleave": False}, "rope_interleave is False"),
        ("StableLmForCausalLM", {"rope_theta": 500000.0}, "rope_theta is 500000.0"),
        ("AfmoeForCausalLM", {"mup_enabled": False}, "mup_enabled is False"),
        ("Exaone4ForCausalLM", {"sliding_window": 4096}, "sliding_window is set in a model of 2 blocks"),
        ("PhimoeForCausalLM", {}, "sparse mixer"),
    ],
)
def test_what_llama_cpp_would_run_otherwise_is_refused(architecture: str, config: dict[str, object], said: str) -> None:
    with pytest.raises(PlanError, match=said) as caught:
        converter_config(architecture, {**WIDTHS, **config}, {})
    assert architecture in str(caught.value)
    assert caught.value.hint
    right = {key: True for key, value in config.items() if value is False}
    if architecture != "PhimoeForCausalLM":
        converter_config(architecture, {**WIDTHS, **right}, {})
