"""Pretraining: next-token prediction on plain text."""

from __future__ import annotations

import functools
from typing import Any

from runner.data.examples import Example, Features, misfit
from runner.errors import ConfigError, Fault
from runner.tasks.task import OF_TOKENS, Task, token_loss, token_metrics


def pretrain(*, append_eos: bool) -> Task:
    """Next-token prediction on plain text; long documents are cut into pieces of ``data.max_length``."""

    def encode(example: Example, tokenizer: Any, max_length: int) -> list[Features]:
        if not isinstance(example, str):
            raise misfit(example, "plain text (data/format=text, data.format.key=<the column of the text>)")
        eos, adds_eos = tokenizer.eos_token_id, _adds_eos(tokenizer)
        ids = tokenizer(example, add_special_tokens=True, verbose=False)["input_ids"]
        if append_eos:
            if eos is None:
                problem = "the tokenizer has no end-of-sequence token"
                raise ConfigError(Fault("task.append_eos", problem, "set task.append_eos=false", True))
            ids = ids if ids[-1:] == [eos] else [*ids, eos]
        elif adds_eos:
            ids = ids[:-1]
        pieces = [ids[start : start + max_length] for start in range(0, len(ids), max_length)]
        return [{"input_ids": piece, "labels": list(piece)} for piece in pieces if len(piece) > 1]

    def prompt(example: Example, tokenizer: Any) -> tuple[str, str] | None:
        words = str(example).split(" ")
        half = min(len(words) // 2, 24)
        return (" ".join(words[:half]), " ".join(words[half : 2 * half])) if half else None

    return Task("pretrain", True, encode, prompt, token_loss, token_metrics, chats=False, measures=OF_TOKENS)


@functools.lru_cache(maxsize=4)
def _adds_eos(tokenizer: Any) -> bool:
    """Whether the tokenizer ends each text with the end-of-sequence token by itself."""
    ids = tokenizer("a", add_special_tokens=True, verbose=False)["input_ids"]
    return tokenizer.eos_token_id is not None and ids[-1:] == [tokenizer.eos_token_id]
