"""The data order: which packs each optimizer step computes, as a pure function of (seed, step)."""

from __future__ import annotations

import functools
import math

import numpy as np

from runner.errors import ConfigError, Fault


class DataOrder:
    """The order of the packs over all epochs, for all ranks together.

    Every epoch has its own order. A step takes the next ``per_step`` packs, possibly across the end of an epoch. With
    ``epochs``, the data end after that many epochs, and the last step may have fewer packs.
    """

    def __init__(
        self, sizes: np.ndarray, *, per_step: int, seed: int, shuffle: bool, epochs: float | None = None
    ) -> None:
        """``sizes``: (packs,) tokens of each pack."""
        self.sizes, self.per_step, self.seed, self.shuffle, self.epochs = sizes, per_step, seed, shuffle, epochs
        self._of_epoch = functools.lru_cache(maxsize=2)(self._draw)
        self._tokens_before = functools.lru_cache(maxsize=2)(self._sum_tokens)

    def packs_of_step(self, i: int) -> list[int]:
        """The packs of optimizer step ``i`` (from 0)."""
        count = len(self.sizes)
        return [
            int(self._of_epoch(p // count)[p % count]) for p in range(self.packs_before(i), self.packs_before(i + 1))
        ]

    def packs_of_pass(self) -> list[int]:
        """Every pack once, in the order of the first epoch."""
        return [int(pack) for pack in self._of_epoch(0)]

    def packs_before(self, step: int) -> int:
        """Number of packs in the first ``step`` steps."""
        return min(step * self.per_step, self._end())

    def tokens_before(self, step: int) -> int:
        """Tokens without padding in the first ``step`` steps."""
        epoch, packs = divmod(self.packs_before(step), len(self.sizes))
        return int(epoch * self.sizes.sum() + self._tokens_before(epoch)[packs])

    def epoch(self, step: int) -> float:
        """Number of epochs, as a fraction, after ``step`` steps."""
        return float(self.packs_before(step) / len(self.sizes))

    def steps(self, max_steps: int | None = None, epochs: float | None = None, max_tokens: int | None = None) -> int:
        """Number of optimizer steps until the first of these limits is reached.

        Raises:
            ConfigError: all limits are None.
        """
        limits = [max_steps] if max_steps is not None else []
        for limit in (epochs, self.epochs):
            if limit is not None:
                limits.append(math.ceil(self._packs_of(limit) / self.per_step))
        if max_tokens is not None:
            limits.append(math.ceil(self._packs_until(max_tokens) / self.per_step))
        if not limits:
            remedy = "set one of train.max_steps, train.num_train_epochs, train.max_tokens"
            raise ConfigError(Fault("train", "no stopping criterion", remedy))
        return max(1, min(limits))

    def _draw(self, epoch: int) -> np.ndarray:
        """The order of the packs in one epoch, from PCG64's raw numbers: numpy guarantees that they never change."""
        if not self.shuffle:
            return np.arange(len(self.sizes))
        numbers = np.random.PCG64([self.seed % 2**64, epoch]).random_raw(len(self.sizes))
        return np.argsort(numbers, kind="stable")

    def _sum_tokens(self, epoch: int) -> np.ndarray:
        """(packs + 1,) tokens before each pack of an epoch."""
        return np.concatenate([[0], np.cumsum(self.sizes[self._of_epoch(epoch)])])

    def _packs_of(self, epochs: float) -> int:
        return math.ceil(epochs * len(self.sizes) - 1e-6)

    def _packs_until(self, tokens: int) -> int:
        epoch, rest = divmod(tokens, int(self.sizes.sum()))
        return epoch * len(self.sizes) + int(np.searchsorted(self._tokens_before(epoch), rest))

    def _end(self) -> int:
        return self._packs_of(self.epochs) if self.epochs is not None else 2**62
