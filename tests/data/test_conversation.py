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
        ("tools", [{"type": "function"}]), ("tools", '[{"name": "add"}]'), ("history", [["a", "b"]]), ("weight", 0),
        ("weight", 0.5), ("weight", "0"), ("loss_weight", 3.0), ("train", False), ("images", ["a.png"]),
        ("reasoning_content", "Easy."), ("chat_template_kwargs", {"enable_thinking": False}), ("label", False),
        ("kto_tag", False), ("system_prompt", "Be brief."),
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


@pytest.mark.parametrize(
    ("key", "value"),
    [("tool_calls", CALL), ("function_call", {"name": "add"}), ("reasoning", "Easy."), ("images", ["a.png"]),
     ("train_detail", [{"begin_offset": 0}]), ("refusal", "No.")],
)  # fmt: skip
def test_a_key_of_a_turn_that_changes_what_is_learnt_is_refused(key, value):
    row = {"messages": [QUESTION, {**ANSWER, key: value}]}
    assert f"message 2 has '{key}'" in refused(row)
    assert read(row, "messages", f"+format.ignore=[{key}]") == EXCHANGE
    row = {"conversations": [ROWS["sharegpt"]["conversations"][0], {"from": "gpt", "value": "Four.", key: value}]}
    assert f"message 2 has '{key}'" in refused(row, "sharegpt")
    row = {"prompt": "Two and two?", "completion": [{**ANSWER, key: value}]}
    assert f"message 1 has '{key}'" in refused(row, "prompt_completion")
    assert f"message 2 has '{key}'" in refused({"messages": [QUESTION, {**ANSWER, "content": None, key: value}]})
    assert read({"messages": [QUESTION, {**ANSWER, key: None, "id": 1, "name": "Bob"}]}) == EXCHANGE


def test_all_keys_of_a_row_are_named_at_once():
    text = refused({"tools": CALL, "messages": [QUESTION, {**ANSWER, "tool_calls": CALL}]})
    assert "the row has 'tools', message 2 has 'tool_calls'" in text
    assert "+data.format.ignore=[tool_calls,tools]" in text


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

    assert turn(0) == turn(False) == turn(0.0) == {**ANSWER, "train": False}
    assert turn(1) == turn(True) == turn(None) == ANSWER
    assert read({"messages": [{**QUESTION, key: True}, ANSWER]})[0] == {**QUESTION, "train": True}
    assert read({"messages": [QUESTION, {**ANSWER, key: 0}]}, "messages", f"+format.ignore=[{key}]") == EXCHANGE
    said = [ROWS["sharegpt"]["conversations"][0], {"from": "gpt", "value": "Four.", key: 0}]
    assert read({"conversations": said}, "sharegpt")[1] == {**ANSWER, "train": False}
    for value in (0.5, "0", "false", -1, float("nan"), [0]):
        text = refused({"messages": [QUESTION, {**ANSWER, key: value}]})
        assert f"message 2 has {key}={value!r}; allowed: 0 or false (not trained), 1 or true (trained)" in text


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
    text = refused({"messages": [QUESTION, {"role": "function_call", "content": "{}"}, ANSWER]})
    assert "message 2 is a tool call (role function_call): tools are not supported" in text
    text = refused({"conversations": [said[0], {"from": "function_call", "value": "{}"}, said[1]]}, "sharegpt")
    assert "+data.format.roles.function_call=assistant" in text
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
    with pytest.raises(DataError, match="message 2 has 'tool_calls'") as caught:
        formats.checked([QUESTION, {**ANSWER, "tool_calls": CALL}], "data.format.function", "f")
    assert "ignore" not in str(caught.value)
    weighed = formats.checked([QUESTION, {**ANSWER, "weight": 0}], "data.format.function", "f")
    assert weighed == [QUESTION, {**ANSWER, "train": False}]
    with pytest.raises(DataError, match="half of a character"):
        formats.checked("a \ud83d", "data.format.function", "f")
