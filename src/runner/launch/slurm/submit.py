"""Handing runs to the scheduler: each is submitted once, however often and by however many it is asked for."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from runner import files
from runner.errors import Fault, LaunchError
from runner.files import locked
from runner.launch.slurm import entry, script, snapshot, submission
from runner.launch.slurm.submission import Submission
from runner.tracking import slurm_client
from runner.tracking.rundir import DONE, RunDir, State
from runner.tracking.sweepdir import SweepDir, slurm_room

if TYPE_CHECKING:
    from runner.launch.slurm.request import SlurmRequest


def submit(
    asked: SlurmRequest, rundirs: Sequence[RunDir], sweep: SweepDir | None, before: Callable[[], object] = lambda: None
) -> list[RunDir]:
    """Submit those of the runs that are not in the queue already; their folders say then that they wait.

    Args:
        before: called before the first is submitted, and when all say so.

    Returns:
        the runs that are not submitted, which is said: their earlier jobs do not leave their nodes, or Slurm refused
        them after it had taken others.

    Raises:
        LaunchError: Slurm took none, or what it is to run cannot be written down.
    """
    left: list[RunDir] = []
    for home, members in _homes(rundirs, sweep).items():
        with (
            files.writing(home, LaunchError),
            locked(slurm_room(home) / ".lock"),  # two commands at once submit one after the other
        ):
            left += _submit_from(asked, home, members, before)
    return left


def _submit_from(asked: SlurmRequest, home: Path, members: list[RunDir], before: Callable[[], object]) -> list[RunDir]:
    for id in submission.adopt(home):
        print(f"found job {id}, which an earlier command submitted without noting it", file=sys.stderr)
    stuck = submission.wait_until_left(members)
    for rundir in stuck:
        job = rundir.read_manifest()["slurm"]["job_id"]
        print(f"{rundir.path} is not submitted: its job {job} has ended and does not leave its nodes; give the "
              "same command again when squeue shows it no more", file=sys.stderr)  # fmt: skip
    members = [rundir for rundir in members if rundir not in stuck]
    queued = submission.is_queued(members)
    for rundir, is_queued in zip(members, queued, strict=True):
        if is_queued:
            job = rundir.read_manifest()["slurm"]["job_id"]
            print(f"{rundir.path} is in the queue already (job {job})", file=sys.stderr)
    new = [rundir for rundir, known in zip(members, queued, strict=True) if not known]
    ended: list[_Ended] = []
    try:
        for rundir in new:
            if found := _say_waiting(rundir):
                ended.append(found)
        before()
        return stuck + _submit_new(asked, home, new)
    finally:
        _say_again(ended)


def run_here(asked: SlurmRequest, rundirs: Sequence[RunDir], sweep: SweepDir | None) -> list[int]:
    """submitit's debug cluster: one run after another in this process; returns their exit codes."""
    from submitit import DebugExecutor

    codes = []
    for home, members in _homes(rundirs, sweep).items():
        for rundir in members:
            begun = submission.begin(asked, home, [rundir], None, None)
            job = DebugExecutor(slurm_room(home)).submit(entry.run, str(submission.path(home, begun.name)))
            submission.note(home, begun, job.job_id)
            try:
                job.results()
                codes.append(0)
            except SystemExit as end:
                codes.append(int(end.code or 0))
            if codes[-1] in (75, 130):
                return codes
    return codes


def _homes(rundirs: Sequence[RunDir], sweep: SweepDir | None) -> dict[Path, list[RunDir]]:
    """The runs by the folder in which their submission is written down: their sweep's, or each its own."""
    if sweep:
        return {sweep.path: list(rundirs)} if rundirs else {}
    return {rundir.path: [rundir] for rundir in rundirs}


class _Ended(NamedTuple):
    """How a run had ended before it was submitted again."""

    rundir: RunDir
    state: State
    job: dict[str, Any] | None


def _say_waiting(rundir: RunDir) -> _Ended | None:
    """Write down that the run waits: how it ended before, and the job that it was, are past; returns them."""
    state, job = rundir.read_state(), rundir.read_manifest().get("slurm")
    if state.status == "pending" and not job:
        return None
    with rundir.held() as mine:
        if mine and rundir.read_state().status not in DONE:
            rundir.update_manifest(slurm=None)
            rundir.write_state(status="pending", reason="")
            return _Ended(rundir, state, job)
    return None


def _say_again(ended: Iterable[_Ended]) -> None:
    """Those that Slurm did not take are what they were; whose manifest notes a job again was taken."""
    for rundir, state, job in ended:
        if rundir.read_manifest().get("slurm"):
            continue
        with contextlib.suppress(OSError), rundir.held() as mine:  # a full disk: it says that it waits, and may
            if mine and rundir.read_state().status == "pending":
                rundir.update_manifest(slurm=job)
                rundir.write_state(status=state.status, reason=state.reason)


def _submit_new(asked: SlurmRequest, home: Path, rundirs: list[RunDir]) -> list[RunDir]:
    """Submit these runs; returns those that Slurm refused after it had taken others."""
    taken: list[RunDir] = []
    longest, previous = longest_array(asked), _still_queued(asked, home)
    for members, code in _by_code(asked, home, rundirs):
        for start in range(0, len(members), longest):
            part = members[start : start + longest]
            try:
                begun = submission.begin(asked, home, part, code, previous or None)
                id = (_to_slurm if asked.cluster == "slurm" else _to_local)(asked, home, begun)
                submission.note(home, begun, id)
            except Exception as error:  # its note stays: Slurm may have taken the job and not been able to say so
                refusal = _refusal(error, home, len(taken), len(rundirs))
                if not taken:
                    raise refusal from error
                print(refusal, file=sys.stderr)
                return [rundir for rundir in rundirs if rundir not in taken]
            taken += part
            _tell(asked, id, part, previous)
            previous = id if asked.array_parallelism else ""
    return []


def _still_queued(asked: SlurmRequest, home: Path) -> str:
    """The jobs of this sweep that earlier commands submitted and that have not ended, as a dependency names them.

    They share the sweep's throttle with what follows. Empty where there is none, or no throttle.
    """
    if asked.cluster != "slurm" or not asked.array_parallelism:
        return ""
    ids = [id for earlier in submission.noted(home) if earlier.cluster == "slurm" for id in earlier.job_ids()]
    active = {id.partition("_")[0] for id, job in slurm_client.jobs(ids).items() if job.is_active}
    return ":".join(sorted(active, key=int))


def tell_how_to_watch(home: Path) -> None:
    print(f"    python -m runner status {home}    how it goes; logs and cancel take a folder too", file=sys.stderr)


def longest_array(asked: SlurmRequest) -> int:
    """How many runs may be submitted at once."""
    return int(slurm_client.settings("MaxArraySize").get("MaxArraySize", 1001)) if asked.cluster == "slurm" else 1


def _by_code(asked: SlurmRequest, home: Path, rundirs: list[RunDir]) -> Iterator[tuple[list[RunDir], Path | None]]:
    """The runs together with the code that they are to run: that which they began with, or today's."""
    groups: dict[Path | None, list[RunDir]] = {}
    fresh = []
    for rundir in rundirs:
        folder = (rundir.read_manifest().get("snapshot") or {}).get("folder")
        if asked.snapshot == "keep" and folder and Path(folder).is_dir():
            groups.setdefault(Path(folder), []).append(rundir)
        else:
            fresh.append(rundir)
    if fresh:
        code = None if asked.snapshot == "none" else snapshot.take(home)
        groups.setdefault(code, []).extend(fresh)
    for folder, members in groups.items():
        yield members, folder


def _to_slurm(asked: SlurmRequest, home: Path, begun: Submission) -> str:
    """Submit one job, or one array; returns the id of the whole."""
    from submitit import SlurmExecutor
    from submitit.helpers import DelayedSubmission

    room, file = slurm_room(home), str(submission.path(home, begun.name))
    DelayedSubmission(entry.run, file).dump(room / f"{begun.name}.pkl")
    code = Path(begun.code) if begun.code else None
    made = script.parameters(asked, begun.name, script.setup_lines(asked, room, begun.name, code))
    if begun.after:  # parts of a sweep share its throttle: one after the other
        given = made["additional_parameters"].get("dependency")
        made["additional_parameters"]["dependency"] = ",".join(filter(None, (given, f"afterany:{begun.after}")))
    executor = SlurmExecutor(room, max_num_timeout=0, python=script.python(asked))
    executor.update_parameters(**made, array_parallelism=asked.array_parallelism or len(begun.folders))
    with script.environment(asked):
        jobs = executor.map_array(entry.run, [file] * len(begun.folders))
    return str(jobs[0].job_id).partition("_")[0]


def _to_local(asked: SlurmRequest, home: Path, begun: Submission) -> str:
    """Start submitit's own supervisor on this machine, out of reach of this terminal's Ctrl-C; returns its pid."""
    from submitit import LocalExecutor

    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        said = os.dup(2)  # unlike 2 it is not inherited: who waits for the end of our output need not wait for the run
        try:
            os.setsid()
            nothing = os.open(os.devnull, os.O_RDWR)
            for number in (0, 1, 2):
                os.dup2(nothing, number)
            if begun.code:
                path = [begun.code, *filter(None, [os.environ.get("PYTHONPATH")]), os.getcwd()]
                os.environ.update(RUNNER_SNAPSHOT=begun.code, PYTHONSAFEPATH="1", PYTHONPATH=os.pathsep.join(path))
            executor = LocalExecutor(slurm_room(home), max_num_timeout=0, python=script.python(asked))
            executor.update_parameters(
                timeout_min=asked.timeout_min, tasks_per_node=asked.tasks, signal_delay_s=asked.signal_delay_s
            )
            job = executor.submit(entry.run, str(submission.path(home, begun.name)))
            os.write(write, str(job.job_id).encode())
        except BaseException:
            os.write(said, traceback.format_exc().encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        id = answer.read()
    os.waitpid(child, 0)
    if not id:
        raise LaunchError(Fault("launcher", "submitit could not start a process here", "see above", asked.cluster))
    return id


def _refusal(error: Exception, home: Path, done: int, wanted: int) -> LaunchError:
    """Slurm's reason not to take a job, and what has become of the others."""
    if isinstance(error, LaunchError):
        return error
    if isinstance(error, OSError) and files.is_of_outputs(error, home):
        fault = files.outputs_fault(error, home)
        took = f"; Slurm took {done} of {wanted} runs" if done else ""
        return LaunchError(replace(fault, problem=fault.problem + took))
    lines = [line.strip() for line in str(error).splitlines() if "error:" in line]
    said = lines[-1].rpartition("error: ")[2] if lines else f"{type(error).__name__}: {error}"
    remedy = "the same command again submits the rest, once Slurm allows it"
    return LaunchError(Fault("launcher", f"Slurm took {done} of {wanted} runs and refused the next: {said}", remedy))


def _tell(asked: SlurmRequest, id: str, part: list[RunDir], after: str) -> None:
    what = "1 run" if len(part) == 1 else f"{len(part)} runs"
    if asked.cluster == "local":
        print(f"started {what} as process {id}: {part[0].path}", file=sys.stderr)
        return
    throttle = f", {asked.array_parallelism} at a time" if asked.array_parallelism and len(part) > 1 else ""
    where = f" in partition {asked.partition}" if asked.partition else ""
    behind = f", after job {after.replace(':', ', ')}" if after else ""
    print(f"submitted {what} as job {id}{where}{throttle}{behind}", file=sys.stderr)
