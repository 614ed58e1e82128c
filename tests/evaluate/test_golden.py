"""Golden files and their errors, graders, prompts as token ids, and answers side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantize.errors import RecipeError, UsageError
from quantize.evaluate.answers import compare_answers
from quantize.evaluate.golden import GoldenSet, Grade, Haystack, load_golden
from quantize.evaluate.graders import grade, parse_json
from quantize.evaluate.prompts import PromptTokenizer, ask, build_haystack
from quantize.evaluate.record import Change

SHIPPED = Path(__file__).parent.parent.parent / "calibration" / "golden"

ONE = """\
name: mine
prompts:
  - id: paris
    prompt: What is the capital of France?
    grade: {kind: contains, all: [Paris]}
"""


def judged(answer: str, source: str | None = None, **rule: Any) -> bool:
    return grade(Grade.model_validate(rule), answer, source).passed


def write(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_the_shipped_prompts_cover_what_they_should() -> None:
    golden = load_golden([SHIPPED])
    assert len(golden.prompts) >= 30
    assert {item.language for item in golden.prompts} == {"en", "vi"}
    for language in ("en", "vi"):
        categories = {item.prompt.category for item in golden.prompts if item.language == language}
        assert categories == {"short", "json", "long-context", "domain", "refusal", "hallucination", "consistency"}


def test_every_grader_is_used() -> None:
    kinds = {item.prompt.grade.kind for item in load_golden([SHIPPED]).prompts}
    assert kinds == {"exact", "contains", "regex", "json", "refusal", "same"}


def test_the_hash_follows_what_is_asked_and_not_the_layout(tmp_path: Path) -> None:
    first = load_golden([write(tmp_path, ONE)]).hash
    assert load_golden([write(tmp_path, "# a remark\n" + ONE)]).hash == first
    assert load_golden([write(tmp_path, ONE.replace("France", "Spain"))]).hash != first


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("kind: contains", "kind: contain", r"mine\.yaml:5:19: .*"),
        ("all: [Paris]", "pattern: Paris", r"mine\.yaml:5:.*`pattern` does not go with kind `contains`"),
        ("kind: contains, all: [Paris]", "kind: exact", r"mine\.yaml:5:.*kind `exact` needs `answers`"),
        ("kind: contains, all: [Paris]", "kind: regex, pattern: '('", r"mine\.yaml:5:.*no regular expression"),
        ("kind: contains, all: [Paris]", "kind: json, schema: {type: thing}", r"mine\.yaml:5:.*no JSON Schema"),
        ("prompt: What", "promt: What", r"mine\.yaml:4:5: .*promt"),
        ("id: paris", "id: Paris?", r"mine\.yaml:3:9: "),
        ("name: mine\n", "", r"mine\.yaml:1:1: .*name"),
        ("What is the capital of France?", '"{haystack} Where?"', r"mine\.yaml:3:.*`haystack`"),
    ],
)
def test_a_wrong_file_says_where(old: str, new: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, ONE.replace(old, new, 1))
    with pytest.raises(RecipeError, match=message):
        load_golden([path])


def test_ids_and_names_must_be_unique(tmp_path: Path) -> None:
    twice = ONE + ONE.split("prompts:\n")[1]
    with pytest.raises(RecipeError, match=r"twice\.yaml:6:9: the id paris is there twice"):
        load_golden([write(tmp_path, twice, "twice.yaml")])
    with pytest.raises(RecipeError, match=r"the set mine is already in"):
        load_golden([write(tmp_path, ONE, "a.yaml"), write(tmp_path, ONE, "b.yaml")])


def test_missing_files_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none\.yaml: no such file"):
        load_golden([tmp_path / "none.yaml"])
    with pytest.raises(RecipeError, match="no golden prompt files"):
        load_golden([tmp_path])


@pytest.mark.parametrize(
    ("rule", "good", "bad"),
    [
        ({"kind": "exact", "answers": ["Tokyo"]}, ["Tokyo", " tokyo.\n", '"Tokyo"'], ["Tokyo is it", "Kyoto", ""]),
        ({"kind": "contains", "all": ["3"]}, ["It is 3.", "3"], ["1303", "three", "3.14159x3a"][:2]),
        ({"kind": "contains", "any": ["H2O", "H₂O"]}, ["h2o", "It is H₂O."], ["HO2"]),
        ({"kind": "contains", "any": ["bé"]}, ["từ bé", "be\u0301"], ["béo", "be"]),
        ({"kind": "contains", "all": ["yes"], "none": ["no"]}, ["yes, nothing"], ["yes and no"]),
        ({"kind": "regex", "pattern": r"\bls\b"}, ["`ls`", "use ls -l"], ["also", "false"]),
        ({"kind": "refusal"}, ["I don’t know.", "Tôi không biết.", "It is not mentioned."], ["It is 5 euros.", ""]),
        ({"kind": "refusal", "none": ["Smith"]}, ["I do not know"], ["I'm not sure, maybe Smith"]),
        ({"kind": "json"}, ['{"a": 1}', '```json\n{"a": 1}\n```', 'Sure! {"a": [1, 2]} there', "[]"], ["{a: 1}", "no"]),
        ({"kind": "json", "strict": True}, ['{"a": 1}', '```\n{"a": 1}\n```'], ['Sure! {"a": 1}', '{"a": NaN}']),
        (
            {"kind": "json", "schema": {"type": "object", "required": ["a"]}},
            ['{"a": 1}', "<think>{}</think>{\"a\": 2}"],
            ['{"b": 1}', "[1]", "<think>{\"a\": 2}"],
        ),
    ],
)  # fmt: skip
def test_graders(rule: dict[str, Any], good: list[str], bad: list[str]) -> None:
    assert [text for text in good if not judged(text, **rule)] == []
    assert [text for text in bad if judged(text, **rule)] == []


def test_the_same_as_the_source() -> None:
    source = "A rainbow is an arc of colours in the sky."
    assert judged(source, kind="same")
    assert judged("A rainbow is an arc of colours in our sky", source, kind="same")
    assert not judged("Un arc-en-ciel est beau.", source, kind="same")
    assert not judged("", source, kind="same")


def test_a_refusal_must_be_the_model_s_own() -> None:
    question = 'The shop opens at nine. If the text does not say it, answer "I don\'t know". Who owns the shop?'
    rule = Grade.model_validate({"kind": "refusal"})
    assert grade(rule, "I don't know.", question=question).passed
    assert grade(rule, "The text does not say who owns it.", question=question).passed
    assert not grade(rule, 'If the text does not say it, answer "I don\'t know".', question=question).passed


def test_going_round_in_circles_is_no_answer() -> None:
    circle = "la Cité, la France, Paris, " * 10
    assert not judged(circle, kind="contains", all=["Paris"])
    assert judged("Paris", kind="contains", all=["Paris"])
    prose = "The capital of France is Paris, a city on the Seine that has been the seat of government for most of the "
    assert judged(prose + "time since the twelfth century, with short breaks.", kind="contains", all=["Paris"])


def test_a_failure_says_why() -> None:
    verdict = grade(Grade.model_validate({"kind": "json", "schema": {"properties": {"a": {"const": 2}}}}), '{"a": 1}')
    assert verdict.reason == "JSON, but not as the schema has it: at a: 2 was expected"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@settings(max_examples=40)
@given(st.dictionaries(st.text(), json_values, max_size=3), st.text(alphabet="abc .,\n"))
def test_json_is_found_in_prose(value: dict[str, Any], prose: str) -> None:
    assert parse_json(prose + json.dumps(value) + prose, strict=False) == value


@given(st.text(), st.sampled_from(["exact", "contains", "regex", "json", "refusal", "same"]))
def test_no_answer_breaks_a_grader(answer: str, kind: str) -> None:
    extra = {"exact": {"answers": ["x"]}, "contains": {"all": ["x"]}, "regex": {"pattern": "x"}}.get(kind, {})
    verdict = grade(Grade.model_validate({"kind": kind, **extra}), answer, "source")
    assert verdict.passed or verdict.reason


def test_prompts_become_token_ids_with_the_model_s_own_template(tiny: Path, tmp_path: Path) -> None:
    tokenizer = PromptTokenizer(tiny)
    asked = ask(load_golden([write(tmp_path, ONE)]), tokenizer, 256)
    (request,) = asked.requests
    assert 2 in request.stop
    assert "What is the capital of France?" in tokenizer.decode(request.token_ids)
    assert tokenizer.pieces([1, 10**6]) == ["<s>", None]


REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
SHOWS = "{% for message in messages if message.role == 'user' %}<user>{{ message.content }}{% endfor %}"


@pytest.mark.parametrize("template", [SHOWS, REFUSES + SHOWS], ids=["leaves it out", "refuses it"])
def test_a_system_text_goes_before_the_user_s_where_the_template_takes_none(template: str, own_tiny: Path) -> None:
    config = json.loads((own_tiny / "tokenizer_config.json").read_text())
    (own_tiny / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    tokenizer = PromptTokenizer(own_tiny)
    assert tokenizer.decode(tokenizer.chat("What is it?", "Be brief.")) == "<user>Be brief.\n\nWhat is it?"
    assert tokenizer.decode(tokenizer.chat("What is it?", None)) == "<user>What is it?"


def test_a_haystack_is_as_long_as_it_may_be(tiny: Path) -> None:
    tokenizer = PromptTokenizer(tiny)
    haystack = Haystack(needle="The code is 7391.", filler=["The dog does not mind.", "The fox jumps."], depth=0.5)
    text = build_haystack(haystack, tokenizer, 300)
    lines = text.splitlines()
    assert "The code is 7391." in lines[len(lines) // 2]
    assert 200 < len(tokenizer.encode(text.replace(haystack.needle, ""))) <= 300
    first, last = (
        build_haystack(haystack.model_copy(update={"depth": depth}), tokenizer, 300).splitlines() for depth in (0, 1)
    )
    assert first[0] == last[-1] == haystack.needle


def test_a_prompt_that_is_too_long_is_refused(tiny: Path, tmp_path: Path) -> None:
    golden = load_golden([write(tmp_path, ONE)])
    with pytest.raises(UsageError, match=r"golden prompt mine/paris: \d+ tokens and 64 for the answer"):
        ask(golden, PromptTokenizer(tiny), 70)


THREE = """\
name: mine
prompts:
  - {id: a, prompt: Say a., grade: {kind: contains, all: [a]}}
  - {id: b, prompt: Say b., grade: {kind: contains, all: [b]}}
  - {id: c, category: json, prompt: Give JSON., grade: {kind: json}}
  - {id: d, category: json, prompt: Give JSON again., grade: {kind: json}}
"""


def three(folder: Path) -> GoldenSet:
    return load_golden([write(folder, THREE)])


def test_answers_side_by_side(tmp_path: Path) -> None:
    golden = three(tmp_path)
    result = compare_answers(golden, ["?"] * 4, ["a", "x", "{}", "[]"], ["x", "b", "{}", "broken"], 256)
    assert [item.change for item in result.results] == ["lost", "gained", "kept", "lost"]
    assert (result.source_passed, result.artifact_passed) == (3, 2)
    assert (result.json_source_passed, result.json_lost) == (2, 1)
    assert [item.key for item in result.results if item.change is Change.LOST] == ["mine/a", "mine/d"]
    assert result.results[3].artifact.reason.startswith("not JSON")


def test_prompts_without_a_right_answer_are_counted_apart(tmp_path: Path) -> None:
    text = THREE + "  - {id: e, prompt: Say e., grade: {kind: same}}\n"
    result = compare_answers(load_golden([write(tmp_path, text)]), ["?"] * 5, ["a"] * 5, ["a", "a", "a", "a", "z"], 256)
    assert (result.source_passed, result.artifact_passed, result.prompts) == (1, 1, 4)
    assert result.same_rate == 0
    assert result.lost == 0


def test_long_prompts_are_shown_by_their_ends(tmp_path: Path) -> None:
    result = compare_answers(three(tmp_path), ["begin" + "." * 9000 + "end"] * 4, ["x"] * 4, ["x"] * 4, 256)
    shown = result.results[0].prompt
    assert shown.startswith("begin")
    assert shown.endswith("end")
    assert len(shown) < 2100
