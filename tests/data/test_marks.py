"""Marks around the texts of a conversation: found again where a template writes them, and removed without a trace."""

from __future__ import annotations

import json

from runner.data import marks
from runner.data.marks import Marked, MarkedText

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "unit": " cm "}}}
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Two and two?"},
    {"role": "assistant", "content": " \n", "reasoning_content": "Easy.", "tool_calls": [CALL]},
    {"role": "tool", "content": "4"},
    {"role": "assistant", "content": "<think>\nSure.\n</think>\n\n Four. "},
]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "adds"}}]


def written(marked: Marked) -> str:
    """What a template might write: everything, in order."""
    return json.dumps([marked.tools, marked.messages], ensure_ascii=False)


def test_without_its_marks_the_text_is_that_of_the_conversation() -> None:
    marked = Marked.of(TALK, TOOLS, {1})
    view = marks.seen(written(marked))
    assert view.text == json.dumps([TOOLS, TALK], ensure_ascii=False)
    assert all(None not in (start, end) for part, start, end in view.spans(marked.parts) if part.kind != "call")
    assert TALK[4]["content"] == "<think>\nSure.\n</think>\n\n Four. ", "the conversation itself is not changed"


def test_each_part_is_found_at_its_own_characters() -> None:
    marked = Marked.of(TALK, TOOLS, {1})
    view = marks.seen(written(marked))
    texts = [(part, view.text[start:end]) for part, start, end in view.spans(marked.parts) if start is not None]
    assert (MarkedText(-1, "tool"), "add") in texts
    assert (MarkedText(1, "content"), "Two and two?") in texts
    assert (MarkedText(2, "reasoning"), "Easy.") in texts
    assert (MarkedText(2, "call"), "cm") in texts, "white space at the ends stays outside"
    assert (MarkedText(4, "content"), "Four.") in texts
    assert not any(part.number == 0 for part, _ in texts), "a system prompt is marked only if it is trained"
    assert not any(part == MarkedText(2, "content") for part, _ in texts), "an empty text stays empty"


def test_a_part_that_is_not_written_has_no_place() -> None:
    marked = Marked.of(TALK, [], ())
    for message in marked.messages:
        message.pop("reasoning_content", None)
    spans = {part: (start, end) for part, start, end in marks.seen(written(marked)).spans(marked.parts)}
    assert spans[MarkedText(2, "reasoning")] == (None, None)
    assert None not in spans[MarkedText(3, "content")]
