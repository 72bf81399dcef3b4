"""The train loop. It takes its parts ready made and knows no configuration, no tracker and no terminal.

One step: micro-batches → summed loss of each, divided by the trained tokens of *all* of them on all ranks → gradients →
clip → update. Every rank runs this loop and sees the same numbers; the hooks of rank 0 are the ones that write.

Everything random at step ``i`` (order of the data, dropout) is a pure function of (seed, i); together with a
checkpoint's weights and optimizer state that makes a run that was killed and continued the same run, bit for bit.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from runner.config.schema import TrainSettings
from runner.data.batches import Batches
from runner.errors import Fault, Stopped, TrainingError
from runner.models.kernels.compilation import Choice
from runner.tasks.task import Task
from runner.train.async_metrics import AsyncMetrics
from runner.train.checkpoint import Checkpoints, Progress
from runner.train.distributed import wrap
from runner.train.distributed.ranks import Ranks
from runner.train.distributed.wrap import Spread
from runner.train.prefetch import Prefetcher
from runner.train.throughput import Meter, Timing

Record = Callable[[int, dict[str, float]], None]


@dataclass(frozen=True)
class Parts:
    """All that training needs, built by ``build``."""

    model: torch.nn.Module
    task: Task
    batches: Batches
    ahead: Prefetcher
    """The same, brought to the device one step before they are needed."""
    evaluation: Batches
    optimizer: torch.optim.Optimizer
    schedule: Callable[[int, int], float]
    """(step, total steps) → factor on the learning rate."""
    settings: TrainSettings
    seed: int
    total_steps: int
    compile: Choice
    ranks: Ranks
    spread: Spread
    checkpoints: Checkpoints
    meter: Meter
    readings: AsyncMetrics[Step]
    quote: Callable[[dict[str, Any]], str]
    """A batch → the beginning of its text, for an error message."""
    extra_metrics: Callable[[], dict[str, float]]
    """Memory and such, read when a record is written: on all ranks at once."""


@dataclass(frozen=True)
class Hooks:
    """Whom the loop tells what happens, and who may stop it."""

    record: Record
    """(step, metrics): called at each logging step and after each evaluation."""
    evaluating: Callable[[int, int], None]
    """(batches done, batches in all) of an evaluation."""
    saving: Callable[[], None]
    """Called before each checkpoint: what was recorded so far is to be as safe as the checkpoint will be."""
    check_stop: Callable[[], None]
    """Raises Stopped when somebody asked for it; called where nothing would be lost."""
    warm: Callable[[], None]
    """Called after the first step of this process: what is compiled from then on is a surprise."""


def train(parts: Parts, progress: Progress, hooks: Hooks) -> Progress:
    """Train from ``progress`` to the last step, evaluating and saving on the way.

    Raises:
        Stopped: as asked for by ``check_stop``, after the state was saved.
        TrainingError: the loss is not a number, or a checkpoint cannot be written.
    """
    first, saved = progress.step, boundary(progress)
    parts.meter.go_on(Timing(**progress.timing))
    try:
        while True:
            if evaluation_is_due(progress.step, parts) and not progress.evaluated:
                catch_up(parts, progress, hooks)
                metrics = evaluate(parts, hooks)
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
    """Where between two steps training stands; a checkpoint of the same place holds the same."""
    return progress.step, progress.evaluated


def save(parts: Parts, progress: Progress, hooks: Hooks) -> None:
    catch_up(parts, progress, hooks)
    progress.timing = asdict(parts.meter.timing)
    hooks.saving()
    parts.checkpoints.save(parts.model, parts.optimizer, progress)
    parts.meter.pause()


@dataclass(frozen=True)
class Step:
    """A step whose sums are still on their way."""

    number: int
    """Counted from 1."""
    learning_rate: float
    names: tuple[str, ...]
    """Of its sums, in the order of the numbers; the gradient's norm comes after them."""


@dataclass(frozen=True)
class Sums:
    """What a step came to, over all ranks."""

    step: Step
    sums: dict[str, float]
    norm: float
    """Of the gradients, before they were clipped."""


def optimizer_step(parts: Parts, progress: Progress, hooks: Hooks) -> None:
    """One update of the weights from all micro-batches of the step; ``progress`` moves only when it is done.

    Nothing here waits for the device: what a step came to is read when it is due, see ``readings``.
    """
    step, settings = progress.step, parts.settings
    parts.model.train()
    torch.manual_seed(derived_seed(parts.seed, step, parts.ranks.rank))
    began = time.perf_counter()
    micro_batches = parts.ahead.step(step)
    waited = time.perf_counter() - began
    counts = (sum(batch[kind] for batch in micro_batches) for kind in ("trained", "tokens"))
    trained, tokens = parts.ranks.agree(hooks.check_stop, *counts)
    learning_rate = set_learning_rate(parts.optimizer, parts.schedule(step, parts.total_steps))

    sums = accumulate_gradients(parts, micro_batches, trained, hooks)
    norm = wrap.clip(parts.model, settings.max_grad_norm or math.inf)
    parts.readings.put(Step(step + 1, learning_rate, tuple(sums)), torch.stack([*sums.values(), norm.double()]))
    read = [checked(parts, *one) for one in parts.readings.due()]
    parts.optimizer.step()
    parts.optimizer.zero_grad(set_to_none=True)

    progress.step += 1
    progress.tokens += int(tokens)
    progress.evaluated = False
    parts.meter.step(int(tokens), waited)
    for one in read:
        note(parts, progress, hooks, one)


def catch_up(parts: Parts, progress: Progress, hooks: Hooks) -> None:
    """Wait for the sums that are still on their way, and record them."""
    for one in parts.readings.due(all_of_them=True):
        note(parts, progress, hooks, checked(parts, *one))


def checked(parts: Parts, step: Step, numbers: list[float]) -> Sums:
    """What a step came to, over all ranks.

    Raises:
        TrainingError: one of the numbers is none.
    """
    *local, norm = numbers
    sums = over_ranks(parts, dict(zip(step.names, local, strict=True)))
    check_finite(parts, step.number, sums["loss"], norm)
    return Sums(step, sums, norm)


def note(parts: Parts, progress: Progress, hooks: Hooks, found: Sums) -> None:
    """Add what a step came to, and record it where that is due."""
    number = found.step.number
    progress.trained_tokens += int(found.sums["count"])
    progress.window = {name: progress.window.get(name, 0.0) + value for name, value in found.sums.items()}
    if number % parts.settings.logging_steps == 0 or number == parts.total_steps:
        hooks.record(number, training_metrics(parts, progress, found))
        progress.window = {}


def accumulate_gradients(
    parts: Parts, micro_batches: list[dict[str, Any]], trained: float, hooks: Hooks
) -> dict[str, torch.Tensor]:
    """Backward through every micro-batch; returns this rank's sums, float64 on the device.

    Each summed loss is divided by the trained tokens of the whole step, so that four micro-batches of one row give
    the gradient of one batch of four (transformers#34242 is the mistake of averaging means). Gradients are averaged
    over the ranks: times their number that is the sum.
    """
    totals: dict[str, torch.Tensor] = {}
    divisor = max(trained, 1) / parts.ranks.world
    for number, batch in enumerate(micro_batches, 1):
        if number > 1:
            parts.ranks.agree(hooks.check_stop)
        with parts.spread.accumulating(number == len(micro_batches)):
            with parts.spread.computing():
                sums = parts.spread.forward(batch)
            (sums["loss"] / divisor).backward()
        add(totals, sums)
    return totals


def evaluate(parts: Parts, hooks: Hooks) -> dict[str, float]:
    """The task's metrics over the whole evaluation split."""

    def before(done: int, count: int) -> None:
        parts.ranks.agree(hooks.check_stop)
        hooks.evaluating(done, count)

    totals = evaluation_sums(parts.model, parts.task, parts.evaluation, parts.spread, before)
    hooks.evaluating(parts.evaluation.batches_in_pass, parts.evaluation.batches_in_pass)
    parts.meter.pause()
    return {f"eval/{name}": value for name, value in parts.task.metrics(over_ranks(parts, totals)).items()}


@torch.no_grad()
def evaluation_sums(
    model: torch.nn.Module, task: Task, batches: Batches, spread: Spread, before: Callable[[int, int], None]
) -> dict[str, float]:
    """The task's sums over one pass; never logits. ``before`` is called with (batches done, in all) at each batch."""
    model.eval()
    totals: dict[str, torch.Tensor] = {}
    for done, batch in enumerate(batches.one_pass()):
        before(done, batches.batches_in_pass)
        with spread.computing():
            add(totals, task.loss(model, spread.on_device(batch)))
    return {name: float(value) for name, value in totals.items()}


def add(totals: dict[str, torch.Tensor], sums: dict[str, torch.Tensor]) -> None:
    for name, value in sums.items():
        totals[name] = totals.get(name, 0.0) + value.detach().double()


def over_ranks(parts: Parts, totals: dict[str, float]) -> dict[str, float]:
    return dict(zip(totals, parts.ranks.agree(lambda: None, *totals.values()), strict=True))


def training_metrics(parts: Parts, progress: Progress, found: Sums) -> dict[str, float]:
    window, step = progress.window, found.step
    return {
        "train/loss": window["loss"] / max(window["count"], 1.0),
        "train/grad_norm": found.norm,
        "train/learning_rate": step.learning_rate,
        "train/tokens": parts.batches.tokens_at(step.number),
        "train/epoch": parts.batches.epoch(step.number),
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
    """Scale every group's own learning rate; returns the first group's, for the record."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
    return float(optimizer.param_groups[0]["lr"])


def derived_seed(seed: int, step: int, rank: int = 0) -> int:
    """A seed for the random numbers of one step on one rank, unlike that of any other step, rank or run seed."""
    name = f"{seed}/{step}/{rank}" if rank else f"{seed}/{step}"
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1


def check_finite(parts: Parts, step: int, loss: float, norm: float) -> None:
    if math.isfinite(loss) and math.isfinite(norm):
        return
    what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
    quoted = parts.ranks.gather([repr(parts.quote(batch)) for batch in parts.batches.step(step - 1)[:4]])
    texts = "; ".join(text for rank in quoted for text in rank[:4])
    remedy = "lower optim.learning_rate, set train.max_grad_norm, or look at these rows; the last checkpoint is sound"
    raise TrainingError(Fault("", f"{what} at step {step}. The batch begins: {texts}", remedy))
