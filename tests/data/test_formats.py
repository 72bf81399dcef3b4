"""Each format reads its rows, refuses the others' by name, and never lets an untrainable one through."""

# ruff: noqa: F401, F811 - fixtures are imported, then asked for by name

from __future__ import annotations

import json
from collections import Counter

import pytest
from fixtures.data_formats import CHATS, EXCHANGE, JUDGED, PAIRS, ROWS, custom, option, own

from runner.data import formats, row_shape, sources, splits
from runner.errors import DataError

TASKS = {**dict.fromkeys(PAIRS, " task=dpo"), **dict.fromkeys(JUDGED, " task=kto")}


@pytest.mark.parametrize("name", CHATS)
def test_every_format_reads_the_same_conversation(name):
    assert option(name)(ROWS[name]) == EXCHANGE


def test_text_is_text():
    assert option("text")(ROWS["text"]) == "Two and two are four."


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("other", ROWS)
def test_a_row_of_another_format_is_refused_with_the_override_to_use(name, other):
    if name == other:
        option(name)(ROWS[name])
        assert row_shape.looks_like(ROWS[name]) == name
        return
    if (name, other) in {("messages", "kto_messages"), ("sharegpt", "kto_sharegpt"), ("prompt_completion", "kto")}:
        assert option(name)(ROWS[other]) == EXCHANGE  # a good answer may be learnt; a bad one is refused
        with pytest.raises(DataError, match=r"the row has '(label|kto_tag)'"):
            option(name)({**ROWS[other], **{key: False for key in ("label", "kto_tag") if key in ROWS[other]}})
        return
    with pytest.raises(DataError) as caught:
        option(name)(ROWS[other])
    message = str(caught.value)
    assert message.startswith(f"data/format={name}: ")
    assert f"The row looks like {other}" in message
    assert message.endswith(f"→ data/format={other}{TASKS.get(other, '')}")


def test_values_that_are_neither_text_nor_number_are_refused_with_their_place():
    rows = [("x.jsonl:1", {"text": "a", "label": b"b"}), ("x.jsonl:2", {"text": "a", "label": "b"})]
    with pytest.raises(DataError, match=r"x\.jsonl:1: contains a value of the type bytes"):
        splits.index(rows, option("label"), True, Counter())
    with pytest.raises(DataError, match="chat_template_kwargs cannot be parsed as JSON"):
        option("messages")({"messages": EXCHANGE, "chat_template_kwargs": "{enable_thinking"})
    with pytest.raises(DataError, match="contains a value of the type bytes"):
        option("messages")({"messages": EXCHANGE, "tools": [{"name": "f", "parameters": {"a": b"b"}}]})


def test_a_row_of_no_format_says_what_it_has():
    with pytest.raises(DataError, match=r"finds nothing \(keys here: question, answer\) under 'instruction'") as caught:
        option("alpaca")({"question": "?", "answer": "!"})
    assert "data.format.instruction=KEY" in str(caught.value)
    with pytest.raises(DataError, match="finds int under 'text'"):
        option("text")({"text": 3})


def test_keys_can_be_renamed():
    read = option("alpaca", "format.instruction=question", "format.output=answer")
    assert read({"question": "Two and two?", "answer": "Four."}) == EXCHANGE
    read = option("sharegpt", "format.speaker=who", "format.value=says", "+format.roles.bot=assistant")
    said = [{"who": "human", "says": "Two and two?"}, {"who": "bot", "says": "Four."}]
    assert read({"conversations": said}) == EXCHANGE


def test_alpaca_puts_the_input_below_the_instruction_and_takes_a_system_prompt():
    row = {"instruction": "Add.", "input": "2, 2", "output": "4", "system": "Be brief."}
    contents = [message["content"] for message in option("alpaca")(row)]
    assert contents == ["Be brief.", "Add.\n\n2, 2", "4"]
    assert len(option("alpaca")({**row, "input": None, "system": None})) == 2


def test_sharegpt_takes_a_system_prompt_and_refuses_unknown_speakers():
    row = {**ROWS["sharegpt"], "system": "Be brief."}
    assert option("sharegpt")(row)[0] == {"role": "system", "content": "Be brief."}
    with pytest.raises(DataError, match="unknown speaker 'bing'") as caught:
        option("sharegpt")({"conversations": [{"from": "bing", "value": "Hi"}]})
    assert "+data.format.roles.bing=user" in str(caught.value)


def test_prompt_and_completion_may_be_messages():
    assert option("prompt_completion")({"prompt": EXCHANGE[:1], "completion": EXCHANGE[1:]}) == EXCHANGE
    assert option("prompt_completion")({"prompt": EXCHANGE[:1], "completion": "Four."}) == EXCHANGE


def test_contents_may_be_lists_of_text_parts():
    parts = [{"type": "text", "text": "Two and "}, {"type": "text", "text": "two?"}]
    assert option("messages")({"messages": [{"role": "user", "content": parts}, EXCHANGE[1]]}) == EXCHANGE
    with pytest.raises(DataError, match="neither text nor images; only these can be trained on"):
        option("messages")({"messages": [{"role": "user", "content": [{"type": "audio"}]}]})


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([*EXCHANGE[:1], {"role": "assistant", "content": " \n"}], "message 2, of the assistant, is empty"),
        ([*EXCHANGE[:1], {"role": "assistant", "content": None}], "message 2, of the assistant, is empty"),
        ([{"role": "assistent", "content": "Hi"}], "unknown role 'assistent'. did you mean 'assistant'"),
        (EXCHANGE[:1], "has no assistant turn"),
        ([], "has no assistant turn"),
        ([{"role": "user"}], "message 1 needs role and content, it has role"),
        (["Hi"], "message 1 needs role and content, it has str"),
    ],
)
def test_conversations_that_cannot_be_trained_on(messages, problem):
    with pytest.raises(DataError) as caught:
        option("messages")({"messages": messages})
    assert problem in str(caught.value)
    assert caught.value.faults[0].remedy


def test_an_empty_text():
    with pytest.raises(DataError, match="the text under 'text' is empty"):
        option("text")({"text": " "})


def test_what_a_function_gives_is_checked(own):
    assert custom(f"{own}:to_nothing")({}) is None
    with pytest.raises(DataError, match="gave int"):
        formats.checked(1, "data.format", "mine")
    with pytest.raises(DataError, match="failed on this row: KeyError: 'q'"):
        custom(f"{own}:to_messages")({})
    with pytest.raises(DataError, match="is empty"):
        custom(f"{own}:to_messages")({"q": "?", "a": ""})
    with pytest.raises(DataError, match="failed on this row: SystemExit: 0"):
        custom(f"{own}:to_the_end")({})


def test_a_function_that_changes_its_row_gives_the_same_in_every_pass(tmp_path):
    """Rows are read several times, and those of a JSON file stay in memory."""
    (tmp_path / "rows.json").write_text(json.dumps([{"messages": EXCHANGE}]))
    function = (
        "def f(row):\n    row['messages'].insert(0, {'role': 'system', 'content': 'A'})\n    return row['messages']\n"
    )
    (tmp_path / "changing.py").write_text(function)
    records = sources.local(path=str(tmp_path / "rows.json"), eval_path=None, documents="file").train
    read = custom(f"{tmp_path}/changing.py:f")
    for _ in range(3):
        assert [read(row) for _, row in records] == [[{"role": "system", "content": "A"}, *EXCHANGE]]
