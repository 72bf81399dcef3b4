"""What a row or a turn carries beside its text is honoured or refused by name; nothing is dropped silently."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
from hydra import compose, initialize_config_dir

from runner.config import bind
from runner.data import formats
from runner.errors import DataError

QUESTION, ANSWER = {"role": "user", "content": "Two and two?"}, {"role": "assistant", "content": "Four."}
EXCHANGE = [QUESTION, ANSWER]
CALL = [{"id": "c1", "type": "function", "function": {"name": "add", "arguments": "{}"}}]
ROWS = {
    "messages": {"messages": EXCHANGE},
    "sharegpt": {"conversations": [{"from": "human", "value": "Two and two?"}, {"from": "gpt", "value": "Four."}]},
    "alpaca": {"instruction": "Two and two?", "output": "Four."},
    "prompt_completion": {"prompt": "Two and two?", "completion": "Four."},
}


@functools.cache
def option(name: str, *overrides: str) -> Callable[..., formats.Example]:
    with initialize_config_dir(str(bind.config_dir() / "data"), version_base="1.3"):
        return bind.bind(bind.to_plain(compose(f"format/{name}", list(overrides)))["format"], "data.format")


def read(row: dict, name: str = "messages", *overrides: str) -> formats.Example:
    return option(name, *overrides)(row)


def refused(row: dict, name: str = "messages", *overrides: str) -> str:
    with pytest.raises(DataError) as caught:
        read(row, name, *overrides)
    assert caught.value.faults[0].remedy
    return str(caught.value)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("functions", [{"name": "add"}]), ("history", [["a", "b"]]), ("images", ["a.png"]),
        ("reasoning_content", "Easy."), ("enable_thinking", False), ("label", False), ("kto_tag", False),
        ("system_prompt", "Be brief."), ("wieght", 2), ("mask", [0, 1]), ("completion_mask", [0, 1]),
    ],
)  # fmt: skip
def test_a_key_of_the_row_that_changes_what_is_learnt_is_refused_in_each_format(name, key, value):
    text = refused({**ROWS[name], key: value}, name)
    assert f"the row has '{key}'" in text
    assert f"+data.format.ignore=[{key}]" in text
    assert read({**ROWS[name], key: value}, name, f"+format.ignore=[{key}]") == EXCHANGE


@pytest.mark.parametrize("name", ROWS)
def test_other_keys_and_keys_without_a_value_are_allowed(name):
    more = {"id": 3, "source": "x", "height": 180, "split": "train", "tools": [], "history": None, "images": "",
            "weight": 1, "loss_weight": 1.0, "train": True, "label": True}  # fmt: skip
    assert read({**ROWS[name], **more}, name) == EXCHANGE
    assert read({**ROWS[name], "tools": "[]", "weight": "1.0", "history": " null "}, name) == EXCHANGE


WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize("name", ROWS)
def test_tools_weight_and_variables_of_the_template_are_kept_in_each_format(name):
    for tools in ([WEATHER], [WEATHER["function"]], '[{"name": "weather", "parameters": {"type": "object", '
                  '"properties": {}}}]', WEATHER):  # fmt: skip
        assert read({**ROWS[name], "tools": tools}, name) == {"messages": EXCHANGE, "tools": [WEATHER]}
    for key, value in (("weight", 0), ("loss_weight", 2.5), ("weight", "0.5"), ("train", "false"), ("train", False)):
        weight = float({"false": 0}.get(value, value))
        assert read({**ROWS[name], key: value}, name) == {"messages": EXCHANGE, "weight": weight}
        assert read({**ROWS[name], key: value}, name, f"+format.ignore=[{key}]") == EXCHANGE
    for kwargs in ({"enable_thinking": False}, '{"enable_thinking": false}'):
        row = read({**ROWS[name], "chat_template_kwargs": kwargs}, name)
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
    assert problem in refused({**ROWS["messages"], key: value})


def test_weights_of_a_row_that_contradict_each_other():
    assert "the row contradicts itself: weight=1, train=False" in refused(
        {**ROWS["messages"], "weight": 1, "train": False}
    )


ADD = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}


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


@pytest.mark.parametrize(
    ("key", "value"),
    [("images", ["a.png"]), ("train_detail", [{"begin_offset": 0}]), ("refusal", "No."), ("tools", [ADD])],
)
def test_a_key_of_a_turn_that_changes_what_is_learnt_is_refused(key, value):
    row = {"messages": [QUESTION, {**ANSWER, key: value}]}
    assert f"message 2 has '{key}'" in refused(row)
    assert read(row, "messages", f"+format.ignore=[{key}]") == EXCHANGE
    row = {"conversations": [ROWS["sharegpt"]["conversations"][0], {"from": "gpt", "value": "Four.", key: value}]}
    assert f"message 2 has '{key}'" in refused(row, "sharegpt")
    row = {"prompt": "Two and two?", "completion": [{**ANSWER, key: value}]}
    assert f"message 1 has '{key}'" in refused(row, "prompt_completion")
    assert f"message 2 has '{key}'" in refused({"messages": [QUESTION, {**ANSWER, "content": None, key: value}]})
    assert read({"messages": [QUESTION, {**ANSWER, key: None, "id": 1}]}) == EXCHANGE


def test_names_are_kept():
    row = {"messages": [QUESTION, {"role": "tool", "content": "4", "name": "add", "tool_call_id": "c1"}, ANSWER]}
    assert read(row) == row["messages"]


def test_all_keys_of_a_row_are_named_at_once():
    text = refused({"history": [["a", "b"]], "messages": [QUESTION, {**ANSWER, "images": ["a.png"]}]})
    assert "the row has 'history', message 2 has 'images'" in text
    assert "+data.format.ignore=[history,images]" in text


@pytest.mark.parametrize(
    ("key", "value"),
    [("train_on_turn", False), ("masked", True), ("loss_mask", 0), ("ignore", True), ("skip", True), ("exclude", True)],
)
def test_a_turn_that_other_programs_would_not_train_is_refused(key, value):
    assert f"message 2 has '{key}'" in refused({"messages": [QUESTION, {**ANSWER, key: value}]})


@pytest.mark.parametrize(
    ("key", "meant"),
    [("wieght", "weight"), ("Weight", "weight"), ("weights", "weight"), ("toolCalls", "tool_calls"),
     ("tool-calls", "tool_calls"), ("trian", "train")],
)  # fmt: skip
def test_a_misspelt_key_is_refused_with_the_right_one(key, meant):
    text = refused({"messages": [QUESTION, {**ANSWER, key: 0.5}]})
    assert f"message 2 has '{key}' (did you mean '{meant}'?)" in text


@pytest.mark.parametrize("key", ["weight", "loss_weight", "train", "training", "loss"])
def test_a_turn_says_whether_it_is_trained(key):
    def turn(value: object) -> list:
        return read({"messages": [QUESTION, {**ANSWER, key: value}, *EXCHANGE]})[1]

    assert turn(0) == turn(False) == turn(0.0) == turn("0") == {**ANSWER, "weight": 0.0}
    assert turn(0.5) == {**ANSWER, "weight": 0.5}
    assert turn(1) == turn(True) == turn(None) == turn("true") == ANSWER
    assert read({"messages": [{**QUESTION, key: True}, ANSWER]})[0] == {**QUESTION, "weight": 1.0}
    assert read({"messages": [QUESTION, {**ANSWER, key: 0}]}, "messages", f"+format.ignore=[{key}]") == EXCHANGE
    said = [ROWS["sharegpt"]["conversations"][0], {"from": "gpt", "value": "Four.", key: 0}]
    assert read({"conversations": said}, "sharegpt")[1] == {**ANSWER, "weight": 0.0}
    for value in ("no", -1, float("nan"), float("inf"), [0]):
        text = refused({"messages": [QUESTION, {**ANSWER, key: value}]})
        assert f"message 2 has {key}={value!r}; allowed: a number from 0 (not trained), true or false" in text


def test_weights_that_contradict_each_other():
    text = refused({"messages": [QUESTION, {**ANSWER, "weight": 0, "train": True}]})
    assert "message 2 contradicts itself: weight=0, train=True" in text


def test_roles_of_other_programs():
    rules = {"role": "developer", "content": "Be brief."}
    result = {"role": "observation", "content": "4"}
    row = read({"messages": [rules, QUESTION, ANSWER, result, ANSWER]})
    assert [turn["role"] for turn in row] == ["system", "user", "assistant", "tool", "assistant"]
    said = ROWS["sharegpt"]["conversations"]
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
    assert "the text under 'system' is" in refused({**ROWS[name], "system": value}, name)


def test_there_is_one_system_prompt():
    row = {"system": "A", "conversations": [{"from": "system", "value": "B"}, *ROWS["sharegpt"]["conversations"]]}
    assert "has two system prompts: the key 'system', and the first message" in refused(row, "sharegpt")
    without = read(row, "sharegpt", "format.system=null")
    assert without == [{"role": "system", "content": "B"}, *EXCHANGE]
    assert "with the role system" in refused({**ROWS["messages"], "system": "A"})
    text = refused({**ROWS["alpaca"], "system_prompt": "A"}, "alpaca")
    assert "use it with data.format.system=system_prompt" in text
    assert read({**ROWS["alpaca"], "system_prompt": "A"}, "alpaca", "format.system=system_prompt")[0]["content"] == "A"


def test_the_input_of_an_instruction_under_another_key():
    row = {**ROWS["alpaca"], "context": "Numbers."}
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
        ("sharegpt", {**ROWS["sharegpt"], "system": "Four \ud83d"}),
        ("alpaca", {**ROWS["alpaca"], "input": "Four \ud83d"}),
        ("prompt_completion", {**ROWS["prompt_completion"], "completion": "Four \ud83d"}),
        ("text", {"text": "Four \ud83d"}),
    ],
)
def test_half_of_a_character_is_refused(name, row):
    assert "contains half of a character (the lone surrogate '\\ud83d', character 6)" in refused(row, name)


def test_plain_texts_have_no_weights_either():
    assert "the row has 'weight'" in refused({"text": "A text.", "weight": 0}, "text")
    assert read({"text": "A text.", "weight": 1, "tools": "a hammer", "history": "long"}, "text") == "A text."


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
