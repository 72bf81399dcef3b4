"""Tools and calls of them: one shape, whatever the row has."""

from __future__ import annotations

import pytest
from fixtures.data_formats import ADD, ANSWER, EXCHANGE, QUESTION, read, refused


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tool_calls", [{"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}]),
        ("tool_calls", '[{"name": "add", "arguments": {"a": 2}}]'),
        ("function_call", {"name": "add", "arguments": '{"a": 2}'}),
    ],
)
def test_calls_of_tools_are_kept_with_their_arguments_as_an_object(key, value):
    row = {"messages": [QUESTION, {"role": "assistant", key: value}, {"role": "tool", "content": "4"}, ANSWER]}
    (call,) = read(row)[1].pop("tool_calls")
    assert (call.pop("id", None) == "c1") == ("c1" in str(value))
    assert call == ADD
    assert read({"messages": [QUESTION, {**ANSWER, key: value}]}, "messages", f"+format.ignore=[{key}]") == EXCHANGE
    assert "is empty" in refused(row, "messages", f"+format.ignore=[{key}]")


def test_calls_that_are_no_calls():
    for value, problem in (
        ([{"function": {}}], "call 1 of message 2 has no name"),
        (
            [{"name": "add", "arguments": "[1]"}],
            "the arguments of call 1 of message 2 are [1]; a JSON object is needed",
        ),
        ([{"name": "add", "arguments": "{"}], "the arguments of call 1 of message 2 cannot be parsed as JSON"),
    ):
        assert problem in refused({"messages": [QUESTION, {"role": "assistant", "tool_calls": value}]})
    assert "message 1 has 'tool_calls', but its role is user" in refused(
        {"messages": [{**QUESTION, "tool_calls": [ADD]}, ANSWER]}
    )
