"""What runs in each task of a job: it finds its run folder, says which rank it is, and works.

Slurm starts the same job again after a preemption, and whoever comes back finds everything in the folder.
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
from runner.signals import signals_to
from runner.tracking import slurm_client
from runner.tracking.mirror import behind
from runner.tracking.rundir import RunDir

EARLY_WARNING_S = 60.0
"""How much sooner than asked for Slurm may warn of the time limit: it looks at the clock this seldom."""
LONGEST_GOODBYE_S = 60.0
"""How long a failed rank lets rank 0 say why, before its end takes the others down."""


def run(file: str) -> None:
    """Work as one rank on the run that this job is for; submitit calls this in every task.

    Args:
        file: a submission; its n-th folder is that of the n-th task of an array.

    Raises:
        SystemExit: with the exit code of the run unless it is 0, so that Slurm says FAILED of what failed.
    """
    from submitit import JobEnvironment

    job = JobEnvironment()
    asked = json.loads(Path(file).read_text())
    rundir = RunDir(Path(asked["folders"][int(job.array_task_id or 0)]))
    os.environ.update(rank_environment(job))
    begun_at = rundir.saved_step()
    early: list[int] = []  # a stop may come before the worker listens, and again while it is decided what follows
    with signals_to(lambda number, _: early.append(number)):
        code = _work(rundir, job, early)
        if job.global_rank == 0 and job.cluster == "slurm" and code == 75:
            code = _after_stop(rundir, asked, has_advanced=rundir.saved_step() > begun_at)
    if code:
        sys.exit(code)


def rank_environment(job: Any) -> dict[str, str]:
    """The variables by which torch's ranks find each other."""
    # A new port for each start: the last one may still be taken. Below the range from which Linux gives ports away.
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


def _work(rundir: RunDir, job: Any, early: list[int]) -> int:
    """The exit code of this rank; that of a stop is rank 0's alone to give, it decides what Slurm does then."""
    from runner.train import worker

    if job.global_rank == 0:
        _wait_for_predecessor(rundir, early)
    code = 75 if early else worker.work(rundir)
    if job.global_rank == 0:
        return code
    waited = time.monotonic()
    while code == 1 and rundir.is_alive() and time.monotonic() - waited < LONGEST_GOODBYE_S:
        time.sleep(0.2)
    return code if code == 1 else 0


def _wait_for_predecessor(rundir: RunDir, early: list[int]) -> None:
    """After a node was lost, the worker there may live on for a while; nobody can take over before it has ended."""
    said = False
    while rundir.is_alive() and not early:
        if not said:
            print(f"waiting for another worker of {rundir.path} to end", file=sys.stderr, flush=True)
            said = True
        time.sleep(0.5)


def _after_stop(rundir: RunDir, asked: dict[str, Any], *, has_advanced: bool) -> int:
    """Continue after a preemption or the time limit: the job goes back into the queue, unless that is of no use."""
    id, restarts, most = slurm_client.own_id(), slurm_client.own_restarts(), asked["max_requeues"]
    reason = rundir.read_state().reason
    try:
        if slurm_client.fate(id, restarts) == "running":
            if restarts >= most:
                problem = f"not requeued again (launcher.max_requeues={most})"
            elif not has_advanced and slurm_client.seconds_left(id) <= asked["signal_delay_s"] + EARLY_WARNING_S:
                problem = "not requeued: its time limit leaves no time to train; give it a longer launcher.timeout_min"
            else:
                print(f"requeueing {id} ({restarts + 1}/{most}): {reason}", file=sys.stderr, flush=True)
                slurm_client.requeue(id)
                return 75
            _leave(rundir, f"{problem}; {reason}")
    except LaunchError as error:
        _leave(rundir, f"could not be requeued ({error.faults[0].problem}); {reason}")
    return 75


def _leave(rundir: RunDir, reason: str) -> None:
    """It stays as it is until somebody submits it again; its mirror has ended before that was known."""
    print(reason, file=sys.stderr, flush=True)
    rundir.write_state(reason=reason)
    rundir.update_manifest(slurm={**(rundir.read_manifest().get("slurm") or {}), "has_left": True})
    for problem in behind.tell([rundir.path]) if behind.is_wanted(rundir) else []:
        print(problem, file=sys.stderr, flush=True)
