"""Models that read images beside text, through a whole recipe: the text part is quantized, the tower is as it was.

Judged by transformers' own class, by gguf's reader and by llama.cpp's reader of images.
"""

from __future__ import annotations

import ctypes
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click.testing
import pytest
import torch
from safetensors.torch import load_file

from quantize.build.outdated import outdated
from quantize.cli import main
from quantize.errors import CheckpointError, PlanError, VerifyError
from quantize.events import Reporter, SilentReporter
from quantize.formats import find_format
from quantize.formats.gguf.check import compare_towers
from quantize.formats.gguf.layout import GgufLayout
from quantize.formats.gguf.source import expected_of
from quantize.formats.nothing_lost import account
from quantize.formats.packed.runtime import GPTQMODEL
from quantize.model.checkpoint import open_checkpoint
from quantize.model.source import pin_path
from quantize.model.towers import APART, outermost, tower_tensors
from quantize.runtimes.llama_cpp.images import ProcessorSettings
from quantize.store.artifact import Artifact
from quantize.store.store import Store
from quantize.system.cache import Cache
from quantize.system.process import run_step
from quantize.testing import write_recipe
from tests.bad_checkpoints import change_json
from tests.wrappers import GEMMA_3, QWEN_2_5_VL, Wrapper, make_wrapper

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers and its plugins warn on import
TEXT = "\n\n".join(f"Paragraph {index}: the quick brown fox jumps over the lazy dog. " * 3 for index in range(40))
FOLDERS = ("gptq-int4-g64", "awq-int4-g64", "bnb-int8")
FILE = "q4_k_m-imatrix"
KINDS = [GEMMA_3, QWEN_2_5_VL]


@dataclass
class Made:
    """All variants of a tiny model."""

    kind: Wrapper
    source: Path
    artifacts: dict[str, Artifact]
    output: str


def build(kind: Wrapper, root: Path, *more: dict[str, Any], evaluate: bool) -> Made:
    """A tiny model in every format, and other variants."""
    make_wrapper(kind, root / "model")
    (root / "text.txt").write_text(TEXT)
    variants: list[dict[str, Any]] = [
        {"format": "gguf", "type": "Q4_K_M", "imatrix": True, **kind.pre_tokenizer},
        {"format": "gptq", "group_size": 64},
        {"format": "awq", "group_size": 64},
        {"format": "bitsandbytes", "type": "int8"},
        *more,
    ]
    extra = {
        "calibration": {"dataset": "text.txt", "samples": 16, "sequence_length": 64, "minimum_tokens": 16},
        "evaluation": {"text": "prose", "windows": 3, "window": 64, "golden": []},
        "gates": {"max_kl": 5, "max_perplexity_ratio": 10},
    }
    recipe = write_recipe(root / "recipe.yaml", root / "model", variants, **extra)
    arguments = ["build", str(recipe), "--store", str(root / "store"), *([] if evaluate else ["--no-eval"])]
    result = click.testing.CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    artifacts = {item.manifest.variant: item for item in Store(root / "store").artifacts()}
    assert len(artifacts) == len(variants), result.output
    return Made(kind, root / "model", artifacts, result.output)


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.architecture)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return build(request.param, tmp_path_factory.mktemp("wrapper"), evaluate=False)


def towers_of(made: Made) -> dict[str, torch.Tensor]:
    """The source's tensors that text does not pass, by their names."""
    return {name: item for name, item in load_file(made.source / "model.safetensors").items()
            if name.startswith(made.kind.towers)}  # fmt: skip


def test_what_text_does_not_pass_is_found_by_running(made: Made) -> None:
    found = tower_tensors(open_checkpoint(made.source))
    assert found == set(towers_of(made))
    assert len(found) > 10


def test_it_is_said_that_text_alone_is_quantized_and_measured(made: Made) -> None:
    said = "its text part is quantized and measured, on text alone; the other parts are carried over as they are"
    assert f"{made.kind.architecture} reads more than text: {said}" in " ".join(made.output.split())
    for artifact in made.artifacts.values():
        card = " ".join((artifact.folder / "README.md").read_text().split())
        assert f"The model reads more than text: {said}, and nothing was measured of them." in card


@pytest.mark.parametrize("variant", FOLDERS)
def test_towers_are_carried_bit_by_bit(made: Made, variant: str) -> None:
    artifact = made.artifacts[variant]
    have = load_file(artifact.folder / "model.safetensors")
    reasons = {item.tensor: (item.type, item.reason) for item in artifact.manifest.kept_in_high_precision}
    for name, tensor in towers_of(made).items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(have[name].view(torch.int16), tensor.view(torch.int16)), name
        assert reasons[name] == ("BF16", "a part that text does not pass (images, sound): carried over as it is")
    folds = getattr(find_format(artifact.manifest.format).builder, "folds", False)
    counts = account(artifact.folder, open_checkpoint(made.source), folds=folds)
    assert sum(counts.values()) == len(open_checkpoint(made.source).tensors)
    assert counts["quantized"] == 2 * 7


def loaded(_reporter: Reporter, folders: list[Path], towers: tuple[str, ...]) -> list[tuple[str, int, list[str], bool]]:
    """What transformers makes of artifacts: class, quantized linears, those in towers, whether logits are finite."""
    from transformers import AutoModelForImageTextToText

    GPTQMODEL.import_torch("a test")
    found = []
    for folder in folders:
        model = AutoModelForImageTextToText.from_pretrained(folder, device_map="cpu")
        named = list(model.named_modules())
        packed = [name for name, module in named if hasattr(module, "qweight") or "8bit" in type(module).__name__]
        inside = [name for name in packed if any(part.rstrip(".") in name for part in towers)]
        logits = model(torch.tensor([[9, 20, 31, 42]])).logits
        found.append((type(model).__name__, len(packed), inside, bool(torch.isfinite(logits).all())))
    return found


def test_transformers_loads_them_as_the_class_that_the_source_had(made: Made) -> None:
    folders = [made.artifacts[variant].folder for variant in FOLDERS]
    found = run_step("loading", SilentReporter(), loaded, folders, made.kind.towers)
    assert found == [(made.kind.architecture, 2 * 7, [], True)] * len(FOLDERS)
    for folder in folders:
        source = (made.source / "preprocessor_config.json").read_bytes()
        assert (folder / "preprocessor_config.json").read_bytes() == source
        config = json.loads((folder / "config.json").read_text())
        assert config["architectures"] == [made.kind.architecture]


def test_loaders_are_told_to_leave_towers_alone(made: Made) -> None:
    import re

    settings = {
        name: json.loads((made.artifacts[name].folder / "config.json").read_text())["quantization_config"]
        for name in FOLDERS
    }
    for module in made.kind.modules:
        assert module in settings["awq-int4-g64"]["modules_to_not_convert"]
        assert module in settings["bnb-int8"]["llm_int8_skip_modules"]
        for path in (f"{module}.blocks.0.attn", f"model.{module}.blocks.0.attn"):
            patterns = settings["gptq-int4-g64"]["dynamic"]
            assert any(item.startswith("-:") and re.match(item[2:], path) for item in patterns), path
    text = "model.language_model.layers.0.mlp.gate_proj"
    assert not any(re.match(item[2:], text) for item in settings["gptq-int4-g64"]["dynamic"])


def test_a_gguf_has_its_tower_in_a_file_beside_it(made: Made) -> None:
    import gguf

    artifact = made.artifacts[FILE]
    (path,) = artifact.folder.glob("mmproj-*.gguf")
    reader = gguf.GGUFReader(path)
    assert reader.fields["general.architecture"].contents() == "clip"
    values = {item.name: gguf.quants.dequantize(item.data, item.tensor_type) for item in reader.tensors}
    source = towers_of(made)
    flat = {item.float().numpy().tobytes() for item in source.values()}
    same = [name for name, item in values.items() if item.astype("float32").tobytes() in flat]
    assert len(same) >= len(values) // 2, "queries, keys and values may be taken apart, and convolutions turned"
    assert sum(item.size for item in values.values()) == sum(item.numel() for item in source.values())
    kept = {item.tensor: item.reason for item in artifact.manifest.kept_in_high_precision}
    assert all(kept[name].endswith(f"carried over in {path.name}") for name in source)
    assert artifact.manifest.left_out == ()
    assert path.name in {item.path for item in artifact.manifest.files}
    main_file = GgufLayout().main_file(artifact.folder)
    card = (artifact.folder / "README.md").read_text()
    assert f"llama-server -m {main_file.name} --mmproj {path.name}\n" in card


def seen(_reporter: Reporter, model: Path, towers: Path) -> bool:
    """Whether llama.cpp takes a model and its tower together."""
    import llama_cpp
    from llama_cpp import mtmd_cpp

    llama_cpp.llama_backend_init()
    found = llama_cpp.llama_model_load_from_file(str(model).encode(), llama_cpp.llama_model_default_params())
    settings = mtmd_cpp.mtmd_context_params_default()
    settings.use_gpu, settings.warmup, settings.n_threads = False, False, 1
    context = mtmd_cpp.mtmd_init_from_file(str(towers).encode(), found, settings)
    return bool(context) and bool(mtmd_cpp.mtmd_support_vision(ctypes.c_void_p(context)))


def test_llama_cpp_takes_the_tower(made: Made) -> None:
    folder = made.artifacts[FILE].folder
    (towers,) = folder.glob("mmproj-*.gguf")
    assert run_step("loading", SilentReporter(), seen, GgufLayout().main_file(folder), towers)


def test_a_lost_or_changed_tower_is_refused(made: Made, tmp_path: Path) -> None:
    checkpoint, folder = open_checkpoint(made.source), made.artifacts[FILE].folder
    pre_tokenizer = made.kind.pre_tokenizer.get("pre_tokenizer")
    expected = run_step("asking", SilentReporter(), expected_of, checkpoint, pre_tokenizer)
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    main_file, (towers,) = GgufLayout().main_file(copy), copy.glob("mmproj-*.gguf")
    compare_towers(main_file, expected)
    raw = bytearray(towers.read_bytes())
    raw[-4096:] = bytes(4096)
    towers.write_bytes(raw)
    with pytest.raises(VerifyError, match="differs from the source's"):
        compare_towers(main_file, expected)
    towers.unlink()
    with pytest.raises(VerifyError, match="the file with the towers is lost"):
        compare_towers(main_file, expected)


def without_means(made: Made, root: Path) -> Path:
    """A copy of the source whose processor's file lacks a setting."""
    source = Path(shutil.copytree(made.source, root / "model"))
    change_json(source / "preprocessor_config.json", image_mean=None)
    return source


def test_a_processors_file_that_lacks_what_llama_cpp_takes_from_it_is_refused_at_plan(
    made: Made, tmp_path: Path
) -> None:
    """By its own name; transformers has a mean by itself, so other formats are planned."""
    variants = [
        {"format": "gguf", "type": "Q8_0", **made.kind.pre_tokenizer},
        {"format": "bitsandbytes", "type": "int8"},
    ]
    recipe = write_recipe(tmp_path / "recipe.yaml", without_means(made, tmp_path), variants)
    result = click.testing.CliRunner().invoke(main, ["plan", str(recipe)])
    assert result.exit_code == 3
    assert "preprocessor_config.json: no `image_mean`, which llama.cpp takes from there" in result.stderr
    assert [line.split()[-2:] for line in result.stdout.splitlines() if line.startswith("bnb")] == [["to", "build"]]


def test_without_a_processors_file_that_file_is_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"there is no preprocessor_config\.json, which says `image_mean`"):
        ProcessorSettings(tmp_path, {"image_std": [1.0]})["image_mean"]
    (tmp_path / "processor_config.json").write_text("{}")
    assert ProcessorSettings(tmp_path, {"image_std": [1.0]})["image_std"] == [1.0]
    with pytest.raises(CheckpointError, match=r"^processor_config\.json: no `image_mean`"):
        ProcessorSettings(tmp_path, {})["image_mean"]


def test_a_build_that_left_towers_behind_without_a_word_is_built_again(made: Made) -> None:
    source = pin_path(made.source, Cache(made.source.parent / "cache"), SilentReporter())
    for artifact in made.artifacts.values():
        assert outdated(artifact, source) == ""
        kept = tuple(item for item in artifact.manifest.kept_in_high_precision if not item.reason.startswith(APART))
        before = artifact.manifest.model_copy(update={"kept_in_high_precision": kept})
        assert outdated(replace(artifact, manifest=before), source).startswith("the source reads more than text")


@pytest.mark.every_class  # a minute and more: every variant is measured beside its source
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.architecture)
def test_every_variant_is_accepted_near_the_source(kind: Wrapper, tmp_path: Path) -> None:
    made = build(kind, tmp_path, {"format": "gguf", "type": "Q8_0", **kind.pre_tokenizer}, evaluate=True)
    for variant, artifact in made.artifacts.items():
        measured = json.loads((artifact.folder / "measurements.json").read_text())["evaluation"]
        assert measured["quality"]["mean_kl"] < (0.02 if variant in ("q8_0", "bnb-int8") else 0.5), variant


def test_the_outermost_modules_hold_nothing_else() -> None:
    others = ["model.layers.0.mlp.weight", "lm_head.weight"]
    towers = ["model.visual.blocks.0.weight", "model.visual.norm.weight", "model.newline", "projector.1.weight"]
    assert outermost(towers, others) == ("model.visual", "projector")
