"""Handing runs to the scheduler: each is submitted once, however often and by however many it is asked for."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from runner import scheduler
from runner.errors import Fault, LaunchError
from runner.files import locked
from runner.launch import sbatch, slurm_job, snapshot, submission
from runner.launch.submission import Submission
from runner.rundir import RunDir
from runner.sweepdir import SweepDir

if TYPE_CHECKING:
    from runner.launch.slurm import Slurm


def submit(asked: Slurm, rundirs: Sequence[RunDir], sweep: SweepDir | None) -> None:
    """Submit those of the runs that are not in the queue already.

    Raises:
        LaunchError: Slurm refused; what it had taken before stays submitted.
    """
    for home, members in _homes(rundirs, sweep).items():
        room = submission.room(home)
        with locked(room / ".lock"):  # two commands at once submit one after the other
            for id in submission.adopt(home):
                print(f"found job {id}, which an earlier command submitted without noting it", file=sys.stderr)
            queued = submission.is_queued(members)
            for rundir, is_queued in zip(members, queued, strict=True):
                if is_queued:
                    job = rundir.read_manifest()["slurm"]["job_id"]
                    print(f"{rundir.path} is in the queue already (job {job})", file=sys.stderr)
            _submit_new(asked, home, [rundir for rundir, known in zip(members, queued, strict=True) if not known])


def run_here(asked: Slurm, rundirs: Sequence[RunDir], sweep: SweepDir | None) -> list[int]:
    """submitit's debug cluster: one run after another in this process; returns their exit codes."""
    from submitit import DebugExecutor

    codes = []
    for home, members in _homes(rundirs, sweep).items():
        for rundir in members:
            begun = submission.begin(asked, home, [rundir], None, None)
            job = DebugExecutor(submission.room(home)).submit(slurm_job.run, str(submission.path(home, begun.name)))
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


def _submit_new(asked: Slurm, home: Path, rundirs: list[RunDir]) -> None:
    done, previous = 0, ""
    ids: list[str] = []
    longest = longest_array(asked)
    for members, code in _by_code(asked, home, rundirs):
        for start in range(0, len(members), longest):
            part = members[start : start + longest]
            after = previous if asked.cluster == "slurm" else _in_lane(ids, asked.array_parallelism)
            begun = submission.begin(asked, home, part, code, after or None)
            try:
                previous = (_to_slurm if asked.cluster == "slurm" else _to_local)(asked, home, begun)
            except Exception as error:  # its note stays: Slurm may have taken the job and not been able to say so
                raise _refusal(error, done, len(rundirs)) from error
            submission.note(home, begun, previous)
            ids.append(previous)
            done += len(part)
            _tell(asked, previous, part)


def tell_how_to_watch(home: Path) -> None:
    print(f"    python -m runner status {home}    how it goes; logs and cancel take a folder too", file=sys.stderr)


def longest_array(asked: Slurm) -> int:
    """How many runs may be submitted at once."""
    return int(scheduler.settings("MaxArraySize").get("MaxArraySize", 1001)) if asked.cluster == "slurm" else 1


def _in_lane(ids: list[str], lanes: int | None) -> str:
    """The local process that has to end before the next may start, so that there are never more than ``lanes``."""
    return ids[-lanes] if lanes and len(ids) >= lanes else ""


def _by_code(asked: Slurm, home: Path, rundirs: list[RunDir]) -> Iterator[tuple[list[RunDir], Path | None]]:
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
        code = None if asked.snapshot == "none" else snapshot.take(home, fresh)
        groups.setdefault(code, []).extend(fresh)
    for folder, members in groups.items():
        yield members, folder


def _to_slurm(asked: Slurm, home: Path, begun: Submission) -> str:
    """Submit one job, or one array; returns the id of the whole."""
    from submitit import SlurmExecutor
    from submitit.helpers import DelayedSubmission

    room, file = submission.room(home), str(submission.path(home, begun.name))
    DelayedSubmission(slurm_job.run, file).dump(room / f"{begun.name}.pkl")
    code = Path(begun.code) if begun.code else None
    made = sbatch.parameters(asked, begun.name, sbatch.setup_lines(asked, room, begun.name, code))
    if begun.after and asked.array_parallelism:  # parts of a sweep share its throttle: one after the other
        given = made["additional_parameters"].get("dependency")
        made["additional_parameters"]["dependency"] = ",".join(filter(None, (given, f"afterany:{begun.after}")))
    executor = SlurmExecutor(room, max_num_timeout=0, python=sbatch.python(asked))
    executor.update_parameters(**made, array_parallelism=asked.array_parallelism or len(begun.folders))
    with sbatch.environment(asked):
        jobs = executor.map_array(slurm_job.run, [file] * len(begun.folders))
    return str(jobs[0].job_id).partition("_")[0]


def _to_local(asked: Slurm, home: Path, begun: Submission) -> str:
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
            executor = LocalExecutor(submission.room(home), max_num_timeout=0, python=sbatch.python(asked))
            executor.update_parameters(
                timeout_min=asked.timeout_min, tasks_per_node=asked.tasks, gpus_per_node=asked.gpus_per_node or 0,
                signal_delay_s=asked.signal_delay_s,
            )  # fmt: skip
            job = executor.submit(slurm_job.run, str(submission.path(home, begun.name)))
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


def _refusal(error: Exception, done: int, wanted: int) -> LaunchError:
    """Slurm's reason not to take a job, and what has become of the others."""
    if isinstance(error, LaunchError):
        return error
    lines = [line.strip() for line in str(error).splitlines() if "error:" in line] or [type(error).__name__]
    said = lines[-1].rpartition("error: ")[2]
    remedy = "the same command again submits the rest, once Slurm allows it"
    return LaunchError(Fault("launcher", f"Slurm took {done} of {wanted} runs and refused the next: {said}", remedy))


def _tell(asked: Slurm, id: str, part: list[RunDir]) -> None:
    what = "1 run" if len(part) == 1 else f"{len(part)} runs"
    if asked.cluster == "local":
        print(f"started {what} as process {id}: {part[0].path}", file=sys.stderr)
        return
    throttle = f", {asked.array_parallelism} at a time" if asked.array_parallelism and len(part) > 1 else ""
    where = f" in partition {asked.partition}" if asked.partition else ""
    print(f"submitted {what} as job {id}{where}{throttle}", file=sys.stderr)
