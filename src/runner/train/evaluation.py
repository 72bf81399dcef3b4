"""Evaluate a model during training and after it: the sums of a task over the evaluation split."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import torch

from runner.data.batches import Batches
from runner.tasks.task import Task
from runner.train.checkpoint import Progress
from runner.train.parts import Hooks, Parts
from runner.train.step_batches import StepBatches, nowhere


def is_over(progress: Progress, parts: Parts) -> bool:
    """Whether training ends here: after the last step, or earlier."""
    return progress.step >= parts.total_steps or bool(progress.ended)


def is_due(progress: Progress, parts: Parts) -> bool:
    step, every = progress.step, parts.settings.eval_steps
    return step == 0 or is_over(progress, parts) or (every is not None and step % every == 0)


def evaluate(parts: Parts, step: int, hooks: Hooks) -> dict[str, float]:
    """The task's metrics on the whole evaluation split."""

    of_rows = sum(batches.batches_in_pass for _, batches in parts.evaluation.by_part())
    count = of_rows + parts.answering.rounds

    def before(done: int, _: int = 0) -> None:
        parts.ranks.agree(hooks.check_stop)
        hooks.evaluating(done, count)

    with parts.average.in_model():
        sums = sums_of(parts.step_batches, parts.evaluation, before, step)
        of_answers = parts.answering.metrics(step, lambda done: before(of_rows + done))
    hooks.evaluating(count, count)
    parts.meter.pause()
    metrics = metrics_of(parts.task, {name: over_ranks(parts, each) for name, each in sums.items()})
    return {**metrics, **{f"eval/{name}": value for name, value in of_answers.items()}}


def metrics_of(task: Task, sums: dict[str, dict[str, float]]) -> dict[str, float]:
    """``eval/loss`` … of all held-out rows, ``eval/NAME/loss`` … of each set of rows that has a name."""
    return {
        f"eval/{name}/{metric}" if name else f"eval/{metric}": value
        for name, each in sums.items()
        for metric, value in task.metrics(each).items()
    }


@torch.no_grad()
def sums_of(
    step_batches: StepBatches, batches: Batches, before: Callable[[int, int], None], step: int = 0
) -> dict[str, dict[str, float]]:
    """The task's sums over one pass: under "" of all held-out rows, and of each part of the rows under its name.

    ``before`` is called before each batch with (batches done, all batches). ``step``: the step after which the model is
    evaluated.
    """
    model, task, parts = step_batches.model, step_batches.task, batches.by_part()
    count, done = sum(part.batches_in_pass for _, part in parts), 0
    sums: dict[str, dict[str, torch.Tensor]] = {"": {}}
    for named, part in parts:
        model.eval()
        totals: dict[str, torch.Tensor] = {}
        if done:  # samples are those of the first part
            step_batches = replace(step_batches, show=nowhere)
        for batch in step_batches.one_pass(part, functools.partial(before, done, count), step):
            before(done, count)
            with step_batches.wrapped.autocasting():
                add(task, totals, task.loss(model, batch))
            done += 1
        if named.weight:
            add(task, sums[""], totals)
        if named.name:
            sums[named.name] = totals
    return {name: {key: float(value) for key, value in each.items()} for name, each in sums.items()}


def add(task: Task, totals: dict[str, torch.Tensor], sums: dict[str, torch.Tensor]) -> None:
    """Add ``sums`` to ``totals`` in float64."""
    for name, value in sums.items():
        value = value.detach().double()
        totals[name] = task.combined(name, totals[name], value) if name in totals else value


def over_ranks(parts: Parts, totals: dict[str, float]) -> dict[str, float]:
    """Sum over all ranks."""
    summed = dict(zip(totals, parts.ranks.agree(lambda: None, *totals.values()), strict=True))
    maxima = {name: totals[name] for name in parts.task.maxima}
    return {**summed, **(parts.ranks.largest(maxima) if maxima else {})}
