"""Metrics of answers against a reference, to be named in ``train.metrics``; each has the signature of a reward."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_match(completions: Sequence[Any], reference: Sequence[Any], **_: Any) -> list[float | None]:
    """1 where the answer is the reference but for case, punctuation, articles and spaces, as in SQuAD."""
    return [
        None if right is None else float(_normal(_text(answer)) == _normal(str(right)))
        for answer, right in zip(completions, reference, strict=True)
    ]


def f1(completions: Sequence[Any], reference: Sequence[Any], **_: Any) -> list[float | None]:
    """F1 of the words of the answer and of the reference, as in SQuAD (https://arxiv.org/abs/1606.05250)."""
    return [
        None if right is None else _word_f1(_normal(_text(answer)).split(), _normal(str(right)).split())
        for answer, right in zip(completions, reference, strict=True)
    ]


def rouge_l(completions: Sequence[Any], reference: Sequence[Any], **_: Any) -> list[float | None]:
    """F1 of the longest common subsequence of words: ROUGE-L of the package rouge-score, without stemming."""
    return [
        None if right is None else _lcs_f1(_words(str(right)), _words(_text(answer)))
        for answer, right in zip(completions, reference, strict=True)
    ]


def _text(answer: Any) -> str:
    return answer if isinstance(answer, str) else str(answer[-1]["content"])


def _normal(text: str) -> str:
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def _word_f1(answer: list[str], reference: list[str]) -> float:
    if not answer or not reference:
        return float(answer == reference)
    return _f1(sum((Counter(answer) & Counter(reference)).values()), len(answer), len(reference))


def _lcs_f1(reference: list[str], answer: list[str]) -> float:
    lengths = [0] * (len(answer) + 1)
    for word in reference:
        before = 0
        for place, other in enumerate(answer, 1):
            longest = before + 1 if word == other else max(lengths[place], lengths[place - 1])
            before, lengths[place] = lengths[place], longest
    return _f1(lengths[-1], len(answer), len(reference))


def _f1(common: int, answer: int, reference: int) -> float:
    return 2 * common / (answer + reference) if common else 0.0
