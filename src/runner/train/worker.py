"""One rank: from a prepared run folder to its end. It reads the folder and its environment, and nothing else.

It starts or resumes, decided by what it finds: ``python -m runner.worker FOLDER`` is all a launcher has to run. Of
several ranks all compute, and rank 0 alone holds the folder, writes into it and speaks.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from runner import terminal
from runner.config import user_code
from runner.errors import Fault, LaunchError, Pruned, ResumeError, RunnerError, Stopped
from runner.files import write_atomic
from runner.models.kernels import compilation
from runner.signals import Stop
from runner.tracking import manifest, metrics_log, provenance, slurm_client
from runner.tracking.mirror import spawn
from runner.tracking.rundir import RunDir
from runner.train import attach, outcome, report
from runner.train.distributed import parallel
from runner.train.distributed.ranks import Ranks, lost_peer, of_environment, silent, unanimous
from runner.train.outcome import Clock

if TYPE_CHECKING:
    from runner.train.checkpoint import Progress
    from runner.train.inputs import Inputs
    from runner.train.loop import Hooks, Parts

Ask = Callable[[list[str]], list[str]]
STATE_EVERY_S = 0.5
"""Between two writings of how far a run is: each waits for the disk, for milliseconds or, on a network, more."""
log = logging.getLogger("runner")


class Loaded(NamedTuple):
    """All that is needed to train; until it is there a run can be refused."""

    cfg: dict[str, Any]
    made: Inputs
    parts: Parts
    progress: Progress
    probed: dict[str, float]
    """Metrics of the memory that was tried out."""


def work(rundir: RunDir, *, mirrored: bool = False) -> int:
    """Bring the run in ``rundir`` to its end, or as far as it gets.

    ``mirrored``: another process brings the folder into MLflow, as for all runs of a sweep.

    Returns:
        the exit code: 0 completed (now or earlier), 1 failed, 2 refused, 75 preempted, 130 interrupted. Ranks beyond 0
        return 0 unless they fail: whoever started them stops the others when one ends with another code.
    """
    ranks = of_environment()
    if ranks.rank:
        with silent(rundir.rank_log(ranks.rank)):
            return _along(rundir, ranks)
    with rundir.held() as mine:
        found = rundir.read_state()
        if not mine or found.status == "completed":
            _dismiss(ranks)
            return _found_completed(rundir) if mine else attach.follow(rundir)
        if rundir.cancel_request.exists():
            _dismiss(ranks)
            return _found_cancelled(rundir)
        with terminal.logging_to(rundir.log), Stop() as stop:
            code = _attempt(rundir, ranks, stop, mirrored)
        if code == 2 and found.status == "pending" and not found.attempt:
            rundir.discard()
    if code != 1 and not stop.was_hasty:
        ranks.leave()
    return code


def _attempt(rundir: RunDir, ranks: Ranks, stop: Stop, mirrored: bool) -> int:
    """Train, and write down truthfully how it ended."""
    mirror, clock = None, Clock(rundir.read_state().seconds)
    try:
        outcome.clear(rundir)
        cfg = manifest.read_config(rundir)
        _refuse_other_world(cfg, ranks)
        mirror = None if mirrored else spawn.start_mirror(rundir, cfg)
        with stop.at_once():
            ranks.join()
            is_given_up = rundir.prune_request.exists()
            ranks.broadcast(not is_given_up)
            if is_given_up:
                raise Pruned(rundir.prune_request.read_text())
            if not mirrored:
                terminal.loading("data and model")
            loaded = _load(rundir, cfg, ranks)
        summary = _train(rundir, loaded, stop, clock)
        rundir.write_state(status="completed", reason="", summary=summary, seconds=clock.seconds())
        code = 0
    except (Stopped, KeyboardInterrupt) as error:
        # A launcher stops those that are left when one of the ranks fails.
        failed = outcome.last_words(rundir, ranks, wait_s=0.0)
        code = outcome.left_by_peer(rundir, clock, ranks) if failed else outcome.stopped(rundir, clock, error)
    except Exception as error:
        if isinstance(error, RunnerError) and error.exit_code == 2 and not clock.is_started:
            return outcome.refused(rundir, clock, error)
        lost = ranks.world > 1 and lost_peer(error)
        code = outcome.left_by_peer(rundir, clock, ranks) if lost else outcome.failed(rundir, clock, error)
    report.ending(rundir, None if mirrored else spawn.wait_mirror(mirror, rundir), code)
    return code


def _along(rundir: RunDir, ranks: Ranks) -> int:
    """The same way on the other ranks, which write nothing but their own log."""
    clock = Clock(0.0)
    with terminal.logging_to(rundir.rank_log(ranks.rank), speaks=False), Stop() as stop:
        try:
            cfg = manifest.read_config(rundir)
            _refuse_other_world(cfg, ranks)
            with stop.at_once():
                ranks.join()
                wanted = ranks.broadcast(False)
                loaded = _load(rundir, cfg, ranks) if wanted else None
            if loaded:
                _train(rundir, loaded, stop, clock)
        except (Stopped, KeyboardInterrupt) as error:
            log.warning(f"stopped: {error}")
        except Exception as error:
            if not isinstance(error, RunnerError) or error.exit_code != 2 or clock.is_started:
                return outcome.failed_along(rundir, ranks, error)
            log.error(str(error))
    if not stop.was_hasty:
        ranks.leave()
    return 0


def _dismiss(ranks: Ranks) -> None:
    """There is nothing to do for the others."""
    ranks.join()
    ranks.broadcast(False)
    ranks.leave()


def _found_completed(rundir: RunDir) -> int:
    print(f"{rundir.path} is completed already: nothing to do", file=sys.stderr)
    return 0


def _found_cancelled(rundir: RunDir) -> int:
    """Somebody cancelled it after it had been handed over, which forgets what was asked before."""
    reason = rundir.cancel_request.read_text().strip() or "cancelled"
    print(f"{rundir.path} is not begun: {reason}", file=sys.stderr)
    with contextlib.suppress(OSError):  # a full disk
        rundir.write_state(status="killed", reason=reason)
    return outcome.CODES["killed"]


def _refuse_other_world(cfg: Mapping[str, Any], ranks: Ranks) -> None:
    """A run is continued by as many processes as it began with: its batches are divided over them."""
    wanted = parallel.processes_of(cfg["parallel"])
    if wanted != ranks.world:
        problem = f"this run is trained by {_processes(wanted)}, and {_processes(ranks.world)} started"
        remedy = f"start it with launcher=accelerate launcher.processes={wanted}, torchrun or launcher=slurm"
        if wanted == 1:
            remedy = "start one process, or a new run with parallel=ddp"
        raise LaunchError(Fault("parallel.processes", problem, remedy, wanted))


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"


def _load(rundir: RunDir, cfg: dict[str, Any], ranks: Ranks) -> Loaded:
    from runner.train import (
        build,
        inputs,
        probe,  # torch and all that, only now
    )

    terminal.quiet_libraries()

    def read() -> Inputs:
        user_code.refuse_changed(cfg)
        made = inputs.inputs(manifest.pinned(cfg, rundir), ranks)
        _refuse_other_data(rundir, report.data_identity(cfg, made))
        return made

    made = build.resolve_micro_batch_size(cfg, unanimous(ranks, read), ranks)
    parts = unanimous(ranks, lambda: build.parts(cfg, made, rundir, ranks))
    made, parts, probed = probe.fit(made, parts)
    if ranks.rank == 0:
        report.header(cfg, made, parts, rundir)
    return Loaded(cfg, made, parts, parts.checkpoints.restore(parts.model, parts.optimizer), probed)


def _train(rundir: RunDir, loaded: Loaded, stop: Stop, clock: Clock) -> dict[str, Any]:
    """Train from where the run stands to its end; returns the numbers of the summary."""
    from runner.models import pretrained
    from runner.train import generate, loop

    cfg, made, parts, progress, probed = loaded
    leads = parts.ranks.rank == 0
    if leads:
        _begin(rundir, loaded)
    clock.start()
    in_step = parallel.kind_of(cfg["parallel"]) == "fsdp"
    ask = partial(
        generate.generate, parts.model, made.tokenizer, max_new_tokens=made.settings.sample_tokens, in_step=in_step
    )
    with stop.at_once():
        answered = _samples_before(rundir, made, ask, progress.step, parts.ranks)
    graphs: list[int] = []
    with _telling(rundir, made, clock, stop, graphs) if leads else _silent(stop) as hooks:
        progress = loop.train(parts, progress, hooks)
    pretrained.save(parts.model, made.tokenizer, rundir.model, writes=leads)
    _samples_after(rundir, ask, answered, writes=leads)
    peaks = parts.extra_metrics()
    if not leads:
        return {}
    rundir.update_manifest(weights_sha256=provenance.weights_digest(rundir.model))
    compiled = report.compiled(parts.model, sum(graphs))
    return {**report.summary(rundir, parts, progress, clock.seconds()), **peaks, **probed, **compiled}


def _begin(rundir: RunDir, loaded: Loaded) -> None:
    cfg, made, parts, progress, _ = loaded
    metrics_log.rewind(rundir, progress.step, progress.evaluated)
    rundir.update_manifest(**report.manifest(cfg, made, parts, rundir))
    if progress.step:
        log.info(f"resumed at step {progress.step}/{made.total_steps}")
    state = rundir.read_state()
    rundir.write_state(
        status="running", attempt=state.attempt + 1, pid=os.getpid(), host=os.uname().nodename, reason="",
        step=progress.step, total_steps=made.total_steps, started=state.started or time.time(),
        scheduler_id=slurm_client.own_id(),
    )  # fmt: skip


@contextlib.contextmanager
def _telling(rundir: RunDir, made: Inputs, clock: Clock, stop: Stop, graphs: list[int]) -> Iterator[Hooks]:
    """The hooks of rank 0: into the folder and onto the terminal."""
    from runner.train import loop

    reached, told_at = rundir.read_state().step, 0.0

    def tell_state() -> None:
        nonlocal told_at
        rundir.write_state(step=reached, seconds=clock.seconds())
        told_at = time.monotonic()

    with terminal.Display(made.total_steps) as display:

        def record(step: int, metrics: dict[str, float]) -> None:
            nonlocal reached
            metrics_log.append(rundir, {"step": step, "time": time.time(), **metrics})
            reached = step
            if time.monotonic() - told_at >= STATE_EVERY_S:
                tell_state()
            display.record(step, metrics)

        def check_stop() -> None:
            stop.check()
            if rundir.prune_request.exists():
                raise Pruned(rundir.prune_request.read_text())

        try:
            yield loop.Hooks(
                record=record,
                evaluating=display.evaluating,
                saving=partial(metrics_log.sync_to_disk, rundir),
                check_stop=check_stop,
                warm=lambda: graphs.append(compilation.graphs()),
            )
        finally:
            with contextlib.suppress(OSError):  # a full disk: what ends the run says so
                tell_state()


@contextlib.contextmanager
def _silent(stop: Stop) -> Iterator[Hooks]:
    """The hooks of the other ranks."""
    from runner.train import loop

    def nothing(*_: object) -> None:
        pass

    yield loop.Hooks(record=nothing, evaluating=nothing, saving=nothing, check_stop=stop.check, warm=nothing)


def _refuse_other_data(rundir: RunDir, found: dict[str, Any]) -> None:
    """A run goes on with the rows that it began with, or not at all; a rerun has those of its original."""
    manifest = rundir.read_manifest()
    begun = manifest.get("data") or {}
    if manifest.get("rerun") and not rundir.read_state().attempt:
        _refuse_others_than_original(begun, found)
    if begun.get("digest", found["digest"]) != found["digest"]:
        problem = f"{found['uri']} is not what this run began with (digest {found['digest']}, then {begun['digest']})"
        raise ResumeError(Fault("data", problem, "restore the data, or start a new run with it"))
    if begun.get("function", found["function"]) != found["function"]:
        problem = "the source text of the function has changed since this run began"
        raise ResumeError(Fault("data.format.function", problem, "restore it, or start a new run with it"))


def _refuse_others_than_original(original: dict[str, Any], found: dict[str, Any]) -> None:
    same = {key: original.get(key, found[key]) == found[key] for key in ("digest", "function")}
    if not same["digest"]:
        problem = f"{found['uri']} is not what the run was trained on that this repeats"
        problem += f" (digest {found['digest']}, then {original['digest']})"
        raise ResumeError(Fault("data", problem, "restore the data, or name where it lies with data.path=…"))
    if not same["function"]:
        problem = "the source text of the function is not that of the run that this repeats"
        raise ResumeError(Fault("data.format.function", problem, "restore it, or name where it lies"))


def _samples_before(rundir: RunDir, made: Inputs, ask: Ask, step: int, ranks: Ranks) -> list[dict[str, str]]:
    """Answers of the untrained model; kept in the folder, so that a resumed run still has them."""
    kept = json.loads(rundir.samples.read_text()) if step and ranks.rank == 0 and rundir.samples.exists() else None
    if (answered := ranks.broadcast(kept)) is not None:
        return list(answered)
    chosen = made.splits.samples[: made.settings.sample_prompts]
    answers = ask([sample["prompt"] for sample in chosen])
    answered = [{**sample, "before": answer} for sample, answer in zip(chosen, answers, strict=True)]
    if ranks.rank == 0:
        write_atomic(rundir.samples, json.dumps(answered, indent=1, ensure_ascii=False))
    return answered


def _samples_after(rundir: RunDir, ask: Ask, answered: list[dict[str, str]], *, writes: bool) -> None:
    answers = ask([sample["prompt"] for sample in answered])
    done = [{**sample, "after": answer} for sample, answer in zip(answered, answers, strict=True)]
    if writes:
        write_atomic(rundir.samples, json.dumps(done, indent=1, ensure_ascii=False))
