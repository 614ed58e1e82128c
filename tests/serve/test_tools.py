"""Tool calls of local models: texts of three families read back, whole and in pieces; what is forced, refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantize.runtimes.chat_template import ChatTemplate
from quantize.runtimes.tool_style import FAMILIES, tool_style
from quantize.serve.engines.tools import TOOL_STYLES, CallReader, wish_of
from quantize.serve.protocol import ChatRequest
from tests.serve.conftest import Running, fakes, gateways

NAMES = frozenset({"weather", "time"})
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
TIME = {"type": "function", "function": {"name": "time"}}
HERMES = """{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<tool_call>{"name": <name>, "arguments": <args-json-object>}</tool_call><|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}{% for call in message.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def read(family: str, pieces: list[str], *, forced: bool = False, parallel: bool = True) -> tuple[str, list[Any]]:
    """The text and the (name, arguments) of an answer that comes in pieces."""
    reader = CallReader(TOOL_STYLES[family], NAMES, forced=forced, parallel=parallel)
    deltas = [delta for piece in pieces for delta in reader.add(piece)] + reader.flush()
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert [call["index"] for call in calls] == list(range(len(calls))) == list(range(reader.calls))
    assert all(len(call["id"]) == 9 and call["id"].isalnum() and call["type"] == "function" for call in calls)
    functions = [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls]
    return "".join(delta.get("content", "") for delta in deltas), functions


ONE = '{"name": "weather", "arguments": {"city": "Hanoi"}}'
HANOI = ("weather", {"city": "Hanoi"})
READ = [
    ("hermes", f"<tool_call>\n{ONE}\n</tool_call>", "", [HANOI]),
    ("hermes", f"Let me look.\n<tool_call>{ONE}</tool_call>", "Let me look.", [HANOI]),
    ("hermes", f'<tool_call>{ONE}</tool_call>\n<tool_call>{{"name": "time", "arguments": {{}}}}</tool_call>', "",
     [HANOI, ("time", {})]),
    ("hermes", f"<tool_call>\n{ONE}", "", [HANOI]),  # the model ended its turn there
    ("hermes", '<tool_call>{"name": "weather", "arguments": {"city": "</tool_call>"}}</tool_call>', "",
     [("weather", {"city": "</tool_call>"})]),
    ("hermes", '<tool_call>{"name": "weather", "arguments": "{\\"city\\": \\"Hanoi\\"}"}</tool_call>', "", [HANOI]),
    ("hermes", '<tool_call>{"name": "rm", "arguments": {}}</tool_call>', None, []),  # no such tool
    ("hermes", "<tool_call>nonsense</tool_call> and on", None, []),
    ("hermes", '<tool_call>{"name": "weather", "argu', None, []),
    ("hermes", "5 < 7 <tool", None, []),
    ("hermes", "plain", None, []),
    ("hermes", ' {"name": "weather"}', None, []),
    ("mistral", '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Hanoi"}}, {"name": "time", "arguments": {}}]',
     "", [HANOI, ("time", {})]),
    ("mistral", "a list: [1]", None, []),
    ("llama3", '{"name": "weather", "parameters": {"city": "Hanoi"}}', "", [HANOI]),
    ("llama3", '\n{"name": "weather", "parameters": {"city": "Hanoi"}}; {"name": "time", "parameters": {}}', "",
     [HANOI, ("time", {})]),
    ("llama3", '{"name": "someone", "age": 3}', None, []),
    ("llama3", 'So: {"name": "weather", "parameters": {"city": "Hanoi"}}', None, []),
    ("llama3", "   ", None, []),
]  # fmt: skip


@pytest.mark.parametrize(("family", "answer", "text", "calls"), READ)
def test_calls_are_read_and_everything_else_stays_text(
    family: str, answer: str, text: str | None, calls: list[Any]
) -> None:
    wanted = (answer if text is None else text, calls)
    assert read(family, [answer]) == wanted
    assert read(family, list(answer)) == wanted


@given(st.sampled_from(READ), st.lists(st.integers(0, 120), max_size=6))
@settings(max_examples=200, deadline=None)
def test_where_an_answer_is_cut_into_pieces_changes_nothing(row: Any, cuts: list[int]) -> None:
    family, answer, text, calls = row
    places = [0, *sorted(min(cut, len(answer)) for cut in cuts), len(answer)]
    pieces = [answer[a:b] for a, b in pairwise(places)]
    assert read(family, pieces) == (answer if text is None else text, calls)


@given(st.text(alphabet='<>/tool_cal[TOOL_CALLS]{}"name: \n', max_size=60), st.sampled_from(sorted(TOOL_STYLES)))
@settings(max_examples=300, deadline=None)
def test_what_is_no_call_comes_out_letter_by_letter(text: str, family: str) -> None:
    assert read(family, list(text)) == (text, [])


@pytest.mark.parametrize(
    ("family", "key"), [("hermes", "arguments"), ("mistral", "arguments"), ("llama3", "parameters")]
)
def test_a_forced_answer_is_the_call_alone(family: str, key: str) -> None:
    call: Any = {"name": "weather", key: {"city": "Hanoi"}}
    answer = json.dumps([call] if family == "mistral" else call)
    assert read(family, list(answer), forced=True) == ("", [HANOI])
    assert read(family, list(answer[:-4]), forced=True) == (answer[:-4], [])  # cut off by max_tokens


def test_at_most_one_call_where_the_client_says_so() -> None:
    twice = f"<tool_call>{ONE}</tool_call>" * 2
    assert read("hermes", [twice])[1] == [HANOI, HANOI]
    assert read("hermes", [twice], parallel=False)[1] == [HANOI]


@pytest.mark.parametrize(
    ("template", "style"),
    [
        (HERMES, "hermes"),
        ("{% for message in messages %}{{ message.content }}{% endfor %}", ""),
        ("{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}{% endif %}[TOOL_CALLS]", "mistral"),
        ("{% if tools %}[TOOL_CALLS]f[ARGS]{}{% endif %}", ""),
        ('{% if tools %}Respond {"name": function name, "parameters": dictionary}{% endif %}'
         '{{ \'{"name": "\' }}{{ \'"parameters": \' }}', "llama3"),
        ("{% if tools %}<tool_call>\n<function=x>{% endif %}arguments", ""),
        ("{% if tools %}<tool_call>name <arg_key>k</arg_key>{% endif %}arguments", ""),
    ],
)  # fmt: skip
def test_the_family_of_a_template(template: str, style: str) -> None:
    assert tool_style(template) == style
    assert set(TOOL_STYLES) == set(FAMILIES)


def test_a_template_is_given_the_tools_and_what_was_called() -> None:
    called = {"id": "123456789", "type": "function", "function": {"name": "weather", "arguments": {"city": "Hanoi"}}}
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": [called]},
                {"role": "tool", "content": "rain", "tool_call_id": "123456789"}]  # fmt: skip
    text = ChatTemplate(HERMES, {}).render(messages, [WEATHER])
    assert json.dumps(WEATHER) in text
    assert '{"name": "weather", "arguments": {"city": "Hanoi"}}' in text
    assert text.endswith("<|im_start|>tool\nrain<|im_end|>\n<|im_start|>assistant\n")


def schema_of(parameters: dict[str, Any] | None, more: list[Any] | None = None, style: str = "hermes") -> Any:
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    body = {"messages": [], "tools": [tool, *(more or [])], "tool_choice": "required"}
    request = ChatRequest.model_construct(**{**body, "tools": ChatRequest.model_validate(
        {**body, "messages": [{"role": "user", "content": "x"}]}).tools})  # fmt: skip
    wish = wish_of(request, style, has_grammar=True, runtime="test")
    assert wish is not None
    return wish.schema()


def test_the_schema_of_a_forced_call_takes_what_the_tools_take_and_nothing_else() -> None:
    from jsonschema import Draft202012Validator

    tree = {
        "type": "object",
        "$defs": {"Leaf": {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}},
        "properties": {"leaf": {"$ref": "#/$defs/Leaf"}, "again": {"$ref": "#"}},
        "required": ["leaf"],
    }
    check = Draft202012Validator(schema_of(tree, [WEATHER]))
    good = [{"name": "f", "arguments": {"leaf": {"n": 1}, "again": {"leaf": {"n": 2}}}},
            {"name": "weather", "arguments": {"city": "x"}}]  # fmt: skip
    bad = [{"name": "f", "arguments": {"leaf": {"n": "1"}}}, {"name": "f", "arguments": {"again": {"leaf": 1}}},
           {"name": "weather", "arguments": {}}, {"name": "g", "arguments": {}}, {"name": "f"}, []]  # fmt: skip
    assert all(check.is_valid(item) for item in good)
    assert not any(check.is_valid(item) for item in bad)
    assert Draft202012Validator(schema_of(None, style="mistral")).is_valid([{"name": "f", "arguments": {}}])
    assert Draft202012Validator(schema_of(None, style="llama3")).is_valid({"name": "f", "parameters": {}})


@pytest.fixture(scope="module")
def caller() -> Iterator[Running]:
    """A model that repeats what it is told, calls too, and can be held to a grammar."""
    with gateways() as run:
        yield run(fakes(supports=["json", "logprobs"], tool_style="hermes"))


ASKED = f"look <tool_call> {ONE} </tool_call>"


def test_the_openai_client_gets_a_call_whole_and_streamed(caller: Running) -> None:
    client = openai.OpenAI(base_url=f"{caller.url}/v1", api_key="none", max_retries=0)
    fields: Any = {"model": "fake", "messages": [{"role": "user", "content": ASKED}], "tools": [WEATHER]}
    choice = client.chat.completions.create(**fields).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "look"
    (call,) = choice.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == HANOI
    with client.chat.completions.stream(**fields) as stream:
        streamed = stream.get_final_completion().choices[0]
    assert streamed.finish_reason == "tool_calls"
    assert streamed.message.content == "look"
    assert streamed.message.tool_calls[0].function.arguments == call.function.arguments
    answered = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    again = client.chat.completions.create(
        model="fake",
        messages=[choice.message.model_dump(), answered],
        tools=[WEATHER],  # type: ignore[list-item]
    )
    assert again.choices[0].message.content == "look rain "
    assert again.choices[0].finish_reason == "stop"


def test_arguments_may_come_back_as_an_object_and_a_tool_without_its_type(caller: Running) -> None:
    past = {
        "role": "assistant",
        "tool_calls": [{"id": "1", "function": {"name": "weather", "arguments": {"city": "x"}}}],
    }
    messages = [past, {"role": "tool", "tool_call_id": "1", "content": "rain"}]
    answer = caller.ask("POST", "/v1/chat/completions", {"messages": messages, "tools": [{"function": {"name": "f"}}]})
    assert answer.json["choices"][0]["message"]["content"] == "rain "


def test_none_is_no_call(caller: Running) -> None:
    answer = caller.chat(ASKED, tools=[WEATHER], tool_choice="none").json["choices"][0]
    assert (answer["message"]["content"], answer["finish_reason"]) == (ASKED + " ", "stop")


@pytest.mark.parametrize(
    "choice",
    [
        "required",
        {"type": "function", "function": {"name": "weather"}},
        {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [WEATHER]}},
    ],
)
def test_a_call_that_must_be(caller: Running, choice: Any) -> None:
    fields = {"tools": [WEATHER, TIME], "tool_choice": choice, "response_format": {"type": "json_object"}}
    answer = caller.chat(ONE, **fields).json["choices"][0]
    assert answer["finish_reason"] == "tool_calls"
    assert answer["message"]["content"] is None
    assert answer["message"]["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city":"Hanoi"}'}


def called(arguments: str) -> dict[str, Any]:
    return {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}


STRICT = {"type": "function", "function": {"name": "f", "strict": True, "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools"),
        ({"tools": [STRICT]}, "tools"),
        ({"tools": [TIME], "tool_choice": "weather"}, "tool_choice"),
        ({"tools": [TIME], "tool_choice": {"type": "function", "function": {"name": "weather"}}}, "tool_choice"),
        ({"tools": [TIME], "tool_choice": {"type": "allowed_tools", "allowed_tools": {"tools": 5}}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TIME], "response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [TIME], "grammar": 'root ::= "x"'}, "grammar"),
        ({"messages": [{"role": "assistant", "tool_calls": [called("[")]}]}, "messages"),
        ({"messages": [{"role": "user", "content": "", "tool_calls": [{"function": {"name": "f"}}]}]}, "messages"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"type": "custom"}]}]}, "messages"),
    ],
)  # fmt: skip
def test_what_can_not_be_done_names_its_field(caller: Running, fields: dict[str, Any], param: str) -> None:
    answer = caller.chat("x", **fields)
    assert (answer.status, answer.json["error"]["param"]) == (422, param), answer.body


def test_a_model_that_knows_no_tools_or_can_not_be_forced_says_so(gateway: Running) -> None:
    answer = gateway.chat("x", tools=[TIME]).json["error"]
    assert answer["param"] == "tools"
    assert "the model's chat template has no tool calls" in answer["message"]
    with gateways() as run:
        free = run(fakes(tool_style="hermes"))
        assert free.chat(ASKED, tools=[WEATHER]).json["choices"][0]["finish_reason"] == "tool_calls"
        assert free.chat("x", tools=[TIME], tool_choice="required").json["error"]["param"] == "tool_choice"
