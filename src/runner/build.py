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
    fused,
    memory,
    meters,
    models,
    optim,
    parallel,
    recompute,
    spread,
    train,
)
from runner.checkpoint import Checkpoints
from runner.errors import ConfigError, Fault
from runner.origins import ModelSource
from runner.packing import divisors
from runner.precision import dtype_for
from runner.ranks import ALONE, Ranks
from runner.readings import Readings
from runner.rundir import RunDir
from runner.schema import TrainSettings
from runner.tasks import Task

ADAPTER_BYTES = 4
"""Adapters train in float32."""
SAFE = 0.5
"""What takes less of the free memory by the formula fits, whatever a rehearsal would say."""
ROOM = 0.95
"""Of the free memory, for micro_batch_size=auto."""

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
    made = Inputs(task, source, tokenizer, settings, splits, batches, evaluation, steps, device)
    return settle_rows(cfg, made, ranks) if settings.micro_batch_size == "auto" else made


def settle_rows(cfg: Mapping[str, Any], made: Inputs, ranks: Ranks = ALONE) -> Inputs:
    """As many rows at a time as are expected to fit, on the rank with the least room; the steps stay what they are."""
    choices = divisors(made.settings.per_device_batch_size)
    fitting = (rows for rows in reversed(choices) if expect(cfg, compute_at_once(made, rows)).fits)
    return compute_at_once(made, min(ranks.gather(next(fitting, 1))))


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
    recompute.arrange(model, made.settings.memory)
    return model


def parts(cfg: Mapping[str, Any], made: Inputs, rundir: RunDir, ranks: Ranks = ALONE) -> train.Parts:
    """Everything the train loop takes; the optimizer comes after the model is in place, which may change parameters."""
    if made.settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if made.device.type == "cpu":
        memory.return_what_is_freed()
    expected = expect(cfg, made, roughly=True)
    if expected.memory.total > SAFE * expected.free_bytes:
        expected = expect(cfg, made)
        check_fits(expected)
    source, autocast = keep_updates(made.source, made.device, full=expected.counts["adapter"] == 0)
    made = replace(made, source=source)
    model = load_model(cfg, made)
    batches, evaluation = settle_attention(made.source, model, made.batches, made.evaluation)
    if cfg["data"]["packing"]:
        attention.check_isolation(model)
    config.bind(cfg["compile"], "compile")(model)
    chosen = config.bind(cfg["parallel"], "parallel")()
    in_place = spread.over(chosen, model, made.task, ranks, made.device, autocast)
    weight_decay = cfg["optim"].get("weight_decay", 0.0)
    optimizer = config.bind(cfg["optim"], "optim")(optim.parameter_groups(model, weight_decay))
    peak = meters.peak_flops(made.device, model_dtype(model)) * ranks.world
    return train.Parts(
        model=model,
        task=made.task,
        batches=batches,
        evaluation=evaluation,
        optimizer=optimizer,
        schedule=config.bind(cfg["schedule"], "schedule"),
        settings=made.settings,
        seed=cfg["seed"],
        total_steps=made.total_steps,
        ranks=ranks,
        spread=in_place,
        checkpoints=Checkpoints(rundir.checkpoints, made.settings.save_total_limit, ranks),
        meter=meters.Meter(expected.flops_per_token, peak),
        readings=Readings.of(made.device),
        quote=partial(quote, made.tokenizer),
        extra_metrics=lambda: ranks.largest(memory.metrics()),
    )


def settle_attention(source: ModelSource, model: torch.nn.Module, *batches: data.Batches) -> list[data.Batches]:
    """Let the model attend by document where it can; rows that are not packed need no padding then.

    Raises:
        ConfigError: it was asked for, and the model cannot.
    """
    if source.attention not in ("auto", "by_document"):
        return list(batches)
    obstacle = documents.install(model, batches[0].max_length)
    if not obstacle:
        return [one.laid_end_to_end() for one in batches]
    if source.attention == "by_document":
        raise ConfigError(Fault("model.attention", obstacle, "use model.attention=auto", source.attention))
    log.debug(f"no attention by document: {obstacle}")
    return list(batches)


def keep_updates(source: ModelSource, device: torch.device, *, full: bool) -> tuple[ModelSource, torch.dtype | None]:
    """Weights that train whole are kept in float32 and computed with in bfloat16: pure bfloat16 loses small updates.

    Returns the source and the dtype of autocast. A dtype that was asked for is left as it is.
    """
    if full and source.dtype == "auto" and dtype_for("auto", device) == torch.bfloat16:
        return replace(source, dtype="float32"), torch.bfloat16
    return source, None


def pick_device() -> torch.device:
    """The rank's own accelerator, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def model_dtype(model: torch.nn.Module) -> torch.dtype:
    return torch.float32 if next(model.parameters()).dtype == torch.float32 else torch.bfloat16


def quote(tokenizer: Any, batch: Mapping[str, Any], length: int = 40) -> str:
    """The first tokens of a batch as text."""
    return str(tokenizer.decode(batch["input_ids"][0, :length].tolist()))


@dataclass(frozen=True)
class Expected:
    """What training will take, known before any weight is loaded."""

    counts: dict[str, int]
    """Parameters as ``models.describe`` counts them."""
    memory: memory.MemoryEstimate
    held_bytes: int
    """What this process holds of the device's memory already."""
    total_bytes: int
    """What the device has, in use or not."""
    free_bytes: int
    flops_per_token: float

    @property
    def fits(self) -> bool:
        """With a little room beside what else is running."""
        return self.memory.total - self.held_bytes <= ROOM * self.free_bytes


def expect(cfg: Mapping[str, Any], made: Inputs, *, roughly: bool = False) -> Expected:
    """Count parameters and memory on a model without weights; ``roughly``: by a formula, in a tenth of the time."""
    quant = config.bind(cfg["quant"], "quant")()
    adapt = config.bind(cfg["lora"], "lora")
    model = adapt(models.empty(made.source, quant, made.device))
    counts = models.describe(model)
    full = counts["adapter"] == 0
    source, autocast = keep_updates(made.source, made.device, full=full)
    size = dtype_for(source.dtype, made.device).itemsize
    weights = counts["linear"] * (quant.bytes_per_weight or size)
    weights += (counts["total"] - counts["linear"] - counts["adapter"]) * size + counts["adapter"] * ADAPTER_BYTES
    using = replace(made, source=source)
    activations = formula(using, model, autocast, full=full) if roughly else rehearse(cfg, using, autocast, full=full)
    if quant.bits is not None:
        activations += largest_matrix(model) * size  # unpacked while it is used
    gradients = counts["trainable"] * (size if full else ADAPTER_BYTES)
    held = memory.held_already(made.device)
    found = memory.MemoryEstimate(
        weights=int(weights),
        gradients=gradients,
        optimizer=int(counts["trainable"] * optim.state_bytes(cfg["optim"])),
        activations=activations,
        libraries=held + memory.unusable(made.device, activations + gradients),
    )
    if parallel.kind_of(cfg["parallel"]) == "fsdp":
        found = found.in_shards(parallel.processes_of(cfg["parallel"]), len(compiling.decoder_layers(model)))
    total, free = memory.of_device(made.device)
    report = made.splits.report
    trained = report.train_trained_tokens / max(report.train_tokens, 1)
    return Expected(counts, found, held, total, free, meters.flops_per_token(model, cfg["data"]["max_length"], trained))


def rehearse(cfg: Mapping[str, Any], made: Inputs, autocast: torch.dtype | None, *, full: bool) -> int:
    """Bytes that live from forward to backward pass, from a rehearsal of the largest step; else from the formula."""
    quant = config.bind(cfg["quant"], "quant")()
    by_document = made.source.attention in ("auto", "by_document")
    batches = made.batches.laid_end_to_end() if by_document else made.batches

    def make(layers: int | None) -> torch.nn.Module:
        model: torch.nn.Module = config.bind(cfg["lora"], "lora")(models.empty(made.source, quant, made.device, layers))
        if quant.bits != 8:
            fused.fuse(model)
        return model

    try:
        return memory.rehearsed(
            make,
            batches.largest,
            by_document=by_document,
            kept=made.settings.memory,
            autocast=autocast,
            device=made.device,
        )
    except Exception as error:
        log.debug(f"the step cannot be rehearsed, its memory is told by a formula: {error!r}")
        return formula(made, make(None), autocast, full=full)


def formula(made: Inputs, model: torch.nn.Module, autocast: torch.dtype | None, *, full: bool) -> int:
    """The same for a model like Llama, from its numbers."""
    size = (autocast or dtype_for(made.source.dtype, made.device)).itemsize
    kept = made.settings.memory
    return memory.by_formula(model.config, made.batches.largest, kept=kept, dtype_bytes=size, full=full)


def largest_matrix(model: torch.nn.Module) -> int:
    """Values of the largest weight of the decoder's layers."""
    layer = compiling.decoder_layers(model)[0]
    return max(parameter.numel() for parameter in layer.parameters())


def check_fits(expected: Expected) -> None:
    """Refuse a model that cannot fit; warn where it does not fit beside what else is running.

    Raises:
        ConfigError: with the ways to make it smaller.
    """
    needed, gib = expected.memory.total, 2**30
    remedy = (
        "use train.micro_batch_size=auto or a smaller one, train.memory=balanced or min, quant=4bit, lora=lora, "
        "or a smaller data.max_length"
    )
    if needed > expected.total_bytes:
        problem = f"needs about {needed / gib:.1f} GiB, and the device has {expected.total_bytes / gib:.1f} GiB"
        raise ConfigError(Fault("model", problem, remedy))
    if needed - expected.held_bytes > expected.free_bytes:
        free = f"{expected.free_bytes / gib:.1f} of {expected.total_bytes / gib:.1f} GiB are free"
        log.warning(f"about {needed / gib:.1f} GiB will be needed, and {free}; if it runs out: {remedy}")
