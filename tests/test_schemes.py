"""Every scheme of compressed-tensors and every mode of MLX, on a tiny model: what is written, and who reads it how.

Independent readers: compressed-tensors and transformers, mlx and mlx-lm (inside verify, and here by logits). What
config.json says is what llm-compressor 0.14 writes for the scheme.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import click.testing
import pytest
from safetensors import safe_open

from quantize.build.execution import RunOptions
from quantize.cli import main
from quantize.events import ListReporter
from quantize.formats import find_format, option_models
from quantize.formats.base import RunLimits
from quantize.formats.compressed_tensors.schemes import SCHEMES
from quantize.recipe.model import load_recipe
from quantize.runtimes.base import ModelRef
from quantize.store.artifact import Artifact
from quantize.store.store import Store
from quantize.store.workspace import Workspace
from quantize.system.cache import Cache
from quantize.system.process import run_step
from quantize.testing import TinyModel, make_checkpoint, write_recipe
from tests.conftest import build
from tests.contract_steps import compute
from tests.evaluate.test_streamed import compare_engines

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers and its plugins warn on import

CT: list[dict[str, Any]] = [
    {"scheme": "W4A16", "group_size": 32, "method": "awq"},
    {"scheme": "W4A16_ASYM"},
    {"scheme": "W4A16_ASYM", "group_size": 64, "method": "awq"},
    {"scheme": "W8A16"},
    {"scheme": "W8A8"},
    {"scheme": "W8A8", "smooth": True},
    {"scheme": "FP8_BLOCK"},
    {"scheme": "NVFP4A16"},
    {"scheme": "MXFP4A16"},
]
MLX: list[dict[str, Any]] = [
    {"bits": 3, "group_size": 32},
    {"bits": 6},
    {"bits": 8, "group_size": 128},
    {"mode": "mxfp4"},
    {"mode": "nvfp4"},
]
VARIANTS = [{"format": "compressed-tensors", **item} for item in CT] + [{"format": "mlx", **item} for item in MLX]
NAMES = [
    "ct-w4a16-g32-awq", "ct-w4a16-asym-g128", "ct-w4a16-asym-g64-awq", "ct-w8a16-g128", "ct-w8a8", "ct-w8a8-smooth",
    "ct-fp8-block",
    "ct-nvfp4a16", "ct-mxfp4a16", "mlx-int3-g32", "mlx-int6-g64", "mlx-int8-g128", "mlx-mxfp4", "mlx-nvfp4",
]  # fmt: skip
COMPUTED = ("ct-w4a16-asym-g128", "ct-w8a8", "ct-nvfp4a16", "mlx-int3-g32", "mlx-mxfp4")  # the others are like these
Q_PROJ = "model.layers.0.self_attn.q_proj."
# Of q_proj [256, 256]: what llm-compressor 0.14.0.1 wrote for the scheme, BF16 scales as F16 here.
TENSORS = {
    "ct-w4a16-asym-g128": {
        "weight_packed": ("I32", [256, 32]), "weight_scale": ("F16", [256, 2]), "weight_shape": ("I64", [2]),
        "weight_zero_point": ("I32", [32, 2]),
    },
    "ct-w8a16-g128": {
        "weight_packed": ("I32", [256, 64]), "weight_scale": ("F16", [256, 2]), "weight_shape": ("I64", [2]),
    },
    "ct-w8a8": {"weight": ("I8", [256, 256]), "weight_scale": ("F16", [256, 1])},
    "ct-fp8-block": {"weight": ("F8_E4M3", [256, 256]), "weight_scale": ("F16", [2, 2])},
    "ct-nvfp4a16": {
        "weight_packed": ("U8", [256, 128]), "weight_scale": ("F8_E4M3", [256, 16]),
        "weight_global_scale": ("F32", [1]),
    },
    "ct-mxfp4a16": {"weight_packed": ("U8", [256, 128]), "weight_scale": ("U8", [256, 8])},
}  # fmt: skip


def other_kind(name: str) -> Any:
    """Of a kind that is tested: with the other classes."""
    return pytest.param(name, marks=pytest.mark.every_class)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("schemes") / "tiny", TinyModel(blocks=1))


@pytest.fixture(scope="module")
def store(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    root = tmp_path_factory.mktemp("schemes")
    text = [f"Paragraph {index}: the quick brown fox jumps over the lazy dog. " * 3 for index in range(12)]
    (root / "text.txt").write_text("\n\n".join(text))
    calibration = {"dataset": "text.txt", "samples": 8, "sequence_length": 64, "minimum_tokens": 16}
    recipe = load_recipe(
        write_recipe(root / "tiny.yaml", checkpoint, VARIANTS, calibration=calibration), option_models()
    )
    found = Store(root / "artifacts")
    workspace = Workspace(found, Cache(root / "cache"), ListReporter())
    outcomes = build(recipe, workspace, RunOptions(RunLimits(threads=2)), evaluate=False)
    assert {item.variant: str(item.error) for item in outcomes if item.error} == {}
    return found


@pytest.fixture(params=NAMES)
def artifact(request: pytest.FixtureRequest, store: Store) -> Artifact:
    return store.find(f"tiny/{request.param}")


def test_each_was_read_back_by_another_program(artifact: Artifact) -> None:
    facts = artifact.measurements()["verify"]
    assert facts["linears"] == 7
    assert facts["runtime"] in ("transformers + compressed-tensors", "mlx-lm")
    assert len(facts["tokens"]) >= 8


@pytest.mark.parametrize("name", [name if name in COMPUTED else other_kind(name) for name in NAMES])
def test_the_runtime_computes_what_is_read(store: Store, checkpoint: Path, name: str) -> None:
    """In float32; activations that are rounded too are a part of the distance where the scheme rounds them."""
    artifact = store.find(f"tiny/{name}")
    found = run_step(
        "computing", ListReporter(), compute, ModelRef(artifact.folder, artifact.manifest.format), checkpoint
    )
    rounds_inputs = artifact.manifest.options.get("scheme") in ("W8A8", "FP8_BLOCK")
    assert found.answered == found.served
    assert found.from_weights < (0.5 if rounds_inputs else 0.02) * found.from_source


@pytest.mark.parametrize("name", ["ct-w8a8-smooth", "ct-fp8-block", "mlx-int6-g64"])
def test_block_by_block_it_is_what_its_runtime_gives(store: Store, checkpoint: Path, name: str) -> None:
    """Rounded activations too: the order of sums alone sends some of them to the other of two levels."""
    artifact = store.find(f"tiny/{name}")
    found = run_step(
        "comparing", ListReporter(), compare_engines, ModelRef(artifact.folder, artifact.manifest.format), checkpoint
    )
    assert found.apart < 0.1 * found.real


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_are_those_of_llm_compressor(store: Store, name: str) -> None:
    with safe_open(store.find(f"tiny/{name}").folder / "model.safetensors", "pt") as file:
        names = [name for name in file.keys() if name.startswith(Q_PROJ)]  # noqa: SIM118 - it is no dict
        parts = {name.removeprefix(Q_PROJ): file.get_slice(name) for name in names}
    assert {key: (part.get_dtype(), part.get_shape()) for key, part in parts.items()} == TENSORS[name]


def test_config_says_what_llm_compressor_says(store: Store) -> None:
    """Read by compressed-tensors' own classes, against its presets of the same names."""
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme

    for name in NAMES[:9]:
        made = store.find(f"tiny/{name}")
        settings = json.loads((made.folder / "config.json").read_text())["quantization_config"]
        found = QuantizationConfig.model_validate(settings)
        (scheme,) = found.config_groups.values()
        preset = preset_name_to_scheme(made.manifest.options["scheme"], ["Linear"])
        assert preset.weights is not None
        if made.manifest.group_size != preset.weights.group_size:
            preset.weights.group_size = made.manifest.group_size
        for args in (preset.weights, preset.input_activations, scheme.weights, scheme.input_activations):
            if args is not None:
                args.observer = args.zp_dtype = args.scale_dtype = None  # for who quantizes, not for who reads
        assert (scheme.weights, scheme.input_activations) == (preset.weights, preset.input_activations), name
        assert (found.quant_method, found.quantization_status) == ("compressed-tensors", "compressed")
        assert found.ignore == ["lm_head"]
        assert found.format == scheme.format


def test_a_solved_row_may_lose_more_of_a_small_group_than_a_rounded_one() -> None:
    """One scale for a whole row leaves little of a group far below the rest; a wrong scale is still found."""
    gains = find_format("compressed-tensors").gains
    assert gains({"scheme": "W8A8"}) == (0.6, 1.5)
    assert gains({"scheme": "FP8_DYNAMIC"}) is gains({"scheme": "W8A16"}) is None


def test_mlx_says_how_it_is_packed(store: Store) -> None:
    for name, bits, group, mode in (("mlx-int3-g32", 3, 32, "affine"), ("mlx-nvfp4", 4, 16, "nvfp4")):
        config = json.loads((store.find(f"tiny/{name}").folder / "config.json").read_text())
        said = {"bits": bits, "group_size": group, "mode": mode}
        assert config["quantization"] == config["quantization_config"] == said


def test_solving_loses_less_than_rounding(store: Store) -> None:
    for name in ("ct-w8a8", "ct-nvfp4a16", "ct-mxfp4a16", "mlx-mxfp4", "mlx-int3-g32"):
        layers = store.find(f"tiny/{name}").measurements()["layers"].values()
        assert sum(item["loss"] for item in layers) < 0.9 * sum(item["nearest_loss"] for item in layers), name


def test_a_quantized_artifact_is_a_source_too(store: Store, tmp_path: Path) -> None:
    """What was written is read as a checkpoint, by the code that reads what llm-compressor wrote."""
    for name in ("ct-fp8-block", "ct-mxfp4a16", "ct-w4a16-asym-g128"):
        path = write_recipe(tmp_path / f"{name}.yaml", store.find(f"tiny/{name}").folder, [{"format": "mlx"}])
        result = click.testing.CliRunner().invoke(main, ["plan", str(path)])
        assert (result.exit_code, "were quantized before" in result.stderr) == (0, True), result.stderr


def test_the_code_in_a_card_runs(store: Store) -> None:
    """Where transformers must be told to dequantize: zero points, and FP4 beside FP16."""
    for name in ("ct-w4a16-asym-g128", "ct-nvfp4a16"):
        folder = store.find(f"tiny/{name}").folder
        code = (folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
        assert "dequantize=True" in code
        ran = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
        assert (ran.returncode, ran.stdout != "") == (0, True), ran.stderr[-2000:]


def test_other_servers_get_their_line(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTIZE_STORE", str(store.root))
    serve = partial(click.testing.CliRunner().invoke, main)
    sglang = serve(["serve", "tiny/ct-fp8-block", "--print", "sglang", "--device", "cuda:0"]).stdout
    folder = str(store.find("tiny/ct-fp8-block").folder)
    assert sglang.splitlines()[1].startswith("# activations are FP8 on GPUs of compute capability 8.9 or more; older")
    assert f"--model-path {folder}" in sglang.replace("\\\n", "")
    mlx = serve(["serve", "tiny/mlx-mxfp4", "--print", "mlx", "--port", "8123"]).stdout
    assert "mlx_lm.server" in mlx
    assert "--port 8123" in mlx
    for name, runtime in (("tiny/mlx-mxfp4", "sglang"), ("tiny/ct-w8a8", "mlx"), ("tiny/mlx-mxfp4", "vllm")):
        refused = serve(["serve", name, "--print", runtime, "--device", "cuda:0"])
        assert (refused.exit_code, refused.stdout) == (3, ""), refused.stderr


def test_the_list_of_formats_says_where_each_runs() -> None:
    rows = json.loads(click.testing.CliRunner().invoke(main, ["list", "formats", "--json"]).stdout)
    runs = {row["format"]: {item["kind"]: item["capability"] for item in row["runs"]} for row in rows}
    assert runs["compressed-tensors"]["scheme: FP8_DYNAMIC"] == "8.9"
    assert set(runs["compressed-tensors"]) == {f"scheme: {name}" for name in SCHEMES}
    assert runs["mlx"] == {"": ""}


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ({"format": "compressed-tensors", "scheme": "W8A8", "group_size": 64}, "W8A8 has no group size to choose"),
        ({"format": "compressed-tensors", "scheme": "NVFP4A16", "method": "awq"}, "method: awq works with W4A16"),
        ({"format": "compressed-tensors", "scheme": "W4A16", "smooth": True}, "smooth: true works with W8A8"),
        ({"format": "compressed-tensors", "scheme": "FP8_DYNAMIC", "damping": 0.5}, "FP8_DYNAMIC has no damping"),
        ({"format": "compressed-tensors", "scheme": "W4A4"}, "scheme"),
        ({"format": "mlx", "mode": "mxfp4", "bits": 8}, "mxfp4 has 4 bits in groups of 32"),
        ({"format": "mlx", "group_size": 16}, "affine groups are of 32, 64 or 128"),
    ],
)
def test_what_does_not_go_together_is_refused(
    checkpoint: Path, tmp_path: Path, variant: dict[str, Any], message: str
) -> None:
    path = write_recipe(tmp_path / "odd.yaml", checkpoint, [variant])
    result = click.testing.CliRunner().invoke(main, ["plan", str(path)])
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_width_that_is_not_whole_groups_is_refused_at_plan(tmp_path: Path) -> None:
    """144 is 9 groups of 16 and no whole number of 32."""
    source = make_checkpoint(tmp_path / "odd", TinyModel(hidden=144, intermediate=288, blocks=1, heads=4, kv_heads=4))
    names = ("MXFP4A16", "FP8_DYNAMIC", "NVFP4A16", "FP8_BLOCK")
    variants = [{"format": "compressed-tensors", "scheme": name} for name in names]
    path = write_recipe(tmp_path / "odd.yaml", source, [*variants, {"format": "mlx", "group_size": 32}])
    result = click.testing.CliRunner().invoke(main, ["plan", str(path)])
    assert "MXFP4A16 has groups of 32, which do not divide the 144 inputs" in result.stderr + result.stdout
    assert "FP8_BLOCK has groups of 128, which do not divide the 144 inputs" in result.stderr + result.stdout
    assert "group_size 32 does not divide the 144 inputs" in result.stderr + result.stdout
