"""What a row or a turn carries beside its text is honoured or refused by name; nothing is dropped silently."""

from __future__ import annotations

import pytest
from fixtures.data_formats import ADD, ANSWER, CHATS, EXCHANGE, QUESTION, read, refused

from runner.data import formats
from runner.errors import DataError

CALL = [{"id": "c1", "type": "function", "function": {"name": "add", "arguments": "{}"}}]


WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize("name", CHATS)
def test_tools_weight_and_variables_of_the_template_are_kept_in_each_format(name):
    for tools in ([WEATHER], [WEATHER["function"]], '[{"name": "weather", "parameters": {"type": "object", '
                  '"properties": {}}}]', WEATHER):  # fmt: skip
        assert read({**CHATS[name], "tools": tools}, name) == {"messages": EXCHANGE, "tools": [WEATHER]}
    for key, value in (("weight", 0), ("loss_weight", 2.5), ("weight", "0.5"), ("train", "false"), ("train", False)):
        weight = float({"false": 0}.get(value, value))
        assert read({**CHATS[name], key: value}, name) == {"messages": EXCHANGE, "weight": weight}
        assert read({**CHATS[name], key: value}, name, f"+format.ignore=[{key}]") == EXCHANGE
    for kwargs in ({"enable_thinking": False}, '{"enable_thinking": false}'):
        row = read({**CHATS[name], "chat_template_kwargs": kwargs}, name)
        assert row == {"messages": EXCHANGE, "chat_template_kwargs": {"enable_thinking": False}}


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("tools", [{"type": "function"}], "tool 1 of the tools of the row has no name"),
        ("tools", "[{", "the tools of the row cannot be parsed as JSON"),
        ("tools", 5, "is neither a list nor an object"),
        ("tools", [{"name": "a \ud83d"}], "half of a character"),
        ("weight", -1, "the row has weight=-1; allowed: a number from 0"),
        ("weight", "many", "the row has weight='many'"),
        ("loss_mask", [0, 1], "the row has loss_mask=[0, 1]"),
        ("chat_template_kwargs", 5, "chat_template_kwargs is 5; an object is needed"),
    ],
)
def test_what_a_row_carries_has_a_right_form(key, value, problem):
    assert problem in refused({**CHATS["messages"], key: value})


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_kept(key):
    row = {"messages": [QUESTION, {**ANSWER, key: "Easy."}]}
    assert read(row) == [QUESTION, {**ANSWER, "reasoning_content": "Easy."}]
    assert read(row, "messages", f"+format.ignore=[{key}]") == EXCHANGE


def test_roles_that_call_tools_and_parts_of_a_content():
    text = '{"name": "add", "arguments": {"a": 2}}'
    expected = [QUESTION, {"role": "assistant", "content": "", "tool_calls": [ADD]}, {"role": "tool", "content": "4"}]
    said = [{"from": "human", "value": "Two and two?"}, {"from": "function_call", "value": text},
            {"from": "observation", "value": "4"}, {"from": "gpt", "value": "Four."}]  # fmt: skip
    assert read({"conversations": said}, "sharegpt") == [*expected, ANSWER]
    swift = [QUESTION, {"role": "tool_call", "content": text}, {"role": "tool_response", "content": "4"}, ANSWER]
    assert read({"messages": swift}) == [*expected, ANSWER]
    # Several calls are one turn, with what the assistant said before them.
    several = [QUESTION, {"role": "assistant", "content": "Let me see."}, *swift[1:2] * 2, *swift[2:]]
    assert read({"messages": several})[1] == {"role": "assistant", "content": "Let me see.", "tool_calls": [ADD, ADD]}
    parts = [{"type": "reasoning", "value": "Easy."}, {"type": "text", "value": "Let me see."},
             {"type": "tool_call", "value": text}]  # fmt: skip
    assert read({"messages": [QUESTION, {"role": "assistant", "content": parts}]})[1] == {
        "role": "assistant", "content": "Let me see.", "reasoning_content": "Easy.", "tool_calls": [ADD],
    }  # fmt: skip
    assert "cannot be parsed as JSON" in refused({"messages": [QUESTION, {"role": "tool_call", "content": "add"}]})


def test_names_are_kept():
    row = {"messages": [QUESTION, {"role": "tool", "content": "4", "name": "add", "tool_call_id": "c1"}, ANSWER]}
    assert read(row) == row["messages"]


def test_roles_of_other_programs():
    rules = {"role": "developer", "content": "Be brief."}
    result = {"role": "observation", "content": "4"}
    row = read({"messages": [rules, QUESTION, ANSWER, result, ANSWER]})
    assert [turn["role"] for turn in row] == ["system", "user", "assistant", "tool", "assistant"]
    said = CHATS["sharegpt"]["conversations"]
    assert read({"conversations": [{"from": "developer", "value": "Be brief."}, *said]}, "sharegpt")[0] == {
        "role": "system",
        "content": "Be brief.",
    }
    for speaker in (["human"], None, 3):
        assert "unknown speaker" in refused({"conversations": [{"from": speaker, "value": "Hi"}]}, "sharegpt")
    assert "the role of message 1 is a list" in refused({"messages": [{"role": ["user"], "content": "Hi"}]})


@pytest.mark.parametrize("value", [["Be brief."], [{"type": "text", "text": "Be brief."}], 5, True, {"a": 1}, 0, False])
@pytest.mark.parametrize("name", ["sharegpt", "alpaca"])
def test_a_system_prompt_is_a_text(name, value):
    assert "the text under 'system' is" in refused({**CHATS[name], "system": value}, name)


def test_there_is_one_system_prompt():
    row = {"system": "A", "conversations": [{"from": "system", "value": "B"}, *CHATS["sharegpt"]["conversations"]]}
    assert "has two system prompts: the key 'system', and the first message" in refused(row, "sharegpt")
    without = read(row, "sharegpt", "format.system=null")
    assert without == [{"role": "system", "content": "B"}, *EXCHANGE]
    assert "with the role system" in refused({**CHATS["messages"], "system": "A"})
    text = refused({**CHATS["alpaca"], "system_prompt": "A"}, "alpaca")
    assert "use it with data.format.system=system_prompt" in text
    assert read({**CHATS["alpaca"], "system_prompt": "A"}, "alpaca", "format.system=system_prompt")[0]["content"] == "A"


def test_the_input_of_an_instruction_under_another_key():
    row = {**CHATS["alpaca"], "context": "Numbers."}
    assert "use it with data.format.input=context" in refused(row, "alpaca")
    assert read(row, "alpaca", "format.input=context")[0]["content"] == "Two and two?\n\nNumbers."


@pytest.mark.parametrize("value", [None, 3, 1.5, True, {"a": 1}])
def test_a_content_is_a_text(value):
    assert "the content of message 1 is" in refused({"messages": [{"role": "user", "content": value}, ANSWER]})
    parts = [{"type": "text", "text": value}]
    assert "part 1 of the content of message 1" in refused({"messages": [{"role": "user", "content": parts}, ANSWER]})


def test_a_part_of_a_text_has_no_weight():
    parts = [{"type": "text", "text": "Four.", "weight": 0}]
    assert "part 1 of the content of message 2 has 'weight'" in refused(
        {"messages": [QUESTION, {"role": "assistant", "content": parts}]}
    )


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("messages", {"messages": [QUESTION, {"role": "assistant", "content": "Four \ud83d"}]}),
        ("sharegpt", {**CHATS["sharegpt"], "system": "Four \ud83d"}),
        ("alpaca", {**CHATS["alpaca"], "input": "Four \ud83d"}),
        ("prompt_completion", {**CHATS["prompt_completion"], "completion": "Four \ud83d"}),
        ("text", {"text": "Four \ud83d"}),
    ],
)
def test_half_of_a_character_is_refused(name, row):
    assert "contains half of a character (the lone surrogate '\\ud83d', character 6)" in refused(row, name)


def test_messages_of_a_function_of_ones_own_are_checked_likewise():
    with pytest.raises(DataError, match="message 2 has 'images'") as caught:
        formats.checked([QUESTION, {**ANSWER, "images": ["a.png"]}], "data.format.function", "f")
    assert "ignore" not in str(caught.value)
    called = [QUESTION, {**ANSWER, "tool_calls": CALL}]
    assert formats.checked(called, "data.format.function", "f")[1]["tool_calls"][0]["id"] == "c1"
    row = formats.checked({"messages": [*called[:1], ANSWER], "tools": [WEATHER], "weight": 2}, "f", "f")
    assert row == {"messages": EXCHANGE, "tools": [WEATHER], "weight": 2.0}
    weighed = formats.checked([QUESTION, {**ANSWER, "weight": 0}], "data.format.function", "f")
    assert weighed == [QUESTION, {**ANSWER, "weight": 0.0}]
    with pytest.raises(DataError, match="half of a character"):
        formats.checked("a \ud83d", "data.format.function", "f")
