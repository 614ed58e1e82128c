"""What the command makes of its words: targets, what fits, keys, and what it refuses before anything is loaded."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from quantize.cli.serve import ServeFlags, command
from quantize.cli.serving_options import take_serving
from quantize.errors import RefusedError, UsageError
from quantize.formats import runtime_kind
from quantize.runtimes.devices import ON_CPU, Accelerator, DevicePlace
from quantize.runtimes.looking import find_gpus
from quantize.runtimes.served import Serving
from quantize.serve.limits import KEYS_VARIABLE, load_keys
from quantize.serve.preflight import engine_target, place
from quantize.serve.targets import LocalTarget, UpstreamTarget, resolve
from quantize.store.store import Store
from quantize.system.gpus import LocalGpu
from quantize.system.machine import Machine
from tests.conftest import Built, Run

GIB = 2**30
WANTED = Serving(device="auto")
CARD = Accelerator("cuda:0", "RTX 4060", 8 * GIB, 7 * GIB)
ROOMY = Machine((), 16 * GIB, 15 * GIB, 4)


def local(text: str | Path, store: Store) -> LocalTarget:
    found = resolve(str(text), store)
    assert isinstance(found, LocalTarget)
    return found


def test_an_artifact_by_its_name(built: Built) -> None:
    target = local("tiny/q8_0", built.store)
    assert (target.name, target.format, target.kind.name) == ("tiny/q8_0", "gguf", "llama.cpp")
    assert target.path.suffix == ".gguf"
    assert target.shape.vocab_size == 384
    assert local("short=tiny/q8_0", built.store).name == "short"


def test_a_file_a_folder_and_an_address(built: Built, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = local("tiny/q8_0", built.store).path
    assert local(path, built.store).name == path.stem
    folder = local(tiny, built.store)
    assert (folder.name, folder.format, folder.kind.name) == ("tiny", "safetensors", "transformers")
    monkeypatch.setenv("QUANTIZE_UPSTREAM_KEY", "one-key")
    monkeypatch.setenv("QUANTIZE_UPSTREAM_KEY_BIG", "big-key")
    upstream = resolve("big=http://127.0.0.1:1/v1#m", built.store)
    assert upstream == UpstreamTarget("big", "http://127.0.0.1:1/v1", "m", "big-key")
    assert "big-key" not in repr(upstream)
    assert resolve("http://127.0.0.1:1/v1", built.store) == UpstreamTarget(
        "upstream", "http://127.0.0.1:1/v1", None, "one-key"
    )


def test_what_is_no_target(built: Built, own_tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no artifact"):
        resolve("nothing/here", built.store)
    with pytest.raises(UsageError, match="not the address of a server"):
        resolve("http://user:secret@host/v1", built.store)
    (tmp_path / "x.bin").write_bytes(b"x")
    with pytest.raises(UsageError, match="not a file of any installed format"):
        resolve(str(tmp_path / "x.bin"), built.store)
    (own_tiny / "model.safetensors").rename(own_tiny / "pytorch_model.bin")
    with pytest.raises(RefusedError, match="no safetensors"):
        resolve(str(own_tiny), built.store)


def test_what_does_not_fit_is_refused_with_numbers_and_what_would(built: Built) -> None:
    target = local("tiny/f16", built.store)
    big = replace(target, weights_bytes=9 * GIB)
    named = replace(WANTED, device="cuda:0")
    with pytest.raises(RefusedError, match=r"tiny/f16 does not fit: 9\.\d+ GiB expected of 6\.30 GiB usable") as caught:
        place(big, named, ROOMY, [CARD], built.store)
    assert "on the RTX 4060 of 8.0 GiB" in caught.value.message
    assert "variant tiny/q8_0" in str(caught.value.hint)
    assert "--gpu-layers 1, the others on the CPU" in str(caught.value.hint)
    assert "KV cache at" not in str(caught.value.hint), "the flag is called otherwise"
    assert "--force" in str(caught.value.hint)
    assert place(big, named, ROOMY, [CARD], built.store, force=True).where == DevicePlace("cuda:0")
    assert place(target, named, ROOMY, [CARD], built.store).verdict.word == "fits"


def test_auto_takes_the_layers_that_fit_and_says_so(built: Built) -> None:
    big = replace(local("tiny/f16", built.store), weights_bytes=9 * GIB)
    placed = place(big, WANTED, ROOMY, [CARD], built.store)
    assert placed.where == DevicePlace("cuda:0", 1)
    assert placed.note.startswith("1 of 2 layers on cuda:0 (RTX 4060), the others on the CPU: 7.00 GiB are free there")
    serving = engine_target(big, WANTED, placed).serving
    assert (serving.device, serving.gpu_layers, serving.named) == ("cuda:0", 1, False)
    two = place(big, WANTED, ROOMY, [CARD, replace(CARD, device="cuda:1")], built.store)
    assert engine_target(big, WANTED, two).serving.place == DevicePlace("cuda", None, (0.5, 0.5))
    with pytest.raises(RefusedError, match="does not fit"):
        place(big, WANTED, replace(ROOMY, available_ram_bytes=GIB), [CARD], built.store)


def test_auto_takes_the_cpu_where_no_part_of_a_model_can_be_on_a_gpu(built: Built, tiny: Path) -> None:
    big = replace(local(tiny, built.store), weights_bytes=9 * GIB)
    placed = place(big, WANTED, ROOMY, [CARD], built.store)
    assert placed.where == ON_CPU
    assert re.fullmatch(r"on the CPU: it takes 9\.\d+ GiB, and 7\.00 GiB are free on cuda:0 \(RTX 4060\)", placed.note)
    assert placed.verdict.card_bytes == ROOMY.available_ram_bytes
    assert not engine_target(big, WANTED, placed).serving.named
    for wanted, machine in ((replace(WANTED, device="gpu"), ROOMY), (WANTED, replace(ROOMY, available_ram_bytes=GIB))):
        with pytest.raises(RefusedError, match=r"does not fit: .* free on the RTX 4060"):
            place(big, wanted, machine, [CARD], built.store)
    assert place(big, WANTED, ROOMY, [CARD], built.store, force=True).where == DevicePlace("cuda:0")
    nothing = replace(local("tiny/f16", built.store), weights_bytes=2 * GIB)
    small = replace(CARD, free_bytes=GIB // 2)
    assert place(nothing, WANTED, ROOMY, [small], built.store).where == ON_CPU
    with pytest.raises(RefusedError, match="does not fit"):
        place(nothing, replace(WANTED, gpu_layers=1), ROOMY, [small], built.store)


def test_bits_of_the_kv_cache_are_in_the_estimate_and_the_suggestions(built: Built, tiny: Path) -> None:
    target = local("tiny/f16", built.store)
    deep = replace(target, shape=replace(target.shape, kv_layers=target.shape.kv_layers * 4000))
    wanted = Serving(512, slots=8, device="cuda:0")
    expected = {
        bits: place(deep, replace(wanted, kv_bits=bits), ROOMY, [CARD], built.store, force=True).verdict.expected_bytes
        for bits in ("16", "8", "4")
    }
    values = 512 * 8 * 2 * 128 * 2 * 4000  # tokens, sequences, keys and values of 2 heads of 64, in 2 x 4000 layers
    # the compute buffer differs, too: without flash attention the scores are in it, [heads, 512, 512] in float32
    assert expected["16"] - expected["8"] == pytest.approx(values * (2 - 34 / 32), rel=0.01)
    assert expected["8"] - expected["4"] == values * (34 - 18) / 32
    with pytest.raises(RefusedError, match="does not fit") as caught:
        place(deep, wanted, ROOMY, [CARD], built.store)
    assert "--kv-bits 8" in str(caught.value.hint)
    with pytest.raises(UsageError, match="transformers keeps its KV cache in 16 bits, not in 8"):
        place(local(tiny, built.store), Serving(kv_bits="8"), ROOMY, (), built.store)


def test_gpu_layers_are_in_the_estimate(built: Built) -> None:
    big = replace(local("tiny/f16", built.store), weights_bytes=9 * GIB)
    one = place(big, replace(WANTED, device="cuda:0", gpu_layers=1), ROOMY, [CARD], built.store)
    assert one.where == DevicePlace("cuda:0", 1)
    assert one.verdict.expected_bytes < 6 * GIB
    with pytest.raises(RefusedError, match="does not fit"):
        place(big, replace(WANTED, device="cuda:0", gpu_layers=2), ROOMY, [CARD], built.store)


@pytest.mark.parametrize(("device", "wanted"), [("vulkan:0", "vulkan:0"), ("metal:0", "gpu"), ("rocm:1", "auto")])
def test_a_gpu_of_any_maker_is_a_gpu(built: Built, device: str, wanted: str) -> None:
    card = replace(CARD, device=device)
    placed = place(local("tiny/q8_0", built.store), replace(WANTED, device=wanted), ROOMY, [card], built.store)
    assert placed.where == DevicePlace(device)


def test_a_card_that_llama_cpp_is_not_built_for(built: Built) -> None:
    """A driver that knows a card, and a llama.cpp for the CPU: nothing is on the card, and that is said."""
    target = local("tiny/q8_0", built.store)
    beside = replace(ROOMY, gpus=(LocalGpu("RTX 4060", 8 * GIB, GIB),))
    assert find_gpus(target.kind, "cuda:0") == ()
    line = 'CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_CUDA=on" pip install --force-reinstall --no-deps --no-cache-dir'
    with pytest.raises(UsageError, match=r"no cuda:0 here \(GPUs: llama.cpp can use none of RTX 4060\)") as caught:
        place(target, replace(WANTED, device="cuda:0"), beside, (), built.store)
    assert line in str(caught.value.hint)
    placed = place(target, WANTED, beside, (), built.store)
    assert placed.where == ON_CPU
    assert placed.note.startswith("on the CPU: llama.cpp can't use the RTX 4060; one that can: ")
    assert line in placed.note
    with pytest.raises(RefusedError, match=r"free of 16\.0 GiB RAM"):
        place(target, WANTED, replace(beside, available_ram_bytes=GIB // 50), (), built.store)


def test_a_torch_for_the_cpu_beside_a_card_takes_the_cpu(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    card = LocalGpu("RTX 4060", 8 * GIB, GIB)
    monkeypatch.setattr("quantize.runtimes.transformers.kind.nvidia_gpus", lambda: (card,))
    monkeypatch.setattr("quantize.runtimes.transformers.kind.version", lambda _: "2.13.0+cpu")
    kind = runtime_kind("safetensors")
    assert not kind.knows_gpus
    assert find_gpus(kind, "auto") == ()
    monkeypatch.setattr("quantize.runtimes.transformers.kind.version", lambda _: "2.13.0")
    assert kind.knows_gpus
    monkeypatch.setattr("quantize.runtimes.transformers.kind.nvidia_gpus", tuple)
    assert not kind.knows_gpus, "torch is not started to look for a card that the driver does not know"


def test_free_memory_counts_not_all_of_it(built: Built) -> None:
    target = local("tiny/q8_0", built.store)
    assert place(target, Serving(), ROOMY, (), built.store).verdict.word == "fits"
    with pytest.raises(RefusedError, match=r"free of 16\.0 GiB RAM"):
        place(target, Serving(), replace(ROOMY, available_ram_bytes=GIB // 50), (), built.store)


def test_device_and_context(built: Built) -> None:
    target = local("tiny/q8_0", built.store)
    placed = place(target, WANTED, ROOMY, (), built.store)
    assert (placed.where, placed.context, placed.note) == (ON_CPU, 512, "")
    told = engine_target(target, WANTED, placed)
    assert (told.model.path, told.serving) == (target.path.resolve(), Serving(512, slots=2))
    with pytest.raises(UsageError, match="513 tokens are more than its context of 512"):
        place(target, Serving(513, device="auto"), ROOMY, (), built.store)
    with pytest.raises(UsageError, match=r"there is no cuda:0 here \(GPUs: none\)"):
        place(target, Serving(device="cuda:0"), ROOMY, (), built.store)
    with pytest.raises(UsageError, match="'tpu' is no device"):
        place(target, Serving(device="tpu"), ROOMY, (), built.store)


def test_keys_from_a_file_and_the_environment(tmp_path: Path, run: Run) -> None:
    done = run("serve", "--new-key", "alice")
    key, line = (text.split()[-1] for text in done.stdout.splitlines())
    assert key not in line
    path = tmp_path / "keys"
    path.write_text(f"# our keys\n\n{line}\n")
    keys = load_keys(path, {KEYS_VARIABLE: "another-plain-key-1, " + line.replace("alice", "carol")})
    assert keys.owner(f"Bearer {key}".encode()) in ("alice", "carol")
    assert keys.owner(b"bearer another-plain-key-1") == "env1"
    assert not load_keys(None, {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sk-plain-key-in-a-file", "keys:1: not `name:sha256:hash`"),
        ("", "no keys in it"),
        ("a:sha256:" + "0" * 64 + "\na:sha256:" + "1" * 64, "keys:2: a second key named a"),
        (None, r"can't be read \(FileNotFoundError\)"),
    ],
)
def test_keys_that_can_not_be_taken(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "keys"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        load_keys(path, {})
    assert "sk-plain" not in str(caught.value)
    with pytest.raises(UsageError, match="key 1 is too short"):
        load_keys(None, {KEYS_VARIABLE: "short"})


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "no artifact to serve"),
        (["x/y"], 2, "no artifact, model's file, model's folder or address 'x/y'"),
        (["http://127.0.0.1:9/v1", "--host", "0.0.0.0"], 2, "there are no API keys"),
        (["http://127.0.0.1:9/v1", "http://127.0.0.1:8/v1"], 2, "two models have the same name"),
        (["http://127.0.0.1:9/v1", "--canary", "x"], 2, "is not NAME=PERCENT%"),
        (["http://127.0.0.1:9/v1", "--canary", "x=101%"], 2, "is not NAME=PERCENT%"),
        (["http://127.0.0.1:9/v1", "--fallback", "x"], 2, "'x' is not served here"),
        (["http://127.0.0.1:9/v1", "--max-body", "much"], 2, "'much' is no size"),
        (["--new-key", "a b"], 2, "'a b' is no name for a key"),
    ],
)
def test_wrong_words_are_refused(run: Run, arguments: list[str], code: int, message: str) -> None:
    done = run("serve", *arguments, "--port", 0)
    assert done.exit_code == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_that_is_taken(run: Run) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = run("serve", "http://127.0.0.1:9/v1", "--port", taken.getsockname()[1])
    assert done.exit_code == 2
    assert "can't listen on 127.0.0.1" in done.stderr


def test_a_flag_is_an_option_and_a_field_of_its_name() -> None:
    """Beside the words and what ends the command early; one without the other would be seen only when it is run."""
    other = {"artifacts", "store", "new_key", "hand_over", "locked", "lock"}
    given = {str(option.name) for option in command.params if option.expose_value} - other
    of_models: dict[str, Any] = dict.fromkeys(given)
    take_serving(Serving, of_models)
    assert {*of_models, "serving"} == {field.name for field in fields(ServeFlags)}
