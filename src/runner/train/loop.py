"""The train loop. It is independent of configuration files, tracking and terminal output.

One step: for each micro-batch, the task's summed loss divided by the counts (trained tokens, or what else the task
divides by) of *all* micro-batches on all ranks → backward → clip gradients → optimizer step. Every rank runs this loop
with the same metrics; only rank 0's hooks write.

Everything random at step ``i`` (order of the data, dropout) is a pure function of (seed, i). A run resumed from a
checkpoint is therefore bit-identical to a run without interruption.
"""

from __future__ import annotations

import functools
import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from runner.config.schema import TrainSettings
from runner.data.batches import Batches
from runner.errors import Fault, Stopped, TrainingError
from runner.models.kernels.compilation import Choice
from runner.tasks.task import Task, losses_of_sources
from runner.train.async_metrics import AsyncMetrics
from runner.train.checkpoint import Checkpoints, Progress
from runner.train.distributed import wrap
from runner.train.distributed.ranks import Ranks
from runner.train.distributed.wrap import Wrapped
from runner.train.prefetch import Prefetcher
from runner.train.prepared import Preparer, nowhere
from runner.train.throughput import Meter, Timing

Record = Callable[[int, dict[str, float]], None]


@dataclass(frozen=True)
class Parts:
    """Everything the train loop needs, built by ``build.parts``."""

    model: torch.nn.Module
    task: Task
    batches: Batches
    prefetcher: Prefetcher
    """``batches`` on the device, prefetched one step ahead."""
    evaluation: Batches
    preparer: Preparer
    optimizer: torch.optim.Optimizer
    schedule: Callable[[int, int], float]
    """(step, total steps) → factor of the learning rate."""
    settings: TrainSettings
    seed: int
    total_steps: int
    compile: Choice
    ranks: Ranks
    wrapped: Wrapped
    checkpoints: Checkpoints
    meter: Meter
    async_metrics: AsyncMetrics[Step]
    quote: Callable[[dict[str, Any]], str]
    """Batch → the beginning of its text, for error messages."""
    extra_metrics: Callable[[], dict[str, float]]
    """More metrics for a record, such as memory; a collective call on all ranks."""


@dataclass(frozen=True)
class Hooks:
    """Callbacks of the loop."""

    record: Record
    """(step, metrics): called at each logging step and after each evaluation."""
    evaluating: Callable[[int, int], None]
    """(batches done, all batches): progress of an evaluation."""
    saving: Callable[[], None]
    """Called before each checkpoint, to flush the records written so far to the disk."""
    check_stop: Callable[[], None]
    """Raises Stopped if a stop was requested; called only where the state can be saved."""
    warm: Callable[[], None]
    """Called after the first step of this process; graphs compiled later count as recompilations."""


def train(parts: Parts, progress: Progress, hooks: Hooks) -> Progress:
    """Train from ``progress`` to the last step, with evaluations and checkpoints.

    Raises:
        Stopped: raised by ``check_stop``; a checkpoint was saved.
        TrainingError: the loss or the gradient norm is not finite, or a checkpoint cannot be written.
    """
    first, saved = progress.step, boundary(progress)
    parts.meter.resume(Timing(**progress.timing))
    try:
        while True:
            if evaluation_is_due(progress.step, parts) and not progress.evaluated:
                catch_up(parts, progress, hooks)
                metrics = evaluate(parts, progress.step, hooks)
                progress.evaluated = True
                hooks.record(progress.step, metrics)
            if boundary(progress) != saved and save_is_due(progress.step, parts):
                save(parts, progress, hooks)
                saved = boundary(progress)
            if progress.step >= parts.total_steps:
                parts.checkpoints.finish()
                return progress
            optimizer_step(parts, progress, hooks)
            if progress.step == first + 1:
                hooks.warm()
    except Stopped:
        if boundary(progress) != saved:
            save(parts, progress, hooks)
        parts.checkpoints.finish()
        raise


def boundary(progress: Progress) -> tuple[int, bool]:
    """The position of training between two steps; checkpoints at equal positions are equal."""
    return progress.step, progress.evaluated


def save(parts: Parts, progress: Progress, hooks: Hooks) -> None:
    """Write a checkpoint, after all pending metrics were recorded."""
    catch_up(parts, progress, hooks)
    progress.timing = asdict(parts.meter.timing)
    hooks.saving()
    parts.checkpoints.save(parts.model, parts.optimizer, progress)
    parts.meter.pause()


@dataclass(frozen=True)
class Step:
    """A step whose sums are still being copied from the device."""

    number: int
    """Counted from 1."""
    learning_rate: float
    names: tuple[str, ...]
    """Names of the sums, in the order of the copied numbers; the gradient norm comes last."""
    tokens: int
    """Without padding, since the first step."""
    totals: dict[str, float]
    """What the terms of the loss are divided by, over all micro-batches, ranks and updates."""


@dataclass(frozen=True)
class Sums:
    """Sums and gradient norm of a step, over all ranks."""

    step: Step
    sums: dict[str, float]
    norm: float
    """Gradient norm before clipping."""


def optimizer_step(parts: Parts, progress: Progress, hooks: Hooks) -> None:
    """One optimizer step over all micro-batches; ``progress`` is updated at the end.

    Never synchronizes with the device: loss and norm are read some steps later, see ``AsyncMetrics``.
    """
    step, settings = progress.step, parts.settings
    began = time.perf_counter()
    micro_batches = parts.prefetcher.step(step)
    arrived = time.perf_counter()
    micro_batches = prepared(parts, step, micro_batches, hooks)
    waits = {"waited": arrived - began, "prepared": time.perf_counter() - arrived}
    parts.model.train()
    torch.manual_seed(derived_seed(parts.seed, step, parts.ranks.rank))
    kinds = list(dict.fromkeys(["tokens", "trained", *parts.task.divisors.values()]))
    counts = (sum(batch[kind] for batch in micro_batches) for kind in kinds)
    totals = dict(zip(kinds, parts.ranks.agree(hooks.check_stop, *counts), strict=True))
    learning_rate = set_learning_rate(parts.optimizer, parts.schedule(step, parts.total_steps))

    sums: dict[str, torch.Tensor] = {}
    for update in range(parts.task.updates):
        if update:
            apply_gradients(parts)
        add(parts.task, sums, accumulate_gradients(parts, micro_batches, totals, hooks))
        norm = wrap.clip(parts.model, settings.max_grad_norm or math.inf)
    numbers = torch.stack([*sums.values(), norm.double()])
    tokens = progress.tokens + int(totals["tokens"])
    of_updates = {kind: total * parts.task.updates for kind, total in totals.items()}
    parts.async_metrics.put(Step(step + 1, learning_rate, tuple(sums), tokens, of_updates), numbers)
    due = [checked(parts, *entry) for entry in parts.async_metrics.due()]
    apply_gradients(parts)

    progress.step += 1
    progress.tokens = tokens
    progress.trained_tokens += int(totals["trained"])
    progress.evaluated = False
    parts.meter.step(int(totals["tokens"]), **waits)
    for result in due:
        note(parts, progress, hooks, result)


def apply_gradients(parts: Parts) -> None:
    """Update the weights, and forget the gradients."""
    parts.optimizer.step()
    parts.optimizer.zero_grad(set_to_none=True)


def prepared(parts: Parts, step: int, micro_batches: list[dict[str, Any]], hooks: Hooks) -> list[dict[str, Any]]:
    """The micro-batches as the task wants them: the same on every resume, because nothing else is random there."""
    return parts.preparer.step(parts.batches, step, micro_batches, derived_seed(parts.seed, step), hooks.check_stop)


def catch_up(parts: Parts, progress: Progress, hooks: Hooks) -> None:
    """Wait for all pending sums and record them."""
    for entry in parts.async_metrics.due(everything=True):
        note(parts, progress, hooks, checked(parts, *entry))


def checked(parts: Parts, step: Step, numbers: list[float]) -> Sums:
    """All-reduce the sums of a step and check them.

    Raises:
        TrainingError: the loss or the gradient norm is not finite.
    """
    *local, norm = numbers
    sums = over_ranks(parts, dict(zip(step.names, local, strict=True)))
    check_finite(parts, step.number, parts.task.step_loss(sums, step.totals), norm)
    return Sums(step, sums, norm)


def note(parts: Parts, progress: Progress, hooks: Hooks, result: Sums) -> None:
    """Add the sums of a step to ``progress``; record metrics at logging steps."""
    number = result.step.number
    progress.window = {
        name: parts.task.combined(name, progress.window[name], value) if name in progress.window else value
        for name, value in result.sums.items()
    }
    if number % parts.settings.logging_steps == 0 or number == parts.total_steps:
        hooks.record(number, training_metrics(parts, progress, result))
        progress.window = {}


def accumulate_gradients(
    parts: Parts, micro_batches: list[dict[str, Any]], totals: dict[str, float], hooks: Hooks
) -> dict[str, torch.Tensor]:
    """Forward and backward of every micro-batch; returns this rank's sums, float64 on the device.

    Each sum is divided by the ``totals`` of the whole step, so that four micro-batches of one row give the gradient
    of one batch of four rows (averaging means instead is the bug of transformers#34242). DDP and FSDP average gradients
    over the ranks, so the loss is multiplied by the number of ranks.
    """
    step_sums: dict[str, torch.Tensor] = {}
    for number, batch in enumerate(micro_batches, 1):
        if number > 1:
            parts.ranks.agree(hooks.check_stop)
        with parts.wrapped.accumulating(number == len(micro_batches)):
            with parts.wrapped.autocasting():
                sums = parts.wrapped.forward(batch)
            (parts.task.step_loss(sums, totals) * parts.ranks.world).backward()
        add(parts.task, step_sums, sums)
    return step_sums


def evaluate(parts: Parts, step: int, hooks: Hooks) -> dict[str, float]:
    """The task's metrics on the whole evaluation split."""

    def before(done: int, count: int) -> None:
        parts.ranks.agree(hooks.check_stop)
        hooks.evaluating(done, count)

    sums = evaluation_sums(parts.preparer, parts.evaluation, before, step)
    count = sum(batches.batches_in_pass for _, batches in parts.evaluation.by_part())
    hooks.evaluating(count, count)
    parts.meter.pause()
    return evaluation_metrics(parts.task, {name: over_ranks(parts, each) for name, each in sums.items()})


def evaluation_metrics(task: Task, sums: dict[str, dict[str, float]]) -> dict[str, float]:
    """``eval/loss`` … of all held-out rows, ``eval/NAME/loss`` … of each set of rows that has a name."""
    return {
        f"eval/{name}/{metric}" if name else f"eval/{metric}": value
        for name, each in sums.items()
        for metric, value in task.metrics(each).items()
    }


@torch.no_grad()
def evaluation_sums(
    preparer: Preparer, batches: Batches, before: Callable[[int, int], None], step: int = 0
) -> dict[str, dict[str, float]]:
    """The task's sums over one pass: under "" of all held-out rows, and of each part of the rows under its name.

    ``before`` is called before each batch with (batches done, all batches). ``step``: the step after which the model is
    evaluated.
    """
    model, task, parts = preparer.model, preparer.task, batches.by_part()
    count, done = sum(part.batches_in_pass for _, part in parts), 0
    sums: dict[str, dict[str, torch.Tensor]] = {"": {}}
    for named, part in parts:
        model.eval()
        totals: dict[str, torch.Tensor] = {}
        preparer = preparer if not done else replace(preparer, show=nowhere)  # samples are those of the first part
        for batch in preparer.one_pass(part, functools.partial(before, done, count), step):
            before(done, count)
            with preparer.wrapped.autocasting():
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


def training_metrics(parts: Parts, progress: Progress, result: Sums) -> dict[str, float]:
    step, metrics = result.step, parts.task.metrics(progress.window)
    return {
        **{f"train/{name}": metrics[name] for name in parts.task.train_metrics if name in metrics},
        **{f"train/{name}": value for name, value in losses_of_sources(progress.window).items()},
        "train/grad_norm": result.norm,
        "train/learning_rate": step.learning_rate,
        "train/tokens": step.tokens,
        "train/epoch": parts.batches.order.epoch(step.number),
        **parts.meter.rates(),
        **parts.extra_metrics(),
    }


def evaluation_is_due(step: int, parts: Parts) -> bool:
    every = parts.settings.eval_steps
    return step in (0, parts.total_steps) or (every is not None and step % every == 0)


def save_is_due(step: int, parts: Parts) -> bool:
    every = parts.settings.save_steps
    return step == parts.total_steps or (every is not None and step > 0 and step % every == 0)


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Multiply the initial learning rate of every parameter group by ``factor``; return that of the first group."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
    return float(optimizer.param_groups[0]["lr"])


def derived_seed(seed: int, step: int, rank: int = 0) -> int:
    """Seed for one step on one rank; different for every step, rank and run seed."""
    name = f"{seed}/{step}/{rank}" if rank else f"{seed}/{step}"
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1


def check_finite(parts: Parts, step: int, loss: float, norm: float) -> None:
    if math.isfinite(loss) and math.isfinite(norm):
        return
    problem = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient norm is {norm}"
    quoted = parts.ranks.gather([repr(parts.quote(batch)) for batch in parts.batches.step(step - 1)[:4]])
    texts = "; ".join(text for rank in quoted for text in rank[:4])
    remedy = "lower optim.learning_rate, set train.max_grad_norm, or inspect these rows"
    if any(parts.checkpoints.folder.glob("step-*")):
        remedy += "; the last checkpoint is valid"
    raise TrainingError(Fault("", f"{problem} at step {step}. The batch begins: {texts}", remedy))
