"""Follow submitted runs: squeue shows whether a job has ended, the run folder shows progress and result."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

from runner import terminal
from runner.errors import Fault, Interrupted, LaunchError, Preempted
from runner.launch import progress_table
from runner.launch.launcher import Source
from runner.launch.slurm import submission
from runner.signals import signals_to
from runner.tracking.rundir import RunDir
from runner.tracking.state_file import State
from runner.train import outcome

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 15.0
"""Seconds between two squeue calls, at first and after a long time without changes: other users need Slurm too."""
POLL_S = 0.5
SETTLING_S = 2.0
"""How long after its job's end a run's last state may take to arrive over a shared file system."""


def follow(rundirs: Sequence[RunDir]) -> list[int]:
    """Show progress until every job has left the queue. Ctrl-C and SIGTERM end this command, not the jobs.

    Returns:
        the exit code of each run; for runs that are still active, 0 after Ctrl-C and 75 after SIGTERM.
    """
    jobs, code_of_active = _Jobs(rundirs), 0
    try:
        with signals_to(_end, [signal.SIGTERM]):
            progress_table.follow(list(rundirs), jobs.have_ended)
    except (KeyboardInterrupt, Preempted) as stop:
        code_of_active = Preempted.exit_code if isinstance(stop, Preempted) else 0
        print(f"\nstopped following; {len(jobs.active)} of {len(rundirs)} runs are still active", file=sys.stderr)
        print("    python -m runner status RUN, logs RUN or cancel RUN; RUN is a run folder", file=sys.stderr)
    return [code_of_active if rundir in jobs.active else _code(rundir, len(rundirs) == 1) for rundir in rundirs]


Submit = Callable[[RunDir], Sequence[RunDir]]
"""Submits a run; returns the run if it was not submitted because its earlier job has not left its nodes."""


def serve(source: Source, at_once: int, submit: Submit) -> int:
    """Submit the runs that ``source`` proposes, ``at_once`` at the same time.

    Returns:
        0; 130 after Ctrl-C, 75 after SIGTERM.

    Raises:
        LaunchError: no run is active, and the remaining ones cannot be submitted.
    """
    running: list[RunDir] = []
    try:
        with signals_to(_end, [signal.SIGTERM]):
            _serve(source, at_once, submit, running)
    except (KeyboardInterrupt, Preempted) as stop:
        print(
            f"\nstopped the search; {len(running)} runs are still active. The same command continues the search",
            file=sys.stderr,
        )
        return Preempted.exit_code if isinstance(stop, Preempted) else Interrupted.exit_code
    return 0


def _end(*_: object) -> NoReturn:
    """Handler of SIGTERM: ends this command as Ctrl-C does."""
    raise Preempted("stopped by SIGTERM")


def _serve(source: Source, at_once: int, submit: Submit, running: list[RunDir]) -> None:
    """Loop until the source has no more runs and all runs have ended. ``running`` is updated in place."""
    refused: list[RunDir] = []
    stuck: list[RunDir] = []
    while True:
        again, stuck = stuck, []
        while len(running) < at_once:
            rundir = refused.pop() if refused else source.next() or (again.pop() if again else None)
            if rundir is None:
                break
            try:
                if submit(rundir):
                    stuck.append(rundir)
                    continue
            except LaunchError as error:  # job limit reached or controller busy: no reason to end a search
                if not running:
                    raise
                print(f"{error}; trying again when a job has ended", file=sys.stderr)
                refused.append(rundir)
                break
            running.append(rundir)
        stuck += again
        if not running:
            _refuse_stuck(stuck)
            return
        jobs = _Jobs(running)
        while len(jobs.active) == len(running):
            time.sleep(POLL_S)
            source.poll()
            jobs.have_ended()
        for rundir in [each for each in running if each not in jobs.active]:
            state = _settled(rundir)
            print(f"{rundir.path.name}: {state.status} {state.reason}".strip(), file=sys.stderr)
            source.ended(rundir)
            running.remove(rundir)


def _refuse_stuck(rundirs: Sequence[RunDir]) -> None:
    if rundirs:
        problem = "not submitted: the run's earlier job has not left its nodes"
        names = ", ".join(rundir.path.name for rundir in rundirs)
        raise LaunchError(Fault("launcher", problem, "repeat the command when squeue no longer lists the job", names))


def _settled(rundir: RunDir) -> State:
    """State of a run whose job has ended; waits a moment if the state is not final yet."""
    if rundir.read_state().status in ("pending", "running"):
        time.sleep(SETTLING_S)
    return rundir.read_state()


class _Jobs:
    """Polls squeue for the jobs of runs, less and less often while nothing changes."""

    def __init__(self, rundirs: Sequence[RunDir]) -> None:
        self.active = list(rundirs)
        self._pause = FIRST_PAUSE_S
        self._due = time.monotonic() + FIRST_PAUSE_S

    def have_ended(self) -> bool:
        """Whether all jobs have left the queue; updates ``active``."""
        if time.monotonic() < self._due:
            return False
        try:
            queued = submission.is_queued(self.active)
        except LaunchError as error:  # jobs run on without the controller, which will return
            print(f"{error.faults[0].problem}; trying again", file=sys.stderr)
            queued = [True] * len(self.active)
        has_changed = not all(queued)
        self.active = [rundir for rundir, is_queued in zip(self.active, queued, strict=True) if is_queued]
        self._pause = FIRST_PAUSE_S if has_changed else min(LONGEST_PAUSE_S, self._pause * 1.3)
        self._due = time.monotonic() + self._pause
        return not self.active


def _code(rundir: RunDir, is_alone: bool) -> int:
    """Exit code by the run's state; 1 for a run that alone among several was stopped, or whose job wrote no state."""
    if (state := _settled(rundir)).status not in ("pending", "running"):
        code = outcome.exit_code(state)
        return code if is_alone or code not in (Preempted.exit_code, Interrupted.exit_code) else 1
    job = (rundir.read_manifest().get("slurm") or {}).get("job_id")
    command = f"python -m runner logs {terminal.typed(rundir.path)}"
    print(f"job {job} ended without writing a state; see {command}", file=sys.stderr)
    return 1
