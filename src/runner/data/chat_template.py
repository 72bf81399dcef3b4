"""Tokenise a conversation with the tokenizer's chat template, and mask the labels of everything but the answers.

The rendered text is tokenised once, so the ids equal those of ``tokenizer.apply_chat_template``. Labels come from the
character span of each answer: from the end of the generation prompt through the end-of-turn token, which the model
has to learn to generate. A turn's own ``train`` decides whether it is trained (``conversation.TRAIN_KEYS``).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from runner.data.conversation import Message
from runner.data.examples import Features
from runner.data.packing import IGNORED
from runner.data.skeleton import PLACEHOLDER, Skeleton, Span, Turn, placeholders
from runner.errors import ConfigError, DataError, Fault
from runner.signals import time_limit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

TrainOn = Literal["assistant", "last", "all"]
LONGEST_RENDERING_S = 20.0
"""A chat template that takes longer for one conversation is refused: it probably loops for ever."""
MOST_CHARACTERS = 10**8
"""A chat template that writes more for one conversation, beside its contents, is refused."""
GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


def encode(messages: list[Message], tokenizer: Tokenizer, train_on: TrainOn) -> Features:
    """Tokenise the whole conversation; tokens that are not trained get the label -100.

    ``train_on``: ``assistant`` trains every answer; ``last`` the last answer only; ``all`` every token of the rendered
    text, including headers, system turns and user turns. A turn with ``train: False`` is never trained; one with
    ``train: True`` is, unless ``train_on`` is ``last``.

    Raises:
        ConfigError: the tokenizer has no chat template, or the turns cannot be located in the rendered text.
        DataError: the template rejects this conversation.
    """
    template = _template(tokenizer, _chat_template(tokenizer))
    usual = [train_on == "all" or message["role"] == "assistant" for message in messages]
    unusual = {i for i, message in enumerate(messages) if message.get("train", usual[i]) != usual[i]}
    if train_on == "all" and not unusual:
        ids = template.tokenize(template.render(messages))[0]
        return {"input_ids": ids, "labels": list(ids)}
    find = template.find_marked if template.has_markers else template.find_turns
    ids, turns = find(messages, unusual)
    labels = list(ids) if train_on == "all" else [IGNORED] * len(ids)
    if train_on == "last":
        turns = [(i, span) for i, span in turns if messages[i]["role"] == "assistant"][-1:]
    for i, (first, end) in turns:
        labels[first:end] = ids[first:end] if usual[i] != (i in unusual) else [IGNORED] * (end - first)
    return {"input_ids": ids, "labels": labels}


def prompt(messages: list[Message], tokenizer: Tokenizer) -> str:
    """Render the conversation with the generation prompt at its end."""
    return _template(tokenizer, _chat_template(tokenizer)).render(messages, add_generation_prompt=True)


def end_of_turn(tokenizer: Tokenizer) -> int | None:
    """The id of the token that ends an answer in training; None if the tokenizer has no template or no such token."""
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
        problem = "the model's tokenizer has no chat template, so conversations cannot be rendered"
        remedy = "use a model with a chat template (usually named …-Instruct), or train on plain text: task=pretrain"
        raise ConfigError(Fault("model.path", problem, remedy, tokenizer.name_or_path)) from None


@functools.lru_cache(maxsize=16)
def _template(tokenizer: Tokenizer, text: str) -> _Template:
    return _Template(tokenizer, text)


class _Template:
    """A tokenizer's chat template, analysed by rendering placeholders instead of message contents.

    Most templates write the same text around the contents for the same sequence of roles. This *skeleton* is rendered
    once for each sequence of roles and then matched against every conversation. If the match fails (for example
    because the template strips earlier thinking), the answers are located by rendering each prefix of the conversation.
    """

    def __init__(self, tokenizer: Tokenizer, text: str) -> None:
        self.tokenizer = tokenizer
        self.has_markers = bool(GENERATION_MARKER.search(text))
        self._skeleton = functools.cache(self._build_skeleton)
        self.openings: dict[tuple[str, str], int] = {}
        self.fast: Any = _fast_tokenizer(tokenizer)
        self.generation_prompt, self.closing, self.tail = self._analyse_turn()

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        with self._rendering():
            rendered: Any = self.tokenizer.apply_chat_template(
                _plain(messages), tokenize=False, add_generation_prompt=add_generation_prompt
            )
            if len(rendered) > MOST_CHARACTERS + sum(len(message["content"]) for message in messages):
                raise MemoryError
            return str(rendered)

    @contextlib.contextmanager
    def _rendering(self) -> Iterator[None]:
        """For a block that renders: errors of the template as a message, and an end for one that does not end."""
        remedy = "use a model with another chat template, or correct this one"
        try:
            with time_limit(LONGEST_RENDERING_S):
                yield
        except TimeoutError:
            problem = f"the model's chat template takes more than {LONGEST_RENDERING_S:g} s for one conversation"
            raise ConfigError(Fault("model.path", problem, remedy, self.tokenizer.name_or_path)) from None
        except MemoryError:
            problem = f"the model's chat template writes more than {MOST_CHARACTERS:,} characters for one conversation"
            raise ConfigError(Fault("model.path", problem, remedy, self.tokenizer.name_or_path)) from None
        except Exception as error:  # a template is a program: it may fail in any way
            problem = f"the model's chat template rejects this conversation: {error or type(error).__name__}"
            raise DataError(Fault("", problem, "correct the row, or remove it")) from error

    def tokenize(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids, and the character at which each token starts (empty without a fast tokenizer)."""
        if self.fast is not None:
            encoding = self.fast.encode(text, add_special_tokens=False)
            offsets = encoding.offsets
            # Many tokenizers exclude a token's leading space from its offsets: use the end of the previous token.
            pairs = zip(offsets, [(0, 0), *offsets], strict=False)
            return encoding.ids, [start if start < end else end for (start, _), (_, end) in pairs]
        return _ids(self.tokenizer, text), []

    def find_turns(self, messages: list[Message], needed: set[int]) -> tuple[list[int], list[Turn]]:
        """Token ids of the conversation, and the token span of each answer and each message in ``needed``."""
        if self.fast is None:
            raise self._unmaskable("the tokenizer gives no character offsets")
        text = self.render(messages)
        skeleton = self._skeleton(tuple(message["role"] for message in messages))
        spans = skeleton.match(messages, text) if skeleton is not None else None
        if spans is None:
            spans = dict(self._find_by_prefixes(messages, text))
        if needed - spans.keys():
            raise self._unmaskable("the row gives weights to turns that are not the assistant's")
        ids, starts = self.tokenize(text)
        tokens: list[Turn] = []
        for number, (start, end) in spans.items():
            # A token that starts inside an answer is trained; one that starts in the header belongs to the prompt.
            first = bisect_left(starts, start)
            if not messages[number].get("train", True):
                first = bisect_right(starts, start) - 1  # no part of this turn is trained, not even with its header
            tokens.append((number, (first, bisect_left(starts, end))))
        return ids, tokens

    def find_marked(self, messages: list[Message], needed: set[int]) -> tuple[list[int], list[Turn]]:
        """Like ``find_turns``, for a template that marks the answers with ``{% generation %}``."""
        with self._rendering():
            encoded = self.tokenizer.apply_chat_template(
                _plain(messages), return_dict=True, return_assistant_tokens_mask=True
            )
        edges = [0, *encoded["assistant_masks"], 0]
        changes = [at for at, (before, after) in enumerate(itertools.pairwise(edges)) if before != after]
        spans = list(zip(changes[::2], changes[1::2], strict=True))
        answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if needed and (needed - set(answers) or len(spans) != len(answers)):
            raise self._unmaskable("its {% generation %} marks do not show each turn to which the row gives a weight")
        numbers = answers if len(spans) == len(answers) else answers[:1] * len(spans)
        return encoded["input_ids"], list(zip(numbers, spans, strict=True))

    def _analyse_turn(self) -> tuple[str, str, str]:
        """Render one exchange; returns (generation prompt, trained text after an answer, all text after an answer)."""
        exchange = placeholders(("user", "assistant"))
        try:
            question, whole = self.render(exchange[:1]), self.render(exchange)
            prompted = self.render(exchange[:1], add_generation_prompt=True)
        except DataError:
            return "", "", ""
        tail = whole.rpartition(exchange[1]["content"])[2]
        # Text after the end-of-turn token (usually a newline) is never generated, hence not trained.
        tokens = (token for token in self.tokenizer.get_added_vocab() if token.strip() and token in tail)
        closing = tail[: min((tail.index(token) + len(token) for token in tokens), default=len(tail))]
        return prompted[len(question) :] if prompted.startswith(question) else "", closing, tail

    def _build_skeleton(self, roles: tuple[str, ...]) -> Skeleton | None:
        """The text that the template writes around these roles; None if it does not show where answers start."""
        contents = placeholders(roles)
        try:
            text = self.render(contents)
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

    def _find_opening(self, earlier: list[Message], text: str, start: int, end: int) -> int | None:
        if earlier:
            with contextlib.suppress(DataError):
                prompt_text = self.render(earlier, add_generation_prompt=True)
                shared = _common_prefix(prompt_text, text)
                # At most up to the content: a longer prompt (DeepSeek-R1 appends "<think>") contains text that this
                # conversation does not have.
                if start <= shared <= end and shared in (len(prompt_text), end):
                    return shared - start
        at = text.rfind(self.generation_prompt, start, end) if self.generation_prompt else -1
        return at + len(self.generation_prompt) - start if at >= 0 else None

    def _find_by_prefixes(self, messages: list[Message], text: str) -> Iterator[Turn]:
        """Locate each answer by rendering the conversation before it and including it. Slower, for any contents."""
        reached = 0
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self.render(messages[:number], add_generation_prompt=True) if number else self.generation_prompt
            through = self.render(messages[: number + 1])
            if not text.startswith(before) or len(before) < reached:
                raise self._unmaskable("the template renders earlier turns differently when later turns follow")
            if text.startswith(through):
                reached = len(through) - (len(self.tail) - len(self.closing)) * through.endswith(self.tail)
            elif self.closing.strip() and (at := text.find(self.closing, len(before))) >= 0:
                reached = at + len(self.closing)
            else:
                raise self._unmaskable("the template does not show where an answer ends")
            yield number, (len(before), reached)

    def _unmaskable(self, reason: str) -> ConfigError:
        problem = f"cannot locate the turns in the text rendered by the model's chat template: {reason}"
        remedy = "train on every token with task.train_on=all, or use a model whose template has {% generation %} marks"
        return ConfigError(Fault("model.path", problem, remedy, self.tokenizer.name_or_path))


def _plain(messages: Sequence[Message]) -> list[dict[str, str]]:
    """The messages as the template sees them: role and content."""
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _common_prefix(first: str, second: str) -> int:
    """Number of characters at the start that are equal in both texts."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def _fast_tokenizer(tokenizer: Tokenizer) -> Any:
    """The underlying Rust tokenizer (a third faster than the wrapper); None if it gives other ids than the wrapper."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    probe = " A word,\n\n 12 words\u2026 ".join(["", *tokenizer.get_added_vocab(), ""])
    if fast is None or fast.encode(probe, add_special_tokens=False).ids != _ids(tokenizer, probe):
        return None
    return fast


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
