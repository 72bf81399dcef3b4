"""Entry point of every Slurm task: find the run folder, set the rank's environment variables, train.

A requeued job starts here again and resumes from the run folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from runner.errors import LaunchError
from runner.launch.slurm import snapshot
from runner.signals import signals_to
from runner.tracking import slurm_client
from runner.tracking.mirror import backlog
from runner.tracking.rundir import RunDir

EARLY_WARNING_S = 60.0
"""Slurm checks time limits once a minute: the signal may come this much earlier than ``signal_delay_s``."""
REPORT_TIMEOUT_S = 60.0
"""How long a failed rank waits for rank 0 to record the failure: when the rank exits, Slurm kills the others."""


def run(file: str) -> None:
    """Train the run of this job as one rank; submitit calls this function in every task.

    Args:
        file: JSON file of the submission; array task n trains the n-th folder in it.

    Raises:
        SystemExit: the run's exit code, unless it is 0; Slurm then shows the job as FAILED.
    """
    from submitit import JobEnvironment

    job = JobEnvironment()
    submission = json.loads(Path(file).read_text())
    rundir = RunDir(Path(submission["folders"][int(job.array_task_id or 0)]))
    os.environ.update(rank_environment(job))
    if submission["code"]:
        _refuse_other_code(rundir, Path(submission["code"]), job.global_rank)
        sys.path.append(str(Path.cwd()))  # PYTHONSAFEPATH leaves it out
    first_step = rundir.saved_step()
    early: list[int] = []  # signals that arrive while no worker handles them
    with signals_to(lambda number, _: early.append(number)):
        code = _work(rundir, job, early)
        if job.global_rank == 0 and job.cluster == "slurm" and code == 75:
            code = _after_stop(rundir, submission, has_advanced=rundir.saved_step() > first_step)
    if code:
        sys.exit(code)


def rank_environment(job: Any) -> dict[str, str]:
    """The environment variables of torch.distributed."""
    # Another port for each start, as the last one may still be in use; below Linux's range of ephemeral ports.
    start = f"{job.job_id} {os.environ.get('SLURM_RESTART_COUNT', '0')}"
    port = 20000 + int(hashlib.sha256(start.encode()).hexdigest(), 16) % 12000
    return {
        "MASTER_ADDR": "127.0.0.1" if job.num_nodes == 1 else job.hostnames[0],
        "MASTER_PORT": str(port),
        "RANK": str(job.global_rank),
        "WORLD_SIZE": str(job.num_tasks),
        "LOCAL_RANK": str(job.local_rank),
        "LOCAL_WORLD_SIZE": str(job.num_tasks // job.num_nodes),
    }


def _refuse_other_code(rundir: RunDir, code: Path, rank: int) -> None:
    """End this process if it does not run the snapshot of the code.

    Raises:
        SystemExit: with code 1, after the reason is in state.json and MLflow.
    """
    if not (problem := snapshot.mismatch(code)):
        return
    deadline = time.monotonic() + REPORT_TIMEOUT_S
    while rank and rundir.read_state().reason != problem and time.monotonic() < deadline:
        time.sleep(0.2)  # rank 0 records it; when this rank exits, Slurm kills the others
    if rundir.read_state().reason != problem:
        rundir.write_state(status="failed")
        _record_not_requeued(rundir, problem)
    sys.exit(1)


def _work(rundir: RunDir, job: Any, early: list[int]) -> int:
    """Train; returns the exit code of this rank. After a stop, only rank 0 returns a code other than 0."""
    from runner.train import worker

    if job.global_rank == 0:
        _wait_for_predecessor(rundir, early)
    code = 75 if early else worker.work(rundir)
    if job.global_rank == 0:
        return code
    ended_at = time.monotonic()
    while code == 1 and rundir.is_alive() and time.monotonic() - ended_at < REPORT_TIMEOUT_S:
        time.sleep(0.2)
    return code if code == 1 else 0


def _wait_for_predecessor(rundir: RunDir, early: list[int]) -> None:
    """After a node failure the old worker may still run for a while; wait until it has ended, or until a signal."""
    if rundir.is_alive():
        print(f"waiting for another worker of {rundir.path} to end", file=sys.stderr, flush=True)
    while rundir.is_alive() and not early:
        time.sleep(0.5)


def _after_stop(rundir: RunDir, submission: dict[str, Any], *, has_advanced: bool) -> int:
    """Requeue the job after a preemption or at the time limit, unless the job could not train any further."""
    id, restarts, limit = slurm_client.own_id(), slurm_client.own_restarts(), submission["max_requeues"]
    reason = rundir.read_state().reason
    try:
        if (fate := slurm_client.fate(id, restarts)) in ("running", "time limit"):
            left = 0.0 if fate == "time limit" else slurm_client.seconds_left(id)
            if restarts >= limit:
                problem = f"not requeued again (launcher.max_requeues={limit})"
            elif not has_advanced and left <= submission["signal_delay_s"] + EARLY_WARNING_S:
                problem = "not requeued: the time limit leaves no time to train; set a larger launcher.timeout_min"
            else:
                print(f"requeueing job {id} ({restarts + 1}/{limit}): {reason}", file=sys.stderr, flush=True)
                slurm_client.requeue(id)
                return 75
            _record_not_requeued(rundir, f"{problem}; {reason}")
    except LaunchError as error:
        _record_not_requeued(rundir, f"could not be requeued ({error.faults[0].problem}); {reason}")
    return 75


def _record_not_requeued(rundir: RunDir, reason: str) -> None:
    """Write to state.json, the manifest and MLflow that the job is not requeued; the mirror may have ended."""
    print(reason, file=sys.stderr, flush=True)
    rundir.write_state(reason=reason)
    rundir.update_manifest(slurm={**(rundir.read_manifest().get("slurm") or {}), "has_left": True})
    for problem in backlog.upload([rundir.path]) if backlog.is_wanted(rundir) else []:
        print(problem, file=sys.stderr, flush=True)
