"""What each rank does in an attempt at a run: load data and model, train to the last step, save the result.

Rank 0 writes the records, the state and the samples into the run folder; ``worker`` decides whether there is anything
to train, and records how the attempt ended.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from runner import imports, log_handlers, terminal
from runner.errors import DamagedError, Fault, Pruned, ResumeError, TrainingError
from runner.files import write_atomic
from runner.models.kernels import compilation
from runner.signals import Stop
from runner.tracking import metrics_log, provenance, slurm_client
from runner.tracking.rundir import RunDir
from runner.train import run_facts, run_summary
from runner.train.distributed.ranks import Ranks, unanimous
from runner.train.options import Options
from runner.train.outcome import Clock

if TYPE_CHECKING:
    from runner.train.callbacks import Callbacks
    from runner.train.checkpoint import Progress
    from runner.train.inputs import Inputs
    from runner.train.parts import Hooks, Parts

Ask = Callable[..., list[str]]
"""``text_generation.generate`` of the model: (prompts, progress=…) → answers."""
STATE_EVERY_S = 0.5
"""Minimum seconds between two writes of state.json, because each write waits for the disk."""
log = logging.getLogger("runner")


class Loaded(NamedTuple):
    """Everything needed to train; a run can be refused until this is loaded."""

    inputs: Inputs
    parts: Parts
    progress: Progress
    probed: dict[str, float]
    """Memory metrics of ``probe.fit``."""


def load(rundir: RunDir, options: Options, ranks: Ranks) -> Loaded:
    with imports.uncollected():
        from runner.train import build, inputs, probe, reference, teacher_cache  # imports torch

    log_handlers.quiet_libraries()

    def progress_of(label: str) -> Callable[[int, int], None]:
        return terminal.progress(label) if ranks.rank == 0 else lambda *_: None

    def read() -> Inputs:
        options.refuse_changed_code()
        options.refuse_changed_start()
        run_inputs = inputs.inputs(options, ranks)
        _refuse_other_data(rundir, run_facts.data_identity(run_inputs))
        return run_inputs

    run_inputs = build.resolve_micro_batch_size(unanimous(ranks, read), ranks)
    unanimous(ranks, lambda: teacher_cache.compute(run_inputs, ranks, progress_of("teacher")))
    parts = unanimous(ranks, lambda: teacher_cache.attached(run_inputs, build.parts(run_inputs, rundir, ranks)))
    run_inputs, parts, probed = probe.fit(run_inputs, parts)
    if ranks.rank == 0:
        run_summary.header(run_inputs, parts, rundir)
    if parts.task.reference is not None:
        unanimous(ranks, lambda: reference.compute(parts, options.start, progress_of("reference")))
    return Loaded(run_inputs, parts, parts.checkpoints.restore(parts.model, parts.optimizer), probed)


def train(rundir: RunDir, loaded: Loaded, stop: Stop, clock: Clock) -> dict[str, Any]:
    """Train to the last step, save the model and the samples; return the numbers of the summary (rank 0)."""
    from runner.models import pretrained
    from runner.train import loop, mlmodel, text_generation

    inputs, parts, progress, probed = loaded
    leads, folder = parts.ranks.rank == 0, rundir.identity()
    if leads:
        _begin(rundir, loaded)
    clock.start()
    watching = _callbacks(rundir, inputs, leads=leads)
    watching.call("start", progress.step)
    in_step = inputs.options.parallel.kind == "fsdp"
    tokens = inputs.settings.sample_tokens
    ask = partial(text_generation.generate, parts.model, inputs.tokenizer, max_new_tokens=tokens, in_step=in_step)
    with stop.at_once(), clock.parts.timing("samples"):
        samples = _samples_before(rundir, inputs, ask, progress.step, parts.ranks)
    graphs: list[int] = []
    following = _writing_hooks(rundir, inputs, clock, stop, graphs, folder) if leads else _silent_hooks(stop)
    with following as hooks, clock.parts.timing("training"), parts.profile.running():
        progress = loop.train(parts, progress, watching.follow(hooks))
    if leads:
        _refuse_removed(rundir, folder)
    with stop.at_once(), clock.parts.timing("saving"):  # the last step is saved
        parts.checkpoints.restore_result(parts.model, progress)
        pretrained.save(parts.model, inputs.tokenizer, rundir.model, writes=leads)
        if leads:
            mlmodel.write(rundir, inputs)
    with stop.at_once(), clock.parts.timing("samples"):
        _answer(rundir, ask, samples, "after", writes=leads)
    watching.call("end", progress.step)
    peaks = parts.extra_metrics()
    if not leads:
        return {}
    rundir.update_manifest(weights_sha256=provenance.weights_digest(rundir.model))
    compiled = run_facts.compiled(parts.model, sum(graphs))
    numbers = run_facts.numbers(rundir, parts, progress, clock.seconds())
    return {**numbers, "part seconds": clock.parts.seconds, **peaks, **probed, **compiled}


def _callbacks(rundir: RunDir, inputs: Inputs, *, leads: bool) -> Callbacks:
    """The callbacks of the run, with the metrics that earlier attempts recorded; none on the other ranks."""
    from runner.train.callbacks import Callbacks

    if not leads or not inputs.callbacks:
        return Callbacks()
    recorded = (pair for record in metrics_log.read(rundir) for pair in record.items())
    metrics = {name: value for name, value in recorded if name not in ("step", "time")}
    return Callbacks(inputs.callbacks, rundir.path, metrics)


def _begin(rundir: RunDir, loaded: Loaded) -> None:
    """Drop records after the checkpoint, and write manifest.json and state.json."""
    inputs, parts, progress, _ = loaded
    metrics_log.rewind(rundir, progress.step, progress.evaluated)
    run_summary.warn_of_losses(rundir, inputs, progress)
    if progress.step:
        run_facts.warn_of_products(rundir)
    rundir.update_manifest(**run_facts.manifest(inputs, parts, rundir))
    if progress.step:
        log.info(f"resumed at step {progress.step}/{inputs.total_steps}")
    if slurm_client.own_id():
        rundir.update_manifest(scheduler_name=slurm_client.own_ref().name)
    state = rundir.read_state()
    rundir.write_state(
        status="running", attempt=state.attempt + 1, pid=os.getpid(), host=os.uname().nodename, reason="",
        step=progress.step, total_steps=inputs.total_steps, started=state.started or time.time(),
        scheduler_id=slurm_client.own_id(),
    )  # fmt: skip


@contextlib.contextmanager
def _writing_hooks(
    rundir: RunDir, inputs: Inputs, clock: Clock, stop: Stop, graphs: list[int], folder: tuple[int, int]
) -> Iterator[Hooks]:
    """The hooks of rank 0, which write to the run folder (``folder``: its identity) and the terminal."""
    from runner.train.parts import Hooks

    last_step, written_at = rundir.read_state().step, 0.0

    def write_state() -> None:
        nonlocal written_at
        _refuse_removed(rundir, folder)
        rundir.write_state(step=last_step, seconds=clock.seconds())
        written_at = time.monotonic()

    with terminal.Display(inputs.total_steps) as display:

        def record(step: int, metrics: dict[str, float]) -> None:
            nonlocal last_step
            _refuse_removed(rundir, folder)
            metrics_log.append(rundir, {"step": step, "time": time.time(), **metrics})
            last_step = step
            if time.monotonic() - written_at >= STATE_EVERY_S:
                write_state()
            display.record(step, metrics)

        def check_stop() -> None:
            stop.check()
            if rundir.prune_request.exists():
                raise Pruned(rundir.prune_request.read_text())

        try:
            yield Hooks(
                record=record,
                evaluating=_timed(display.evaluating, clock.parts),
                saving=lambda _: metrics_log.sync_to_disk(rundir),
                check_stop=check_stop,
                warm=lambda: graphs.append(compilation.graphs()),
                is_late=lambda: clock.seconds() >= 60 * (inputs.settings.max_minutes or math.inf),
            )
        finally:
            # A checkpoint may be newer than the last record (train.logging_steps).
            last_step = max(last_step, rundir.saved_step())
            # A full disk or a removed folder: reported by the error that ends the run.
            with contextlib.suppress(OSError, DamagedError, TrainingError):
                write_state()


def _timed(evaluating: Callable[[int, int], None], parts: terminal.Stopwatch) -> Callable[[int, int], None]:
    """The hook ``evaluating``, which also adds the time from the first to the last call to the part ``evaluation``."""
    running = contextlib.ExitStack()

    def timed(done: int, count: int) -> None:
        if not done:
            running.enter_context(parts.timing("evaluation"))
        evaluating(done, count)
        if done == count:
            running.close()

    return timed


@contextlib.contextmanager
def _silent_hooks(stop: Stop) -> Iterator[Hooks]:
    """The hooks of the other ranks, which write nothing."""
    from runner.train.parts import Hooks

    def nothing(*_: object) -> None:
        pass

    yield Hooks(record=nothing, evaluating=nothing, saving=nothing, check_stop=stop.check, warm=nothing)


def _refuse_removed(rundir: RunDir, identity: tuple[int, int]) -> None:
    """Check that the folder is still the one in which this worker began.

    Raises:
        TrainingError: it was removed, or removed and created again, or has lost its manifest.
    """
    if rundir.identity() != identity or not rundir.manifest.exists():
        lost = rundir.path if rundir.identity() != identity else rundir.manifest
        problem = f"{lost} was removed while the run trained"
        raise TrainingError(Fault("", problem, "start the run again"))


def _refuse_other_data(rundir: RunDir, data: dict[str, Any]) -> None:
    """Check that a resumed run has the same data as before, and a rerun the data of the original run."""
    manifest = rundir.read_manifest()
    before, is_first = manifest.get("data") or {}, bool(manifest.get("rerun")) and not rundir.read_state().attempt
    for group in ("sources", "evals"):
        for name, each in (data.get(group) or {}).items():
            _refuse_other_digest(f"data.{group}.{name}", each, (before.get(group) or {}).get(name) or {}, is_first)
    _refuse_other_digest("data", data, before, is_first)
    if before.get("function", data["function"]) != data["function"]:
        why = "is not that of the original run" if is_first else "has changed since this run began"
        remedy = "set the key to its new location" if is_first else "start a new run with it"
        problem = f"the source code of the function {why}"
        raise ResumeError(Fault("data.format.function", problem, f"restore it, or {remedy}"))


def _refuse_other_digest(key: str, data: dict[str, Any], before: dict[str, Any], is_first: bool) -> None:
    """``is_first``: ``before`` is the data of the run that this one repeats."""
    if (earlier := before.get("digest", data["digest"])) != data["digest"]:
        why = "is not the data of the original run" if is_first else "has changed since this run began"
        remedy = "set data.path to its new location" if is_first else "start a new run with it"
        problem = f"{data['uri']} {why} (digest {earlier}, now {data['digest']})"
        raise ResumeError(Fault(key, problem, f"restore the data, or {remedy}"))


def _samples_before(rundir: RunDir, inputs: Inputs, ask: Ask, step: int, ranks: Ranks) -> list[dict[str, str]]:
    """Samples of the untrained model, saved in the folder; a resumed run reads them from there.

    If a resumed run has lost them, the prompts without answers: the model is no longer untrained.
    """
    saved = run_summary.samples(rundir) if step and ranks.rank == 0 else None
    if (samples := ranks.broadcast(saved)) is not None:
        return list(samples)
    prompts = inputs.splits.samples[: inputs.settings.sample_prompts]
    if step:
        if prompts and ranks.rank == 0:
            log.warning(f"{rundir.samples} is lost: the answers of the model before training are not shown")
        return prompts
    return _answer(rundir, ask, prompts, "before", writes=ranks.rank == 0)


def _answer(rundir: RunDir, ask: Ask, samples: list[dict[str, str]], key: str, *, writes: bool) -> list[dict[str, str]]:
    """Add the model's answers to the samples under ``key``; save them in the folder if ``writes``."""
    watch = terminal.progress(f"generating samples {key} training: token") if writes else None
    answers = ask([sample["prompt"] for sample in samples], progress=watch)
    answered = [{**sample, key: answer} for sample, answer in zip(samples, answers, strict=True)]
    if writes:
        write_atomic(rundir.samples, json.dumps(answered, indent=1, ensure_ascii=False))
    return answered
