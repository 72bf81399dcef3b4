"""From a frozen configuration to the parts of a training: every option bound, every object made once."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from runner import (
    attention,
    compiling,
    config,
    data,
    documents,
    expected,
    fused,
    head,
    meters,
    models,
    optim,
    parallel,
    recompute,
    spread,
    train,
    usage,
)
from runner.ahead import Ahead
from runner.checkpoint import Checkpoints
from runner.errors import ConfigError, Fault
from runner.origins import ModelSource
from runner.packing import divisors
from runner.precision import dtype_for, keep_updates
from runner.ranks import ALONE, Ranks, unanimous
from runner.readings import Readings
from runner.rundir import RunDir
from runner.schema import TrainSettings
from runner.tasks import Task

log = logging.getLogger("runner")


@dataclass(frozen=True)
class Inputs:
    """What is known without loading weights: enough for ``plan`` and to refuse what cannot train."""

    task: Task
    source: ModelSource
    tokenizer: Any
    settings: TrainSettings
    splits: data.Splits
    batches: data.Batches
    evaluation: data.Batches
    total_steps: int
    device: torch.device
    told: expected.Expected | None = None
    """What ``micro_batch_size=auto`` went by, from before the model was loaded."""

    @property
    def cut(self) -> str:
        """How a step is cut into smaller pieces, as words behind its size; empty where it is not."""
        rows, of_device = self.settings.rows_at_a_time, self.settings.per_device_batch_size
        return f", {rows} of {of_device} rows at a time" if rows < of_device else ""


def inputs(cfg: Mapping[str, Any], ranks: Ranks = ALONE) -> Inputs:
    """Data, tokenizer and the number of steps; the batches are those of this rank.

    Raises:
        ConfigError, DataError: something that would not train, in one message with its remedy.
    """
    device = pick_device()
    settings = TrainSettings(**cfg["train"])
    task = config.bind(cfg["task"], "task")()
    source = models.resolve(config.bind(cfg["model"], "model")())
    tokenizer = models.tokenizer(source)
    splits, batches, evaluation = load_data(cfg, task, source, tokenizer, settings, ranks.rank)
    steps = batches.steps(settings.max_steps, settings.num_train_epochs, settings.max_tokens)
    if device.type == "cpu":
        usage.begin()
    return Inputs(task, source, tokenizer, settings, splits, batches, evaluation, steps, device)


def settle_rows(cfg: Mapping[str, Any], made: Inputs, ranks: Ranks = ALONE) -> Inputs:
    """``micro_batch_size=auto`` settled: as many rows at a time as are expected to fit on every rank."""
    if made.settings.micro_batch_size != "auto":
        return made

    told: dict[int, expected.Expected] = {}

    def that_fit() -> int:
        for rows in reversed(divisors(made.settings.per_device_batch_size)):
            told[rows] = expected.expect(cfg, compute_at_once(made, rows))
            if told[rows].fits:
                return rows
        return 1

    rows = min(ranks.gather(unanimous(ranks, that_fit)))
    return replace(
        compute_at_once(made, rows), told=told.get(rows) or expected.expect(cfg, compute_at_once(made, rows))
    )


def settle_compile(
    cfg: Mapping[str, Any], made: Inputs, told: expected.Expected, began: str | None = None
) -> compiling.Choice:
    """``compile=auto`` settled: ``regional`` on a GPU that can, where training is long enough to win the wait back.

    ``began``: as what the run began, which it keeps where it can, since compiled code rounds in other places.
    """
    node = cfg["compile"]
    if parallel.kind_of(node) != "auto":
        return compiling.Choice(node)
    in_shards = parallel.kind_of(cfg["parallel"]) == "fsdp"
    in_8_bits = config.bind(cfg["quant"], "quant")().bits == 8
    reason = compiling.obstacle(made.device, told.layers, in_8_bits=in_8_bits, in_shards=in_shards)
    if not reason and began == "none":
        reason = "the run began so"
    if not reason and began is None and expected.training_seconds(made, told)[0] < compiling.PAYS_FROM_S:
        reason = "training is short"
    name = "none" if reason else "regional"
    return compiling.Choice(config.option("compile", name), name, reason)


def compute_at_once(made: Inputs, rows: int) -> Inputs:
    """The same inputs with another micro-batch."""
    batches, evaluation = made.batches.cut_into(rows), made.evaluation.cut_into(rows)
    return replace(made, settings=replace(made.settings, micro_batch_size=rows), batches=batches, evaluation=evaluation)


def load_data(
    cfg: Mapping[str, Any],
    task: Task,
    source: ModelSource,
    tokenizer: Any,
    settings: TrainSettings,
    rank: int,
) -> tuple[data.Splits, data.Batches, data.Batches]:
    settings_node, format_node, source_node = data.split_node(dict(cfg["data"]))
    data_settings = config.bind(settings_node, "data", data.DataSettings)()
    models.check_max_length(source, data_settings.max_length)
    splits = data.load(
        config.bind(source_node, "data"),
        config.bind(format_node, "data.format"),
        task,
        tokenizer,
        data_settings,
        identity={"format": format_node, "task": cfg["task"]},
    )
    batches = partial(
        data.Batches,
        packing=data_settings.packing,
        max_length=data_settings.max_length,
        rows_per_batch=settings.rows_at_a_time,
        seed=cfg["seed"],
        pad_id=tokenizer.pad_token_id,
        rank=rank,
        world=parallel.processes_of(cfg["parallel"]),
    )
    training = batches(
        splits.train,
        accumulation=settings.gradient_accumulation_steps * (settings.per_device_batch_size // settings.rows_at_a_time),
        shuffle=True,
        epochs=settings.num_train_epochs,
    )
    return splits, training, batches(splits.eval, accumulation=1, shuffle=False)


def load_model(cfg: Mapping[str, Any], made: Inputs) -> torch.nn.Module:
    """The model on its device, quantized and adapted as configured; its initial weights depend on the seed alone.

    One that will be cut into shards stays in the machine's memory until then: the device need not hold it whole.
    """
    quant = config.bind(cfg["quant"], "quant")()
    device, source = made.device, made.source
    if parallel.kind_of(cfg["parallel"]) == "fsdp":
        source = replace(source, dtype="bfloat16" if dtype_for(source.dtype, device) == torch.bfloat16 else "float32")
        device = torch.device("cpu")
    torch.manual_seed(cfg["seed"])
    base = models.load(source, quant, device)
    torch.manual_seed(cfg["seed"])
    model: torch.nn.Module = config.bind(cfg["lora"], "lora")(base)
    fused.fuse(model)
    return model


def parts(cfg: Mapping[str, Any], made: Inputs, rundir: RunDir, ranks: Ranks = ALONE) -> train.Parts:
    """Everything the train loop takes; the optimizer comes after the model is in place, which may change parameters."""
    if made.settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    told = expected.expect(cfg, made, roughly=True)
    if told.memory.total > expected.SAFE * told.free_bytes:
        told = expected.expect(cfg, made)
        expected.check_fits(told)
    source, autocast = keep_updates(made.source, made.device, full=told.counts["adapter"] == 0)
    made = replace(made, source=source)
    choice = settle_compile(cfg, made, told, began=rundir.read_manifest().get("compile"))
    model = load_model(cfg, made)
    recompute.arrange(model, made.settings.memory, eager=not compiling.is_asked_for(choice.node))
    batches, evaluation = settle_attention(made.source, model, autocast, made.batches, made.evaluation)
    if cfg["data"]["packing"]:
        attention.check_isolation(model, autocast)
    chosen = config.bind(cfg["parallel"], "parallel")()
    settle_head(model, autocast, chosen.kind)
    config.bind(choice.node, "compile")(model)
    in_place = spread.over(chosen, model, made.task, ranks, made.device, autocast)
    weight_decay = cfg["optim"].get("weight_decay", 0.0)
    optimizer = config.bind(cfg["optim"], "optim")(optim.parameter_groups(model, weight_decay))
    peak = meters.peak_flops(made.device, autocast or model_dtype(model)) * ranks.world
    return train.Parts(
        model=model,
        task=made.task,
        batches=batches,
        ahead=Ahead(batches, made.device, made.total_steps),
        evaluation=evaluation,
        optimizer=optimizer,
        schedule=config.bind(cfg["schedule"], "schedule"),
        settings=made.settings,
        seed=cfg["seed"],
        total_steps=made.total_steps,
        compile=choice,
        ranks=ranks,
        spread=in_place,
        checkpoints=Checkpoints(rundir.checkpoints, made.settings.save_total_limit, ranks),
        meter=meters.Meter(told.flops_per_token, peak),
        readings=Readings.of(made.device),
        quote=partial(quote, made.tokenizer),
        extra_metrics=lambda: ranks.largest(usage.metrics()),
    )


def settle_attention(
    source: ModelSource, model: torch.nn.Module, autocast: torch.dtype | None, *batches: data.Batches
) -> list[data.Batches]:
    """Let the model attend by document where it can; rows that are not packed need no padding then.

    Raises:
        ConfigError: it was asked for, and the model cannot.
    """
    if source.attention not in ("auto", "by_document"):
        return list(batches)
    obstacle = documents.install(model, batches[0].max_length, autocast)
    if not obstacle:
        return [one.laid_end_to_end() for one in batches]
    if source.attention == "by_document":
        raise ConfigError(Fault("model.attention", obstacle, "use model.attention=auto", source.attention))
    log.debug(f"no attention by document: {obstacle}")
    return list(batches)


def settle_head(model: torch.nn.Module, autocast: torch.dtype | None, kind: str) -> None:
    """Let the loss compute the logits where it can; of a sharded model the head is whole in its forward pass alone."""
    obstacle = "it is sharded" if kind == "fsdp" else head.install(model, autocast)
    if obstacle:
        log.debug(f"logits are made by the model: {obstacle}")


def pick_device() -> torch.device:
    """The rank's own accelerator, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def model_dtype(model: torch.nn.Module) -> torch.dtype:
    return torch.float32 if next(model.parameters()).dtype == torch.float32 else torch.bfloat16


def quote(tokenizer: Any, batch: Mapping[str, Any], length: int = 40) -> str:
    """The first tokens of a batch as text."""
    return str(tokenizer.decode(batch["input_ids"][0, :length].tolist()))
