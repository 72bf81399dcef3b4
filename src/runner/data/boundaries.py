"""The document boundaries of a batch, and the parts in which attention by document computes it.

A GPU kernel for documents of different lengths does work, and allocates float32 memory, for ``documents * longest``
positions of a call, however short most documents are. Therefore a batch of many short documents and a long one is
computed in parts: in each of them that product is at most ``DENSITY`` times the number of tokens. The numbers of
documents and the longest lengths are powers of two, so that there are few different shapes to compile.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np

DENSITY = 4


class AttentionPart(NamedTuple):
    """Neighbouring documents that attention computes in one call."""

    documents: int
    """Including the padding, and documents of length zero that fill up a power of two."""
    tokens: int
    longest: int
    """An upper bound of the length of a document."""

    @property
    def is_dense(self) -> bool:
        return self.documents * self.longest <= DENSITY * self.tokens


class Boundaries(NamedTuple):
    """Documents that are concatenated to one row."""

    ends: np.ndarray
    """(documents + 1,) int32, from 0 to the number of tokens; repeated values are documents of length zero."""
    parts: tuple[AttentionPart, ...]


def of_packs(packs: Sequence[Sequence[int]], width: int, limit: int) -> Boundaries:
    """The boundaries of packed rows of ``width`` tokens, given the lengths of the documents of each row.

    The whole batch is one part if it is dense, else every row is one. Padding is cut into documents that are not longer
    than the longest real one. ``limit``: no document of any batch is longer.
    """
    lengths: list[int] = []
    rows: list[AttentionPart] = []
    for pack in packs:
        longest = min(_power(max(pack, default=limit)), limit)
        whole, rest = divmod(width - sum(pack), longest)
        members = [*pack, *[longest] * whole, rest]
        members += [0] * (_power(len(members)) - len(members))
        lengths += members
        rows.append(AttentionPart(len(members), width, longest))
    together = AttentionPart(len(lengths), width * len(rows), max(row.longest for row in rows))
    return Boundaries(_ends(lengths), (together,) if together.is_dense else tuple(rows))


def of_row(documents: Sequence[int], width: int, limit: int) -> Boundaries:
    """The boundaries of documents, given their lengths, in a single row of ``width`` tokens; cut into dense parts.

    ``limit``: as of ``of_packs``; the few tokens of padding at the end may exceed it.
    """
    parts: list[AttentionPart] = []
    lengths = [*documents, width - sum(documents)]
    for length in lengths:
        longest = max(min(_power(length), limit), length)
        joined = _joined(parts[-1], length, longest) if parts else None
        if joined is not None and joined.is_dense:
            parts[-1] = joined
        else:
            parts.append(AttentionPart(1, length, longest))
    return Boundaries(_ends(lengths), tuple(parts))


def _joined(part: AttentionPart, length: int, longest: int) -> AttentionPart:
    return AttentionPart(part.documents + 1, part.tokens + length, max(part.longest, longest))


def _power(number: int) -> int:
    """The smallest power of two that is at least ``number``."""
    return 1 << max(number - 1, 0).bit_length()


def _ends(lengths: Sequence[int]) -> np.ndarray:
    return np.array([0, *accumulate(lengths)], dtype=np.int32)
