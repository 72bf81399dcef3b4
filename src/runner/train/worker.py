"""The worker: one attempt at a prepared run folder, as one rank. Reads only the folder and the environment variables.

``python -m runner.worker FOLDER`` starts or resumes a run, depending on the folder's state. All ranks compute; only
rank 0 holds the lock of the folder, writes into it and prints to the terminal.
"""

from __future__ import annotations

import contextlib
import logging
import sys

from runner import log_handlers, streams, terminal
from runner.errors import Fault, LaunchError, Pruned, RunnerError, Stopped
from runner.signals import Stop
from runner.tracking import recovery
from runner.tracking.mirror import spawn
from runner.tracking.rundir import RunDir
from runner.train import attach, attempt, outcome, run_summary
from runner.train.distributed.ranks import Ranks, lost_peer, of_environment, silent
from runner.train.options import Options
from runner.train.outcome import Clock

log = logging.getLogger("runner")


@streams.guarded()
@streams.unblocked()
def work(rundir: RunDir, *, mirrored: bool = False) -> int:
    """Train the run in ``rundir`` until it completes, fails or is stopped.

    ``mirrored``: another process uploads the folder to MLflow, as for the runs of a sweep.

    Returns:
        the exit code: 0 completed (now or earlier), 1 failed, 2 refused, 75 preempted, 130 interrupted. Ranks other
        than 0 return 0 unless they fail, because launchers stop all ranks when one exits with another code.
    """
    ranks = of_environment()
    if ranks.rank:
        with silent(rundir.rank_log(ranks.rank)):
            return _other_rank(rundir, ranks)
    with rundir.held() as holds_lock:
        if holds_lock and (problem := recovery.rebuild_state(rundir)):
            print(f"{problem}; rebuilt from the checkpoints", file=sys.stderr)
        state = rundir.read_state()
        if not holds_lock or state.status == "completed":
            _dismiss(ranks)
            return _completed_already(rundir) if holds_lock else attach.follow(rundir)
        if rundir.cancel_request.exists():
            _dismiss(ranks)
            return _cancelled_already(rundir)
        with log_handlers.logging_to(rundir.log), Stop() as stop:
            code = _attempt(rundir, ranks, stop, mirrored)
        if code == 2 and state.status == "pending" and not state.attempt:
            recovery.discard(rundir)
    if code != 1 and not stop.was_hasty:
        ranks.leave()
    return code


def _attempt(rundir: RunDir, ranks: Ranks, stop: Stop, mirrored: bool) -> int:
    """Train, and record how the attempt ended."""
    mirror, clock = None, Clock(rundir.read_state().seconds)
    try:
        outcome.clear(rundir)
        recovery.restore_manifest(rundir)
        options = Options.of(rundir)
        _refuse_other_world(options, ranks)
        mirror = None if mirrored else spawn.start_mirror(rundir)
        with stop.at_once():
            ranks.join()
            is_pruned = rundir.prune_request.exists()
            ranks.broadcast(not is_pruned)
            if is_pruned:
                raise Pruned(rundir.prune_request.read_text())
            if not mirrored:
                terminal.loading("data and model")
            with clock.parts.timing("loading"):
                loaded = attempt.load(rundir, options, ranks)
        summary = attempt.train(rundir, loaded, stop, clock)
        reason = summary.pop("reason", "")
        rundir.write_state(status="completed", reason=reason, summary=summary, seconds=clock.seconds())
        code = 0
    except (Stopped, KeyboardInterrupt) as error:
        # A launcher stops the remaining ranks when one rank fails.
        failed = outcome.last_words(rundir, ranks, wait_s=0.0)
        code = outcome.left_by_peer(rundir, clock, ranks) if failed else outcome.stopped(rundir, clock, error)
    except Exception as error:
        if isinstance(error, RunnerError) and error.exit_code == 2 and not clock.is_started:
            return outcome.refused(rundir, clock, error)
        lost = ranks.world > 1 and lost_peer(error)
        code = outcome.left_by_peer(rundir, clock, ranks) if lost else outcome.failed(rundir, clock, error)
    if rundir.manifest.exists():  # else the folder was removed
        run_summary.ending(rundir, None if mirrored else _uploaded(mirror, rundir, stop), code)
    return code


def _uploaded(mirror: spawn.Mirror | None, rundir: RunDir, stop: Stop) -> spawn.MirrorResult:
    """Wait for the upload; after a stop only for a moment, because schedulers kill soon: the upload process goes on."""
    with contextlib.suppress(Stopped), stop.at_once():
        return spawn.wait_mirror(mirror, rundir)
    return spawn.wait_mirror(mirror, rundir, timeout_s=spawn.AFTER_A_STOP_S)


def _other_rank(rundir: RunDir, ranks: Ranks) -> int:
    """``_attempt`` for ranks other than 0, which write only their own log."""
    clock = Clock(0.0)
    with log_handlers.logging_to(rundir.rank_log(ranks.rank), speaks=False), Stop() as stop:
        try:
            options = Options.of(rundir)
            _refuse_other_world(options, ranks)
            with stop.at_once():
                ranks.join()
                is_training = ranks.broadcast(False)
                loaded = attempt.load(rundir, options, ranks) if is_training else None
            if loaded:
                attempt.train(rundir, loaded, stop, clock)
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
    """Let the other ranks exit without training."""
    ranks.join()
    ranks.broadcast(False)
    ranks.leave()


def _completed_already(rundir: RunDir) -> int:
    print(f"{rundir.path} is completed already: nothing to do", file=sys.stderr)
    return 0


def _cancelled_already(rundir: RunDir) -> int:
    """Record that the run was cancelled between launch and start."""
    reason = rundir.cancel_request.read_text().strip() or "cancelled"
    print(f"{rundir.path} is not started: {reason}", file=sys.stderr)
    with contextlib.suppress(OSError):  # disk full
        rundir.write_state(status="killed", reason=reason)
    return outcome.CODES["killed"]


def _refuse_other_world(options: Options, ranks: Ranks) -> None:
    """Check the number of processes: the batches of a run are divided over a fixed number."""
    expected = options.parallel.processes
    if expected != ranks.world:
        problem = f"this run needs {_processes(expected)}, but {_processes(ranks.world)} started"
        remedy = f"use launcher=accelerate launcher.processes={expected}, torchrun or launcher=slurm"
        if expected == 1:
            remedy = "start one process, or a new run with parallel=ddp"
        raise LaunchError(Fault("parallel.processes", problem, remedy, expected))


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"
