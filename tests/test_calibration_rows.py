"""Calibration rows as people have them: each form gives the ids that the model's own template and tokenizer give.

What is right is said by transformers: the template applied to the messages as OpenAI writes them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from quantize.calibration.datasets import find_dataset
from quantize.calibration.datasets.base import Row
from quantize.calibration.text import CalibrationSet, load_calibration_set, load_tokenizer, read_rows
from quantize.errors import PlanError, RecipeError
from quantize.evaluate.text import load_text
from quantize.recipe.calibration import CalibrationSpec

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers warns on import

ASKED = {"role": "user", "content": "What is the capital of France?"}
ANSWERED = {"role": "assistant", "content": "The capital of France is Paris."}
CHAT = [ASKED, ANSWERED]
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"name": "find", "arguments": {"place": "Paris"}}
FIND = {"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}
TEXT = "The quick brown fox jumps over the lazy dog."

# One that takes no system message and no two messages of a role in a row, as Gemma's.
STRICT = """{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for message in messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/...') }}{% endif %}
{{- '<' + message['role'] + '>' + message['content'] }}{% endfor %}"""
# One that knows tools, calls and thinking, as Qwen's.
TOOLED = """{% if tools %}{{ 'tools: ' + tools | tojson }}{% endif %}{% for message in messages %}
{{- '<' + message.role + '>' }}{% if message.reasoning_content is defined %}
{{- '(' + message.reasoning_content + ')' }}{% endif %}{{ message.content }}
{%- if message.tool_calls is defined %}{% for call in message.tool_calls %}
{{- 'call ' + call.function.name + call.function.arguments | tojson }}{% endfor %}{% endif %}{% endfor %}"""
# One that reads lists of parts only, as some of models that also see.
PARTS = """{% for message in messages %}{{ '<' + message['role'] + '>' }}
{%- for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}
{%- endfor %}"""


def spec(dataset: str = "rows.jsonl", **values: Any) -> CalibrationSpec:
    return CalibrationSpec.model_validate(
        {"dataset": dataset, "samples": 8, "sequence_length": 400, "minimum_tokens": 1, **values}
    )


def write_lines(folder: Path, *rows: Any) -> None:
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")


def set_of(folder: Path, model: Path, *rows: Any, **values: Any) -> CalibrationSet:
    write_lines(folder, *rows)
    return load_calibration_set(spec(**values), folder, model)


def rows_of(folder: Path, dataset: str, **values: Any) -> list[Row]:
    return list(read_rows(find_dataset(spec(dataset, **values), folder), folder))


def by_template(model: Path, messages: list[dict[str, Any]], **others: Any) -> tuple[int, ...]:
    return tuple(load_tokenizer(model).apply_chat_template(messages, tokenize=True, return_dict=False, **others))


def with_template(tiny: Path, to: Path, template: str | None) -> Path:
    folder = Path(shutil.copytree(tiny, to / "model"))
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["chat_template"]
    path.write_text(json.dumps(settings if template is None else {**settings, "chat_template": template}))
    return folder


ALPACA = {"instruction": "Name the capital.", "input": "France", "output": "Paris."}


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": CHAT}, CHAT),
        ({"conversations": [{"from": "human", "value": ASKED["content"]},
                            {"from": "gpt", "value": ANSWERED["content"]}]}, CHAT),
        ({"conversations": CHAT, "id": "a"}, CHAT),
        ({"prompt": ASKED["content"], "completion": ANSWERED["content"]}, CHAT),
        ({"prompt": [ASKED], "completion": [ANSWERED]}, CHAT),
        ({"system": SYSTEM["content"], "prompt": ASKED["content"], "response": ANSWERED["content"]}, [SYSTEM, *CHAT]),
        (ALPACA, [{"role": "user", "content": "Name the capital.\n\nFrance"},
                  {"role": "assistant", "content": "Paris."}]),
        ({**ALPACA, "input": ""}, [{"role": "user", "content": "Name the capital."},
                                   {"role": "assistant", "content": "Paris."}]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "What is the capital "},
                                                    {"type": "text", "text": "of France?"}]}, ANSWERED]}, CHAT),
        ({"messages": json.dumps(CHAT)}, CHAT),
        ({"messages": [{"role": "developer", "content": "Be brief."}, *CHAT]}, [SYSTEM, *CHAT]),
    ],
    ids=["messages", "sharegpt", "openai-in-sharegpt", "prompt", "prompt-messages", "system-column", "alpaca",
         "alpaca-without-input", "parts", "messages-in-text", "developer"],
)  # fmt: skip
def test_a_chat_in_whatever_columns_is_what_the_template_makes_of_its_messages(
    row: dict[str, Any], messages: list[dict[str, Any]], tiny: Path, tmp_path: Path
) -> None:
    found = set_of(tmp_path, tiny, row)
    assert found.token_ids == (by_template(tiny, messages),)
    assert found.skipped_rows == 0


def test_text_comes_before_all_other_columns(tiny: Path, tmp_path: Path) -> None:
    found = set_of(tmp_path, tiny, {"text": TEXT, "messages": CHAT, "prompt": "x", "completion": "y"})
    assert found.token_ids == (tuple(load_tokenizer(tiny)(TEXT)["input_ids"]),)


def test_a_question_and_its_answer_are_text_to_a_model_without_a_template(tiny: Path, tmp_path: Path) -> None:
    plain = with_template(tiny, tmp_path, None)
    found = set_of(tmp_path, plain, {"prompt": "One two", "completion": "three four"})
    assert found.token_ids == (tuple(load_tokenizer(tiny)("One two\nthree four")["input_ids"]),)
    with pytest.raises(PlanError, match="the model has no chat template"):
        set_of(tmp_path, plain, {"messages": CHAT})


def test_a_system_message_that_the_template_refuses_is_said_to_the_user(tiny: Path, tmp_path: Path) -> None:
    strict = with_template(tiny, tmp_path, STRICT)
    found = set_of(tmp_path, strict, {"messages": CHAT}, {"messages": [SYSTEM, *CHAT]})
    folded = [{"role": "user", "content": f"Be brief.\n\n{ASKED['content']}"}, ANSWERED]
    assert found.token_ids == (by_template(strict, CHAT), by_template(strict, folded))
    assert found.folded_rows == 1
    assert found.remarks() == [
        "the chat template takes no system message: 1 rows have it before the user's text"
    ]  # fmt: skip


def test_roles_that_a_template_refuses_are_an_error_with_its_own_words(tiny: Path, tmp_path: Path) -> None:
    strict = with_template(tiny, tmp_path, STRICT)
    said = r"rows\.jsonl:2:1: .*refuses the row: Conversation roles must alternate"
    with pytest.raises(RecipeError, match=said) as it:
        set_of(tmp_path, strict, {"messages": CHAT}, {"messages": [ASKED, ASKED]})
    assert "its roles are: user, user" in str(it.value)


@pytest.mark.parametrize("arguments", [CALL["arguments"], json.dumps(CALL["arguments"])], ids=["object", "text"])
@pytest.mark.parametrize("tools", [[FIND], json.dumps([FIND]), None], ids=["list", "text", "none"])
def test_tools_and_calls_without_content_are_used(arguments: Any, tools: Any, tiny: Path, tmp_path: Path) -> None:
    tooled = with_template(tiny, tmp_path, TOOLED)
    call = {"type": "function", "function": {"name": "find", "arguments": arguments}}
    result = {"role": "tool", "content": "48.8 N"}
    row = {"messages": [ASKED, {"role": "assistant", "content": None, "tool_calls": [call]}, result], "tools": tools}
    right = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]}
    expected = by_template(tooled, [ASKED, right, result], tools=[FIND] if tools else None)
    assert set_of(tmp_path, tooled, row).token_ids == (expected,)
    assert 'call find{"place": "Paris"}' in load_tokenizer(tooled).decode(expected)


def test_calls_as_sharegpt_writes_them(tiny: Path, tmp_path: Path) -> None:
    tooled = with_template(tiny, tmp_path, TOOLED)
    turns = [("human", ASKED["content"]), ("function_call", json.dumps(CALL)), ("observation", "48.8 N")]
    row = {"conversations": [{"from": who, "value": what} for who, what in turns]}
    right = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]}
    expected = by_template(tooled, [ASKED, right, {"role": "tool", "content": "48.8 N"}])
    assert set_of(tmp_path, tooled, row).token_ids == (expected,)


@pytest.mark.parametrize("name", ["thinking", "reasoning_content", "reasoning"])
def test_thinking_has_the_name_that_the_template_reads(name: str, tiny: Path, tmp_path: Path) -> None:
    tooled = with_template(tiny, tmp_path, TOOLED)
    expected = by_template(tooled, [ASKED, {**ANSWERED, "reasoning_content": "It is Paris."}])
    assert set_of(tmp_path, tooled, {"messages": [ASKED, {**ANSWERED, name: "It is Paris."}]}).token_ids == (expected,)


def test_a_template_that_reads_parts_gets_parts(tiny: Path, tmp_path: Path) -> None:
    model = with_template(tiny, tmp_path, PARTS)
    parts = [{**item, "content": [{"type": "text", "text": item["content"]}]} for item in CHAT]
    expected = by_template(model, parts)
    assert set_of(tmp_path, model, {"messages": CHAT}).token_ids == (expected,)
    assert "Paris" in load_tokenizer(model).decode(expected)


def test_rows_that_hold_nothing_are_skipped_and_counted(tiny: Path, tmp_path: Path) -> None:
    rows = [{"text": None}, {"text": TEXT}, {"messages": []}, {"messages": None}, {"prompt": None, "completion": "x"},
            {"text": ""}, None, {"prompt": "", "completion": " "}]  # fmt: skip
    found = set_of(tmp_path, tiny, *rows, minimum_tokens=2)
    assert (len(found.token_ids), found.skipped_rows) == (1, 7)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": 7}, "column `text` holds neither text nor chat messages, but int"),
        ({"body": "x"}, "no column `text`\n  it has: body; say which: `column: NAME`"),
        ({"messages": [{"speaker": "me", "text": "x"}]}, "a message without a role\n  .*this one has: speaker, text"),
        ({"messages": ["x"]}, "a chat message must be an object"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
         "a message has a part of type 'image_url'"),
        ({"messages": CHAT, "tools": "none"}, "column `tools` is no list of tools"),
        ({"prompt": 1, "completion": "x"}, "column `prompt` holds no text, but int"),
        ({"text": "x" * ((16 << 20) + 1)}, "a text of 16,777,217 characters"),
    ],
    ids=["number", "column", "keys", "strings", "image", "tools", "prompt", "huge"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_a_row_that_can_t_be_used_is_named(name: str, row: Any, message: str, tiny: Path, tmp_path: Path) -> None:
    rows = [{"text": TEXT}, row]
    lines = "\n".join(map(json.dumps, rows))
    if len(lines) > 16 << 20 and name.endswith("l"):
        message = "more than 16,777,216 bytes"
    (tmp_path / name).write_text(json.dumps(rows) if name == "rows.json" else lines)
    where = r"rows\.json row 2: " if name == "rows.json" else r"rows\.jsonl:2:1: "
    with pytest.raises(RecipeError, match=f"{where}(not JSON .)?{message}"):
        load_calibration_set(spec(name), tmp_path, tiny)


def test_a_text_from_windows_is_the_text(tmp_path: Path) -> None:
    paragraphs = [f"Paragraph {number}.\nIts second line." for number in range(6)]
    (tmp_path / "a.txt").write_bytes("\n\n".join(paragraphs).encode())
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(paragraphs).replace("\n", "\r\n").encode())
    (tmp_path / "b.txt").write_bytes((tmp_path / "b.txt").read_bytes().replace(b"\r\r\n", b"\r\n"))
    assert rows_of(tmp_path, "b.txt") == rows_of(tmp_path, "a.txt") == paragraphs
    one, other = (find_dataset(spec(name), tmp_path).content() for name in ("a.txt", "b.txt"))
    assert one == other  # of a text that was read otherwise before, the identity is another than before


def test_lines_from_windows_are_the_lines(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "x"}\r\n\r\n{"text": "y"}\r\n')
    assert rows_of(tmp_path, "a.jsonl") == ["x", "y"]
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf {"text": "x"}\r\n{"text": "y"}')
    assert rows_of(tmp_path, "a.json") == ["x", "y"]


def test_a_json_array_is_a_row_an_item(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"text": "x"}, {"text": "y"}], indent=1))
    assert rows_of(tmp_path, "a.json") == ["x", "y"]
    assert load_text("a.json", tmp_path).documents == ("x", "y")


def test_nested_parquet_is_the_same_chats(tiny: Path, tmp_path: Path) -> None:
    """A table has every key in every message, null where it was not; templates ask whether a key is there."""
    tooled = with_template(tiny, tmp_path, TOOLED)
    call = {"type": "function", "function": {"name": "find", "arguments": '{"place": "Paris"}'}}
    chats: list[Any] = [
        CHAT,
        [ASKED, {"role": "assistant", "content": None, "tool_calls": [call]}],
        [ASKED, {**ANSWERED, "reasoning_content": "Paris."}],
        None,
    ]
    table = pyarrow.table({"messages": chats, "tools": [None, json.dumps([FIND]), None, None], "id": [1, 2, 3, 4]})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    found = load_calibration_set(spec("rows.parquet"), tmp_path, tooled)
    called = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]}
    assert found.token_ids == (
        by_template(tooled, CHAT),
        by_template(tooled, [ASKED, called], tools=[FIND]),
        by_template(tooled, chats[2]),
    )
    assert found.skipped_rows == 1


def test_a_row_of_a_table_is_named_by_its_number(tiny: Path, tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": [TEXT] * 300, "other": [1] * 300}), tmp_path / "a.parquet")
    with pytest.raises(RecipeError, match=r"a\.parquet row 1: column `other` holds neither text nor chat"):
        rows_of(tmp_path, "a.parquet", column="other")
    with pytest.raises(RecipeError, match=r"a\.parquet: no column `body`\n  it has: text, other"):
        rows_of(tmp_path, "a.parquet", column="body")
    strict = with_template(tiny, tmp_path, STRICT)
    chats = [CHAT] * 300 + [[ANSWERED]]
    pyarrow.parquet.write_table(pyarrow.table({"messages": chats}), tmp_path / "b.parquet")
    with pytest.raises(RecipeError, match=r"b\.parquet row 301: .*must alternate"):
        load_calibration_set(spec("b.parquet", samples=400), tmp_path, strict)


def test_a_folder_is_no_dataset(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    with pytest.raises(RecipeError, match="texts is a folder") as caught:
        find_dataset(spec("./texts"), tmp_path).identify()
    assert caught.value.hint == "it has no .txt or .jsonl or .json or .parquet"
    (tmp_path / "texts" / "a.jsonl").write_text("{}")
    with pytest.raises(RecipeError) as caught:
        find_dataset(spec("./texts"), tmp_path).identify()
    assert caught.value.hint == "name a file of it: a.jsonl"


@pytest.mark.parametrize("name", ["rows.txt", "rows.jsonl"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
def test_text_in_another_encoding_is_named(tmp_path: Path, name: str, encoding: str) -> None:
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    (tmp_path / name).write_bytes(f'{mark}{{"text": "a"}}'.encode(encoding))
    kind = encoding[:6].upper()
    with pytest.raises(RecipeError, match=f"the text is {kind}, and UTF-8 is read") as caught:
        find_dataset(spec(name), tmp_path).identify()
    assert caught.value.hint == f"save it as UTF-8, or: iconv -f {kind} -t UTF-8 {name}"
