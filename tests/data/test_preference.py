"""Rows of preference pairs, in the shape of each program that writes them."""

from __future__ import annotations

import pytest
from fixtures.data_formats import ANSWER, EXCHANGE, PAIRS, REJECTED, TOOL, option

from runner.data import row_shape
from runner.errors import DataError


@pytest.mark.parametrize("name", PAIRS)
def test_every_format_of_pairs_reads_the_same_pair(name):
    pair = {"prompt": EXCHANGE[:1], "chosen": ANSWER, "rejected": REJECTED}
    assert option(name)(PAIRS[name]) == pair
    assert option(name)({**PAIRS[name], "tools": [TOOL]}) == {**pair, "tools": [TOOL]}
    for row in ({**PAIRS[name], "weight": 2}, {**PAIRS[name], "images": ["a.png"]}):
        with pytest.raises(DataError, match=r"the row has (a|')"):
            option(name)(row)


def test_other_shapes_of_pairs():
    pair = {"prompt": EXCHANGE[:1], "chosen": ANSWER, "rejected": REJECTED}
    swift = {"messages": EXCHANGE, "rejected_messages": [EXCHANGE[0], REJECTED]}
    assert option("preference_swift")(swift) == pair
    assert row_shape.looks_like(swift) == "preference_swift"
    openai = {**PAIRS["preference_openai"], "input": {"messages": EXCHANGE[:1], "tools": [TOOL]}}
    assert option("preference_openai")(openai) == {**pair, "tools": [TOOL]}
    with_system = {**PAIRS["preference_alpaca"], "system": "Be brief.", "input": "As a word."}
    prompt = option("preference_alpaca")(with_system)["prompt"]
    assert [turn["content"] for turn in prompt] == ["Be brief.", "Two and two?\n\nAs a word."]
    other = {"messages": EXCHANGE, "rejected_messages": [ANSWER, EXCHANGE[0], REJECTED]}
    with pytest.raises(DataError, match="the chosen and the rejected side have different prompts"):
        option("preference_swift")(other)
    with pytest.raises(DataError, match="the chosen and the rejected answer are equal"):
        option("preference_swift")({"messages": EXCHANGE, "rejected_response": "Four."})
    with pytest.raises(DataError, match="needs role and content"):
        option("preference_openai")({**PAIRS["preference_openai"], "preferred_output": ["Four."]})
    with pytest.raises(DataError, match="needs an object with messages under 'input'"):
        option("preference_openai")({**PAIRS["preference_openai"], "input": "Two and two?"})


def test_pairs_of_whole_conversations_may_repeat_the_prompt():
    read, sides = option("preference"), {"chosen": EXCHANGE, "rejected": [EXCHANGE[0], REJECTED]}
    pair = {"prompt": EXCHANGE[:1], "chosen": ANSWER, "rejected": REJECTED}
    assert read(sides) == read({"prompt": "Two and two?", **sides}) == pair
    with pytest.raises(DataError, match="must be one answer of the assistant, it is: user, assistant"):
        read({"prompt": "Another one?", **sides})
    with pytest.raises(DataError, match="has no prompt under 'prompt', and 'chosen' is a text"):
        read({"chosen": "Human: Two? Assistant: Four.", "rejected": "Human: Two? Assistant: Five."})


def test_a_margin_may_be_the_text_of_a_number_and_be_ignored():
    row = {**PAIRS["preference"], "margin": "0.5"}
    assert option("preference")(row)["margin"] == 0.5
    assert "margin" not in option("preference")(row, ignore=["margin"])
    for margin in ("half", True, float("nan"), 1e300):
        with pytest.raises(DataError, match="is not a finite number"):
            option("preference")({**row, "margin": margin})
