"""What the train loop works with: its parts, built by ``build``, and the callbacks that it calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from runner.config.schema import TrainSettings
from runner.data.batches import Batches
from runner.models.kernels.compilation import Choice
from runner.tasks.task import Task
from runner.train.answers import Answering
from runner.train.async_metrics import AsyncMetrics
from runner.train.checkpoint import Checkpoints
from runner.train.distributed.ranks import Ranks
from runner.train.distributed.wrap import Wrapped
from runner.train.ema import Average
from runner.train.layer_norms import LayerNorms
from runner.train.prefetch import Prefetcher
from runner.train.profiling import Profile
from runner.train.selection import Selection
from runner.train.step_batches import StepBatches
from runner.train.throughput import Meter

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
    step_batches: StepBatches
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
    average: Average
    meter: Meter
    layer_norms: LayerNorms
    profile: Profile
    async_metrics: AsyncMetrics[Step]
    quote: Callable[[dict[str, Any]], str]
    """Batch → the beginning of its text, for error messages."""
    answering: Answering
    selection: Selection
    extra_metrics: Callable[[], dict[str, float]]
    """More metrics for a record, such as memory; a collective call on all ranks."""


@dataclass(frozen=True)
class Hooks:
    """Callbacks of the loop."""

    record: Record
    """(step, metrics): called at each logging step and after each evaluation."""
    evaluating: Callable[[int, int], None]
    """(batches done, all batches): progress of an evaluation."""
    saving: Callable[[int], None]
    """(step): called before each checkpoint, to flush the records written so far to the disk."""
    check_stop: Callable[[], None]
    """Raises Stopped if a stop was requested; called only where the state can be saved."""
    warm: Callable[[], None]
    """Called after the first step of this process; graphs compiled later count as recompilations."""
    is_late: Callable[[], bool] = lambda: False
    """Whether the next step is the last one, because the time is over; one rank decides for all."""


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
    norms: tuple[str, ...] = ()
    """Names of the norms of layers, which follow the sums."""
