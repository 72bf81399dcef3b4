"""Run one training step at the largest shape before training, to check that ``micro_batch_size=auto`` fits the GPU.

The step has no optimizer update and leaves no trace: no gradients, unchanged random state, no batch consumed. Memory
for the optimizer state, which is allocated in the first update, is reserved during the step.
"""

from __future__ import annotations

import contextlib
import gc
import logging
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from runner.config.schema import divisors
from runner.errors import LESS_MEMORY, ConfigError, Fault
from runner.models.kernels import compilation
from runner.train.inputs import compute_at_once
from runner.train.memory import usage
from runner.train.prefetch import Prefetcher

if TYPE_CHECKING:
    from runner.train.inputs import Inputs
    from runner.train.parts import Parts

DEVICES = ("cuda",)
"""Devices that raise an error when out of memory; on a CPU the system kills the process."""
FAR = 0.1
"""Relative difference between measured and estimated peak above which a warning is logged."""
log = logging.getLogger("runner")


def fit(inputs: Inputs, parts: Parts) -> tuple[Inputs, Parts, dict[str, float]]:
    """Try the micro-batch chosen by ``micro_batch_size=auto``; reduce it until a step fits on every rank.

    Also returns the metrics ``memory/expected_gib`` and ``memory/probed_gib`` of this rank. Nothing is tried, and the
    metrics are empty, on a CPU, if the micro-batch size was set, and with FSDP, where the other ranks would wait for a
    rank that is out of memory.

    Raises:
        ConfigError: not even one row fits.
    """
    if inputs.estimate is None or not is_possible(inputs):
        return inputs, parts, {}
    rows, peak = _largest_that_fits(inputs, parts)
    rows = min(parts.ranks.gather(rows))
    if not rows:
        problem = f"a step of one row, {inputs.batches.largest.length} tokens long, does not fit on {inputs.device}"
        raise ConfigError(Fault("model", problem, LESS_MEMORY))
    metrics = _compared(inputs, peak) if rows == inputs.settings.rows_at_a_time else {}
    return *_cut(inputs, parts, rows), metrics


def is_possible(inputs: Inputs) -> bool:
    return inputs.device.type in DEVICES and inputs.options.parallel.kind != "fsdp"


def _largest_that_fits(inputs: Inputs, parts: Parts) -> tuple[int, int]:
    """(largest number of rows that fits on this rank, its peak in bytes); (0, 0) if not even one row fits."""
    start = parts.settings.rows_at_a_time
    choices = [rows for rows in reversed(divisors(parts.settings.per_device_batch_size)) if rows <= start]
    for rows, smaller in zip(choices, [*choices[1:], 0], strict=True):
        _, smaller_parts = _cut(inputs, parts, rows)
        if (peak := _peak_of_step(inputs, smaller_parts)) is not None:
            return rows, peak
        if smaller:
            log.warning(
                f"{rows} rows at a time do not fit on {inputs.device}: trying {smaller}; the batch stays the same"
            )
    return 0, 0


def _peak_of_step(inputs: Inputs, parts: Parts) -> int | None:
    """Peak bytes of one forward and backward pass; None if out of memory."""
    device, fits = inputs.device, True
    _forget(device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            _step(inputs, parts)
        except torch.OutOfMemoryError:
            fits = False  # memory is released below: the error still references the tensors here
    peak = _peak_bytes(device)
    for parameter in parts.model.parameters():
        parameter.grad = None
    _forget(device)
    return peak if fits else None


def _step(inputs: Inputs, parts: Parts) -> None:
    assert inputs.estimate is not None
    optimizer_state = torch.empty(inputs.estimate.memory.optimizer, dtype=torch.uint8, device=inputs.device)
    parts.model.train()
    batch = parts.wrapped.on_device(parts.batches.heaviest())
    # The second pass runs with the gradients of the first, as in gradient accumulation.
    for _ in range(2 if parts.batches.order.per_step > parts.batches.per_micro_batch else 1):
        with parts.wrapped.accumulating(False):
            with parts.wrapped.autocasting():
                sums = parts.wrapped.forward(batch)
            parts.task.step_loss(sums, batch).backward()
    del optimizer_state


def _cut(inputs: Inputs, parts: Parts, rows: int) -> tuple[Inputs, Parts]:
    """Inputs and parts with micro-batches of ``rows`` rows."""
    if rows == parts.settings.rows_at_a_time:
        return inputs, parts
    compilation.forget_shapes(parts.model)
    inputs = compute_at_once(inputs, rows)
    batches, evaluation = parts.batches.cut_into(rows), parts.evaluation.cut_into(rows)
    prefetcher = Prefetcher(batches, inputs.device, inputs.total_steps)
    parts = replace(parts, settings=inputs.settings, batches=batches, evaluation=evaluation, prefetcher=prefetcher)
    return inputs, parts


def _compared(inputs: Inputs, peak: int) -> dict[str, float]:
    """Metrics of estimated (if known) and measured peak; logs a warning if they differ by more than ``FAR``."""
    assert inputs.estimate is not None
    if inputs.estimate.unknown:
        return {"memory/probed_gib": peak / usage.GIB}
    estimated = inputs.estimate.memory.total - inputs.estimate.memory.libraries
    if abs(peak - estimated) > FAR * estimated:
        gib = usage.GIB
        log.warning(f"peak memory of a step: {peak / gib:.2f} GiB measured, {estimated / gib:.2f} GiB estimated")
    return {"memory/expected_gib": estimated / usage.GIB, "memory/probed_gib": peak / usage.GIB}


def _peak_bytes(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def _forget(device: torch.device) -> None:
    """Empty the cache of the allocator and reset its peak statistics."""
    gc.collect()
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):
            torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
