"""Mutated input for every reader, a few hundred each; and that the fuzzer would find what it looks for.

`python benchmarks/fuzz.py` is the same with 200,000 each, docs/hostile-input.md has its figures.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import deserialize

from quantize.errors import QuantizeError
from quantize.files.safetensors import read_header
from quantize.recipe.yaml import parse_document
from quantize.system.untrusted import parse_json
from tests.fuzz import run, seeds
from tests.fuzz.mutate import MAX_BYTES, Mutator
from tests.fuzz.run import Report, fuzz_apart, shrunk
from tests.fuzz.targets import TARGETS, Read, Target

INPUTS = 250


@pytest.mark.parametrize("name", TARGETS)
def test_no_input_does_more_than_refuse(name: str) -> None:
    report = fuzz_apart(name, INPUTS, "ci")
    assert [(item.what, item.data) for item in report.findings] == []
    assert report.read + report.refused == INPUTS
    assert len(report.outcomes) > 1, "the mutations never get past the first check"


def test_the_same_seed_gives_the_same_inputs() -> None:
    first, second, other = (Mutator([seeds.safetensors()], "safetensors", seed) for seed in ("a", "a", "b"))
    inputs = [first.next() for _ in range(50)]
    assert inputs == [second.next() for _ in range(50)] != [other.next() for _ in range(50)]
    assert max(map(len, inputs)) <= MAX_BYTES


# --- what it must find ------------------------------------------------------------------------------------------------


def planted(fault: Callable[[], object]) -> Target:
    """A reader with a fault that any input with a 9 in it shows."""

    def prepare(folder: Path) -> Read:
        return lambda data: fault() if b"9" in data else None

    return Target("json", lambda _: [b'{"a": [1, 2, 3]}'], prepare)


def leave() -> None:
    """Open a file that is not the reader's own."""
    (Path.cwd().parent / "other").open("wb")


def only(report: Report) -> tuple[str, bytes]:
    (finding,) = report.findings
    assert finding.times >= 1
    return finding.what, finding.data


@pytest.mark.parametrize(
    ("fault", "what"),
    [
        (lambda: {}["a"], "KeyError: … at no code of ours"),
        (lambda: parse_json(b"}"), "JSONDecodeError: Expecting value: line # column # (char"),
        (leave, "LeftItsFolder: opened "),
        (lambda: os.mkdir("new"), "LeftItsFolder: os#mkdir"),
    ],
)  # fmt: skip
def test_faults_are_found_and_shrunk(fault: Callable[[], object], what: str) -> None:
    found, data = only(fuzz_apart("planted", 300, "0", target=planted(fault)))
    assert found.startswith(what)
    assert data == b"9"


def test_an_input_that_takes_too_long_is_found() -> None:
    def spin() -> None:
        until = time.process_time() + 5
        while time.process_time() < until:
            pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "SHRINK_RUNS", 3)
        found, _ = only(fuzz_apart("planted", 40, "0", target=planted(spin), seconds=0.05))
    assert found.startswith("TookTooLong")


def test_an_input_that_takes_too_much_memory_is_found() -> None:
    found, data = only(fuzz_apart("planted", 100, "0", target=planted(lambda: bytearray(2 * run.MEMORY_BYTES))))
    assert found.startswith("MemoryError")
    assert data == b"9"


def test_a_reader_that_dies_is_found() -> None:
    found, data = only(fuzz_apart("planted", 100, "0", target=planted(lambda: os._exit(7))))
    assert found == "the process died (7)"
    assert b"9" in data


def test_shrinking_keeps_what_shows_it() -> None:
    assert shrunk(b"xxxxaxxxxxxxbxxx", lambda data: b"a" in data and b"b" in data and data.index(b"a") < data.index(b"b")) == b"ab"  # fmt: skip  # noqa: E501


# --- against other readers, and by structure --------------------------------------------------------------------------


def test_what_we_read_the_safetensors_package_reads_too(tmp_path: Path) -> None:
    mutator, read = Mutator([seeds.safetensors()], "safetensors", "other readers"), 0
    for _ in range(3000):
        data = mutator.next()
        (tmp_path / "a").write_bytes(data)
        try:
            ours = read_header(tmp_path / "a")
        except QuantizeError:
            continue
        theirs = dict(deserialize(data))
        assert {name: (list(item.shape), item.dtype) for name, item in ours.items()} == {
            name: (item["shape"], item["dtype"]) for name, item in theirs.items()
        }
        read += 1
    assert read > 30


words = st.text(st.characters(codec="utf-8"), max_size=8).filter(lambda word: word != "<<")  # which YAML merges
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(1 - 2**53, 2**53 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | words,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=4),
    max_leaves=20,
)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(values)
def test_json_is_read_as_python_reads_it(value: Any) -> None:
    for ascii_only in (True, False):
        assert parse_json(json.dumps(value, ensure_ascii=ascii_only).encode()) == value


@settings(deadline=None, max_examples=100, derandomize=True)
@given(values.filter(lambda value: value is not None))
def test_yaml_is_read_as_pyyaml_reads_it(value: Any) -> None:
    text = yaml.safe_dump(value, allow_unicode=True)
    assert parse_document(text, "a.yaml").data == yaml.safe_load(text)


documents = st.fixed_dictionaries(
    {},
    optional={
        key: values | st.sampled_from(["tiny", "python-docs", 4, [{"format": "gguf", "type": "Q8_0"}]])
        for key in ("name", "source", "variants", "calibration", "gates", "defaults", "dataset", "prompts", "artifacts",
                    "license", "weight_map", "architectures", "schema_version", "model", "chat_template", "verdict")
    },
)  # fmt: skip


@pytest.mark.parametrize("name", [name for name in TARGETS if TARGETS[name].form in ("json", "yaml")])
def test_documents_of_any_shape(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path / "model")
    read = replace(TARGETS[name]).prepare(tmp_path / "model")

    @settings(deadline=None, max_examples=40, derandomize=True)
    @given(documents)
    def check(document: dict[str, Any]) -> None:
        try:
            read(seeds.dumped(document))
        except QuantizeError as exc:
            str(exc).encode()

    check()
