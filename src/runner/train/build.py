"""Build the parts of the train loop from a frozen configuration: model, optimizer, batches, checkpoints."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from runner.config import bind
from runner.config.schema import divisors
from runner.data.batches import Batches
from runner.errors import ConfigError, Fault
from runner.models import pretrained
from runner.models.dtypes import dtype_for
from runner.models.kernels import (
    activation_checkpointing,
    attention,
    compilation,
    lm_head,
    lora_linear,
    varlen_attention,
)
from runner.models.pretrained import keep_updates
from runner.models.sources import ModelSource
from runner.tracking.rundir import RunDir
from runner.train import estimate, loop, optim, throughput
from runner.train.async_metrics import AsyncMetrics
from runner.train.checkpoint import Checkpoints
from runner.train.distributed import parallel, wrap
from runner.train.distributed.ranks import ALONE, Ranks, unanimous
from runner.train.inputs import Inputs, compute_at_once
from runner.train.memory import peak, usage
from runner.train.prefetch import Prefetcher

log = logging.getLogger("runner")


def resolve_micro_batch_size(cfg: Mapping[str, Any], inputs: Inputs, ranks: Ranks = ALONE) -> Inputs:
    """Replace ``micro_batch_size=auto`` by the largest micro-batch that is expected to fit on every rank."""
    if inputs.settings.micro_batch_size != "auto":
        return inputs

    estimates: dict[int, peak.Expected] = {}

    def largest_that_fits() -> int:
        for rows in reversed(divisors(inputs.settings.per_device_batch_size)):
            estimates[rows] = estimate.expect(cfg, compute_at_once(inputs, rows))
            if estimates[rows].fits:
                return rows
        return 1

    rows = min(ranks.gather(unanimous(ranks, largest_that_fits)))
    inputs = compute_at_once(inputs, rows)
    return replace(inputs, estimate=estimates.get(rows) or estimate.expect(cfg, inputs))


def resolve_compile(
    cfg: Mapping[str, Any], inputs: Inputs, expected: peak.Expected, began: str | None = None
) -> compilation.Choice:
    """Replace ``compile=auto`` by ``regional`` if the GPU supports it and training is long enough to pay for it.

    ``began``: the choice of an earlier attempt. It is kept if possible, because compiled code rounds differently.
    """
    node = cfg["compile"]
    if parallel.kind_of(node) != "auto":
        return compilation.Choice(node)
    in_shards = parallel.kind_of(cfg["parallel"]) == "fsdp"
    in_8_bits = bind.bind(cfg["quant"], "quant")().bits == 8
    reason = compilation.obstacle(inputs.device, expected.layers, in_8_bits=in_8_bits, in_shards=in_shards)
    if not reason and began == "none":
        reason = "the run began without compilation"
    if not reason and began is None and estimate.training_seconds(inputs, expected)[0] < compilation.PAYS_FROM_S:
        reason = "training is short"
    name = "none" if reason else "regional"
    return compilation.Choice(bind.option("compile", name), name, reason)


def load_model(cfg: Mapping[str, Any], inputs: Inputs) -> torch.nn.Module:
    """Load the model on its device, quantize it and add the adapter; initial weights depend only on the seed.

    With ``parallel=fsdp`` the model stays on the CPU until it is sharded, because it may not fit on one device.
    """
    quant = bind.bind(cfg["quant"], "quant")()
    device, source = inputs.device, inputs.source
    if parallel.kind_of(cfg["parallel"]) == "fsdp":
        source = replace(source, dtype="bfloat16" if dtype_for(source.dtype, device) == torch.bfloat16 else "float32")
        device = torch.device("cpu")
    torch.manual_seed(cfg["seed"])
    base = pretrained.load(source, quant, device)
    torch.manual_seed(cfg["seed"])
    model: torch.nn.Module = bind.bind(cfg["lora"], "lora")(base)
    lora_linear.fuse(model)
    return model


def parts(cfg: Mapping[str, Any], inputs: Inputs, rundir: RunDir, ranks: Ranks = ALONE) -> loop.Parts:
    """Build everything that the train loop needs. Creates the optimizer last: FSDP replaces the parameters."""
    if inputs.settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    expected = estimate.expect(cfg, inputs, roughly=True)
    if expected.memory.total > estimate.SAFE * expected.free_bytes:
        expected = estimate.expect(cfg, inputs)
        estimate.check_fits(expected)
    source, autocast = keep_updates(inputs.source, inputs.device, full=expected.counts["adapter"] == 0)
    inputs = replace(inputs, source=source)
    choice = resolve_compile(cfg, inputs, expected, began=rundir.read_manifest().get("compile"))
    model = load_model(cfg, inputs)
    activation_checkpointing.arrange(model, inputs.settings.memory, eager=not compilation.is_asked_for(choice.node))
    batches, evaluation = resolve_attention(inputs.source, model, autocast, inputs.batches, inputs.evaluation)
    chosen = bind.bind(cfg["parallel"], "parallel")()
    resolve_lm_head(model, autocast, chosen.kind)
    bind.bind(choice.node, "compile")(model)
    wrapped = wrap.wrap(chosen, model, inputs.task, ranks, inputs.device, autocast)
    weight_decay = cfg["optim"].get("weight_decay", 0.0)
    optimizer = bind.bind(cfg["optim"], "optim")(optim.parameter_groups(model, weight_decay))
    peak = throughput.peak_flops(inputs.device, autocast or model_dtype(model)) * ranks.world
    return loop.Parts(
        model=model,
        task=inputs.task,
        batches=batches,
        prefetcher=Prefetcher(batches, inputs.device, inputs.total_steps),
        evaluation=evaluation,
        optimizer=optimizer,
        schedule=bind.bind(cfg["schedule"], "schedule"),
        settings=inputs.settings,
        seed=cfg["seed"],
        total_steps=inputs.total_steps,
        compile=choice,
        ranks=ranks,
        wrapped=wrapped,
        checkpoints=Checkpoints(rundir.checkpoints, inputs.settings.save_total_limit, ranks),
        meter=throughput.Meter(expected.flops_per_token, peak),
        async_metrics=AsyncMetrics.of(inputs.device),
        quote=partial(quote, inputs.tokenizer),
        extra_metrics=lambda: ranks.largest(usage.metrics()),
    )


def resolve_attention(
    source: ModelSource, model: torch.nn.Module, autocast: torch.dtype | None, *batches: Batches
) -> list[Batches]:
    """Install attention by document if the model supports it; unpacked rows then need no padding.

    Raises:
        ConfigError: model.attention=by_document, but the model does not support it; or the model does not compute each
            document of a batch as it computes the document alone.
    """
    longest = max(split.max_length for split in batches)
    attention.check_causal(model, autocast, longest)
    obstacle = f"model.attention={source.attention}"
    if source.attention in ("auto", "by_document"):
        obstacle = varlen_attention.install(model, longest, autocast)
    if not obstacle:
        return [split.laid_end_to_end() for split in batches]
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
