"""Tokenise a conversation with the tokenizer's chat template, and mask the labels of everything but the answers.

The rendered text is tokenised once, so the ids equal those of ``tokenizer.apply_chat_template``. Labels come from the
character span of each answer: from the end of the generation prompt through the end-of-turn token, which the model
has to learn to generate. A turn's own ``weight`` decides how much it is trained (``conversation.TRAIN_KEYS``).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from runner.data.conversation import CARRIES, NO_OPTIONS, REASONING, Message
from runner.data.examples import Features
from runner.data.marks import PLACEHOLDER, Marked, seen
from runner.data.packing import IGNORED
from runner.data.skeleton import Skeleton, Span, placeholders
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


class Turn(NamedTuple):
    """Where a message is, in characters or tokens: from what the model generates of it through its end."""

    number: int
    start: int
    end: int
    thought: int = 0
    """The end of its reasoning; 0 if it has none."""
    lost: bool = False
    """Whether the template leaves out the reasoning that the row has."""


def encode(
    messages: list[Message],
    tokenizer: Tokenizer,
    train_on: TrainOn,
    *,
    options: Mapping[str, Any] = NO_OPTIONS,
    reasoning: bool = True,
    weight: float = 1.0,
) -> Features:
    """Tokenise the whole conversation; tokens that are not trained get the label -100.

    ``train_on``: ``assistant`` trains every answer; ``last`` the last answer only; ``all`` every token of the rendered
    text, including headers, system turns and user turns. A turn's own ``weight`` comes first, unless ``train_on`` is
    ``last``. ``options``: ``tools`` and variables of the template. ``reasoning=False``: the reasoning of an answer is
    not trained; with True, an answer whose reasoning the template leaves out is not trained, and counted as
    ``reasoning_lost``. ``weight`` multiplies that of each token. The features have ``weights`` if one is not 0 or 1.

    Raises:
        ConfigError: the tokenizer has no chat template, or the turns cannot be located in the rendered text.
        DataError: the template rejects this conversation, or leaves out a part of it.
    """
    template = _template(tokenizer, _chat_template(tokenizer))
    usual = [float(train_on == "all" or message["role"] == "assistant") for message in messages]
    own = [float(message.get("weight", usual[i])) for i, message in enumerate(messages)]
    template.check(options)
    if train_on == "all" and weight == 1 and own == usual and _is_plain(messages, options):
        ids = template.tokenize(template.render(messages))[0]
        return {"input_ids": ids, "labels": list(ids)}
    find = template.find_marked if template.has_markers else template.find_turns
    ids, turns = find(messages, {i for i, each in enumerate(own) if each != usual[i]}, options)
    weights = [weight if train_on == "all" else 0.0] * len(ids)
    if train_on == "last":
        turns = [turn for turn in turns if messages[turn.number]["role"] == "assistant"][-1:]
    lost = {turn.number for turn in turns if turn.lost and reasoning and own[turn.number]}
    for turn in turns:
        of_turn = 0.0 if turn.number in lost else own[turn.number] * weight
        weights[turn.start : turn.end] = [of_turn] * (turn.end - turn.start)
        if not reasoning and turn.thought:
            weights[turn.start : turn.thought] = [0.0] * (turn.thought - turn.start)
    labels = [token if each else IGNORED for token, each in zip(ids, weights, strict=True)]
    features: Features = {"input_ids": ids, "labels": labels}
    if any(each not in (0.0, 1.0) for each in (weight, *own)):
        features["weights"] = weights
    return {**features, "reasoning_lost": len(lost)} if lost else features


def prompt(messages: list[Message], tokenizer: Tokenizer, options: Mapping[str, Any] = NO_OPTIONS) -> str:
    """Render the conversation with the generation prompt at its end."""
    return _template(tokenizer, _chat_template(tokenizer)).render(messages, options, add_generation_prompt=True)


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
    once for each sequence of roles and then matched against every conversation. If the match fails, or the conversation
    has more than contents (tools, reasoning), it is rendered once more with marks in its texts (see ``marks``).
    """

    def __init__(self, tokenizer: Tokenizer, text: str) -> None:
        self.tokenizer, self.text = tokenizer, text
        self.has_markers = bool(GENERATION_MARKER.search(text))
        self._skeleton = functools.cache(self._build_skeleton)
        self.openings: dict[tuple[str, str], int] = {}
        self.fast: Any = _fast_tokenizer(tokenizer)
        self.generation_prompt, self.closing, self.tail = self._analyse_turn()

    def render(
        self,
        messages: Sequence[Message],
        options: Mapping[str, Any] = NO_OPTIONS,
        add_generation_prompt: bool = False,
    ) -> str:
        plain = self._plain(messages)
        with self._rendering():
            rendered: Any = self.tokenizer.apply_chat_template(
                plain, tokenize=False, add_generation_prompt=add_generation_prompt, **options
            )
            if len(rendered) > MOST_CHARACTERS + sum(len(message["content"]) for message in messages):
                raise MemoryError
            return str(rendered)

    def check(self, options: Mapping[str, Any]) -> None:
        """Refuse a variable that the template does not use."""
        for name in options.keys() - {"tools"}:
            reserved = name in {"messages", *inspect.signature(self.tokenizer.apply_chat_template).parameters}
            if reserved or not re.search(rf"\b{re.escape(name)}\b", self.text):
                problem = f"the row's chat_template_kwargs has {name!r}, which the model's chat template does not use"
                remedy = "remove it, or train without it knowingly: +data.format.ignore=[chat_template_kwargs]"
                raise DataError(Fault("model.path", problem, remedy, self.tokenizer.name_or_path))

    def _plain(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """The messages as the template sees them; reasoning under the key that it reads."""
        plain = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
        for message in plain:
            if "reasoning_content" in message:
                message[self.reasoning_key] = message.pop("reasoning_content")
            if "tool_calls" in message and not message["content"]:
                message["content"] = self.no_content
        return plain

    @functools.cached_property
    def no_content(self) -> str | None:
        """The content of a turn that is a tool call alone: DeepSeek's templates write the call only beside None."""
        call = {"type": "function", "function": {"name": "\ue0002\ue001", "arguments": {}}}
        question, answer = placeholders(("user", "assistant"))
        for content in ("", None):
            with contextlib.suppress(DataError), self._rendering():
                exchange = [question, {**answer, "content": content, "tool_calls": [call]}]
                if "\ue0002\ue001" in self.tokenizer.apply_chat_template(exchange, tokenize=False):
                    return content
        return ""

    @functools.cached_property
    def reasoning_key(self) -> str:
        """The key of a message's reasoning that the template writes.

        Raises:
            DataError: it writes none.
        """
        question, answer = placeholders(("user", "assistant"))
        for key in REASONING:
            with contextlib.suppress(DataError), self._rendering():
                exchange = [question, {**answer, key: "\ue0002\ue001"}]
                if "\ue0002\ue001" in self.tokenizer.apply_chat_template(exchange, tokenize=False):
                    return key
        raise self._left_out("reasoning")

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

    def find_turns(
        self, messages: list[Message], needed: set[int], options: Mapping[str, Any]
    ) -> tuple[list[int], list[Turn]]:
        """Token ids of the conversation, and the tokens of each answer and each message in ``needed``."""
        if self.fast is None:
            raise self._unmaskable("the tokenizer gives no character offsets")
        text, skeleton = self.render(messages, options), None
        if _is_plain(messages, options):
            skeleton = self._skeleton(tuple(message["role"] for message in messages))
        spans = skeleton.match(messages, text) if skeleton is not None else None
        turns = [Turn(i, *span) for i, span in (spans or {}).items()] or self._locate(messages, text, needed, options)
        if needed - {turn.number for turn in turns}:
            raise self._unmaskable("the row gives weights to turns that the template does not show")
        ids, starts = self.tokenize(text)
        tokens: list[Turn] = []
        for turn in turns:
            # A token that starts inside an answer is trained; one that starts in the header belongs to the prompt.
            first = bisect_left(starts, turn.start)
            if messages[turn.number].get("weight") == 0:
                first = (
                    bisect_right(starts, turn.start) - 1
                )  # no part of this turn is trained, not even with its header
            thought = bisect_left(starts, turn.thought) if turn.thought else 0
            tokens.append(Turn(turn.number, first, bisect_left(starts, turn.end), thought, turn.lost))
        return ids, tokens

    def find_marked(
        self, messages: list[Message], needed: set[int], options: Mapping[str, Any]
    ) -> tuple[list[int], list[Turn]]:
        """Like ``find_turns``, for a template that marks the answers with ``{% generation %}``."""
        plain = self._plain(messages)
        with self._rendering():
            encoded = self.tokenizer.apply_chat_template(
                plain, return_dict=True, return_assistant_tokens_mask=True, **options
            )
        edges = [0, *encoded["assistant_masks"], 0]
        changes = [at for at, (before, after) in enumerate(itertools.pairwise(edges)) if before != after]
        spans = list(zip(changes[::2], changes[1::2], strict=True))
        answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if not _is_plain(messages, options):
            turns = [turn for turn in self.find_turns(messages, needed, options)[1] if turn.number in answers]
            shown = [next((turn for turn in turns if start < turn.end), turns[-1]) for start, _ in spans]
            found = [turn._replace(start=start, end=end) for turn, (start, end) in zip(shown, spans, strict=True)]
        else:
            numbers = answers if len(spans) == len(answers) else answers[:1] * len(spans)
            found = [Turn(number, *span) for number, span in zip(numbers, spans, strict=True)]
        if needed and (needed - set(answers) or len({turn.number for turn in found}) != len(answers)):
            raise self._unmaskable("its {% generation %} marks do not show each turn to which the row gives a weight")
        return encoded["input_ids"], found

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
        tokens = [token for token in self.tokenizer.get_added_vocab() if token.strip() and token in tail]
        end = min((tail.index(token) + len(token) for token in tokens), default=len(tail))
        while adjacent := next((token for token in tokens if tail.startswith(token, end)), ""):
            end += len(adjacent)
        closing = tail[:end]
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

    def _find_opening(
        self, earlier: Sequence[Message], text: str, start: int, end: int, options: Mapping[str, Any] = NO_OPTIONS
    ) -> int | None:
        if earlier:
            with contextlib.suppress(DataError):
                prompt_text = self.render(earlier, options, add_generation_prompt=True)
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

    def _locate(self, messages: list[Message], text: str, needed: set[int], options: Mapping[str, Any]) -> list[Turn]:
        """The characters of each answer and each message in ``needed``, by rendering the conversation with marks.

        Raises:
            ConfigError: the marks do not show where they are.
            DataError: the template leaves out a part of the conversation.
        """
        marked = Marked.of(messages, options.get("tools", ()), needed)
        tools = {"tools": marked.tools} if marked.tools else {}
        view = seen(self.render(marked.messages, {**options, **tools}))
        turns: list[Turn] = []
        reached = 0
        spans = list(view.spans(marked.parts))
        for part, _, end in spans:
            if end is None and part.kind != "reasoning":
                raise self._left_out(part.kind, part.number)
        if view.text != text:
            raise self._unmaskable("what it writes depends on more than the contents")
        for number, message in enumerate(messages):
            own = [(part, start, end) for part, start, end in spans if part.number == number]
            starts = [start for _, start, _ in own if start is not None]
            if not starts:
                continue
            first, last = min(starts), max(end for _, _, end in own if end is not None)
            if first < reached:
                raise self._unmaskable("it writes the messages in another order")
            opening: int | None = first - reached
            if message["role"] == "assistant":
                opening = self._find_opening(messages[:number], text, reached, first, options)
            if opening is None:
                raise self._unmaskable("it does not show where an answer starts")
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
        alone = PLACEHOLDER.split(self.render(marked, options))[-1]
        alone = tail[: _common_prefix(alone, tail)]
        if self.closing and self.closing in alone:
            return alone.index(self.closing) + len(self.closing)
        tokens = (token for token in self.tokenizer.get_added_vocab() if token.strip() and token in alone)
        return max((alone.rindex(token) + len(token) for token in tokens), default=len(alone))

    def _left_out(self, kind: str, number: int = -1) -> DataError:
        """The template does not write a part of a conversation."""
        ignored = {"reasoning": "reasoning_content,reasoning,thinking"}.get(kind, "tools,tool_calls")
        what = {
            "reasoning": "the reasoning of an answer: it knows no reasoning",
            "tool": "the tools of the row: it knows no tools",
            "call": f"a tool call of message {number + 1}",
            "content": f"the text of message {number + 1}",
        }[kind]
        knowingly = f"leave the key out knowingly: +data.format.ignore=[{ignored}]"
        remedy = f"use a model whose chat template writes it, or {knowingly}"
        if kind == "content":
            remedy = "leave the row out, or use a model whose chat template writes it"
        elif kind == "reasoning":
            remedy = f"use a model whose chat template writes it, put <think>…</think> into the content, or {knowingly}"
        problem = f"the model's chat template leaves out {what}"
        return DataError(Fault("model.path", problem, remedy, self.tokenizer.name_or_path))

    def _unmaskable(self, reason: str) -> ConfigError:
        problem = f"cannot locate the turns in the text rendered by the model's chat template: {reason}"
        remedy = "train on every token with task.train_on=all, or use a model whose template has {% generation %} marks"
        return ConfigError(Fault("model.path", problem, remedy, self.tokenizer.name_or_path))


def _is_plain(messages: Sequence[Message], options: Mapping[str, Any]) -> bool:
    """Whether the conversation is roles and contents alone."""
    return not options and not any(
        message.keys() & CARRIES or (message["role"] == "assistant" and "</think>" in message["content"])
        for message in messages
    )


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
