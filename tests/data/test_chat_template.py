"""What is trained is decoded and compared letter by letter; ids are compared with transformers' own."""

from __future__ import annotations

import copy
from itertools import groupby
from typing import Any

import pytest
from fixtures.chat_tokenizer import build

from runner.data import chat_template, rendering
from runner.data.packing import IGNORED
from runner.errors import ConfigError, DataError

TALK = [
    {"role": "user", "content": "Hello there!"},
    {"role": "assistant", "content": "Hello. How are you?"},
    {"role": "user", "content": "Fine — 好的, what is two and two?\n"},
    {"role": "assistant", "content": "It is four.\n\nI think."},
]
WITH_SYSTEM = [{"role": "system", "content": "Be brief."}, *TALK]
WITH_TOOL = [
    {"role": "user", "content": "Add them."},
    {"role": "assistant", "content": "add(2, 2)"},
    {"role": "tool", "content": "4"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "Thanks"},
    {"role": "assistant", "content": "Any time."},
]
THOUGHT = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "<think>\nA greeting.\n</think>\n\nHello."},
    {"role": "user", "content": "Two and two?"},
    {"role": "assistant", "content": "<think>\nEasy.\n</think>\n\nFour."},
]


def trained(messages: list, template: str, train_on: chat_template.TrainOn = "assistant", **more: Any) -> list[str]:
    """The runs of trained tokens, decoded; checks on the way that ids are transformers' and labels repeat them."""
    tokenizer = build(template)
    features = chat_template.encode(messages, tokenizer, train_on, **more)
    ids, labels = features["input_ids"], features["labels"]
    assert ids == tokenizer.apply_chat_template(messages, **more.get("options", {}))["input_ids"]
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
    runs = groupby(zip(ids, labels, strict=True), key=lambda pair: pair[1] != IGNORED)
    return [tokenizer.decode([token for token, _ in run]) for is_trained, run in runs if is_trained]


FIRST, SECOND = TALK[1]["content"], TALK[3]["content"]


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
    assert merged[0] in tokenizer.apply_chat_template(opened)["input_ids"]
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


def test_a_generation_prompt_that_opens_a_thinking_which_the_answer_does_not_have():
    assert trained(TALK, "r1") == [f"{FIRST}</s>", f"{SECOND}</s>"]
    assert trained(THOUGHT, "r1") == []
    assert chat_template.encode(THOUGHT, build("r1"), "assistant")["reasoning_lost"] == 2
    assert trained(THOUGHT, "r1", reasoning=False) == ["\n\nHello.</s>", "\n\nFour.</s>"]


@pytest.mark.parametrize("template", ["smollm2", "llama3", "qwen", "qwen3", "mistral", "plain"])
@pytest.mark.parametrize("messages", [TALK, WITH_SYSTEM, WITH_TOOL], ids=["talk", "system", "tool"])
def test_the_two_ways_of_finding_answers_agree(messages, template):
    if template == "mistral" and messages is not TALK:
        return  # it rejects tools, and writes the system prompt later if more follows: no prompt shows the header
    finder = chat_template.of(build(template)).finder
    text = finder.renderer.render(messages)
    by_skeleton = finder.match(messages, text)
    assert by_skeleton is not None
    by_marks = {turn.number: (turn.start, turn.end) for turn in finder.locate(messages, text, set(), {})}
    assert by_marks
    assert {number: by_skeleton[number] for number in by_marks} == by_marks


def test_the_prompt_ends_where_the_answer_begins():
    rendered = chat_template.prompt(TALK[:1], build("llama3"))
    assert rendered == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHello there!<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_a_template_that_hides_its_answers_is_refused_with_the_remedy():
    with pytest.raises(ConfigError, match="it does not show where an answer starts") as caught:
        chat_template.encode(TALK, build("counting"), "assistant")
    assert "task.train_on=all" in str(caught.value)
    assert len(trained(TALK, "counting", "all")) == 1
    changed = with_template(
        "{% for m in messages %}{{ m['content'] | length }} {{ m['content'] | reverse }}{% endfor %}"
    )
    with pytest.raises(DataError, match="the model's chat template leaves out the text of message 2"):
        chat_template.encode(TALK, changed, "assistant")
    changed = with_template("{% for m in messages %}{{ m['content'] | length }} {{ m['content'] }}{% endfor %}")
    with pytest.raises(ConfigError, match="what it writes depends on more than the contents"):
        chat_template.encode(TALK, changed, "assistant")


def test_a_tokenizer_without_template_is_refused_with_the_remedy():
    with pytest.raises(ConfigError, match=r"model\.path.*the model's tokenizer has no chat template") as caught:
        chat_template.encode(TALK, build(None), "assistant")
    assert "task=pretrain" in str(caught.value)


def test_a_conversation_the_template_refuses():
    with pytest.raises(DataError, match="roles must alternate"):
        chat_template.encode([TALK[0], TALK[0], TALK[1]], build("mistral"), "assistant")


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


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]


def called(**arguments: object) -> dict:
    return {"type": "function", "function": {"name": "weather", "arguments": arguments}}


CALLED = [
    {"role": "user", "content": "Sunny in Rome?"},
    {"role": "assistant", "content": "", "tool_calls": [called(city="Rome", days=2)]},
    {"role": "tool", "content": "yes", "name": "weather"},
    {"role": "assistant", "content": "It is."},
    {"role": "user", "content": "And in Oslo?"},
    {"role": "assistant", "content": "Let me see.", "tool_calls": [called()]},
]


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


def test_a_template_whose_results_repeat_the_name_of_the_call():
    answers = trained([*CALLED[:5], {"role": "assistant", "content": "No."}], "channels", options={"tools": TOOLS})
    final = "<|User|>final "
    assert answers == [
        " to weather city=Rome days=2<|end_header_id|>",
        f"{final}It is.<|eot_id|>",
        f"{final}No.<|eot_id|>",
    ]


REASONED = [
    {"role": "user", "content": "Two and two?"},
    {"role": "assistant", "content": "Four.", "reasoning_content": "Easy."},
    {"role": "user", "content": "And two?"},
    {"role": "assistant", "content": "", "reasoning_content": "A tool.", "tool_calls": [called(n=6)]},
    {"role": "tool", "content": "6"},
    {"role": "assistant", "content": "Six.", "reasoning_content": "Known."},
]


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


def test_reasoning_under_the_key_that_the_template_reads():
    tokenizer = build("channels")
    messages = [{**message} for message in REASONED[:2]]
    features = chat_template.encode(messages, tokenizer, "assistant")
    theirs = [messages[0], {"role": "assistant", "content": "Four.", "thinking": "Easy."}]
    assert features["input_ids"] == tokenizer.apply_chat_template(theirs)["input_ids"]
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


def test_weights_of_turns_and_of_the_row():
    weighed = [TALK[0], {**TALK[1], "weight": 0.5}, *TALK[2:]]
    features = chat_template.encode(weighed, build("qwen"), "assistant", weight=3.0)
    pairs = zip(features["labels"], features["weights"], strict=True)
    assert [key for key, _ in groupby(weight for label, weight in pairs)] == [0.0, 1.5, 0.0, 3.0, 0.0]
    assert "weights" not in chat_template.encode(TALK, build("qwen"), "assistant")
    everything = chat_template.encode(weighed, build("qwen"), "all", weight=2.0)
    assert [key for key, _ in groupby(everything["weights"])] == [2.0, 1.0, 2.0]
    assert set(chat_template.encode(TALK, build("qwen"), "assistant", weight=0.0)["labels"]) == {IGNORED}


def with_template(text: str):
    tokenizer = copy.deepcopy(build("smollm2"))
    tokenizer.chat_template = text
    return tokenizer


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
