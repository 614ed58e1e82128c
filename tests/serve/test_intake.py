"""Reading requests beside the model: many at once, again after a death, not for who is gone; and what is told."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from quantize.runtimes.intake import Intake
from quantize.runtimes.llama_cpp.served import DESK
from quantize.runtimes.llama_cpp.words import open_words
from quantize.runtimes.served import PromptTokens, Refused
from tests.serve.rewritten import rewritten

pytest.importorskip("llama_cpp")

NEVER = threading.Event()
# Of llama.cpp's pre-tokenizers some whose rules libstdc++ runs, a step deeper for each character: a long word ended
# the process that it was read in.
RECURSIVE = ("deepseek-v3", "gpt-4o", "bloom", "default")


@pytest.fixture(scope="module")
def intake(weights: Path) -> Iterator[Intake]:
    made = Intake(DESK, os.fsencode(weights))
    assert made.warning() == ""
    yield made
    made.close()


def read(intake: Intake, prompt: str, cancelled: threading.Event = NEVER, **more: Any) -> PromptTokens:
    return intake.read({"prompt": prompt, **more}, cancelled)


def test_many_at_once_are_read_each_by_itself(intake: Intake, weights: Path) -> None:
    words = open_words(weights, feature="testing")
    texts = [f"{number} quick brown foxes é 漢" for number in range(40)]
    with ThreadPoolExecutor(8) as pool:
        found = [item.tokens for item in pool.map(lambda text: read(intake, text), texts)]
    assert found == [words.tokenize(text, special=True, start=True) for text in texts]


def test_tokens_are_not_read_again(intake: Intake) -> None:
    assert intake.read({"prompt": [5, 6]}, NEVER).tokens == [5, 6]


@pytest.mark.parametrize("pre", RECURSIVE)
def test_a_long_word_is_read_by_every_pre_tokenizer(weights: Path, tmp_path: Path, pre: str) -> None:
    intake = Intake(DESK, os.fsencode(rewritten(weights, tmp_path / "model.gguf", pre=pre)))
    try:
        intake.warning()
        assert len(read(intake, "a" * 200_000).tokens) > 1000
    finally:
        intake.close()


def test_a_text_has_an_end(intake: Intake) -> None:
    with pytest.raises(Refused, match="the input has 9,000,000 bytes, the limit is 8,388,608") as caught:
        read(intake, "a" * 9_000_000)
    assert caught.value.fields["status"] == 413


def test_a_process_that_was_killed_is_there_again(weights: Path) -> None:
    intake = Intake(DESK, os.fsencode(weights))
    try:
        intake.warning()
        before = read(intake, "a fox").tokens
        os.kill(intake._server._process.pid, signal.SIGKILL)
        time.sleep(0.2)
        assert [read(intake, "a fox").tokens for _ in range(3)] == [before] * 3
    finally:
        intake.close()


def test_what_nobody_waits_for_is_given_up(intake: Intake) -> None:
    cancelled = threading.Event()
    threading.Timer(0.2, cancelled.set).start()
    started = time.monotonic()
    with pytest.raises(Refused, match="ended"):
        read(intake, "!" * 8_000_000, cancelled)
    assert time.monotonic() - started < 4
    assert read(intake, "a fox").tokens


@pytest.mark.parametrize(
    ("stage", "fit", "code", "param", "words"),
    [
        ("template", None, "chat_template", "messages", "the model's chat template crashes the library"),
        ("tokens", None, "prompt_not_read", None, "splitting the text into tokens crashes the library"),
        ("schema", {"json_schema": "{}", "param": "tools"}, "invalid_json_schema", "tools", "turning the JSON schema"),
        ("grammar", {"grammar": "", "param": "grammar"}, "invalid_grammar", "grammar", "reading the grammar crashes"),
        ("grammar", {"json_schema": "", "param": "x"}, "invalid_json_schema", "x", "keeping to the JSON schema"),
    ],
)
def test_a_death_names_what_it_was_about(
    stage: str, fit: dict[str, Any] | None, code: str, param: str | None, words: str
) -> None:
    intake = Intake("tests.fork_steps:dying_desk", b"")
    try:
        assert intake.warning() == "watch out"
        for _ in range(2):  # the second one may be told from memory
            with pytest.raises(Refused, match=words) as caught:
                intake.read({"prompt": stage, **({"fit": fit} if fit else {})}, NEVER)
            fields = caught.value.fields
            assert (fields["status"], fields["code"], fields["param"]) == (422, code, param)
    finally:
        intake.close()


def test_a_death_in_the_middle_of_an_answer_is_told() -> None:
    intake = Intake("tests.fork_steps:dying_desk", b"")
    try:
        intake.warning()
        prompt = intake.read({"prompt": "mask", "fit": {"json_schema": "{}", "param": "response_format"}}, NEVER)
        assert prompt.masks is not None
        prompt.masks.pipe.poll(10)
        with pytest.raises(Refused, match="keeping to the JSON schema takes more than 2 s") as caught:
            prompt.masks.poll()
        assert caught.value.fields["param"] == "response_format"
        prompt.close()
    finally:
        intake.close()
