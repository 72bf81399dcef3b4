"""What a training will take, told before any weight is loaded."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from runner.config import bind
from runner.errors import LESS_MEMORY, ConfigError, Fault
from runner.models import pretrained
from runner.models.dtypes import dtype_for
from runner.models.kernels import compilation, lora_linear, varlen_attention
from runner.models.pretrained import keep_updates
from runner.train import optim, throughput
from runner.train.distributed import parallel
from runner.train.memory import peak, usage
from runner.train.memory.peak import Expected

if TYPE_CHECKING:
    from runner.train.inputs import Inputs

ADAPTER_BYTES = 4
"""Adapters train in float32."""
SAFE = 0.5
"""Below this part of the free memory the formula is trusted, and no step rehearsed."""
ASSUMED_UTILISATION = 0.4
"""Part of the peak FLOP/s that training is assumed to reach, where its time is foretold."""

log = logging.getLogger("runner")


def expect(cfg: Mapping[str, Any], made: Inputs, *, roughly: bool = False) -> Expected:
    """Count parameters and memory on a model without weights; ``roughly``: by a formula, in a tenth of the time."""
    quant = bind.bind(cfg["quant"], "quant")()
    model = bind.bind(cfg["lora"], "lora")(pretrained.empty(made.source, quant, made.device))
    counts = pretrained.describe(model)
    full = counts["adapter"] == 0
    source, autocast = keep_updates(made.source, made.device, full=full)
    size = dtype_for(source.dtype, made.device).itemsize
    weights = counts["linear"] * (quant.bytes_per_weight or size)
    weights += (counts["total"] - counts["linear"] - counts["adapter"]) * size + counts["adapter"] * ADAPTER_BYTES
    using = replace(made, source=source)
    activations = _by_formula(using, model, autocast, full=full)
    if not roughly:
        activations = _rehearsed(cfg, using, model, autocast, otherwise=activations)
    if quant.bits is not None:
        activations += _largest_matrix(model) * size  # unpacked while it is used
    gradients = counts["trainable"] * (size if full else ADAPTER_BYTES)
    kind, processes = parallel.kind_of(cfg["parallel"]), parallel.processes_of(cfg["parallel"])
    held = usage.held_already(made.device)
    found = peak.MemoryEstimate(
        weights=int(weights),
        gradients=gradients * 2 if kind == "ddp" and processes > 1 else gradients,  # and the buckets that are exchanged
        optimizer=int(counts["trainable"] * optim.state_bytes(cfg["optim"])),
        activations=activations,
        libraries=held + peak.allocator_waste(made.device, activations, gradients),
    )
    if kind == "fsdp":
        found = found.in_shards(processes, peak.depth(model.config))
    total, free = usage.of_device(made.device, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    report = made.splits.report
    trained = report.train_trained_tokens / max(report.train_tokens, 1)
    flops = throughput.flops_per_token(model, cfg["data"]["max_length"], trained)
    return Expected(counts, found, held, total, free, flops, len(compilation.layers_of(model)))


def training_seconds(made: Inputs, told: Expected) -> tuple[float, float]:
    """How long training takes at ``ASSUMED_UTILISATION`` of the device's peak, and that peak in FLOP/s."""
    tokens = made.batches.tokens_at(made.total_steps)
    peak = throughput.peak_flops(made.device, dtype_for(made.source.dtype, made.device))
    return tokens * told.flops_per_token / (peak * ASSUMED_UTILISATION), peak


def check_fits(expected: Expected) -> None:
    """Refuse a model that cannot fit; warn where it does not fit beside what else is running.

    Raises:
        ConfigError: with the ways to make it smaller.
    """
    needed, gib = expected.memory.total, usage.GIB
    if needed > expected.total_bytes:
        problem = f"needs about {needed / gib:.1f} GiB, and the device has {expected.total_bytes / gib:.1f} GiB"
        raise ConfigError(Fault("model", problem, LESS_MEMORY))
    if needed - expected.held_bytes > expected.free_bytes:
        free = f"{expected.free_bytes / gib:.1f} of {expected.total_bytes / gib:.1f} GiB are free"
        log.warning(f"about {needed / gib:.1f} GiB will be needed, and {free}; if it runs out: {LESS_MEMORY}")


def _rehearsed(
    cfg: Mapping[str, Any], made: Inputs, model: Any, autocast: torch.dtype | None, *, otherwise: int
) -> int:
    """Bytes that live from forward to backward pass of the largest step; ``otherwise`` where it cannot be rehearsed."""
    quant = bind.bind(cfg["quant"], "quant")()
    by_document = _attends_by_document(made, model, autocast)
    batches = made.batches.laid_end_to_end() if by_document else made.batches

    def make(layers: int) -> nn.Module:
        small: nn.Module = bind.bind(cfg["lora"], "lora")(pretrained.empty(made.source, quant, made.device, layers))
        lora_linear.fuse(small)
        return small

    try:
        return peak.rehearsed(
            make,
            peak.depth(model.config),
            batches.largest,
            by_document=by_document,
            kept=made.settings.memory,
            autocast=autocast,
            device=made.device,
            accumulates=batches.per_step > batches.per_micro_batch,
            head_in_loss=parallel.kind_of(cfg["parallel"]) != "fsdp",
        )
    except Exception as error:
        log.debug(f"the step cannot be rehearsed, its memory is told by a formula: {error!r}")
        return otherwise


def _attends_by_document(made: Inputs, model: Any, autocast: torch.dtype | None) -> bool:
    """Whether it will, as far as that is known without weights: on a GPU its kernels are for 16 bits."""
    wide = dtype_for(made.source.dtype, made.device) == torch.float32 and autocast is None
    wanted = made.source.attention in ("auto", varlen_attention.NAME)
    return wanted and not varlen_attention.obstacle(model) and not (wide and made.device.type == "cuda")


def _by_formula(made: Inputs, model: Any, autocast: torch.dtype | None, *, full: bool) -> int:
    """The same for a model like Llama, from its numbers."""
    size = (autocast or dtype_for(made.source.dtype, made.device)).itemsize
    settings, shape, scores = made.settings, made.batches.largest, made.source.attention == "eager"
    return peak.by_formula(model.config, shape, kept=settings.memory, dtype_bytes=size, full=full, scores=scores)


def _largest_matrix(model: nn.Module) -> int:
    """Values of the largest weight that may be quantized."""
    return max((module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear)), default=0)
