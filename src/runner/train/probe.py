"""One step without its update, at the largest shape, before the first: what does not fit shows at once, and not later.

Nothing is left of it: no gradient, no random number, no batch of the run. What the optimizer will keep is held free
meanwhile, as it comes with the first update. So ``micro_batch_size=auto`` need not rely on what was foretold.
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
from runner.models import shards
from runner.train import inputs
from runner.train.memory import usage
from runner.train.prefetch import Prefetcher

if TYPE_CHECKING:
    from runner.train.inputs import Inputs
    from runner.train.loop import Parts

DEVICES = ("cuda",)
"""Where memory runs out with an error that can be caught: a CPU's system kills the process."""
FAR = 0.1
"""Part of what was foretold by which the peak may differ without a word."""
log = logging.getLogger("runner")


def fit(made: Inputs, parts: Parts) -> tuple[Inputs, Parts, dict[str, float]]:
    """What ``micro_batch_size=auto`` foretold, tried: with fewer rows at a time where so many do not fit on every rank.

    Returns also the metrics ``memory/expected_gib`` and ``memory/probed_gib``, of this rank; none where nothing was
    tried: on a CPU, where the rows were given, and in shards, where ranks that compute wait for one that cannot.

    Raises:
        ConfigError: not even one row fits.
    """
    in_shards = any(map(shards.is_sharded, parts.model.parameters()))
    if made.estimate is None or made.device.type not in DEVICES or in_shards:
        return made, parts, {}
    rows, peak = _that_fit(made, parts)
    rows = min(parts.ranks.gather(rows))
    if not rows:
        problem = f"a step of one row, {made.batches.largest.length} tokens long, does not fit on {made.device}"
        raise ConfigError(Fault("model", problem, LESS_MEMORY))
    metrics = _compared(made, peak) if rows == made.settings.rows_at_a_time else {}
    return *_cut(made, parts, rows), metrics


def _that_fit(made: Inputs, parts: Parts) -> tuple[int, int]:
    """The most rows that fit on this rank, 0 where none does; and the peak in bytes."""
    start = parts.settings.rows_at_a_time
    choices = [rows for rows in reversed(divisors(parts.settings.per_device_batch_size)) if rows <= start]
    for rows, smaller in zip(choices, [*choices[1:], 0], strict=True):
        _, tried = _cut(made, parts, rows)
        if (peak := _peak_of_step(made, tried)) is not None:
            return rows, peak
        if smaller:
            log.warning(
                f"{rows} rows at a time do not fit on {made.device}: trying {smaller}; the batch stays the same"
            )
    return 0, 0


def _peak_of_step(made: Inputs, parts: Parts) -> int | None:
    """Bytes at the peak of forward and backward pass; None where there were not so many."""
    device, fits = made.device, True
    _forget(device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            _step(made, parts)
        except torch.OutOfMemoryError:
            fits = False  # what is cleared below still hangs on the error here
    peak = _peak_bytes(device)
    for parameter in parts.model.parameters():
        parameter.grad = None
    _forget(device)
    return peak if fits else None


def _step(made: Inputs, parts: Parts) -> None:
    assert made.estimate is not None
    held = torch.empty(made.estimate.memory.optimizer, dtype=torch.uint8, device=made.device)
    parts.model.train()
    batch = parts.spread.on_device(parts.batches.heaviest())
    # From the second micro-batch on the gradients of those before are there while it computes.
    for _ in range(2 if parts.batches.per_step > parts.batches.per_micro_batch else 1):
        with parts.spread.accumulating(False):
            with parts.spread.computing():
                loss = parts.spread.forward(batch)["loss"]
            (loss / max(batch["trained"], 1)).backward()
    del held


def _cut(made: Inputs, parts: Parts, rows: int) -> tuple[Inputs, Parts]:
    """Both with another micro-batch."""
    if rows == parts.settings.rows_at_a_time:
        return made, parts
    made = inputs.compute_at_once(made, rows)
    batches, evaluation = parts.batches.cut_into(rows), parts.evaluation.cut_into(rows)
    ahead = Prefetcher(batches, made.device, made.total_steps)
    return made, replace(parts, settings=made.settings, batches=batches, evaluation=evaluation, ahead=ahead)


def _compared(made: Inputs, peak: int) -> dict[str, float]:
    """What was foretold beside what was seen; said where it is far from it."""
    assert made.estimate is not None
    foretold = made.estimate.memory.total - made.estimate.memory.libraries
    if abs(peak - foretold) > FAR * foretold:
        gib = usage.GIB
        log.warning(f"a step takes {peak / gib:.2f} GiB at its peak, and {foretold / gib:.2f} GiB were foretold")
    return {"memory/expected_gib": foretold / usage.GIB, "memory/probed_gib": peak / usage.GIB}


def _peak_bytes(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def _forget(device: torch.device) -> None:
    """Give back what is free, and let the peak begin anew."""
    gc.collect()
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):
            torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
