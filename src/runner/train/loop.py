"""The train loop. It is independent of configuration files, tracking and terminal output.

One step: for each micro-batch, the task's summed loss divided by the counts (trained tokens, or what else the task
divides by) of *all* micro-batches on all ranks → backward → clip gradients → optimizer step. Every rank runs this loop
with the same metrics; only rank 0's hooks write.

Everything random at step ``i`` (order of the data, dropout) is a pure function of (seed, i). A run resumed from a
checkpoint is therefore bit-identical to a run without interruption.
"""

from __future__ import annotations

import hashlib
import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from runner.errors import Fault, Stopped, TrainingError
from runner.tasks.task import losses_of_sources
from runner.train import evaluation
from runner.train.checkpoint import Progress
from runner.train.distributed import wrap
from runner.train.parts import Hooks, Parts, Step
from runner.train.throughput import Timing


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
            if evaluation.is_due(progress, parts) and not progress.evaluated:
                catch_up(parts, progress, hooks)
                metrics = evaluation.evaluate(parts, progress.step, hooks)
                progress.evaluated = True
                hooks.record(progress.step, metrics)
                parts.selection.evaluated(progress, metrics)
            if boundary(progress) != saved and save_is_due(progress, parts):
                save(parts, progress, hooks)
                saved = boundary(progress)
            if evaluation.is_over(progress, parts):
                parts.checkpoints.finish()
                return progress
            with parts.profile.step(progress.step + 1):
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
    hooks.saving(progress.step)
    parts.checkpoints.save(parts.model, parts.optimizer, progress)
    parts.meter.pause()


@dataclass(frozen=True)
class Sums:
    """Sums and gradient norm of a step, over all ranks."""

    step: Step
    sums: dict[str, float]
    loss: float
    norm: float
    """Gradient norm before clipping."""
    norms: dict[str, float]
    """Those of layers, by name."""


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
    kinds: list[str] = list(dict.fromkeys(["tokens", "trained", *parts.task.divisors.values()]))
    counts = (sum(batch[kind] for batch in micro_batches) for kind in kinds)
    late, *agreed = parts.ranks.agree(hooks.check_stop, float(hooks.is_late()), *counts)
    totals = dict(zip(kinds, agreed, strict=True))
    learning_rate = set_learning_rate(parts.optimizer, parts.schedule(step, parts.total_steps))

    sums: dict[str, torch.Tensor] = {}
    for update in range(parts.task.updates):
        if update:
            apply_gradients(parts)
        evaluation.add(parts.task, sums, accumulate_gradients(parts, micro_batches, totals, hooks))
        norms = parts.layer_norms.measure(step + 1)
        norm = wrap.clip(parts.model, settings.max_grad_norm or math.inf)
    numbers = torch.stack([*sums.values(), *norms.values(), norm.double()])
    tokens = progress.tokens + int(totals["tokens"])
    of_updates = {kind: total * parts.task.updates for kind, total in totals.items()}
    taken = Step(step + 1, learning_rate, tuple(sums), tokens, of_updates, tuple(norms))
    parts.async_metrics.put(taken, numbers)
    due = [checked(parts, *entry) for entry in parts.async_metrics.due()]
    apply_gradients(parts)
    parts.average.update(step + 1)

    progress.step += 1
    progress.tokens = tokens
    progress.trained_tokens += int(totals["trained"])
    progress.evaluated = False
    progress.ended = f"stopped at step {step + 1}: train.max_minutes={settings.max_minutes:g}" if late else ""
    parts.meter.step(int(totals["tokens"]), **waits)
    for result in due:
        note(parts, progress, hooks, result)


def apply_gradients(parts: Parts) -> None:
    """Update the weights and drop the gradients."""
    parts.optimizer.step()
    parts.optimizer.zero_grad(set_to_none=True)


def prepared(parts: Parts, step: int, micro_batches: list[dict[str, Any]], hooks: Hooks) -> list[dict[str, Any]]:
    """The micro-batches after ``Task.prepare``; the seed depends on the step only, so a resumed run has the same."""
    return parts.step_batches.step(parts.batches, step, micro_batches, derived_seed(parts.seed, step), hooks.check_stop)


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
    count = len(step.names)
    sums = evaluation.over_ranks(parts, dict(zip(step.names, local[:count], strict=True)))
    loss = float(parts.task.step_loss(sums, step.totals))
    check_finite(parts, step.number, loss, norm)
    return Sums(step, sums, loss, norm, dict(zip(step.norms, local[count:], strict=True)))


def note(parts: Parts, progress: Progress, hooks: Hooks, result: Sums) -> None:
    """Add the sums of a step to ``progress``; record metrics at logging steps."""
    number = result.step.number
    progress.window = {
        name: parts.task.combined(name, progress.window[name], value) if name in progress.window else value
        for name, value in result.sums.items()
    }
    parts.selection.stepped(progress, number, result.loss)
    is_last = number == parts.total_steps or (bool(progress.ended) and number == progress.step)
    if number % parts.settings.logging_steps == 0 or is_last:
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
        evaluation.add(parts.task, step_sums, sums)
    return step_sums


def training_metrics(parts: Parts, progress: Progress, result: Sums) -> dict[str, float]:
    step, metrics = result.step, parts.task.metrics(progress.window)
    return {
        **{f"train/{name}": metrics[name] for name in parts.task.train_metrics if name in metrics},
        **{f"train/{name}": value for name, value in losses_of_sources(progress.window).items()},
        "train/grad_norm": result.norm,
        **result.norms,
        "train/learning_rate": step.learning_rate,
        "train/tokens": step.tokens,
        "train/epoch": parts.batches.order.epoch(step.number),
        **parts.meter.rates(),
        **parts.extra_metrics(),
    }


def save_is_due(progress: Progress, parts: Parts) -> bool:
    step, every = progress.step, parts.settings.save_steps
    is_best = progress.evaluated and 0 < step == progress.best_step
    return is_best or evaluation.is_over(progress, parts) or (every is not None and step > 0 and step % every == 0)


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
