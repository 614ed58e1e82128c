"""Graders: does an answer pass.

In: a Grade, the text of an answer, for `same` the source's answer too. Out: GradeVerdict, with a reason when it does
not. Pure functions on text. What a model thinks aloud between <think> tags is not part of its answer. Two ways to be
right by accident don't count: going round in circles until the right word comes, and "I don't know" copied from the
question.
"""

from __future__ import annotations

import difflib
import json
import re
import unicodedata
from dataclasses import dataclass
from typing import Any

from quantize.evaluate.golden import Grade, import_jsonschema
from quantize.system.untrusted import time_limit

DEFAULT_SIMILARITY = 0.8
MAX_SECONDS = 10  # of processor time, for one pattern on one answer
LOOP_WORDS = 24
SHORT_ANSWER = 20  # characters: a bare "I don't know" is an answer, even if the question offered it
_THOUGHT = re.compile(r"<think>.*?(?:</think>|$)", re.DOTALL)
_FENCE = re.compile(r"^```[\w-]*\n(.*?)\n?```$", re.DOTALL)
_EDGES = " \t\r\n.,;:!?\"'`*_()[]«»“”‘’"

# How people and models say that they don't know, that something is not there, or that they won't say.
_REFUSALS = (
    "don't know", "do not know", "not know", "not sure", "no idea", "can't", "cannot", "can not", "unable to",
    "couldn't find", "could not find", "no information", "not enough information", "not have information",
    "don't have", "do not have", "not aware", "not familiar", "no record", "no such", "not mentioned", "not mention",
    "not provided", "not provide", "not specified", "not specify", "not stated", "not state", "not say", "not exist",
    "unknown", "not a real", "fictional",
    "không biết", "không có thông tin", "không có đủ thông tin", "không thể", "không rõ", "không chắc", "chưa biết",
    "không tồn tại", "không có thật", "không nói", "không nêu", "không được nêu", "không đề cập", "không được đề cập",
    "không nhắc", "không được nhắc", "không tìm thấy", "chưa có thông tin", "chưa rõ",
)  # fmt: skip


@dataclass(frozen=True)
class GradeVerdict:
    """passed, and if not why."""

    passed: bool
    reason: str = ""


def grade(rule: Grade, answer: str, source_answer: str | None = None, *, question: str = "") -> GradeVerdict:
    """Judge an answer. source_answer: for `same`; None means that the answer is the source's own, which passes.

    question: what was asked; whole sentences of it that the answer repeats are no refusal.
    """
    text = _THOUGHT.sub("", answer).strip()
    if rule.kind == "same":
        return _grade_same(text, source_answer, rule.similarity or DEFAULT_SIMILARITY)
    if not text:
        return GradeVerdict(False, "the answer is empty")
    if rule.kind != "json" and is_looping(text):
        return GradeVerdict(False, "goes round in circles")
    if rule.kind == "exact":
        return _grade_exact(text, rule.answers or [])
    if rule.kind == "contains":
        return _grade_contains(text, rule)
    if rule.kind == "refusal":
        return _grade_refusal(text, rule, question)
    try:
        with time_limit(MAX_SECONDS):
            return _grade_json(text, rule) if rule.kind == "json" else _grade_regex(text, rule.pattern or "")
    except TimeoutError:
        return GradeVerdict(False, f"the pattern takes more than {MAX_SECONDS} s on this answer")


def normalize(text: str) -> str:
    """Composed letters, no case, straight quotes, single spaces: what is compared."""
    plain = unicodedata.normalize("NFC", text).casefold().replace("’", "'")
    return " ".join(plain.split())


def parse_json(text: str, *, strict: bool) -> Any:
    """The JSON value of an answer: all of it (a code fence around it aside), or the first value in it.

    Raises ValueError: there is none.
    """
    fenced = _FENCE.match(text)
    bare = fenced.group(1) if fenced else text
    if strict:
        return json.loads(bare, parse_constant=_refuse_constant)
    decoder = json.JSONDecoder(parse_constant=_refuse_constant)
    for start in (match.start() for match in re.finditer(r"[\[{]", bare)):
        try:
            return decoder.raw_decode(bare, start)[0]
        except ValueError:
            continue
    return json.loads(bare, parse_constant=_refuse_constant)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _grade_exact(text: str, answers: list[str]) -> GradeVerdict:
    given = normalize(text).strip(_EDGES)
    if any(given == normalize(answer).strip(_EDGES) for answer in answers):
        return GradeVerdict(True)
    return GradeVerdict(False, f"is not {' or '.join(answers)}")


def _grade_contains(text: str, rule: Grade) -> GradeVerdict:
    given = normalize(text)
    missing = [part for part in rule.all or [] if not _occurs(part, given)]
    if missing:
        return GradeVerdict(False, f"does not say {', '.join(missing)}")
    if rule.any and not any(_occurs(part, given) for part in rule.any):
        return GradeVerdict(False, f"says none of {', '.join(rule.any)}")
    return _without(rule.none, given)


def _occurs(part: str, given: str) -> bool:
    """As whole words: 3 is not in 1303, and "bé" is not in "béo"."""
    wanted = re.escape(normalize(part))
    return re.search(rf"(?<!\w){wanted}(?!\w)", given) is not None


def _without(unwanted: list[str] | None, given: str) -> GradeVerdict:
    for part in unwanted or []:
        if _occurs(part, given):
            return GradeVerdict(False, f"says {part}")
    return GradeVerdict(True)


def _grade_regex(text: str, pattern: str) -> GradeVerdict:
    found = re.search(pattern, unicodedata.normalize("NFC", text))
    return GradeVerdict(True) if found else GradeVerdict(False, f"no match of {pattern}")


def _grade_json(text: str, rule: Grade) -> GradeVerdict:
    try:
        value = parse_json(text, strict=bool(rule.strict))
    except (ValueError, RecursionError) as exc:
        return GradeVerdict(False, f"not JSON: {str(exc)[:120]}")
    if rule.schema_ is None:
        return GradeVerdict(True)
    validator = import_jsonschema().Draft202012Validator(rule.schema_)
    try:
        problem = next(iter(validator.iter_errors(value)), None)
    except RecursionError:
        return GradeVerdict(False, "the schema, or the answer, is nested without end")
    if problem is None:
        return GradeVerdict(True)
    place = "/".join(map(str, problem.absolute_path)) or "the top"
    return GradeVerdict(False, f"JSON, but not as the schema has it: at {place}: {problem.message[:120]}")


def is_looping(text: str) -> bool:
    """Whether most of a longer answer is repetition: under half of its runs of three words are distinct."""
    words = normalize(text).split()
    if len(words) < LOOP_WORDS:
        return False
    runs = [tuple(words[start : start + 3]) for start in range(len(words) - 2)]
    return 2 * len(set(runs)) < len(runs)


def _grade_refusal(text: str, rule: Grade, question: str) -> GradeVerdict:
    asked = normalize(question)
    sentences = [normalize(part) for part in re.split(r"(?<=[.!?;:\n])\s+|\n", text)]
    own = " ".join(
        part for part in sentences if not asked or part.strip(_EDGES) not in asked or len(part) < SHORT_ANSWER
    )
    if not any(phrase in own for phrase in _REFUSALS):
        return GradeVerdict(False, "answers as if it knew")
    return _without(rule.none, normalize(text))


def _grade_same(text: str, source_answer: str | None, least: float) -> GradeVerdict:
    if source_answer is None:
        return GradeVerdict(True)
    source = _THOUGHT.sub("", source_answer)
    likeness = difflib.SequenceMatcher(None, normalize(source).split(), normalize(text).split(), autojunk=False).ratio()
    if likeness >= least:
        return GradeVerdict(True)
    return GradeVerdict(
        False, f"shares {likeness:.0%} of its words with the source's answer, {least:.0%} are asked for"
    )
