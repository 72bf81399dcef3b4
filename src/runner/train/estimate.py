"""Estimate memory, FLOPs and time of a training run before any weights are loaded."""

from __future__ import annotations

import hashlib
import logging
import os
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from runner.data import boundaries, vision
from runner.errors import LESS_MEMORY, ConfigError, Fault, typed_line
from runner.models import parameters, pretrained
from runner.models.dtypes import dtype_for
from runner.models.kernels import compilation, lora_linear, varlen_attention
from runner.models.pretrained import keep_updates
from runner.train import layout, throughput
from runner.train.memory import footprint, optimizer_state, peak, rehearsals, usage
from runner.train.memory.footprint import Expected, TeacherNeeds

if TYPE_CHECKING:
    from runner.data.batches import Batches
    from runner.train.inputs import Inputs

ADAPTER_BYTES = torch.float32.itemsize
"""Per adapter parameter, or average of a parameter: they are float32."""
ASSUMED_UTILISATION = 0.4
"""MFU assumed when estimating the training time."""
OPERATIONS_OF_LAYER, LAUNCH_S = 188, 7e-6
"""Operations that eager mode starts for a decoder layer with LoRA, forward and backward, and seconds to start one."""

log = logging.getLogger("runner")


def expect(inputs: Inputs) -> Expected:
    """Count parameters on the meta device, and estimate the memory by a simulated step."""
    options = inputs.options
    quant, parallel = options.quant, options.parallel
    model = options.lora(pretrained.empty(inputs.source, quant, inputs.device))
    counts = parameters.describe(model)
    full = counts["adapter"] == 0
    source, autocast = keep_updates(inputs.source, inputs.device, full=full)
    dtype = dtype_for(source.dtype, inputs.device)
    size, trained_dtype = dtype.itemsize, dtype if full else torch.float32
    groups = options.parameter_groups(model)
    weights = counts["quantized_bytes"] + counts["adapter"] * ADAPTER_BYTES
    weights += (counts["total"] - counts["quantized"] - counts["adapter"]) * size
    if options.task.needs_start:  # a copy of the trained weights
        weights += counts["trainable"] * (size if full else ADAPTER_BYTES)
    if inputs.settings.averages:
        weights += counts["trainable"] * ADAPTER_BYTES
    inputs = replace(inputs, source=source)
    activations, unknown = _rehearsed(inputs, model, autocast)
    if not quant.plain and activations is not None:
        activations += parameters.largest_matrix(model) * size  # dequantized while it is used
    gradients = counts["trainable"] * (size if full else ADAPTER_BYTES)
    held = usage.held_already(inputs.device)
    memory = footprint.MemoryEstimate(
        weights=weights,
        gradients=gradients * (2 if parallel.kind == "ddp" and parallel.processes > 1 else 1),  # plus DDP's buckets
        optimizer=optimizer_state.state_bytes(
            options.optim, groups, inputs.device, trained_dtype, options.optimizer_state_values
        ),
        activations=activations,
        libraries=held + footprint.allocator_waste(inputs.device, activations or 0, gradients),
    )
    if parallel.kind == "fsdp":
        memory = memory.in_shards(parallel.processes, peak.depth(model.config), 0.5 if parallel.param_dtype else 1)
    total, free = usage.of_device(inputs.device, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    report = inputs.splits.report
    task, length, trained = options.task, options.data.max_length, report.train_trained_tokens / report.train_tokens
    if task.answers is not None:
        length = report.train_tokens // report.train_rows + task.answers.most_tokens
        trained = task.answers.most_tokens / length
    flops = throughput.flops_per_token(model, length, trained, task.passes_without_gradient, task.updates)
    layers = len(compilation.layers_of(model))
    batches, by_document = _laid(inputs, model, autocast), _attends_by_document(inputs, model, autocast)
    expected = Expected(counts, memory, held, total, free, flops, layers, unknown, share=batches.computed_share)
    if inputs.teacher is None:
        return expected
    batch = batches.largest
    needs = inputs.teacher.needs(inputs.device, length, trained, batch, autocast, by_document=by_document)
    return _beside_teacher(expected, needs, stays=inputs.teacher.spec.top_k is None)


def _beside_teacher(expected: Expected, needs: TeacherNeeds, *, stays: bool) -> Expected:
    """With a teacher in memory, which computes before the model; else it is loaded, and freed, before the model."""
    memory, forward = expected.memory, needs.forward
    if not stays:
        others = memory.gradients + memory.optimizer + (memory.activations or 0)
        memory = replace(memory, weights=max(memory.weights, needs.weights + max(forward or 0, needs.outputs) - others))
        return replace(expected, memory=memory, teacher=needs)
    unknown, activations = expected.unknown, memory.activations
    if forward is None or activations is None:
        unknown, activations = unknown or "a pass of the teacher cannot be simulated", None
    else:
        activations = max(activations + needs.outputs, forward)
    memory = replace(memory, weights=memory.weights + needs.weights, activations=activations)
    flops = expected.flops_per_token + needs.flops_per_token
    return replace(expected, memory=memory, flops_per_token=flops, unknown=unknown, teacher=needs)


def training_seconds(inputs: Inputs, expected: Expected) -> tuple[float, float]:
    """(training seconds at ``ASSUMED_UTILISATION`` of the peak, peak FLOP/s of the device).

    A GPU waits for Python if its model is small: then the time is that of starting the operations one by one.
    """
    tokens = inputs.batches.tokens_at(inputs.total_steps)
    dtype = dtype_for(inputs.source.dtype, inputs.device)
    peak = throughput.peak_flops(inputs.device, dtype, tf32=inputs.settings.tf32)
    seconds = tokens * expected.share * expected.flops_per_token / (peak * ASSUMED_UTILISATION)
    if inputs.device.type == "cuda":
        micro_batches = inputs.total_steps * (inputs.batches.order.per_step // inputs.batches.per_micro_batch)
        seconds = max(seconds, micro_batches * expected.layers * OPERATIONS_OF_LAYER * LAUNCH_S)
    return seconds, peak


def check_fits(expected: Expected) -> None:
    """Check the estimate against the device's memory; log a warning if it exceeds only the free memory.

    Raises:
        ConfigError: the estimate exceeds the total memory.
    """
    gib = usage.GIB
    needs = f"needs {'at least' if expected.unknown else 'about'} {expected.memory.total / gib:.1f} GiB"
    if expected.memory.total > expected.total_bytes:
        problem = f"{needs}, but the device has {expected.total_bytes / gib:.1f} GiB"
        raise ConfigError(Fault("model", problem, LESS_MEMORY))
    if expected.memory.total - expected.held_bytes > expected.free_bytes:
        free = f"{expected.free_bytes / gib:.1f} of {expected.total_bytes / gib:.1f} GiB are free"
        log.warning(f"training {needs}, but {free}. If it runs out of memory: {LESS_MEMORY}")


def _rehearsed(inputs: Inputs, model: Any, autocast: torch.dtype | None) -> tuple[int | None, str]:
    """(peak activation bytes of the largest step, simulated with fake tensors; why they are unknown)."""
    options = inputs.options
    by_document = _attends_by_document(inputs, model, autocast)
    batches = _laid(inputs, model, autocast)

    def make(layers: int) -> nn.Module:
        small = options.lora(pretrained.empty(inputs.source, options.quant, inputs.device, layers))
        lora_linear.fuse(small)
        return small

    step: dict[str, Any] = {
        "shape": batches.largest,
        "by_document": by_document,
        "kept": inputs.settings.memory,
        "autocast": autocast,
        "device": inputs.device,
        "accumulates": batches.order.per_step > batches.per_micro_batch,
        "head_in_loss": options.parallel.kind != "fsdp",
    }
    source = inputs.source
    config = str(model.config.to_dict())
    dtype = dtype_for(source.dtype, inputs.device)
    layers = {**options.layers, "config": config, "dtype": dtype, "attention": source.attention}
    images = vision.largest(batches) if batches.vision is not None else {}
    rehearse = partial(peak.rehearsed, make, peak.depth(model.config), alike=_alike(model), images=images, **step)
    layers["images"] = {name: _described(value) for name, value in images.items()}
    if not source.trust_remote_code:  # the key does not contain the code of the model's folder
        rehearse = partial(rehearsals.remembered, {**layers, **step}, rehearse)
    try:
        activations = rehearse()
        positions = boundaries.DENSITY * batches.largest.tokens if by_document else 0
        return activations + varlen_attention.workspace_bytes(model.config, positions, inputs.device), ""
    except Exception as error:
        log.debug("the step cannot be simulated", exc_info=error)
        return None, f"a step of this model cannot be simulated ({typed_line(error)})"


def _described(value: Any) -> str:
    """The shape of a tensor, and a hash of its values if they are integers; another value as it is."""
    if not isinstance(value, torch.Tensor):
        return str(value)
    values = "" if value.is_floating_point() else hashlib.sha256(value.numpy().tobytes()).hexdigest()
    return f"{tuple(value.shape)} {values}"


def _alike(model: nn.Module) -> bool:
    """Whether the same parameters are trained in each decoder layer."""
    layers = compilation.layers_of(model)
    return len({tuple(name for name, p in layer.named_parameters() if p.requires_grad) for layer in layers}) <= 1


def _laid(inputs: Inputs, model: Any, autocast: torch.dtype | None) -> Batches:
    """The training batches as the model will compute them."""
    if not _attends_by_document(inputs, model, autocast):
        return inputs.batches
    is_eager = inputs.options.compile.func in (compilation.none, compilation.auto)  # auto compiles on GPUs alone
    whole = layout.needs_whole(inputs.settings, is_eager=is_eager)
    return layout.laid(inputs.batches, model, inputs.device.type, whole=whole)


def _attends_by_document(inputs: Inputs, model: Any, autocast: torch.dtype | None) -> bool:
    """Whether the model will use attention by document; on a GPU its kernels need 16-bit dtypes."""
    wide = dtype_for(inputs.source.dtype, inputs.device) == torch.float32 and autocast is None
    enabled = inputs.source.attention in ("auto", varlen_attention.NAME)
    return enabled and not varlen_attention.obstacle(model) and not (wide and inputs.device.type == "cuda")
