"""Examples: which is a conversation, and which task an example fits."""

from __future__ import annotations

import pytest

from runner.data import examples
from runner.data.examples import Example

TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
TOOL = {"type": "function", "function": {"name": "add"}}


def test_a_conversation_with_what_its_row_has_beside_it() -> None:
    assert examples.chat(TALK) == (TALK, {}, 1.0)
    row = {"messages": TALK, "tools": [TOOL], "chat_template_kwargs": {"thinking": False}, "weight": 2}
    assert examples.chat(row) == (TALK, {"tools": [TOOL], "thinking": False}, 2.0)
    assert examples.chat("a text") is None
    assert examples.chat({"prompt": TALK, "label": 1}) is None


@pytest.mark.parametrize(
    ("example", "kind", "task"),
    [
        ("a text", "plain text", "pretrain"),
        (TALK, "conversations", "sft"),
        ({"messages": TALK}, "conversations", "sft"),
        ({"prompt": TALK, "chosen": TALK[1], "rejected": TALK[1]}, "pairs of a chosen", "dpo"),
        ({"prompt": TALK, "completion": TALK[1], "label": True}, "answers with a verdict", "kto"),
        ({"prompt": TALK, "columns": {}}, "prompts without answers", "grpo"),
        ({"prompt": "a text", "label": 3}, "texts with a label", "classify"),
    ],
)
def test_an_example_of_another_task_names_the_task_that_it_fits(example: Example, kind: str, task: str) -> None:
    (fault,) = examples.misfit(example, "something else").faults
    assert fault.problem.startswith(f"gives {kind}")
    assert fault.remedy == f"use task={task}, or a data/format that gives something else"
