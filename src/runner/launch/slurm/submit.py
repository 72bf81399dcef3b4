"""Submit runs to Slurm. Idempotent: concurrent or repeated calls submit a run once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from runner import files, terminal
from runner.errors import Fault, LaunchError
from runner.files import locked
from runner.launch.slurm import entry, script, snapshot, submission
from runner.launch.slurm.request import SlurmRequest
from runner.launch.slurm.submission import Submission
from runner.signals import signals_to
from runner.tracking import slurm_client, slurm_commands
from runner.tracking.rundir import RunDir
from runner.tracking.state_file import DONE, State
from runner.tracking.sweepdir import SweepDir, slurm_room


def submit(
    request: SlurmRequest,
    rundirs: Sequence[RunDir],
    sweep: SweepDir | None,
    before: Callable[[], object] = lambda: None,
) -> list[RunDir]:
    """Submit the runs that are not queued already, and set their status to ``pending``.

    Args:
        before: called when all of them are ``pending``, before the first is submitted.

    Returns:
        the runs that are not submitted, after a message: their earlier jobs have not left their nodes, or Slurm
        refused them after it had accepted others.

    Raises:
        LaunchError: Slurm accepted none, or the record of the submission cannot be written.
    """
    refused: list[RunDir] = []
    for home, members in _homes(rundirs, sweep).items():
        with (
            files.writing(home, LaunchError),
            locked(slurm_room(home) / ".lock"),  # concurrent commands submit one after the other
            signals_to(signal.SIG_IGN, [signal.SIGHUP]),  # a closed terminal would leave runs pending without a job
        ):
            refused += _submit_locked(request, home, members, before)
    return refused


def _submit_locked(
    request: SlurmRequest, home: Path, members: list[RunDir], before: Callable[[], object]
) -> list[RunDir]:
    for id in submission.adopt(home):
        print(f"recorded job {id}: an earlier command submitted it but did not record its id", file=sys.stderr)
    stuck = submission.wait_until_left(members)
    for rundir in stuck:
        job = rundir.read_manifest()["slurm"]["job_id"]
        print(f"{rundir.path} is not submitted: its job {job} has ended but has not left its nodes; repeat the command "
              "when squeue no longer lists the job", file=sys.stderr)  # fmt: skip
    members = [rundir for rundir in members if rundir not in stuck]
    new: list[RunDir] = []
    for rundir, is_queued in zip(members, submission.is_queued(members), strict=True):
        if is_queued:
            job = rundir.read_manifest()["slurm"]["job_id"]
            print(f"{rundir.path} is already queued (job {job})", file=sys.stderr)
        else:
            new.append(rundir)
    changed: list[_Before] = []
    try:
        for rundir in new:
            if earlier := _set_pending(rundir):
                changed.append(earlier)
        before()
        return stuck + _submit_new(request, home, new)
    finally:
        _restore(changed)


def run_here(request: SlurmRequest, rundirs: Sequence[RunDir], sweep: SweepDir | None) -> list[int]:
    """``cluster=debug``: train one run after another in this process; returns their exit codes."""
    from submitit import DebugExecutor

    codes = []
    for home, members in _homes(rundirs, sweep).items():
        for rundir in members:
            record = submission.begin(request, home, [rundir], None, None)
            job = DebugExecutor(slurm_room(home)).submit(entry.run, str(submission.path(home, record.name)))
            submission.note(home, record, job.job_id)
            try:
                job.results()
                codes.append(0)
            except SystemExit as end:
                codes.append(int(end.code or 0))
            if codes[-1] in (75, 130):
                return codes
    return codes


def _homes(rundirs: Sequence[RunDir], sweep: SweepDir | None) -> dict[Path, list[RunDir]]:
    """Runs by the folder that contains their submission record: the sweep's folder, or the run's own."""
    if sweep:
        return {sweep.path: list(rundirs)} if rundirs else {}
    return {rundir.path: [rundir] for rundir in rundirs}


class _Before(NamedTuple):
    """State and job of a run before it was submitted again."""

    rundir: RunDir
    state: State
    job: dict[str, Any] | None


def _set_pending(rundir: RunDir) -> _Before | None:
    """Set the run's status to ``pending`` and remove its earlier job from the manifest; returns what was replaced."""
    state, job = rundir.read_state(), rundir.read_manifest().get("slurm")
    if state.status == "pending" and not job:
        return None
    with rundir.held() as is_held:
        if is_held and rundir.read_state().status not in DONE:
            rundir.update_manifest(slurm=None)
            rundir.write_state(status="pending", reason="")
            return _Before(rundir, state, job)
    return None


def _restore(changed: Iterable[_Before]) -> None:
    """Restore state and manifest of the runs that Slurm has not accepted: their manifests contain no new job."""
    for rundir, state, job in changed:
        if rundir.read_manifest().get("slurm"):
            continue
        with contextlib.suppress(OSError), rundir.held() as is_held:  # a full disk: the run stays pending
            if is_held and rundir.read_state().status == "pending":
                rundir.update_manifest(slurm=job)
                rundir.write_state(status=state.status, reason=state.reason)


def _submit_new(request: SlurmRequest, home: Path, rundirs: list[RunDir]) -> list[RunDir]:
    """Submit these runs; returns those that Slurm refused after it had accepted others."""
    accepted: list[RunDir] = []
    longest, previous = longest_array(request), _still_queued(request, home)
    for members, code in _by_code(request, home, rundirs):
        for start in range(0, len(members), longest):
            part = members[start : start + longest]
            try:
                record = submission.begin(request, home, part, code, previous or None)
                id = (_to_slurm if request.cluster == "slurm" else _to_local)(request, home, record)
                submission.note(home, record, id)
            except Exception as error:  # keep the record: Slurm may have accepted the job although sbatch failed
                refusal = _refusal(error, home, len(accepted), len(rundirs))
                if not accepted:
                    raise refusal from error
                print(refusal, file=sys.stderr)
                return [rundir for rundir in rundirs if rundir not in accepted]
            accepted += part
            _print_submitted(request, id, part, previous)
            previous = id if request.array_parallelism else ""
    return []


def _still_queued(request: SlurmRequest, home: Path) -> str:
    """Ids of this sweep's active jobs, joined by colons as in a dependency: new jobs share ``array_parallelism`` with
    them. Empty without such jobs, or without ``array_parallelism``.
    """
    if request.cluster != "slurm" or not request.array_parallelism:
        return ""
    refs = [ref for record in submission.recorded(home) if record.cluster == "slurm" for ref in record.refs()]
    active = {ref.id.partition("_")[0] for ref, job in slurm_client.jobs(refs).items() if job.is_active}
    return ":".join(sorted(active, key=int))


def print_next_command(home: Path) -> None:
    print(f"    python -m runner status {terminal.typed(home)}    shows progress; also: logs, cancel", file=sys.stderr)


def longest_array(request: SlurmRequest) -> int:
    """Largest number of runs in one submission."""
    return int(slurm_commands.settings("MaxArraySize").get("MaxArraySize", 1001)) if request.cluster == "slurm" else 1


def _by_code(request: SlurmRequest, home: Path, rundirs: list[RunDir]) -> Iterator[tuple[list[RunDir], Path | None]]:
    """Group runs by code snapshot: with ``snapshot=keep`` the one of their first submission, else the current code."""
    groups: dict[Path | None, list[RunDir]] = {}
    without_snapshot = []
    for rundir in rundirs:
        folder = (rundir.read_manifest().get("snapshot") or {}).get("folder")
        if request.snapshot == "keep" and folder and Path(folder).is_dir():
            groups.setdefault(Path(folder), []).append(rundir)
        else:
            without_snapshot.append(rundir)
    if without_snapshot:
        code = None if request.snapshot == "none" else snapshot.take(home)
        groups.setdefault(code, []).extend(without_snapshot)
    for snapshot_folder, members in groups.items():
        yield members, snapshot_folder


def _to_slurm(request: SlurmRequest, home: Path, record: Submission) -> str:
    """Submit one job or one array; returns its id."""
    from submitit import SlurmExecutor
    from submitit.helpers import DelayedSubmission

    room, file = slurm_room(home), str(submission.path(home, record.name))
    DelayedSubmission(entry.run, file).dump(room / f"{record.name}.pkl")
    code = Path(record.code) if record.code else None
    options = script.parameters(request, record.name, script.setup_lines(room, record.name, code))
    if record.after:  # parts of a sweep share array_parallelism: run them one after the other
        own = options["additional_parameters"].get("dependency")
        options["additional_parameters"]["dependency"] = ",".join(filter(None, (own, f"afterany:{record.after}")))
    executor = SlurmExecutor(room, max_num_timeout=0, python=script.python(request))
    executor.update_parameters(**options, array_parallelism=request.array_parallelism or len(record.folders))
    with script.environment(request):
        jobs = executor.map_array(entry.run, [file] * len(record.folders))
    return str(jobs[0].job_id).partition("_")[0]


def _to_local(request: SlurmRequest, home: Path, record: Submission) -> str:
    """Start submitit's supervisor process on this machine, in its own session (no Ctrl-C); returns its pid."""
    from submitit import LocalExecutor

    code = snapshot.importable(Path(record.code)) if record.code else None
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        errors = os.dup(2)  # not inherited by the run: a reader of our stderr need not wait for the run to end
        try:
            os.setsid()
            devnull = os.open(os.devnull, os.O_RDWR)
            for number in (0, 1, 2):
                os.dup2(devnull, number)
            if record.code:
                path = [str(code), *filter(None, [os.environ.get("PYTHONPATH")])]
                os.environ.update(RUNNER_SNAPSHOT=record.code, PYTHONSAFEPATH="1", PYTHONPATH=os.pathsep.join(path))
            executor = LocalExecutor(slurm_room(home), max_num_timeout=0, python=script.python(request))
            executor.update_parameters(
                timeout_min=request.timeout_min, tasks_per_node=request.tasks, signal_delay_s=request.signal_delay_s
            )
            job = executor.submit(entry.run, str(submission.path(home, record.name)))
            os.write(write, str(job.job_id).encode())
        except BaseException:
            os.write(errors, traceback.format_exc().encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        id = answer.read()
    os.waitpid(child, 0)
    if not id:
        problem = "submitit could not start a process on this machine"
        raise LaunchError(Fault("launcher", problem, "see the traceback above", request.cluster))
    return id


def _refusal(error: Exception, home: Path, accepted: int, total: int) -> LaunchError:
    """Why a job was not submitted, and how many of the runs were."""
    if isinstance(error, LaunchError):
        return error
    if isinstance(error, OSError) and files.is_of_outputs(error, home):
        fault = files.outputs_fault(error, home)
        submitted = f"; Slurm accepted {accepted} of {total} runs" if accepted else ""
        return LaunchError(replace(fault, problem=fault.problem + submitted))
    lines = [line.strip() for line in str(error).splitlines() if "error:" in line]
    reason = lines[-1].rpartition("error: ")[2] if lines else f"{type(error).__name__}: {error}"
    problem = f"Slurm accepted {accepted} of {total} runs and refused the next: {reason}"
    return LaunchError(Fault("launcher", problem, "repeat the command later: it submits the remaining runs"))


def _print_submitted(request: SlurmRequest, id: str, part: list[RunDir], after: str) -> None:
    runs = "1 run" if len(part) == 1 else f"{len(part)} runs"
    if request.cluster == "local":
        print(f"started {runs} as process {id}: {part[0].path}", file=sys.stderr)
        return
    throttle = f", {request.array_parallelism} at a time" if request.array_parallelism and len(part) > 1 else ""
    partition = f" in partition {request.partition}" if request.partition else ""
    behind = f", after job {after.replace(':', ', ')}" if after else ""
    print(f"submitted {runs} as job {id}{partition}{throttle}{behind}", file=sys.stderr)
