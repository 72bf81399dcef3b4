"""Where the turns of a conversation are in the text that a chat template renders."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from runner.data.conversation import CARRIES, NO_OPTIONS, Message
from runner.data.marks import PLACEHOLDER, Marked, seen
from runner.data.rendering import Renderer
from runner.data.skeleton import Skeleton, Span, placeholders
from runner.errors import DataError


class Turn(NamedTuple):
    """Where a message is, in characters or tokens: from what the model generates of it through its end."""

    number: int
    start: int
    end: int
    thought: int = 0
    """The end of its reasoning; 0 if it has none."""
    lost: bool = False
    """Whether the template leaves out the reasoning that the row has."""


class TurnFinder:
    """Locates the turns by rendering placeholders instead of message contents.

    Most templates write the same text around the contents for the same sequence of roles. This *skeleton* is rendered
    once for each sequence of roles and then matched against every conversation. If the match fails, or the conversation
    has more than contents (tools, reasoning), it is rendered once more with marks in its texts (see ``marks``).
    """

    def __init__(self, renderer: Renderer) -> None:
        self.renderer = renderer
        self._skeleton = functools.cache(self._build_skeleton)
        self.openings: dict[tuple[str, str], int] = {}
        self.generation_prompt, self.closing = self._analyse_turn()

    def find(self, messages: list[Message], needed: set[int], options: Mapping[str, Any]) -> tuple[str, list[Turn]]:
        """The rendered conversation, and the characters of each answer and each message in ``needed``.

        Raises:
            ConfigError: the text does not show where they are.
            DataError: the template leaves out a part of the conversation.
        """
        text = self.renderer.render(messages, options)
        spans = self.match(messages, text) if is_plain(messages, options) else None
        turns = [Turn(i, *span) for i, span in (spans or {}).items()] or self.locate(messages, text, needed, options)
        if needed - {turn.number for turn in turns}:
            raise self.renderer.unmaskable("the row gives weights to turns that the template does not show")
        return text, turns

    def match(self, messages: list[Message], text: str) -> dict[int, Span] | None:
        """The characters of each turn, by the skeleton of the roles; None if the text differs from it."""
        skeleton = self._skeleton(tuple(message["role"] for message in messages))
        return skeleton.match(messages, text) if skeleton is not None else None

    def _analyse_turn(self) -> tuple[str, str]:
        """Render one exchange; returns (generation prompt, trained text after an answer)."""
        exchange = placeholders(("user", "assistant"))
        try:
            question, whole = self.renderer.render(exchange[:1]), self.renderer.render(exchange)
            prompted = self.renderer.render(exchange[:1], add_generation_prompt=True)
        except DataError:
            return "", ""
        tail = whole.rpartition(exchange[1]["content"])[2]
        # Text after the end-of-turn token (usually a newline) is never generated, hence not trained.
        tokens = [token for token in self.renderer.tokenizer.get_added_vocab() if token.strip() and token in tail]
        end = min((tail.index(token) + len(token) for token in tokens), default=len(tail))
        while adjacent := next((token for token in tokens if tail.startswith(token, end)), ""):
            end += len(adjacent)
        return prompted[len(question) :] if prompted.startswith(question) else "", tail[:end]

    def _build_skeleton(self, roles: tuple[str, ...]) -> Skeleton | None:
        """The text that the template writes around these roles; None if it does not show where answers start."""
        contents = placeholders(roles)
        try:
            text = self.renderer.render(contents)
        except DataError:
            return None
        marks = list(PLACEHOLDER.finditer(text))
        order = [int(mark[1]) for mark in marks]
        starts, ends = [0, *(mark.end() for mark in marks)], [*(mark.start() for mark in marks), len(text)]
        pieces = [text[start:end] for start, end in zip(starts, ends, strict=True)]
        edges: list[Span] = []
        for position, number in enumerate(order):
            opening: int | None = len(pieces[position])
            if roles[number] == "assistant":
                opening = self._opening(contents[:number], text, starts[position], ends[position])
            if opening is None:
                return None
            closes = pieces[position + 1].startswith(self.closing)
            edges.append((opening, len(self.closing) if closes else 0))
        shown = sum(roles[number] == "assistant" for number in order)
        return Skeleton(pieces, order, edges) if shown == roles.count("assistant") else None

    def _opening(self, earlier: list[Message], text: str, start: int, end: int) -> int | None:
        """How many characters of ``text[start:end]``, the piece before an answer, belong to the generation prompt."""
        key = (earlier[-1]["role"] if earlier else "", text[start:end])
        if key not in self.openings:
            opening = self._find_opening(earlier, text, start, end)
            if opening is None:
                return None
            self.openings[key] = opening
        return self.openings[key]

    def _find_opening(
        self, earlier: Sequence[Message], text: str, start: int, end: int, options: Mapping[str, Any] = NO_OPTIONS
    ) -> int | None:
        if earlier:
            with contextlib.suppress(DataError):
                prompt_text = self.renderer.render(earlier, options, add_generation_prompt=True)
                shared = _common_prefix(prompt_text, text)
                # At most up to the content: a longer prompt (DeepSeek-R1 appends "<think>") contains text that this
                # conversation does not have.
                if start <= shared <= end and shared in (len(prompt_text), end):
                    # Gemma's prompt after a tool's result opens no turn, but the conversation has one there.
                    header = self.generation_prompt if text.startswith(self.generation_prompt, shared) else ""
                    return min(shared + len(header), end) - start
        # The prompt may open a thinking that the template does not write in this turn.
        shortest = max(1, len(self.generation_prompt.partition("<think")[0]))
        for length in range(len(self.generation_prompt), shortest - 1, -1):
            if (at := text.rfind(self.generation_prompt[:length], start, end)) >= 0:
                return at + length - start
        return None

    def locate(self, messages: list[Message], text: str, needed: set[int], options: Mapping[str, Any]) -> list[Turn]:
        """The characters of each answer and each message in ``needed``, by rendering the conversation with marks.

        Raises:
            ConfigError: the marks do not show where they are.
            DataError: the template leaves out a part of the conversation.
        """
        marked = Marked.of(messages, options.get("tools", ()), needed)
        tools = {"tools": marked.tools} if marked.tools else {}
        view = seen(self.renderer.render(marked.messages, {**options, **tools}))
        turns: list[Turn] = []
        reached = 0
        spans = list(view.spans(marked.parts))
        for part, _, end in spans:
            if end is None and part.kind != "reasoning":
                raise self.renderer.left_out(part.kind, part.number)
        if view.text != text:
            raise self.renderer.unmaskable("what it writes depends on more than the contents")
        for number, message in enumerate(messages):
            own = [(part, start, end) for part, start, end in spans if part.number == number]
            starts = [start for _, start, _ in own if start is not None]
            if not starts:
                continue
            first, last = min(starts), max(end for _, _, end in own if end is not None)
            if first < reached:
                raise self.renderer.unmaskable("it writes the messages in another order")
            opening: int | None = first - reached
            if message["role"] == "assistant":
                opening = self._find_opening(messages[:number], text, reached, first, options)
            if opening is None:
                raise self.renderer.unmaskable("it does not show where an answer starts")
            if message["role"] == "assistant" or number in needed:
                following = [start for part, start, _ in spans if part.number > number and start is not None]
                tail = text[last : min(following, default=len(text))]
                closed = last + self._closed(tail, marked.messages[: number + 1], {**options, **tools})
                thoughts = [end for part, _, end in own if part.kind == "reasoning"]
                thought = max((end for end in thoughts if end is not None), default=0)
                turns.append(Turn(number, reached + opening, closed, thought, lost=None in thoughts))
            reached = last
        return turns

    def _closed(self, tail: str, marked: Sequence[Message], options: Mapping[str, Any]) -> int:
        """How many characters of ``tail``, which follows the last mark of the last message, belong to that message."""
        if "tool_calls" not in marked[-1]:
            return len(self.closing) if tail.startswith(self.closing) else 0
        alone = PLACEHOLDER.split(self.renderer.render(marked, options))[-1]
        alone = tail[: _common_prefix(alone, tail)]
        if self.closing and self.closing in alone:
            return alone.index(self.closing) + len(self.closing)
        tokens = (token for token in self.renderer.tokenizer.get_added_vocab() if token.strip() and token in alone)
        return max((alone.rindex(token) + len(token) for token in tokens), default=len(alone))


def is_plain(messages: Sequence[Message], options: Mapping[str, Any]) -> bool:
    """Whether the conversation is roles and texts alone."""
    return not options and not any(
        message.keys() & CARRIES
        or message.get("images")
        or (message["role"] == "assistant" and "</think>" in message["content"])
        for message in messages
    )


def _common_prefix(first: str, second: str) -> int:
    """Number of characters at the start that are equal in both texts."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))
