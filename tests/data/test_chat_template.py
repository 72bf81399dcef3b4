"""What is trained is decoded and compared letter by letter; ids are compared with transformers' own."""

from __future__ import annotations

from itertools import groupby

import pytest
from fixtures.chat_tokenizer import build
from fixtures.conversations import (
    CALLED,
    FIRST,
    REASONED,
    SECOND,
    TALK,
    THOUGHT,
    TOOLS,
    WITH_SYSTEM,
    WITH_TOOL,
    called,
    trained,
)

from runner.data import chat_template
from runner.data.packing import IGNORED
from runner.errors import ConfigError


@pytest.mark.parametrize("messages", [TALK, WITH_SYSTEM], ids=["no-system", "system"])
@pytest.mark.parametrize(
    ("template", "start", "end"),
    [
        ("smollm2", "", "<|im_end|>"),
        ("llama3", "", "<|eot_id|>"),
        ("qwen", "", "<|im_end|>"),
        ("marked", "", "<|im_end|>"),
        ("mistral", " ", "</s>"),
        ("r1", "", "</s>"),
    ],
)
def test_answers_and_their_end_are_trained_and_nothing_else(messages, template, start, end):
    assert trained(messages, template) == [f"{start}{FIRST}{end}", f"{start}{SECOND}{end}"]
    assert trained(messages, template, "last") == [f"{start}{SECOND}{end}"]


@pytest.mark.parametrize("template", ["smollm2", "llama3", "qwen", "marked", "mistral"])
def test_all_trains_every_token(template):
    tokenizer = build(template)
    assert trained(TALK, template, "all") == [tokenizer.apply_chat_template(TALK, tokenize=False)]


def test_several_answers_in_a_row_and_tools():
    assert trained(WITH_TOOL, "qwen") == ["add(2, 2)<|im_end|>", "Four.<|im_end|>", "Any time.<|im_end|>"]


def test_a_conversation_that_the_assistant_opens():
    assert trained(TALK[1:], "smollm2") == [f"{FIRST}<|im_end|>", f"{SECOND}<|im_end|>"]


def test_what_the_template_trims_is_not_trained():
    padded = [TALK[0], {"role": "assistant", "content": "  Hello. \n"}]
    assert trained(padded, "llama3") == ["Hello.<|eot_id|>"]
    assert trained(padded, "qwen") == ["  Hello. \n<|im_end|>"]


def test_a_token_that_begins_in_the_header_is_not_trained():
    # "assistant\n" + "\n\nHello" holds the token "\n\n": the model is given "\n", it never has to say that token.
    opened = [TALK[0], {"role": "assistant", "content": "\n\nHello"}]
    tokenizer = build("qwen")
    merged = tokenizer.encode("\n\n", add_special_tokens=False)
    assert len(merged) == 1
    assert merged[0] in tokenizer.apply_chat_template(opened, return_dict=True)["input_ids"]
    assert trained(opened, "qwen") == ["\nHello<|im_end|>"]


def test_a_header_that_ends_in_a_space_keeps_it():
    # "ASSISTANT: " + "you" is tokenised as ":", " you": that space was given, so the token is not trained, ...
    assert trained([TALK[0], {"role": "assistant", "content": "you and I"}], "plain") == [" and I\n"]
    # ... although its own offsets, trimmed, claim that it begins with the y.
    ids, starts = chat_template.of(build("plain")).tokenize(": you")
    assert starts == [0, 1]
    assert len(ids) == 2


def test_marks_in_the_contents_do_not_confuse():
    odd = [TALK[0], {"role": "assistant", "content": "\ue0001\ue001 and \ue0000\ue001"}, *TALK]
    assert trained(odd, "smollm2")[0] == "\ue0001\ue001 and \ue0000\ue001<|im_end|>"


def test_an_answer_whose_thinking_is_left_out_is_not_trained_and_counted():
    assert trained(THOUGHT, "qwen3") == ["<think>\nEasy.\n</think>\n\nFour.<|im_end|>"]
    assert chat_template.encode(THOUGHT, build("qwen3"), "assistant")["reasoning_lost"] == 1
    # Without thinking the template writes an empty one in the last answer: it is for the model to write, too.
    assert trained(TALK, "qwen3") == [f"{FIRST}<|im_end|>", f"<think>\n\n</think>\n\n{SECOND}<|im_end|>"]
    assert "reasoning_lost" not in chat_template.encode(TALK, build("qwen3"), "assistant")


def test_answers_without_their_thinking():
    answers = trained(THOUGHT, "qwen3", reasoning=False)
    assert answers == ["Hello.<|im_end|>", "\n</think>\n\nFour.<|im_end|>"]
    kept = ["\n</think>\n\nHello.<|im_end|>", "\n</think>\n\nFour.<|im_end|>"]
    assert trained(THOUGHT, "qwen", reasoning=False) == kept
    assert trained(THOUGHT, "marked", reasoning=False) == kept
    hidden = trained(THOUGHT, "qwen", "all", reasoning=False)
    assert "A greeting." not in "".join(hidden)
    assert "Hello" in hidden[0]


WEIGHED = [TALK[0], {**TALK[1], "weight": 0.0}, *TALK[2:]]


@pytest.mark.parametrize("template", ["smollm2", "llama3", "qwen", "marked"])
def test_a_turn_of_weight_0_is_read_but_not_trained(template):
    (only,) = trained(WEIGHED, template)
    assert only.startswith(SECOND)
    assert trained([{**message, "weight": 0.0} for message in TALK], template) == []
    assert trained([*TALK[:3], {**TALK[3], "weight": 0.0}], template, "last") == []
    assert "".join(trained(WEIGHED, template, "all")).count(FIRST) == 0
    assert SECOND in "".join(trained(WEIGHED, template, "all"))


def test_a_users_turn_is_trained_or_left_out_as_the_row_says():
    opened = [{**TALK[0], "weight": 1.0}, *TALK[1:]]
    assert trained(opened, "smollm2") == ["Hello there!<|im_end|>", f"{FIRST}<|im_end|>", f"{SECOND}<|im_end|>"]
    hidden = "".join(trained([{**TALK[0], "weight": 0.0}, *TALK[1:]], "mistral", "all"))
    assert "Hello there!" not in hidden
    assert FIRST in hidden


def test_a_weight_that_the_template_hides_is_refused():
    with pytest.raises(ConfigError, match="do not show each turn to which the row gives a weight"):
        chat_template.encode([{**TALK[0], "weight": 1.0}, *TALK[1:]], build("marked"), "assistant")
    shown = trained([{**THOUGHT[0], "weight": 1.0}, *THOUGHT[1:]], "qwen3")
    assert shown == ["Hello<|im_end|>", "<think>\nEasy.\n</think>\n\nFour.<|im_end|>"]


def test_calls_are_trained_through_their_end_and_tools_are_not():
    first = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome", "days": 2}}\n</tool_call><|im_end|>'
    last = 'Let me see.<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call><|im_end|>'
    assert trained(CALLED, "hermes", options={"tools": TOOLS}) == [first, "It is.<|im_end|>", last]
    assert trained(CALLED, "hermes", "last", options={"tools": TOOLS}) == [last]
    both = [*CALLED[:1], {**CALLED[1], "tool_calls": [*CALLED[1]["tool_calls"], called(day="x<|im_end|>")]}]
    (calls,) = trained(both, "hermes")
    assert calls.endswith('"arguments": {"day": "x<|im_end|>"}}\n</tool_call><|im_end|>')
    weighed = [{**CALLED[0]}, {**CALLED[1], "weight": 0.0}, *CALLED[2:]]
    assert trained(weighed, "hermes", options={"tools": TOOLS}) == ["It is.<|im_end|>", last]
    everything = trained(CALLED, "hermes", "all", options={"tools": TOOLS})
    assert everything == [build("hermes").apply_chat_template(CALLED, tokenize=False, tools=TOOLS)]


def test_reasoning_is_trained_where_the_template_writes_it():
    tokenizer = build("hermes")
    features = chat_template.encode(REASONED, tokenizer, "assistant")
    assert features["reasoning_lost"] == 1  # that before the last question
    call = '<tool_call>\n{"name": "weather", "arguments": {"n": 6}}\n</tool_call><|im_end|>'
    thoughts = ["<think>\nA tool.\n</think>\n\n", "<think>\nKnown.\n</think>\n\n"]
    assert trained(REASONED, "hermes") == [thoughts[0] + call, f"{thoughts[1]}Six.<|im_end|>"]
    end = "\n</think>\n\n"
    assert trained(REASONED, "hermes", reasoning=False) == ["Four.<|im_end|>", end + call, f"{end}Six.<|im_end|>"]
    assert trained(REASONED, "hermes", "last") == [f"{thoughts[1]}Six.<|im_end|>"]


def test_weights_of_turns_and_of_the_row():
    weighed = [TALK[0], {**TALK[1], "weight": 0.5}, *TALK[2:]]
    features = chat_template.encode(weighed, build("qwen"), "assistant", weight=3.0)
    pairs = zip(features["labels"], features["weights"], strict=True)
    assert [key for key, _ in groupby(weight for label, weight in pairs)] == [0.0, 1.5, 0.0, 3.0, 0.0]
    assert "weights" not in chat_template.encode(TALK, build("qwen"), "assistant")
    everything = chat_template.encode(weighed, build("qwen"), "all", weight=2.0)
    assert [key for key, _ in groupby(everything["weights"])] == [2.0, 1.0, 2.0]
    assert set(chat_template.encode(TALK, build("qwen"), "assistant", weight=0.0)["labels"]) == {IGNORED}
