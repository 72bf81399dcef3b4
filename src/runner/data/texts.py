"""Texts in flat arrays, which can be files: one text per row."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Texts:
    """One text per row, in flat memory-mapped arrays."""

    characters: np.ndarray  # (bytes,) uint8
    offsets: np.ndarray  # (rows + 1,) int64

    @classmethod
    def of(cls, texts: Sequence[str]) -> Texts:
        encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
        offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), dtype=np.uint8), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @functools.cached_property
    def columns(self) -> tuple[str, ...]:
        """The names in ``columns`` of any of the texts, if these are JSON objects with that key."""
        return tuple(dict.fromkeys(name for row in range(len(self)) for name in json.loads(self[row])["columns"]))

    def __getitem__(self, row: int) -> str:
        content = self.characters[self.offsets[row] : self.offsets[row + 1]]
        return content.tobytes().decode("utf-8", "surrogatepass")
