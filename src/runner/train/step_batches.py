"""The batches that a step or an evaluation computes: those of the data, or what ``Task.prepare`` makes of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from runner.data.batches import Batches
from runner.data.collator import Batch
from runner.tasks.step_context import StepContext
from runner.tasks.task import Task
from runner.train.distributed.ranks import Ranks
from runner.train.distributed.wrap import Wrapped

Start = Callable[[], AbstractContextManager[Any]]
Show = Callable[[int, list[dict[str, Any]]], None]
"""(step, samples) → None: keeps the samples of an evaluation."""


@dataclass(frozen=True)
class StepBatches:
    """The task's ``prepare`` with everything that it needs beside the batches."""

    task: Task
    model: torch.nn.Module
    tokenizer: Any
    wrapped: Wrapped
    ranks: Ranks
    start: Start
    show: Show

    def step(
        self, batches: Batches, number: int, given: list[Batch], seed: int, check: Callable[[], None]
    ) -> list[Any]:
        """The micro-batches of step ``number`` (from 0), ``given`` as they are in the data."""
        if self.task.prepare is None:
            return given
        return self._prepared(batches, batches.order.packs_of_step(number), given, seed, check, number, trains=True)

    def one_pass(self, batches: Batches, check: Callable[[], None], step: int) -> Iterator[Batch]:
        """The batches of an evaluation after ``step`` steps, on the device."""
        given = map(self.wrapped.on_device, batches.one_pass())
        if self.task.prepare is None:
            return given
        return iter(self._prepared(batches, batches.packs_of_pass(), list(given), 0, check, step, trains=False))

    @torch.no_grad()
    def _prepared(
        self,
        batches: Batches,
        packs: list[int],
        given: list[Batch],
        seed: int,
        check: Callable[[], None],
        step: int,
        *,
        trains: bool,
    ) -> list[Batch]:
        assert self.task.prepare is not None
        self.model.eval()
        context = StepContext(
            model=self.model,
            tokenizer=self.tokenizer,
            batches=batches,
            packs=packs,
            micro_batches=given,
            seed=seed,
            trains=trains,
            start=self.start,
            on_device=self.wrapped.on_device,
            show=lambda samples: self.show(step, samples),
            agree=lambda *numbers: self.ranks.agree(check, *numbers),
        )
        with self.wrapped.autocasting():
            return self.task.prepare(context)


def start_of(model: torch.nn.Module) -> Start:
    """The model with the trained weights that it has now, at the start; training changes nothing else."""
    kept = {name: each.detach().clone() for name, each in model.named_parameters() if each.requires_grad}

    @contextlib.contextmanager
    @torch.no_grad()
    def start() -> Iterator[torch.nn.Module]:
        trained = {name: each for name, each in model.named_parameters() if name in kept}
        now = {name: each.detach().clone() for name, each in trained.items()}
        try:
            _write(trained, kept)
            yield model
        finally:
            _write(trained, now)

    return start


def nowhere(step: int, samples: list[dict[str, Any]]) -> None:
    """Keep no samples."""


def none() -> AbstractContextManager[Any]:
    """For tasks without ``needs_start``."""
    raise AssertionError("the task needs the weights of the start: set Task.needs_start")


def _write(parameters: dict[str, torch.nn.Parameter], values: dict[str, torch.Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])
