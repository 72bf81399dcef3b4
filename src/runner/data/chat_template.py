"""From a conversation to tokens and labels, by the tokenizer's own chat template.

The rendered text is tokenised once, so the ids are those of ``tokenizer.apply_chat_template``; labels follow from
where each answer stands in that text. An answer runs from the end of the generation prompt, which the model is
given, through its end-of-turn token, which it has to learn to say.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from runner.data.formats import Message
from runner.data.packing import IGNORED
from runner.errors import ConfigError, DataError, Fault

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

TrainOn = Literal["assistant", "last", "all"]
Features = dict[str, list[int]]
"""``input_ids`` and ``labels`` of one length, not shifted: ``labels[i]`` is ``input_ids[i]`` if trained, else -100."""
Span = tuple[int, int]
"""Characters from (inclusive) … to (exclusive)."""

MARK = re.compile("\ue000(\\d+)\ue001")
GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


def encode(messages: list[Message], tokenizer: Tokenizer, train_on: TrainOn) -> Features:
    """Tokens of the whole conversation, with labels on what is trained.

    ``assistant`` trains every answer, ``last`` the last one only, ``all`` every token of the rendered text: headers,
    system and user turns included.

    Raises:
        ConfigError: the tokenizer has no chat template, or one whose answers cannot be told apart.
        DataError: the template refuses this conversation.
    """
    template = _template(tokenizer, _chat_template(tokenizer))
    if train_on == "all":
        ids = template.tokenize(template.render(messages))[0]
        return {"input_ids": ids, "labels": list(ids)}
    if template.has_markers:
        ids, answers = template.find_marked(messages)
    else:
        ids, answers = template.find_answers(messages)
    labels = [IGNORED] * len(ids)
    for first, end in answers[-1:] if train_on == "last" else answers:
        labels[first:end] = ids[first:end]
    return {"input_ids": ids, "labels": labels}


def prompt(messages: list[Message], tokenizer: Tokenizer) -> str:
    """The conversation rendered up to where the model's next answer begins."""
    return _template(tokenizer, _chat_template(tokenizer)).render(messages, add_generation_prompt=True)


def end_of_turn(tokenizer: Tokenizer) -> int | None:
    """The token that an answer was taught to end with; None where the template, or the lack of one, names none."""
    try:
        closing = _template(tokenizer, _chat_template(tokenizer)).closing
    except ConfigError:
        return None
    ids = _ids(tokenizer, closing)
    return ids[-1] if ids and ids[-1] in tokenizer.get_added_vocab().values() else None


def _chat_template(tokenizer: Tokenizer) -> str:
    try:
        return tokenizer.get_chat_template()
    except ValueError:
        problem = "its tokenizer has no chat template, so it does not say how a conversation is written"
        remedy = "use a model that has one (most are named …-Instruct), or train on plain text with task=pretrain"
        raise ConfigError(Fault("model.path", problem, remedy, tokenizer.name_or_path)) from None


@functools.lru_cache(maxsize=16)
def _template(tokenizer: Tokenizer, text: str) -> _Template:
    return _Template(tokenizer, text)


class _Template:
    """One tokenizer's chat template, with what was learnt about it by rendering marks in the place of contents.

    A template writes the same around the contents of the same roles, mostly: that *skeleton* is rendered once for
    each sequence of roles and then laid over every conversation. Where the text is not exactly skeleton plus contents
    (templates look into contents, to strip earlier thinking, say) the answers are found by rendering each prefix.
    """

    def __init__(self, tokenizer: Tokenizer, text: str) -> None:
        self.tokenizer = tokenizer
        self.has_markers = bool(GENERATION_MARKER.search(text))
        self.skeletons: dict[tuple[str, ...], _Skeleton | None] = {}
        self.openings: dict[tuple[str, str], int | None] = {}
        self.fast: Any = _fast_tokenizer(tokenizer)
        self.generation_prompt, self.closing, self.tail = self._learn_turn()

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        import jinja2

        try:
            return str(
                self.tokenizer.apply_chat_template(
                    list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
                )
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            problem = f"the model's chat template refuses this conversation: {error}"
            raise DataError(Fault("", problem, "change the row, or leave it out")) from error

    def tokenize(self, text: str) -> tuple[list[int], list[int]]:
        """Ids, and the character at which each token begins (none where the tokenizer cannot say)."""
        if self.fast is not None:
            encoding = self.fast.encode(text, add_special_tokens=False)
            offsets = encoding.offsets
            # Many tokenizers leave a token's first space out of its offsets: it begins where the one before ended.
            pairs = zip(offsets, [(0, 0), *offsets], strict=False)
            return encoding.ids, [start if start < end else end for (start, _), (_, end) in pairs]
        return _ids(self.tokenizer, text), []

    def find_answers(self, messages: list[Message]) -> tuple[list[int], list[Span]]:
        """Ids of the conversation, and from which to which token each answer runs."""
        if self.fast is None:
            raise self._unmaskable("its tokenizer does not say where tokens stand in the text")
        text = self.render(messages)
        skeleton = self._skeleton(tuple(message["role"] for message in messages))
        spans = skeleton.lay_over(messages, text) if skeleton is not None else None
        if spans is None:
            spans = list(self._find_by_prefixes(messages, text))
        ids, starts = self.tokenize(text)
        # A token that begins inside an answer is trained; one that begins in the header was given to the model.
        return ids, [(bisect_left(starts, start), bisect_left(starts, end)) for start, end in spans]

    def find_marked(self, messages: list[Message]) -> tuple[list[int], list[Span]]:
        """The same, for a template that marks the answers itself with ``{% generation %}``."""
        encoded = self.tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        edges = [0, *encoded["assistant_masks"], 0]
        changes = [at for at, (before, after) in enumerate(itertools.pairwise(edges)) if before != after]
        return encoded["input_ids"], list(zip(changes[::2], changes[1::2], strict=True))

    def _learn_turn(self) -> tuple[str, str, str]:
        """(generation prompt, end of an answer that is trained, all that follows an answer), from one exchange."""
        exchange = _marked(("user", "assistant"))
        try:
            asked, whole = self.render(exchange[:1]), self.render(exchange)
            prompted = self.render(exchange[:1], add_generation_prompt=True)
        except DataError:
            return "", "", ""
        tail = whole.rpartition(exchange[1]["content"])[2]
        # What follows the end-of-turn token, mostly a newline, is never generated.
        tokens = (token for token in self.tokenizer.get_added_vocab() if token.strip() and token in tail)
        closing = tail[: min((tail.index(token) + len(token) for token in tokens), default=len(tail))]
        return prompted[len(asked) :] if prompted.startswith(asked) else "", closing, tail

    def _skeleton(self, roles: tuple[str, ...]) -> _Skeleton | None:
        if roles not in self.skeletons:
            self.skeletons[roles] = self._build_skeleton(roles)
        return self.skeletons[roles]

    def _build_skeleton(self, roles: tuple[str, ...]) -> _Skeleton | None:
        """What the template writes around these roles; None where that does not show where answers begin."""
        marked = _marked(roles)
        try:
            text = self.render(marked)
        except DataError:
            return None
        marks = list(MARK.finditer(text))
        order = [int(mark[1]) for mark in marks]
        starts, ends = [0, *(mark.end() for mark in marks)], [*(mark.start() for mark in marks), len(text)]
        pieces = [text[start:end] for start, end in zip(starts, ends, strict=True)]
        answers: list[Span | None] = [None] * len(order)
        for position, number in enumerate(order):
            if roles[number] == "assistant":
                opening = self._opening(marked[:number], text, starts[position], ends[position])
                if opening is None:
                    return None
                closes = pieces[position + 1].startswith(self.closing)
                answers[position] = opening, len(self.closing) if closes else 0
        shown = sum(answer is not None for answer in answers)
        return _Skeleton(pieces, order, answers) if shown == roles.count("assistant") else None

    def _opening(self, earlier: list[Message], text: str, start: int, end: int) -> int | None:
        """How much of the piece ``text[start:end]`` before an answer the model is given rather than has to say."""
        key = (earlier[-1]["role"] if earlier else "", text[start:end])
        if key not in self.openings:
            found = self._find_opening(earlier, text, start, end)
            if found is None:
                return None
            self.openings[key] = found
        return self.openings[key]

    def _find_opening(self, earlier: list[Message], text: str, start: int, end: int) -> int | None:
        if earlier:
            with contextlib.suppress(DataError):
                given = self.render(earlier, add_generation_prompt=True)
                shared = _shared_length(given, text)
                # Up to the content, but no further: a prompt that goes on (DeepSeek-R1's "<think>") asks for what
                # this text does not have.
                if start <= shared <= end and shared in (len(given), end):
                    return shared - start
        at = text.rfind(self.generation_prompt, start, end) if self.generation_prompt else -1
        return at + len(self.generation_prompt) - start if at >= 0 else None

    def _find_by_prefixes(self, messages: list[Message], text: str) -> Iterator[Span]:
        """Where answers stand, by rendering the conversation up to and through each: slower, for any contents."""
        reached = 0
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            given = self.render(messages[:number], add_generation_prompt=True) if number else self.generation_prompt
            through = self.render(messages[: number + 1])
            if not text.startswith(given) or len(given) < reached:
                raise self._unmaskable("it writes earlier turns differently once later ones follow")
            if text.startswith(through):
                reached = len(through) - (len(self.tail) - len(self.closing)) * through.endswith(self.tail)
            elif self.closing.strip() and (at := text.find(self.closing, len(given))) >= 0:
                reached = at + len(self.closing)
            else:
                raise self._unmaskable("it does not show where an answer ends")
            yield len(given), reached

    def _unmaskable(self, why: str) -> ConfigError:
        problem = f"its chat template does not tell answers from the rest: {why}"
        remedy = "train on every token with task.train_on=all, or use a model whose template marks {% generation %}"
        return ConfigError(Fault("model.path", problem, remedy, self.tokenizer.name_or_path))


@dataclass(frozen=True)
class _Skeleton:
    """What a template writes before, between and after the contents of a sequence of roles."""

    pieces: list[str]
    order: list[int]
    """Which message's content stands after ``pieces[k]``."""
    answers: list[Span | None]
    """For an answer after ``pieces[k]``: how much of that piece is given, how much of the next one is trained."""

    def lay_over(self, messages: list[Message], text: str) -> list[Span] | None:
        """Where the answers stand in ``text``; None where it is not exactly this skeleton with these contents."""
        if not text.startswith(self.pieces[0]):
            return None
        spans: list[Span] = []
        at = len(self.pieces[0])
        for number, before, after, answer in zip(self.order, self.pieces, self.pieces[1:], self.answers, strict=False):
            for content in _written(messages[number]["content"]):
                if text.startswith(content, at) and text.startswith(after, at + len(content)):
                    break
            else:
                return None
            if answer is not None:
                spans.append((at - len(before) + answer[0], at + len(content) + answer[1]))
            at += len(content) + len(after)
        return spans if at == len(text) else None


def _shared_length(left: str, right: str) -> int:
    pairs = enumerate(zip(left, right, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(left), len(right)))


def _written(content: str) -> Iterator[str]:
    """The ways in which templates write a content: as it is, trimmed, or without the thinking before it."""
    yield content
    yield content.strip()
    if "</think>" in content:
        yield content.rpartition("</think>")[2]
        yield content.rpartition("</think>")[2].lstrip("\n")


def _marked(roles: Sequence[str]) -> list[Message]:
    """A conversation of these roles whose contents can be found again: characters of private use, which no text has."""
    return [{"role": role, "content": f"\ue000{number}\ue001"} for number, role in enumerate(roles)]


def _fast_tokenizer(tokenizer: Tokenizer) -> Any:
    """The Rust tokenizer beneath, called directly at a third less time; None where it does not do all the work."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    probe = " A word,\n\n 12 words\u2026 ".join(["", *tokenizer.get_added_vocab(), ""])
    if fast is None or fast.encode(probe, add_special_tokens=False).ids != _ids(tokenizer, probe):
        return None
    return fast


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
