"""Estimate memory, FLOPs and time of a training run before any weights are loaded."""

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
"""Per adapter parameter: adapters are trained in float32."""
SAFE = 0.5
"""Below this fraction of the free memory the estimate by formula is enough, and no step is simulated."""
ASSUMED_UTILISATION = 0.4
"""MFU assumed when estimating the training time."""

log = logging.getLogger("runner")


def expect(cfg: Mapping[str, Any], inputs: Inputs, *, roughly: bool = False) -> Expected:
    """Count parameters and estimate memory on the meta device; ``roughly``: by a formula, in a tenth of the time."""
    quant = bind.bind(cfg["quant"], "quant")()
    model = bind.bind(cfg["lora"], "lora")(pretrained.empty(inputs.source, quant, inputs.device))
    counts = pretrained.describe(model)
    full = counts["adapter"] == 0
    source, autocast = keep_updates(inputs.source, inputs.device, full=full)
    size = dtype_for(source.dtype, inputs.device).itemsize
    weights = counts["linear"] * (quant.bytes_per_weight or size)
    weights += (counts["total"] - counts["linear"] - counts["adapter"]) * size + counts["adapter"] * ADAPTER_BYTES
    inputs = replace(inputs, source=source)
    activations = _by_formula(inputs, model, autocast, full=full)
    if not roughly:
        activations = _rehearsed(cfg, inputs, model, autocast, fallback=activations)
    if quant.bits is not None:
        activations += _largest_matrix(model) * size  # dequantized while it is used
    gradients = counts["trainable"] * (size if full else ADAPTER_BYTES)
    kind, processes = parallel.kind_of(cfg["parallel"]), parallel.processes_of(cfg["parallel"])
    held = usage.held_already(inputs.device)
    memory = peak.MemoryEstimate(
        weights=int(weights),
        gradients=gradients * 2 if kind == "ddp" and processes > 1 else gradients,  # plus DDP's buckets
        optimizer=int(counts["trainable"] * optim.state_bytes(bind.bind(cfg["optim"], "optim"), inputs.device)),
        activations=activations,
        libraries=held + peak.allocator_waste(inputs.device, activations, gradients),
    )
    if kind == "fsdp":
        memory = memory.in_shards(processes, peak.depth(model.config))
    total, free = usage.of_device(inputs.device, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    report = inputs.splits.report
    trained = report.train_trained_tokens / max(report.train_tokens, 1)
    flops = throughput.flops_per_token(model, cfg["data"]["max_length"], trained)
    return Expected(counts, memory, held, total, free, flops, len(compilation.layers_of(model)))


def training_seconds(inputs: Inputs, expected: Expected) -> tuple[float, float]:
    """(training seconds at ``ASSUMED_UTILISATION`` of the peak, peak FLOP/s of the device)."""
    tokens = inputs.batches.tokens_at(inputs.total_steps)
    peak = throughput.peak_flops(inputs.device, dtype_for(inputs.source.dtype, inputs.device))
    return tokens * expected.flops_per_token / (peak * ASSUMED_UTILISATION), peak


def check_fits(expected: Expected) -> None:
    """Check the estimate against the device's memory; log a warning if it exceeds only the free memory.

    Raises:
        ConfigError: the estimate exceeds the total memory.
    """
    needed, gib = expected.memory.total, usage.GIB
    if needed > expected.total_bytes:
        problem = f"needs about {needed / gib:.1f} GiB, but the device has {expected.total_bytes / gib:.1f} GiB"
        raise ConfigError(Fault("model", problem, LESS_MEMORY))
    if needed - expected.held_bytes > expected.free_bytes:
        free = f"{expected.free_bytes / gib:.1f} of {expected.total_bytes / gib:.1f} GiB are free"
        log.warning(f"training needs about {needed / gib:.1f} GiB, but {free}. If it runs out of memory: {LESS_MEMORY}")


def _rehearsed(
    cfg: Mapping[str, Any], inputs: Inputs, model: Any, autocast: torch.dtype | None, *, fallback: int
) -> int:
    """Peak activation bytes of the largest step, simulated with fake tensors; ``fallback`` if that fails."""
    quant = bind.bind(cfg["quant"], "quant")()
    by_document = _attends_by_document(inputs, model, autocast)
    batches = inputs.batches.laid_end_to_end() if by_document else inputs.batches

    def make(layers: int) -> nn.Module:
        small: nn.Module = bind.bind(cfg["lora"], "lora")(pretrained.empty(inputs.source, quant, inputs.device, layers))
        lora_linear.fuse(small)
        return small

    try:
        return peak.rehearsed(
            make,
            peak.depth(model.config),
            batches.largest,
            by_document=by_document,
            kept=inputs.settings.memory,
            autocast=autocast,
            device=inputs.device,
            accumulates=batches.per_step > batches.per_micro_batch,
            head_in_loss=parallel.kind_of(cfg["parallel"]) != "fsdp",
        )
    except Exception as error:
        log.debug(f"cannot simulate the step, its memory is estimated by a formula: {error!r}")
        return fallback


def _attends_by_document(inputs: Inputs, model: Any, autocast: torch.dtype | None) -> bool:
    """Whether the model will use attention by document; on a GPU its kernels need 16-bit dtypes."""
    wide = dtype_for(inputs.source.dtype, inputs.device) == torch.float32 and autocast is None
    enabled = inputs.source.attention in ("auto", varlen_attention.NAME)
    return enabled and not varlen_attention.obstacle(model) and not (wide and inputs.device.type == "cuda")


def _by_formula(inputs: Inputs, model: Any, autocast: torch.dtype | None, *, full: bool) -> int:
    """Peak activation bytes of the largest step, by a formula for Llama-like models."""
    size = (autocast or dtype_for(inputs.source.dtype, inputs.device)).itemsize
    settings, shape, scores = inputs.settings, inputs.batches.largest, model.config._attn_implementation == "eager"
    return peak.by_formula(model.config, shape, kept=settings.memory, dtype_bytes=size, full=full, scores=scores)


def _largest_matrix(model: nn.Module) -> int:
    """Number of values of the largest linear weight."""
    return max((module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear)), default=0)
