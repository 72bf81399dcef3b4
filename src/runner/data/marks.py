"""Marks inside the texts of a conversation, to see where a chat template writes each of them, and whether it does.

Marks are numbers between private-use characters, absent from real text. They are inside the white space at the ends
of a text and never in an empty one, so that what a template decides by its contents does not change.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from runner.data.conversation import Message

PLACEHOLDER = re.compile("\ue000(\\d+)\ue001")
THINKING = re.compile(r"(\s*<think>)?(.*?)(</think>)(.*)", re.DOTALL)

Kind = Literal["content", "reasoning", "call", "tool"]


class MarkedText(NamedTuple):
    """A marked text: of which message (-1: of the tools) and what it is."""

    number: int
    kind: Kind


@dataclass
class Marked:
    """A conversation with marks; mark ``k`` belongs to ``parts[k // 2]``, its start (even) or its end (odd)."""

    messages: list[Message] = field(default_factory=list)
    tools: list[dict[str, Any]] = field(default_factory=list)
    parts: list[MarkedText] = field(default_factory=list)

    @classmethod
    def of(cls, messages: Sequence[Message], tools: Sequence[dict[str, Any]], also: Collection[int]) -> Marked:
        """Marks in answers, results of tools, tools, and the messages ``also``."""
        marked = cls()
        for number, message in enumerate(messages):
            is_marked = message["role"] in ("assistant", "tool") or number in also
            marked.messages.append(marked._message(number, message) if is_marked else message)
        for tool in tools:
            name = marked._wrapped(tool["function"]["name"], MarkedText(-1, "tool"))
            marked.tools.append({**tool, "function": {**tool["function"], "name": name}})
        return marked

    def _message(self, number: int, message: Message) -> Message:
        changed: Message = {}
        content = MarkedText(number, "content")
        thinking = THINKING.fullmatch(message["content"]) if message["role"] == "assistant" else None
        if "reasoning_content" in message:
            changed["reasoning_content"] = self._wrapped(message["reasoning_content"], MarkedText(number, "reasoning"))
        if thinking is not None and not changed:
            reasoning = self._wrapped(thinking[2], MarkedText(number, "reasoning"))
            answer = self._wrapped(thinking[4], content)
            changed["content"] = f"{thinking[1] or ''}{reasoning}{thinking[3]}{answer}"
        else:
            changed["content"] = self._wrapped(message["content"], content)
        if "tool_calls" in message:
            changed["tool_calls"] = [self._call(number, call) for call in message["tool_calls"]]
        return {**message, **changed}

    def _call(self, number: int, call: Mapping[str, Any]) -> dict[str, Any]:
        part, function = MarkedText(number, "call"), call["function"]
        name = self._wrapped(function["name"], part)
        arguments = {
            # Only behind the key: some templates sort by it.
            key + self._mark(part): self._wrapped(value, part) if isinstance(value, str) else value
            for key, value in function["arguments"].items()
        }
        return {**call, "function": {**function, "name": name, "arguments": arguments}}

    def _wrapped(self, text: str, part: MarkedText) -> str:
        if not (core := text.strip()):
            return text
        lead = text[: text.index(core)]
        self.parts.append(part)
        start = 2 * (len(self.parts) - 1)
        return f"{lead}\ue000{start}\ue001{core}\ue000{start + 1}\ue001{text[len(lead) + len(core) :]}"

    def _mark(self, part: MarkedText) -> str:
        self.parts.append(part)
        return f"\ue000{2 * len(self.parts) - 1}\ue001"


class Seen(NamedTuple):
    """A rendered text without its marks, and where they were."""

    text: str
    places: dict[int, int]
    """Mark → the character at which it occurs first."""

    def spans(self, parts: Sequence[MarkedText]) -> Iterator[tuple[MarkedText, int | None, int | None]]:
        """(part, its first character, its end) of each part, at its first occurrence; None if a mark does not occur."""
        for number, part in enumerate(parts):
            start, end = (self.places.get(mark) for mark in (2 * number, 2 * number + 1))
            yield part, start, end


def seen(text: str) -> Seen:
    """Split a rendered text into the text without marks and the places of the marks."""
    places: dict[int, int] = {}
    pieces, at, length = [], 0, 0
    for mark in PLACEHOLDER.finditer(text):
        pieces.append(text[at : mark.start()])
        length += mark.start() - at
        at = mark.end()
        places.setdefault(int(mark[1]), length)
    return Seen("".join([*pieces, text[at:]]), places)
