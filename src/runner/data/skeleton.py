"""The text that a chat template writes around the contents of a conversation, and the turns found with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from runner.data.conversation import Message

Span = tuple[int, int]
"""Start (inclusive) and end (exclusive), in characters or tokens."""


@dataclass(frozen=True)
class Skeleton:
    """The text that a template writes before, between and after the contents, for one sequence of roles."""

    pieces: list[str]
    order: list[int]
    """``order[k]``: index of the message whose content follows ``pieces[k]``."""
    edges: list[Span]
    """For the content after ``pieces[k]``: (characters of that piece before the turn, those of the next within it)."""

    def match(self, messages: list[Message], text: str) -> dict[int, Span] | None:
        """The character span of each turn in ``text``; None if ``text`` is not this skeleton plus the contents."""
        if not text.startswith(self.pieces[0]):
            return None
        spans: dict[int, Span] = {}
        at = len(self.pieces[0])
        for number, before, after, edge in zip(self.order, self.pieces, self.pieces[1:], self.edges, strict=False):
            for content in _variants(messages[number]["content"]):
                if text.startswith(content, at) and text.startswith(after, at + len(content)):
                    break
            else:
                return None
            spans[number] = at - len(before) + edge[0], at + len(content) + edge[1]
            at += len(content) + len(after)
        return spans if at == len(text) else None


def placeholders(roles: Sequence[str]) -> list[Message]:
    """A conversation whose contents are placeholders: numbers between private-use characters, absent from real text."""
    return [{"role": role, "content": f"\ue000{number}\ue001"} for number, role in enumerate(roles)]


def _variants(content: str) -> Iterator[str]:
    """The forms in which templates write a content: unchanged, or stripped."""
    yield content
    yield content.strip()
