"""Build the parts of the train loop from the options of a run: model, optimizer, batches, checkpoints."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from runner import terminal
from runner.config import bind
from runner.config.schema import divisors
from runner.data import vision
from runner.data.batches import Batches
from runner.errors import ConfigError, Fault
from runner.files import write_atomic
from runner.models import pretrained
from runner.models.dtypes import dtype_for
from runner.models.kernels import (
    activation_checkpointing,
    attention,
    compilation,
    cpu_products,
    lm_head,
    lora_linear,
    score_head,
    varlen_attention,
)
from runner.models.pretrained import keep_updates
from runner.models.quantization import loftq
from runner.models.quantization.quant import Quant
from runner.models.sources import ModelSource
from runner.tracking.rundir import RunDir
from runner.train import (
    devices,
    ema,
    estimate,
    eva,
    layout,
    neftune,
    probe,
    reference,
    router_balance,
    step_batches,
    throughput,
)
from runner.train.answers import Answering
from runner.train.async_metrics import AsyncMetrics
from runner.train.checkpoint import Checkpoints
from runner.train.distributed import wrap
from runner.train.distributed.ranks import ALONE, Ranks, unanimous
from runner.train.inputs import Inputs, compute_at_once
from runner.train.layer_norms import LayerNorms
from runner.train.memory import footprint, usage
from runner.train.options import Options
from runner.train.parts import Parts
from runner.train.prefetch import Prefetcher
from runner.train.profiling import Profile
from runner.train.selection import Selection

log = logging.getLogger("runner")


def resolve_micro_batch_size(inputs: Inputs, ranks: Ranks = ALONE) -> Inputs:
    """Replace ``micro_batch_size=auto`` by the largest micro-batch that is expected to fit on every rank.

    Without an estimate it is the whole batch if ``probe`` can reduce it, else one row.
    """
    if inputs.settings.micro_batch_size != "auto":
        return inputs

    estimates: dict[int, footprint.Expected] = {}

    def largest_that_fits() -> int:
        for rows in reversed(divisors(inputs.settings.per_device_batch_size)):
            estimates[rows] = estimate.expect(compute_at_once(inputs, rows))
            if estimates[rows].fits or (estimates[rows].unknown and probe.is_possible(inputs)):
                return rows
        return 1

    rows = min(ranks.gather(unanimous(ranks, largest_that_fits)))
    inputs = compute_at_once(inputs, rows)
    return replace(inputs, estimate=estimates.get(rows) or estimate.expect(inputs))


def resolve_compile(inputs: Inputs, expected: footprint.Expected, began: str | None = None) -> compilation.Choice:
    """Replace ``compile=auto`` by ``regional`` if the GPU supports it and training is long enough to pay for it.

    ``began``: the choice of an earlier attempt. It is kept if possible, because compiled code rounds differently.
    """
    options = inputs.options
    if options.compile.func is not compilation.auto:
        return compilation.Choice(options.compile)
    in_shards = options.parallel.kind == "fsdp"
    breaks = options.quant.graph_breaks
    reason = compilation.obstacle(inputs.device, expected.layers, graph_breaks=breaks, in_shards=in_shards)
    if not reason and inputs.settings.memory == "offload":
        reason = "train.memory=offload moves the inputs of layers that are not compiled"
    if not reason and vision.of(inputs.tokenizer) is not None:
        reason = "the model reads images"
    if not reason and began == "none":
        reason = "the run began without compilation"
    if not reason and began is None and estimate.training_seconds(inputs, expected)[0] < compilation.PAYS_FROM_S:
        reason = "training is short"
    name = "none" if reason else "regional"
    return compilation.Choice(bind.bind(bind.option("compile", name), "compile"), name, reason)


def load_model(
    inputs: Inputs, first: Path | None = None, ranks: Ranks = ALONE, *, full: bool = False
) -> torch.nn.Module:
    """Load the model on its device, quantize it and add the adapter; initial weights depend only on the seed.

    With ``parallel=fsdp`` the model stays on the CPU until it is sharded: it may not fit on one device. For ``full``
    fine-tuning, bfloat16 weights stay mapped from their files until then, so that processes share the memory.
    """
    options, device, source = inputs.options, inputs.device, inputs.source
    if options.parallel.kind != "fsdp":
        return initial_model(options, source, options.quant, device, first, ranks)
    is_bfloat16 = dtype_for(source.dtype, device) == torch.bfloat16 or (full and pretrained.is_in_bfloat16(source))
    source = replace(source, dtype="bfloat16" if is_bfloat16 else "float32")
    with options.quant.loading_for(device) as quant:
        return initial_model(options, source, quant, torch.device("cpu"), first, ranks)


def initial_model(
    options: Options, source: ModelSource, quant: Quant, device: torch.device, first: Path | None, ranks: Ranks = ALONE
) -> torch.nn.Module:
    """The model that training starts from, with its adapter. ``first``: what LoftQ gives it; written if missing."""
    torch.manual_seed(options.seed)
    base = pretrained.load(source, quant, device)
    torch.manual_seed(options.seed)
    model = options.lora(base)
    lora_linear.fuse(model)
    if options.loftq_iter:
        assert first is not None
        compute = partial(loftq.compute, model, source, options.loftq_iter, first, terminal.progress("LoftQ: layer"))
        unanimous(ranks, compute if ranks.rank == 0 else lambda: None)
        loftq.begin(model, source, first)
    return model


def parts(inputs: Inputs, rundir: RunDir, ranks: Ranks = ALONE) -> Parts:
    """Build everything that the train loop needs. Creates the optimizer last: FSDP replaces the parameters."""
    options, settings = inputs.options, inputs.settings
    _choose_kernels(settings.deterministic, settings.tf32)
    expected = inputs.estimate or estimate.expect(inputs)
    estimate.check_fits(expected)
    full = expected.counts["adapter"] == 0
    source, autocast = keep_updates(inputs.source, inputs.device, full=full)
    inputs = replace(inputs, source=source)
    choice = resolve_compile(inputs, expected, began=rundir.read_manifest().get("compile"))
    model = load_model(inputs, rundir.loftq, ranks, full=full)
    activation_checkpointing.arrange(model, settings.memory, eager=choice.is_eager)
    whole = layout.needs_whole(settings, is_eager=choice.is_eager)
    given = inputs.batches, inputs.evaluation
    batches, evaluation = resolve_attention(inputs.source, model, autocast, *given, whole=whole, device=inputs.device)
    if options.task.reference is not None:
        for split in (batches, evaluation):
            reference.unknown(split)
    resolve_lm_head(model, autocast, options.parallel.kind)
    if choice.is_eager:
        cpu_products.install(model)
    if options.begins_from_data:
        watch = terminal.progress("EVA: forward pass") if ranks.rank == 0 else _silent
        eva.begin(model, batches, autocast, ranks, rundir.eva, watch)
    choice.option(model)
    task = router_balance.balanced(options.task, model, settings.router_aux_loss_coef)
    noisy = neftune.noisy(task, model, settings.neftune_noise_alpha, options.seed)
    dtype = dtype_for(source.dtype, inputs.device) if full else None
    wrapped = wrap.wrap(options.parallel, model, noisy, ranks, inputs.device, autocast, dtype)
    optimizer = options.optim(options.parameter_groups(model))
    decay = ema.decay_of(settings.ema, settings.swa_start, inputs.total_steps)
    average = ema.Average.of(model, options.average, decay, optimizer)
    peak = throughput.peak_flops(inputs.device, autocast or model_dtype(model), tf32=settings.tf32) * ranks.world
    flops = expected.flops_per_token * batches.computed_share
    meter = throughput.Meter(flops, peak, prepares=options.task.prepare is not None)
    return Parts(
        model=model,
        task=task,
        batches=batches,
        prefetcher=Prefetcher(batches, inputs.device, inputs.total_steps),
        evaluation=evaluation,
        step_batches=_step_batches(inputs, model, wrapped, ranks, rundir),
        optimizer=optimizer,
        schedule=options.schedule,
        settings=settings,
        seed=options.seed,
        total_steps=inputs.total_steps,
        compile=choice,
        ranks=ranks,
        wrapped=wrapped,
        checkpoints=Checkpoints(rundir.checkpoints, settings.save_total_limit, ranks, average),
        average=average,
        meter=meter,
        layer_norms=LayerNorms(model, settings.logging_steps if settings.layer_norms else None, inputs.total_steps),
        profile=Profile.of(settings, rundir.profile, inputs.device, meter, leads=ranks.rank == 0),
        async_metrics=AsyncMetrics.of(inputs.device),
        quote=partial(quote, inputs.tokenizer),
        answering=Answering(inputs.questions, model, inputs.tokenizer, wrapped, ranks, keeping(rundir.answers, ranks)),
        selection=Selection.of(settings, is_larger_better=options.is_larger_better),
        extra_metrics=lambda: ranks.largest(usage.metrics()),
    )


def _silent(done: int, count: int) -> None:
    """Show no progress."""


def _choose_kernels(deterministic: bool, tf32: bool) -> None:
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    devices.choose_kernels(deterministic, tf32)


def _step_batches(
    inputs: Inputs, model: torch.nn.Module, wrapped: wrap.Wrapped, ranks: Ranks, rundir: RunDir
) -> step_batches.StepBatches:
    """The model must have the weights of the start."""

    task = inputs.options.task
    start = step_batches.start_of(model) if task.needs_start else step_batches.none
    show = keeping(rundir.rollouts, ranks)
    return step_batches.StepBatches(task, model, inputs.tokenizer, wrapped, ranks, start, show)


def keeping(folder: Path, ranks: Ranks) -> step_batches.Show:
    """A function that writes the samples of an evaluation to a file, on rank 0."""

    def show(step: int, samples: list[dict[str, Any]]) -> None:
        if ranks.rank == 0:
            folder.mkdir(exist_ok=True)
            write_atomic(folder / f"step-{step:06d}.json", json.dumps(samples, indent=1, ensure_ascii=False))

    return show


def resolve_attention(
    source: ModelSource,
    model: torch.nn.Module,
    autocast: torch.dtype | None,
    *batches: Batches,
    whole: bool = False,
    device: torch.device | None = None,
) -> list[Batches]:
    """Install attention by document if the model supports it; unpacked rows then need no padding.

    ``whole``: as of ``layout.laid``. ``device``: where the batches are computed; by default, where the model is.

    Raises:
        ConfigError: model.attention=by_document, but the model does not support it; the model does not compute each
            document of a batch as it computes the document alone; or packing, which an encoder cannot have.
    """
    longest = max(split.longest_document for split in batches)
    if score_head.is_encoder(model):
        if any(split.packing for split in batches):
            problem = f"{source.name} attends in both directions, so documents cannot share a row"
            raise ConfigError(Fault("data.packing", problem, "set data.packing=false", True))
        attention.check_padding(model, autocast)
        return list(batches)
    attention.check_causal(model, autocast, longest)
    obstacle = f"model.attention={source.attention}"
    if source.attention in ("auto", "by_document"):
        obstacle = varlen_attention.install(model, longest, autocast)
    if not obstacle:
        device = device or next(model.parameters()).device
        return [layout.laid(split, model, device.type, whole=whole) for split in batches]
    if source.attention == "by_document":
        raise ConfigError(Fault("model.attention", obstacle, "use model.attention=auto", source.attention))
    log.debug(f"attention by document is not used: {obstacle}")
    if any(split.packing for split in batches):
        attention.check_isolation(model, autocast, longest)
    return list(batches)


def resolve_lm_head(model: torch.nn.Module, autocast: torch.dtype | None, kind: str) -> None:
    """Let the loss compute the logits if possible; an FSDP model gathers its head only inside its forward pass."""
    obstacle = "the model is sharded" if kind == "fsdp" else lm_head.install(model, autocast)
    if obstacle:
        log.debug(f"the model computes the logits, not the loss: {obstacle}")


def model_dtype(model: torch.nn.Module) -> torch.dtype:
    """float32 for float32 weights, otherwise bfloat16 (quantized weights too)."""
    return torch.float32 if next(model.parameters()).dtype == torch.float32 else torch.bfloat16


def quote(tokenizer: Any, batch: Mapping[str, Any], length: int = 40) -> str:
    """The first ``length`` tokens of a batch as text."""
    return str(tokenizer.decode(batch["input_ids"][0, :length].tolist()))
