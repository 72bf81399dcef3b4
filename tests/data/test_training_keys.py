"""Keys that change what is learnt are used or refused, in each format; none is dropped."""

from __future__ import annotations

import re

import pytest
from fixtures.data_formats import ADD, ANSWER, CHATS, EXCHANGE, QUESTION, ROWS, option, read, refused

from runner.errors import DataError

LABELLED = {"label": {"text": "Two and two?", "label": "sum"}}


@pytest.mark.parametrize("name", [*ROWS, *LABELLED])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("labels", [1, 2]), ("input_ids", [[1, 2]]), ("token_ids", "[1, 2]"), ("Tokens", [1.0]),
        ("chosen_input_ids", [1]), ("decoder_labels", [1]), ("target", "Four"), ("targets", ["Four"]),
    ],
)  # fmt: skip
def test_tokens_and_targets_of_another_program_are_refused_in_each_format(name, key, value):
    row = {**ROWS, **LABELLED}[name]
    with pytest.raises(DataError, match=f"the row has '{key}'.*is not used") as caught:
        option(name)({**row, key: value})
    assert re.search(rf"\+data\.format\.ignore=\[.*{key}", str(caught.value))
    assert option(name, f"+format.ignore=[{key}]")({**row, key: value}) == option(name)(row)


@pytest.mark.parametrize("name", [*ROWS, *LABELLED])
def test_counts_and_words_under_such_keys_are_allowed(name):
    row = {**ROWS, **LABELLED}[name]
    more = {"tokens": 512, "labels": ["bug"], "input_ids": [], "target": None, "targets": ""}
    assert option(name)({**row, **more}) == option(name)(row)


@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("functions", [{"name": "add"}]), ("history", [["a", "b"]]), ("videos", ["a.mp4"]),
        ("reasoning_content", "Easy."), ("enable_thinking", False), ("label", False), ("kto_tag", False),
        ("system_prompt", "Be brief."), ("wieght", 2), ("mask", [0, 1]), ("completion_mask", [0, 1]),
    ],
)  # fmt: skip
def test_a_key_of_the_row_that_changes_what_is_learnt_is_refused_in_each_format(name, key, value):
    text = refused({**CHATS[name], key: value}, name)
    assert f"the row has '{key}'" in text
    assert f"+data.format.ignore=[{key}]" in text
    assert read({**CHATS[name], key: value}, name, f"+format.ignore=[{key}]") == EXCHANGE


@pytest.mark.parametrize("name", CHATS)
def test_other_keys_and_keys_without_a_value_are_allowed(name):
    more = {"id": 3, "source": "x", "height": 180, "split": "train", "tools": [], "history": None, "images": "",
            "weight": 1, "loss_weight": 1.0, "train": True, "label": True}  # fmt: skip
    assert read({**CHATS[name], **more}, name) == EXCHANGE
    assert read({**CHATS[name], "tools": "[]", "weight": "1.0", "history": " null "}, name) == EXCHANGE


def test_weights_of_a_row_that_contradict_each_other():
    assert "the row contradicts itself: weight=1, train=False" in refused(
        {**CHATS["messages"], "weight": 1, "train": False}
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [("images", ["a.png"]), ("train_detail", [{"begin_offset": 0}]), ("refusal", "No."), ("tools", [ADD])],
)
def test_a_key_of_a_turn_that_changes_what_is_learnt_is_refused(key, value):
    row = {"messages": [QUESTION, {**ANSWER, key: value}]}
    assert f"message 2 has '{key}'" in refused(row)
    assert read(row, "messages", f"+format.ignore=[{key}]") == EXCHANGE
    row = {"conversations": [CHATS["sharegpt"]["conversations"][0], {"from": "gpt", "value": "Four.", key: value}]}
    assert f"message 2 has '{key}'" in refused(row, "sharegpt")
    row = {"prompt": "Two and two?", "completion": [{**ANSWER, key: value}]}
    assert f"message 1 has '{key}'" in refused(row, "prompt_completion")
    assert f"message 2 has '{key}'" in refused({"messages": [QUESTION, {**ANSWER, "content": None, key: value}]})
    assert read({"messages": [QUESTION, {**ANSWER, key: None, "id": 1}]}) == EXCHANGE


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
    said = [CHATS["sharegpt"]["conversations"][0], {"from": "gpt", "value": "Four.", key: 0}]
    assert read({"conversations": said}, "sharegpt")[1] == {**ANSWER, "weight": 0.0}
    for value in ("no", -1, float("nan"), float("inf"), [0]):
        text = refused({"messages": [QUESTION, {**ANSWER, key: value}]})
        assert f"message 2 has {key}={value!r}; allowed: a number from 0 (not trained), true or false" in text


def test_weights_that_contradict_each_other():
    text = refused({"messages": [QUESTION, {**ANSWER, "weight": 0, "train": True}]})
    assert "message 2 contradicts itself: weight=0, train=True" in text


def test_plain_texts_have_no_weights_either():
    assert "the row has 'weight'" in refused({"text": "A text.", "weight": 0}, "text")
    assert read({"text": "A text.", "weight": 1, "tools": "a hammer", "history": "long"}, "text") == "A text."
