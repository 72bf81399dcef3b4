"""Rendered conversations: what a chat template cannot write, or does not end to write, is one message."""

from __future__ import annotations

import pytest
from fixtures.chat_tokenizer import build
from fixtures.conversations import CALLED, FIRST, REASONED, SECOND, TALK, TOOLS, called, trained, with_template

from runner.data import chat_template, rendering
from runner.data.packing import IGNORED
from runner.errors import ConfigError, DataError


def test_a_tokenizer_without_template_is_refused_with_the_remedy():
    with pytest.raises(ConfigError, match=r"model\.path.*the model's tokenizer has no chat template") as caught:
        chat_template.encode(TALK, build(None), "assistant")
    assert "task=pretrain" in str(caught.value)


def test_a_conversation_the_template_refuses():
    with pytest.raises(DataError, match="roles must alternate"):
        chat_template.encode([TALK[0], TALK[0], TALK[1]], build("mistral"), "assistant")


def test_reasoning_under_the_key_that_the_template_reads():
    tokenizer = build("channels")
    messages = [{**message} for message in REASONED[:2]]
    features = chat_template.encode(messages, tokenizer, "assistant")
    theirs = [messages[0], {"role": "assistant", "content": "Four.", "thinking": "Easy."}]
    assert features["input_ids"] == tokenizer.apply_chat_template(theirs, return_dict=True)["input_ids"]
    text = tokenizer.decode([label for label in features["labels"] if label != IGNORED])
    assert text.startswith("<|User|>analysis Easy.<|end_header_id|>")
    assert text.endswith("final Four.<|eot_id|>")


def test_a_variable_of_the_template():
    options = {"enable_thinking": False}
    assert trained(TALK, "hermes", options=options) == [f"{FIRST}<|im_end|>", f"{SECOND}<|im_end|>"]
    assert chat_template.prompt(TALK[:1], build("hermes"), options).endswith("assistant\n<think>\n\n</think>\n\n")
    for name in ("enable_thinkin", "tokenize", "messages"):
        with pytest.raises(DataError, match=f"'{name}', which the model's chat template does not use"):
            chat_template.encode(TALK, build("hermes"), "assistant", options={name: False})


@pytest.mark.parametrize(
    ("messages", "options", "template", "problem", "remedy"),
    [
        (TALK, {"tools": TOOLS}, "smollm2", "the tools of the row: it ignores tools", "ignore=[tools,tool_calls]"),
        (CALLED[:2], {}, "smollm2", "a tool call of message 2", "+data.format.ignore=[tools,tool_calls]"),
        (CALLED, {}, "channels", "the text of message 6", "leave the row out"),
        ([TALK[0], {**CALLED[1], "tool_calls": [called(), called()]}], {}, "channels", "a tool call of message 2", ""),
        (REASONED[:2], {}, "smollm2", "the reasoning of an answer: it ignores reasoning", "put <think>…</think> into"),
        ([*TALK, {"role": "tool", "content": "4"}, *TALK[:1], REASONED[1]], {}, "r1", "reasoning", "use a model"),
    ],
)  # fmt: skip
def test_what_the_template_leaves_out_is_refused(messages, options, template, problem, remedy):
    for train_on in ("assistant", "all"):
        with pytest.raises(DataError, match="the model's chat template leaves out") as caught:
            chat_template.encode(messages, build(template), train_on, options=options)
        assert problem in str(caught.value)
        assert remedy in str(caught.value)


LOOP = "{% for a in range(99999) %}" * 3 + "{% set b = a %}" + "{% endfor %}" * 3


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (LOOP, "takes more than 2 s for one conversation"),
        ("{{ 'a' * 100000000000000 }}", "writes more than 9,000 characters"),
        ("{{ 'a' * 9100 }}", "writes more than 9,000 characters"),
    ],
)
@pytest.mark.parametrize("mark", ["", "{% generation %}{% endgeneration %}"])
def test_a_template_without_an_end(template, problem, mark, monkeypatch):
    monkeypatch.setattr(rendering, "LONGEST_RENDERING_S", 2.0)
    monkeypatch.setattr(rendering, "MOST_CHARACTERS", 9000)
    with pytest.raises(ConfigError, match=problem) as caught:
        chat_template.encode(TALK, with_template(mark + template), "assistant")
    assert caught.value.faults[0].key == "model.path"


@pytest.mark.parametrize("mark", ["", "{% generation %}{% endgeneration %}"])
def test_any_failure_of_a_template_is_one_message(mark):
    with pytest.raises(DataError, match="rejects this conversation: division by zero"):
        chat_template.encode(TALK, with_template(mark + "{{ 1 / 0 }}"), "assistant")
