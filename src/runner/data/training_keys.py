"""Keys of rows and turns that change what is learnt: which are used, and an error for the others.

A key that changes what is learnt (tools, weights, reasoning, images …) is used or refused, never dropped. Keys
without a meaning for training (``id``, ``source``) are allowed.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from runner.errors import DataError, Fault, quoted

Row = Mapping[str, Any]

TRAIN_KEYS = ("weight", "loss_weight", "train", "training", "loss")
"""Keys of a turn with its weight in the loss: a number from 0, true or false."""
MEDIA = ("images", "image", "videos", "video", "audios", "audio")
REASONING = ("reasoning_content", "reasoning", "thinking")
_CALLS = ("tools", "functions", "tool_calls", "function_call")
TURN_KEYS = ("tool_calls", "function_call", *REASONING, *TRAIN_KEYS, "name", "tool_call_id")
"""Keys of a turn that are used besides its role and content."""
TURN_WORDS = (*_CALLS, *REASONING, *MEDIA, *TRAIN_KEYS, "train_detail", "training_detail", "trainable",
              "train_on_turn", "mask", "ignore", "ignored", "skip", "exclude", "refusal", "tool_plan")  # fmt: skip
WEIGHTS = ("weight", "loss_weight", "sample_weight", "train", "loss_mask")
OPTIONS = ("tools", "chat_template_kwargs")
ROW_KEYS = (*OPTIONS, *WEIGHTS)
"""Keys of a row that are used besides its conversation."""
VERDICTS = ("label", "kto_tag")
"""Whether the answer of a row is a good one."""
SYSTEM = ("system", "system_prompt", "system_message")
TOKENS = ("input_ids", "token_ids", "prompt_ids", "completion_ids", "response_ids", "output_ids", "target_ids",
          "tokens", "labels", "label_ids", "attention_mask", "token_type_ids", "position_ids")  # fmt: skip
"""Numbers that another program has made of a text; other values of these keys change nothing."""
TARGETS = ("target", "targets", "target_text")
"""What another program trains on."""
ROW_WORDS = (*_CALLS, *REASONING, *MEDIA, *WEIGHTS, *VERDICTS, *SYSTEM, *TOKENS, *TARGETS, "history",
             "chat_template_kwargs", "enable_thinking", "mask")  # fmt: skip
TEXT_WORDS = (*WEIGHTS, *TOKENS, *TARGETS)
"""Of a row of plain text."""


def refuse_unused(
    row: Row,
    turns: Sequence[Row],
    used: Collection[str | None],
    *,
    keys: Collection[str] = (),
    ignore: Collection[str] | None = (),
    words: Collection[str] = ROW_WORDS,
    offers: Mapping[str, Collection[str]] = MappingProxyType({}),
) -> None:
    """Refuse a row, or a turn of it, with a key that changes what is learnt and that its format does not use.

    ``used`` and ``keys``: the keys of the row and of a turn that the format uses. ``ignore``: those that the user
    leaves out knowingly; None: the format has no such option. ``words``: what to look for in the row. ``offers``:
    parameters of the format that could name the key of such a word.
    """
    left_out = ignore or ()
    words = (*words, *itertools.chain.from_iterable(offers.values()))
    faulty = [("the row", *pair) for pair in unused(row, words, used, left_out)]
    for number, turn in enumerate(turns, start=1):
        if len(turn) > len(keys):
            pairs = unused(turn, TURN_WORDS, {*keys, *TURN_KEYS}, left_out)
            faulty += [(f"message {number}", *pair) for pair in pairs]
    if not faulty:
        return
    each = (f"{owner} has {quoted(key)}{_near(key, word)}" for owner, key, word in faulty)
    problem = f"{', '.join(each)}: this is not used, and without it something else is learnt"
    if any(word in TOKENS for _, _, word in faulty):
        problem += "; a run tokenises the text itself"
    names = ",".join(sorted({*left_out, *(key for _, key, _ in faulty)}))
    remedy = f"leave the row out, or train without the key knowingly: +data.format.ignore=[{names}]"
    for parameter, meant in offers.items():
        if key := next((key for owner, key, word in faulty if word in meant and owner == "the row"), None):
            remedy = f"use it with data.format.{parameter}={key}, or {remedy}"
    if not offers and any(word in SYSTEM for _, _, word in faulty):
        remedy = f"make it the first message, with the role system, or {remedy}"
    if ignore is None:
        remedy = "leave the row out, or give messages without this key"
    raise DataError(Fault("data.format", problem, remedy))


def weight_of(mapping: Row, keys: Collection[str], what: str, but: Collection[str]) -> float | None:
    """The weight under one of ``keys``; None if there is none.

    Raises:
        DataError: it is no number from 0, or two keys contradict each other.
    """
    weights = {}
    for key in keys:
        if key not in but and (value := mapping.get(key)) not in (None, ""):
            weights[key] = _number(value)
            if not 0 <= weights[key] < math.inf:
                problem = f"{what} has {key}={quoted(value)}; allowed: a number from 0 (not trained), true or false"
                remedy = f"correct it, or train without the key knowingly: +data.format.ignore=[{key}]"
                raise DataError(Fault("", problem, remedy))
    if len(set(weights.values())) > 1:
        problem = f"{what} contradicts itself: " + ", ".join(f"{key}={mapping[key]}" for key in weights)
        raise DataError(Fault("", problem, "correct the row"))
    return next(iter(weights.values()), None)


def number(value: object) -> float | None:
    """A number that float32 can hold, or the text of one as CSV has it; None if it is something else."""
    parsed = math.nan if isinstance(value, bool) else _number(value)
    return parsed if abs(parsed) <= 1e30 and str(value).strip().lower() not in ("true", "false") else None


def _number(value: object) -> float:
    """A number, or the text of one as CSV has it; NaN if it is neither."""
    if isinstance(value, str):
        value = {"true": 1.0, "false": 0.0}.get(value.strip().lower(), value)
    try:
        return float(value) if isinstance(value, bool | int | float | str) else math.nan
    except (ValueError, OverflowError):
        return math.nan


def unused(
    mapping: Row, words: Collection[str], used: Collection[str | None], ignore: Collection[str]
) -> Iterator[tuple[str, str]]:
    """(key, the word of ``words`` that it means) for each key with a value, except those used or ignored."""
    for key, value in mapping.items():
        word = "" if key in used or key in ignore else _meaning(str(key), tuple(words))
        if word and has_value(word, value):
            yield str(key), word


@functools.lru_cache(1024)
def _meaning(key: str, words: tuple[str, ...]) -> str:
    """The word of ``words`` that this key means or misspells, or itself; an empty string if it means none of them."""
    plain = re.sub(r"[^a-z]", "", key.lower())
    known = {word.replace("_", ""): word for word in words}
    if plain in known:
        return known[plain]
    if "mask" in plain and "mask" in known:  # completion_mask, assistant_masks, masked
        return key
    if tokens := next((word for word in ("inputids", "tokenids", "labels") if plain.endswith(word)), ""):
        return known.get(tokens, "")  # chosen_input_ids, decoder_labels
    # Same letters in another order, or one letter more or less; the first letter counts: "height" is no "weight".
    near = (word for word in known if word[:1] == plain[:1] and len(plain) >= 4 and _differs_little(plain, word))
    return known.get(next(near, ""), "")


def _differs_little(one: str, other: str) -> bool:
    if sorted(one) == sorted(other):
        return True
    long, short = (one, other) if len(one) > len(other) else (other, one)
    return len(long) == len(short) + 1 and any(long[:i] + long[i + 1 :] == short for i in range(len(long)))


def _near(key: str, word: str) -> str:
    return "" if key == word or word in TOKENS else f" (did you mean '{word}'?)"


def has_value(word: str, value: object) -> bool:
    """Whether the value of a key that means ``word`` changes anything: null, empty and the weight 1 do not."""
    text = value.strip().lower() if isinstance(value, str) else value
    if text is None or text in ("", "[]", "{}", "null", "none") or (isinstance(value, list | dict) and not value):
        return False
    if word in (*VERDICTS, *TOKENS):
        return text is False or text == "false" or (word in TOKENS and _are_numbers(value))
    return word not in WEIGHTS or text not in (1, "1", "1.0", "true")


def _are_numbers(value: object) -> bool:
    """Whether it is a list of numbers or of such lists, or the text of one as CSV has it."""
    if isinstance(value, str):
        return value.lstrip().startswith("[") and set(value) <= set("[], \n\t0123456789.+-")
    if isinstance(value, list) and value:
        return isinstance(value[0], int | float) or _are_numbers(value[0])
    return False
