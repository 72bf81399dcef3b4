"""The turns of a rendered conversation, by its skeleton and by marks."""

from __future__ import annotations

import pytest
from fixtures.chat_tokenizer import build
from fixtures.conversations import (
    CALLED,
    FIRST,
    SECOND,
    TALK,
    THOUGHT,
    TOOLS,
    WITH_SYSTEM,
    WITH_TOOL,
    trained,
    with_template,
)

from runner.data import chat_template
from runner.errors import ConfigError, DataError


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


def test_a_template_whose_results_repeat_the_name_of_the_call():
    answers = trained([*CALLED[:5], {"role": "assistant", "content": "No."}], "channels", options={"tools": TOOLS})
    final = "<|User|>final "
    assert answers == [
        " to weather city=Rome days=2<|end_header_id|>",
        f"{final}It is.<|eot_id|>",
        f"{final}No.<|eot_id|>",
    ]
