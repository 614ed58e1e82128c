"""Chat templates that do not work, or work for ever: found while loading, refused at each chat, in both runtimes."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from quantize.runtimes.base import ModelRef
from quantize.runtimes.intake import Intake
from quantize.runtimes.llama_cpp.kind import LLAMA_CPP
from quantize.runtimes.llama_cpp.served import DESK
from quantize.runtimes.served import Refused, Serving
from quantize.runtimes.transformers.kind import Transformers
from quantize.serve.engines.base import EngineTarget
from quantize.serve.engines.local import LocalEngine
from quantize.serve.router import Rules
from tests.serve.conftest import Start
from tests.serve.rewritten import rewritten

pytest.importorskip("llama_cpp")
pytest.importorskip("torch")

LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(9) %}" + "{% endfor %}" * 3
BROKEN = {
    "{{ messages | shorten }}": "can't be compiled: line 1: TemplateAssertionError: No filter named 'shorten'",
    "{% remember %}": "can't be compiled: line 1: TemplateSyntaxError: Encountered unknown tag 'remember'",
    "x\n{{ messages[ }}": "can't be compiled: line 2: TemplateSyntaxError",
    "{{ 1 // 0 }}": "does not understand them: ZeroDivisionError",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}": "does not understand them: it calls itself without end",
    "{% for i in range(1000000000) %}x{% endfor %}": "does not understand them: OverflowError",
    LOOP: "takes more than 2 s of processor time",
    "{{ 'x' * 1000000000 }}": "takes too much memory",
    "{% set x = namespace(s='x' * 1000) %}{% for i in range(40) %}{% set x.s = x.s + x.s %}{% endfor %}{{ x.s }}":
        "takes too much memory",
    "{{ ''.__class__.__mro__ }}": "does not understand them: SecurityError",
    "{{ raise_exception('never') }}": "refuses these messages: never",
}  # fmt: skip


def targets(tiny: Path, weights: Path, folder: Path, template: str) -> Iterator[EngineTarget]:
    """The tiny model with this template, in both runtimes."""
    file = rewritten(weights, folder / "model.gguf", template=template)
    yield EngineTarget("llama", LLAMA_CPP, ModelRef(folder, "gguf", file.name), Serving(64, 1, threads=1))
    copied = Path(shutil.copytree(tiny, folder / "copied"))
    config = json.loads((copied / "tokenizer_config.json").read_text())
    (copied / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    (copied / "chat_template.jinja").unlink(missing_ok=True)
    kind = Transformers(chooses_dtype=True)
    yield EngineTarget("torch", kind, ModelRef(copied, "safetensors"), Serving(64, 1, threads=1))


def test_a_broken_template_is_a_warning_and_a_422_in_both_runtimes(
    tiny: Path, weights: Path, tmp_path: Path, start: Start
) -> None:
    template = next(iter(BROKEN))
    found = list(targets(tiny, weights, tmp_path, template))
    gateway = start(
        lambda watcher: {item.name: LocalEngine(item, watcher.about(item.name)) for item in found},
        rules=Rules("llama"), ready=False,
    )  # fmt: skip
    gateway.wait(gateway.is_ready, 120)
    for name in ("llama", "torch"):
        (warning,) = gateway.ask("GET", "/ready").json["models"][name]["warnings"]
        assert warning.startswith(f"the model's chat template {BROKEN[template]}")
        assert warning.endswith(": only /v1/completions and /v1/generate answer")
        answer = gateway.chat("hi", model=name)
        assert (answer.status, answer.json["error"]["code"]) == (422, "chat_template")
        assert BROKEN[template] in answer.json["error"]["message"]
        assert gateway.ask("POST", "/v1/completions", {"model": name, "prompt": "a", "max_tokens": 2}).status == 200
    lines = gateway.lines()
    assert len([line for line in lines if line["event"] == "engine_warning"]) == 2
    assert [line for line in lines if line["event"] == "engine_died"] == []


@pytest.mark.parametrize(("template", "why"), BROKEN.items(), ids=[why[:50] for why in BROKEN.values()])
def test_what_is_wrong_with_a_template_is_told(weights: Path, tmp_path: Path, template: str, why: str) -> None:
    path = rewritten(weights, tmp_path / "model.gguf", template=template)
    intake = Intake(DESK, str(path).encode())
    try:
        assert why in intake.warning()
        order = {"messages": [{"role": "user", "content": "hi"}]}
        with pytest.raises(Refused) as caught:
            intake.read(order, threading.Event())
        assert (caught.value.fields["status"], caught.value.fields["code"]) == (422, "chat_template")
        assert why in str(caught.value)
        assert intake.read({"prompt": "a"}, threading.Event()).tokens
    finally:
        intake.close()
