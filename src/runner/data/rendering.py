"""Render conversations with the chat template of a tokenizer; errors and endless templates become messages."""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from runner.data import images
from runner.data.conversation import NO_OPTIONS, Message
from runner.data.skeleton import placeholders
from runner.data.training_keys import REASONING
from runner.errors import ConfigError, DataError, Fault
from runner.signals import time_limit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

LONGEST_RENDERING_S = 20.0
"""A chat template that takes longer for one conversation is refused: it probably loops for ever."""
MOST_CHARACTERS = 10**8
"""A chat template that writes more for one conversation, beside its contents, is refused."""


class Renderer:
    """A tokenizer with its chat template."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises ConfigError if the tokenizer has no chat template."""
        self.tokenizer, self.text = tokenizer, template_text(tokenizer)
        self.reads_images = getattr(tokenizer, "processor", None) is not None

    def render(
        self,
        messages: Sequence[Message],
        options: Mapping[str, Any] = NO_OPTIONS,
        add_generation_prompt: bool = False,
    ) -> str:
        """The text of a conversation; ``options``: ``tools`` and variables of the template.

        Raises:
            ConfigError: the template takes too long, or writes too much.
            DataError: the template rejects the conversation.
        """
        plain = self.plain(messages)
        with self._limits():
            rendered: Any = self.tokenizer.apply_chat_template(
                plain, tokenize=False, add_generation_prompt=add_generation_prompt, **options
            )
            if len(rendered) > MOST_CHARACTERS + sum(len(message["content"]) for message in messages):
                raise MemoryError
            return str(rendered)

    def encode(self, messages: Sequence[Message], options: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        """(token ids, for each 1 if it is between ``{% generation %}`` marks); raises as ``render`` does."""
        plain = self.plain(messages)
        with self._limits():
            encoded = self.tokenizer.apply_chat_template(
                plain, return_dict=True, return_assistant_tokens_mask=True, **options
            )
        return encoded["input_ids"], encoded["assistant_masks"]

    def check(self, options: Mapping[str, Any]) -> None:
        """Refuse a variable that the template does not use."""
        for name in options.keys() - {"tools"}:
            reserved = name in {"messages", *inspect.signature(self.tokenizer.apply_chat_template).parameters}
            if reserved or not re.search(rf"\b{re.escape(name)}\b", self.text):
                problem = f"the row's chat_template_kwargs has {name!r}, which the model's chat template does not use"
                remedy = "remove it, or train without it knowingly: +data.format.ignore=[chat_template_kwargs]"
                raise DataError(Fault("model.path", problem, remedy, self.tokenizer.name_or_path))

    def plain(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """The messages as the template reads them: without weights, and reasoning under the template's own key.

        The templates of models that read images get every content as a list of parts.

        Raises:
            DataError: a message has an image, and the model reads text alone.
        """
        plain = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
        for message in plain:
            if "reasoning_content" in message:
                message[self.reasoning_key] = message.pop("reasoning_content")
            if "tool_calls" in message and not message["content"]:
                message["content"] = self.no_content
            if self.reads_images:
                message["content"] = _parts(message["content"] or "")
            elif message.get("images"):
                raise self._no_images()
            message.pop("images", None)
        return plain

    @functools.cached_property
    def no_content(self) -> str | None:
        """The content of a turn that is a tool call alone: DeepSeek's templates write the call only beside None."""
        call = {"type": "function", "function": {"name": "\ue0002\ue001", "arguments": {}}}
        return next((content for content in ("", None) if self._writes({"content": content, "tool_calls": [call]})), "")

    @functools.cached_property
    def reasoning_key(self) -> str:
        """The key of a message's reasoning that the template writes.

        Raises:
            DataError: it writes none.
        """
        key = next((key for key in REASONING if self._writes({key: "\ue0002\ue001"})), None)
        if key is None:
            raise self.left_out("reasoning")
        return key

    def _writes(self, answer: Mapping[str, Any]) -> bool:
        """Whether the template writes the third placeholder, which is in this answer, into a short exchange."""
        question, usual = placeholders(("user", "assistant"))
        with contextlib.suppress(DataError), self._limits():
            exchange = [question, {**usual, **answer}]
            if self.reads_images:
                exchange = [{**turn, "content": _parts(turn["content"] or "")} for turn in exchange]
            return "\ue0002\ue001" in self.tokenizer.apply_chat_template(exchange, tokenize=False)
        return False

    @contextlib.contextmanager
    def _limits(self) -> Iterator[None]:
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

    def _no_images(self) -> DataError:
        problem = "the row has images, and this model reads text alone"
        remedy = f"use a model that reads images, such as SmolVLM or LLaVA; or {images.LEAVE_OUT}"
        return DataError(Fault("model.path", problem, remedy, self.tokenizer.name_or_path))

    def left_out(self, kind: str, number: int = -1) -> DataError:
        """The error of a template that does not write a part of a conversation."""
        ignored = {"reasoning": "reasoning_content,reasoning,thinking"}.get(kind, "tools,tool_calls")
        what = {
            "reasoning": "the reasoning of an answer: it ignores reasoning",
            "tool": "the tools of the row: it ignores tools",
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

    def unmaskable(self, reason: str) -> ConfigError:
        """The error of a template whose text does not show where the turns are."""
        problem = f"cannot locate the turns in the text rendered by the model's chat template: {reason}"
        remedy = "train on every token with task.train_on=all, or use a model whose template has {% generation %} marks"
        return ConfigError(Fault("model.path", problem, remedy, self.tokenizer.name_or_path))


def _parts(content: str) -> list[dict[str, str]]:
    """A content as a list of parts: texts, and images where it has their mark."""
    pieces = re.split(f"({images.MARK})", content)
    return [{"type": "image"} if piece == images.MARK else {"type": "text", "text": piece} for piece in pieces if piece]


def template_text(tokenizer: Tokenizer) -> str:
    """The chat template of a tokenizer.

    Raises:
        ConfigError: it has none.
    """
    try:
        return tokenizer.get_chat_template()
    except ValueError:
        problem = "the model's tokenizer has no chat template, so conversations cannot be rendered"
        remedy = "use a model with a chat template (usually named …-Instruct), or train on plain text: task=pretrain"
        raise ConfigError(Fault("model.path", problem, remedy, tokenizer.name_or_path)) from None
