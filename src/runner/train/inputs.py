"""Inputs of a training run that need no model weights: task, tokenizer, data, number of steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from runner.config.schema import TrainSettings
from runner.data import dataset, mixture, vision
from runner.data.batches import Batches
from runner.errors import refuse
from runner.models import architecture, tokenizer_files
from runner.models.kernels import compilation
from runner.models.sources import ModelSource
from runner.tasks.task import Task
from runner.train import answers, callbacks, devices, eva, image_rows, profiling, teacher
from runner.train.distributed.ranks import ALONE, Ranks
from runner.train.memory import footprint, usage
from runner.train.options import DataSet, Options
from runner.train.teacher import Teacher


@dataclass(frozen=True)
class Inputs:
    """Everything known without loading weights; enough for ``plan`` and for most checks."""

    options: Options
    source: ModelSource
    tokenizer: Any
    settings: TrainSettings
    """``options.train``, with the micro-batch size that is used."""
    splits: dataset.Splits
    batches: Batches
    evaluation: Batches
    total_steps: int
    device: torch.device
    notes: list[tuple[str, str]]
    """(label, text) of the task's remarks about the data, for ``plan``."""
    questions: answers.Questions
    """The prompts that the model answers at each evaluation."""
    teacher: Teacher | None = None
    """The model that this one learns from; not loaded yet."""
    callbacks: dict[str, Callable[..., Any]] = field(default_factory=dict)
    estimate: footprint.Expected | None = None
    """The estimate from which ``micro_batch_size=auto`` was chosen; None if the size was set."""

    @property
    def cut(self) -> str:
        """Text about micro-batches to append to the size of a step; empty if the step is one batch."""
        rows, of_device = self.settings.rows_at_a_time, self.settings.per_device_batch_size
        return f", {rows} of {of_device} rows at a time" if rows < of_device else ""


def inputs(options: Options, ranks: Ranks = ALONE) -> Inputs:
    """Load data and tokenizer and count the steps; the batches are those of this rank.

    Raises:
        ConfigError, DataError: the configuration or the data cannot be used for training.
    """
    device, settings = devices.pick(), options.train
    devices.choose_allocator(device, graphs=compilation.records_graphs(options.compile))
    source = architecture.resolve(options.model)
    options = options.on(source)
    tokenizer = tokenizer_files.load(source)
    if vision.of(tokenizer) is not None:
        refuse(image_rows.faults(options, source.name))
    of_teacher = teacher.of(options, source, tokenizer)
    splits, batches, evaluation = load_data(options, source, tokenizer, ranks.rank, options.parallel.processes)
    options = options.settled(splits.settled)
    source = replace(source, head=options.model.head)
    steps = batches.order.steps(settings.max_steps, settings.num_train_epochs, settings.max_tokens)
    batches.order.repeats(steps)  # refuses too many
    questions = answers.questions(settings, options.code, evaluation, tokenizer)
    profiling.check_device(settings, device)
    devices.check_tf32(settings.tf32, device)
    devices.check_offload(settings.memory, device)
    functions = callbacks.load(settings.callbacks, options.code)
    notes = options.task.inspect(batches, evaluation, steps) if options.task.inspect is not None else []
    notes += answers.note(questions, tokenizer)
    if options.begins_from_data:
        notes.append(("adapter", f"begins with directions of the data (EVA): up to {eva.MOST_PASSES} forward passes"))
    if options.loftq_iter:
        iterations = f"{options.loftq_iter} iteration{'s' * (options.loftq_iter > 1)}"
        notes.append(("adapter", f"begins as what {options.quant.name} loses of the weights (LoftQ, {iterations})"))
    notes += image_rows.notes(options, splits.report) if vision.of(tokenizer) is not None else []
    usage.begin(device)
    return Inputs(
        options,
        source,
        tokenizer,
        settings,
        splits,
        batches,
        evaluation,
        steps,
        device,
        notes,
        questions,
        of_teacher,
        functions,
    )


def compute_at_once(inputs: Inputs, rows: int) -> Inputs:
    """The same inputs with micro-batches of ``rows`` rows."""
    settings = replace(inputs.settings, micro_batch_size=rows)
    batches, evaluation = inputs.batches.cut_into(rows), inputs.evaluation.cut_into(rows)
    return replace(inputs, settings=settings, batches=batches, evaluation=evaluation)


def load_data(
    options: Options, source: ModelSource, tokenizer: Any, rank: int = 0, world: int = 1
) -> tuple[dataset.Splits, Batches, Batches]:
    """(splits, training batches of this rank, evaluation batches of this rank)."""
    settings, data = options.train, options.data
    answers = options.task.answers
    more = options.virtual_tokens + (answers.most_tokens if answers is not None else 0)
    architecture.check_max_length(source, data.max_length + more)
    sources = {name: load_set(options.task, tokenizer, each) for name, each in options.sources.items()}
    settled = options.settled(next(iter(sources.values())).settled)
    evals = {name: load_set(settled.task, tokenizer, each, trains=False) for name, each in settled.evals.items()}
    splits = mixture.join(options.mixture, sources, evals)
    batches = partial(
        Batches,
        packing=data.packing,
        max_length=data.max_length,
        rows_per_batch=settings.rows_at_a_time,
        seed=options.seed,
        pad_id=tokenizer.pad_token_id,
        vision=vision.of(tokenizer),
        rank=rank,
        world=world,
    )
    training = batches(
        splits.train,
        accumulation=settings.gradient_accumulation_steps * (settings.per_device_batch_size // settings.rows_at_a_time),
        shuffle=True,
        epochs=settings.num_train_epochs,
        answers=answers,
        max_repeats=options.mixture.max_repeats,
    )
    greedy = replace(answers, per_row=1) if answers is not None else None
    return splits, training, batches(splits.eval, accumulation=1, shuffle=False, answers=greedy)


def load_set(task: Task, tokenizer: Any, given: DataSet, *, trains: bool = True) -> dataset.Splits:
    """The tokenised splits of one data set."""
    return dataset.load(given.source, given.format, task, tokenizer, given.settings, given.encoding, trains=trains)
