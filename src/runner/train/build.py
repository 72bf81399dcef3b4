"""From a frozen configuration to the parts of a training: every option bound, every object made once."""

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


def resolve_micro_batch_size(cfg: Mapping[str, Any], made: Inputs, ranks: Ranks = ALONE) -> Inputs:
    """``micro_batch_size=auto`` settled: as many rows at a time as are expected to fit on every rank."""
    if made.settings.micro_batch_size != "auto":
        return made

    told: dict[int, peak.Expected] = {}

    def that_fit() -> int:
        for rows in reversed(divisors(made.settings.per_device_batch_size)):
            told[rows] = estimate.expect(cfg, compute_at_once(made, rows))
            if told[rows].fits:
                return rows
        return 1

    rows = min(ranks.gather(unanimous(ranks, that_fit)))
    return replace(
        compute_at_once(made, rows), estimate=told.get(rows) or estimate.expect(cfg, compute_at_once(made, rows))
    )


def resolve_compile(
    cfg: Mapping[str, Any], made: Inputs, told: peak.Expected, began: str | None = None
) -> compilation.Choice:
    """``compile=auto`` settled: ``regional`` on a GPU that can, where training is long enough to win the wait back.

    ``began``: as what the run began, which it keeps where it can, since compiled code rounds in other places.
    """
    node = cfg["compile"]
    if parallel.kind_of(node) != "auto":
        return compilation.Choice(node)
    in_shards = parallel.kind_of(cfg["parallel"]) == "fsdp"
    in_8_bits = bind.bind(cfg["quant"], "quant")().bits == 8
    reason = compilation.obstacle(made.device, told.layers, in_8_bits=in_8_bits, in_shards=in_shards)
    if not reason and began == "none":
        reason = "the run began so"
    if not reason and began is None and estimate.training_seconds(made, told)[0] < compilation.PAYS_FROM_S:
        reason = "training is short"
    name = "none" if reason else "regional"
    return compilation.Choice(bind.option("compile", name), name, reason)


def load_model(cfg: Mapping[str, Any], made: Inputs) -> torch.nn.Module:
    """The model on its device, quantized and adapted as configured; its initial weights depend on the seed alone.

    One that will be cut into shards stays in the machine's memory until then: the device need not hold it whole.
    """
    quant = bind.bind(cfg["quant"], "quant")()
    device, source = made.device, made.source
    if parallel.kind_of(cfg["parallel"]) == "fsdp":
        source = replace(source, dtype="bfloat16" if dtype_for(source.dtype, device) == torch.bfloat16 else "float32")
        device = torch.device("cpu")
    torch.manual_seed(cfg["seed"])
    base = pretrained.load(source, quant, device)
    torch.manual_seed(cfg["seed"])
    model: torch.nn.Module = bind.bind(cfg["lora"], "lora")(base)
    lora_linear.fuse(model)
    return model


def parts(cfg: Mapping[str, Any], made: Inputs, rundir: RunDir, ranks: Ranks = ALONE) -> loop.Parts:
    """Everything the train loop takes; the optimizer comes after the model is in place, which may change parameters."""
    if made.settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    told = estimate.expect(cfg, made, roughly=True)
    if told.memory.total > estimate.SAFE * told.free_bytes:
        told = estimate.expect(cfg, made)
        estimate.check_fits(told)
    source, autocast = keep_updates(made.source, made.device, full=told.counts["adapter"] == 0)
    made = replace(made, source=source)
    choice = resolve_compile(cfg, made, told, began=rundir.read_manifest().get("compile"))
    model = load_model(cfg, made)
    activation_checkpointing.arrange(model, made.settings.memory, eager=not compilation.is_asked_for(choice.node))
    batches, evaluation = resolve_attention(made.source, model, autocast, made.batches, made.evaluation)
    if cfg["data"]["packing"]:
        attention.check_isolation(model, autocast)
    chosen = bind.bind(cfg["parallel"], "parallel")()
    resolve_lm_head(model, autocast, chosen.kind)
    bind.bind(choice.node, "compile")(model)
    in_place = wrap.wrap(chosen, model, made.task, ranks, made.device, autocast)
    weight_decay = cfg["optim"].get("weight_decay", 0.0)
    optimizer = bind.bind(cfg["optim"], "optim")(optim.parameter_groups(model, weight_decay))
    peak = throughput.peak_flops(made.device, autocast or model_dtype(model)) * ranks.world
    return loop.Parts(
        model=model,
        task=made.task,
        batches=batches,
        ahead=Prefetcher(batches, made.device, made.total_steps),
        evaluation=evaluation,
        optimizer=optimizer,
        schedule=bind.bind(cfg["schedule"], "schedule"),
        settings=made.settings,
        seed=cfg["seed"],
        total_steps=made.total_steps,
        compile=choice,
        ranks=ranks,
        spread=in_place,
        checkpoints=Checkpoints(rundir.checkpoints, made.settings.save_total_limit, ranks),
        meter=throughput.Meter(told.flops_per_token, peak),
        readings=AsyncMetrics.of(made.device),
        quote=partial(quote, made.tokenizer),
        extra_metrics=lambda: ranks.largest(usage.metrics()),
    )


def resolve_attention(
    source: ModelSource, model: torch.nn.Module, autocast: torch.dtype | None, *batches: Batches
) -> list[Batches]:
    """Let the model attend by document where it can; rows that are not packed need no padding then.

    Raises:
        ConfigError: it was asked for, and the model cannot.
    """
    if source.attention not in ("auto", "by_document"):
        return list(batches)
    obstacle = varlen_attention.install(model, batches[0].max_length, autocast)
    if not obstacle:
        return [one.laid_end_to_end() for one in batches]
    if source.attention == "by_document":
        raise ConfigError(Fault("model.attention", obstacle, "use model.attention=auto", source.attention))
    log.debug(f"no attention by document: {obstacle}")
    return list(batches)


def resolve_lm_head(model: torch.nn.Module, autocast: torch.dtype | None, kind: str) -> None:
    """Let the loss compute the logits where it can; of a sharded model the head is whole in its forward pass alone."""
    obstacle = "it is sharded" if kind == "fsdp" else lm_head.install(model, autocast)
    if obstacle:
        log.debug(f"logits are made by the model: {obstacle}")


def model_dtype(model: torch.nn.Module) -> torch.dtype:
    return torch.float32 if next(model.parameters()).dtype == torch.float32 else torch.bfloat16


def quote(tokenizer: Any, batch: Mapping[str, Any], length: int = 40) -> str:
    """The first tokens of a batch as text."""
    return str(tokenizer.decode(batch["input_ids"][0, :length].tolist()))
