"""Tokenise a conversation with the tokenizer's chat template, and mask the labels of everything but the answers.

The rendered text is tokenised once, so the ids equal those of ``tokenizer.apply_chat_template``. Labels come from the
character span of each answer: from the end of the generation prompt through the end-of-turn token, which the model
has to learn to generate. A turn's own ``weight`` decides how much it is trained (``training_keys.TRAIN_KEYS``).
"""

from __future__ import annotations

import functools
import itertools
import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from runner.data import images, vision
from runner.data.conversation import NO_OPTIONS, Message
from runner.data.examples import Features
from runner.data.packing import IGNORED
from runner.data.rendering import Renderer, template_text
from runner.data.turn_spans import Turn, TurnFinder, is_plain
from runner.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

TrainOn = Literal["assistant", "last", "all"]
GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


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
    template, reader = of(tokenizer), vision.of(tokenizer)
    usual = [float(train_on == "all" or message["role"] == "assistant") for message in messages]
    own = [float(message.get("weight", usual[i])) for i, message in enumerate(messages)]
    template.renderer.check(options)
    if train_on == "all" and weight == 1 and own == usual and reader is None and is_plain(messages, options):
        ids = template.tokenize(template.renderer.render(messages))[0]
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
    features = {**features, "reasoning_lost": len(lost)} if lost else features
    if reader is None:
        return features
    return reader.expanded(features, [image for image in images.of_messages(messages) if image is not None])


def prompt(messages: list[Message], tokenizer: Tokenizer, options: Mapping[str, Any] = NO_OPTIONS) -> str:
    """Render the conversation with the generation prompt at its end."""
    return of(tokenizer).renderer.render(messages, options, add_generation_prompt=True)


def end_of_turn(tokenizer: Tokenizer) -> int | None:
    """The id of the token that ends an answer in training; None if the tokenizer has no template or no such token."""
    try:
        closing = of(tokenizer).finder.closing
    except ConfigError:
        return None
    ids = _ids(tokenizer, closing)
    return ids[-1] if ids and ids[-1] in tokenizer.get_added_vocab().values() else None


def of(tokenizer: Tokenizer) -> ChatTemplate:
    """The chat template of a tokenizer; it is analysed once.

    Raises:
        ConfigError: the tokenizer has none.
    """
    return _analysed(tokenizer, template_text(tokenizer))


@functools.lru_cache(maxsize=16)
def _analysed(tokenizer: Tokenizer, text: str) -> ChatTemplate:
    return ChatTemplate(tokenizer)


class ChatTemplate:
    """A tokenizer with its chat template, which tokenises conversations and locates the tokens of their turns."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.renderer = Renderer(tokenizer)
        self.finder = TurnFinder(self.renderer)
        self.has_markers = bool(GENERATION_MARKER.search(self.renderer.text))
        self.fast: Any = _fast_tokenizer(tokenizer)

    def tokenize(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids, and the character at which each token starts (empty without a fast tokenizer)."""
        if self.fast is not None:
            encoding = self.fast.encode(text, add_special_tokens=False)
            offsets = encoding.offsets
            # Many tokenizers exclude a token's leading space from its offsets: use the end of the previous token.
            pairs = zip(offsets, [(0, 0), *offsets], strict=False)
            return encoding.ids, [start if start < end else end for (start, _), (_, end) in pairs]
        return _ids(self.renderer.tokenizer, text), []

    def find_turns(
        self, messages: list[Message], needed: set[int], options: Mapping[str, Any]
    ) -> tuple[list[int], list[Turn]]:
        """Token ids of the conversation, and the tokens of each answer and each message in ``needed``."""
        if self.fast is None:
            raise self.renderer.unmaskable("the tokenizer gives no character offsets")
        text, turns = self.finder.find(messages, needed, options)
        ids, starts = self.tokenize(text)
        tokens: list[Turn] = []
        for turn in turns:
            # A token that starts inside an answer is trained; one that starts in the header belongs to the prompt.
            first = bisect_left(starts, turn.start)
            if messages[turn.number].get("weight") == 0:  # no part of this turn is trained, not even with its header
                first = bisect_right(starts, turn.start) - 1
            thought = bisect_left(starts, turn.thought) if turn.thought else 0
            tokens.append(Turn(turn.number, first, bisect_left(starts, turn.end), thought, turn.lost))
        return ids, tokens

    def find_marked(
        self, messages: list[Message], needed: set[int], options: Mapping[str, Any]
    ) -> tuple[list[int], list[Turn]]:
        """Like ``find_turns``, for a template that marks the answers with ``{% generation %}``."""
        ids, mask = self.renderer.encode(messages, options)
        edges = [0, *mask, 0]
        changes = [at for at, (before, after) in enumerate(itertools.pairwise(edges)) if before != after]
        spans = list(zip(changes[::2], changes[1::2], strict=True))
        answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if not is_plain(messages, options):
            turns = [turn for turn in self.find_turns(messages, needed, options)[1] if turn.number in answers]
            shown = [next((turn for turn in turns if start < turn.end), turns[-1]) for start, _ in spans]
            located = [turn._replace(start=start, end=end) for turn, (start, end) in zip(shown, spans, strict=True)]
        else:
            numbers = answers if len(spans) == len(answers) else answers[:1] * len(spans)
            located = [Turn(number, *span) for number, span in zip(numbers, spans, strict=True)]
        if needed and (needed - set(answers) or len({turn.number for turn in located}) != len(answers)):
            reason = "its {% generation %} marks do not show each turn to which the row gives a weight"
            raise self.renderer.unmaskable(reason)
        return ids, located


def _fast_tokenizer(tokenizer: Tokenizer) -> Any:
    """The underlying Rust tokenizer (a third faster than the wrapper); None if it gives other ids than the wrapper."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    probe = " A word,\n\n 12 words\u2026 ".join(["", *tokenizer.get_added_vocab(), ""])
    if fast is None or fast.encode(probe, add_special_tokens=False).ids != _ids(tokenizer, probe):
        return None
    return fast


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
