"""Following submitted runs to their ends: the queue says whether a job has ended, the folder how far it is and how."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from runner.errors import Fault, Interrupted, LaunchError, Preempted
from runner.launch import progress_table
from runner.launch.launcher import Source
from runner.launch.slurm import submission
from runner.tracking.rundir import RunDir, State
from runner.train import outcome

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 15.0
"""Between two questions to the scheduler, at the beginning and in the long run: it serves many."""
LOOK_S = 0.5
SETTLING_S = 2.0
"""How much later than its job's end a run's last words may reach us over a shared file system."""


def follow(rundirs: Sequence[RunDir]) -> list[int]:
    """Show how far the runs are until every job has left the queue; Ctrl-C and SIGTERM end the showing alone.

    Returns:
        the exit code of each run; for those that still go on 0 after Ctrl-C, 75 after SIGTERM.
    """
    jobs, code_of_left = _Jobs(rundirs), 0
    try:
        with _ending_on_sigterm():
            progress_table.follow(list(rundirs), jobs.have_ended)
    except (KeyboardInterrupt, Preempted) as stop:
        code_of_left = Preempted.exit_code if isinstance(stop, Preempted) else 0
        print(f"\nno longer following; {len(jobs.left)} of {len(rundirs)} runs go on", file=sys.stderr)
        print("    python -m runner status, logs and cancel take their folders", file=sys.stderr)
    return [code_of_left if rundir in jobs.left else _code(rundir, len(rundirs) == 1) for rundir in rundirs]


Submit = Callable[[RunDir], Sequence[RunDir]]
"""Submits a run; returns it where it could not, as its earlier job does not leave its nodes."""


def serve(source: Source, at_once: int, submit: Submit) -> int:
    """Submit what ``source`` proposes, ``at_once`` at the same time; returns 0, 130 after Ctrl-C, 75 after SIGTERM.

    Raises:
        LaunchError: nothing goes on, and what is left cannot be submitted.
    """
    running: list[RunDir] = []
    try:
        with _ending_on_sigterm():
            _serve(source, at_once, submit, running)
    except (KeyboardInterrupt, Preempted) as stop:
        print(f"\nno further runs are proposed; {len(running)} go on, the same command takes up again", file=sys.stderr)
        return Preempted.exit_code if isinstance(stop, Preempted) else Interrupted.exit_code
    return 0


@contextlib.contextmanager
def _ending_on_sigterm() -> Iterator[None]:
    """While the block runs, SIGTERM raises Preempted wherever the program is, as Ctrl-C does KeyboardInterrupt."""

    def end(*_: object) -> None:
        raise Preempted("stopped by SIGTERM")

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _serve(source: Source, at_once: int, submit: Submit, running: list[RunDir]) -> None:
    """Go on until nothing more is proposed and all has ended; ``running`` holds those that go on."""
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
            except LaunchError as error:  # a limit on jobs, a controller that is busy: not the end of a search
                if not running:
                    raise
                print(f"{error}; it is tried again when a job has ended", file=sys.stderr)
                refused.append(rundir)
                break
            running.append(rundir)
        stuck += again
        if not running:
            _refuse_stuck(stuck)
            return
        jobs = _Jobs(running)
        while len(jobs.left) == len(running):
            time.sleep(LOOK_S)
            source.look()
            jobs.have_ended()
        for rundir in [each for each in running if each not in jobs.left]:
            state = _settled(rundir)
            print(f"{rundir.path.name}: {state.status} {state.reason}".strip(), file=sys.stderr)
            source.ended(rundir)
            running.remove(rundir)


def _refuse_stuck(rundirs: Sequence[RunDir]) -> None:
    if rundirs:
        problem = "an earlier job of theirs does not leave its nodes: not submitted"
        names = ", ".join(rundir.path.name for rundir in rundirs)
        raise LaunchError(Fault("launcher", problem, "give the same command again when squeue shows it no more", names))


def _settled(rundir: RunDir) -> State:
    """What a run whose job has ended says of itself, a moment later if need be."""
    if rundir.read_state().status in ("pending", "running"):
        time.sleep(SETTLING_S)
    return rundir.read_state()


class _Jobs:
    """The jobs that have not left the queue, asked for less and less often while nothing happens."""

    def __init__(self, rundirs: Sequence[RunDir]) -> None:
        self.left = list(rundirs)
        self._pause = FIRST_PAUSE_S
        self._due = time.monotonic() + FIRST_PAUSE_S

    def have_ended(self) -> bool:
        if time.monotonic() < self._due:
            return False
        try:
            queued = submission.is_queued(self.left)
        except LaunchError as error:  # the jobs do not need the controller, and it comes back
            print(f"{error.faults[0].problem}; asking again", file=sys.stderr)
            queued = [True] * len(self.left)
        before, self.left = self.left, [rundir for rundir, goes_on in zip(self.left, queued, strict=True) if goes_on]
        has_changed = len(self.left) < len(before)
        self._pause = FIRST_PAUSE_S if has_changed else min(LONGEST_PAUSE_S, self._pause * 1.3)
        self._due = time.monotonic() + self._pause
        return not self.left


def _code(rundir: RunDir, is_alone: bool) -> int:
    """What its state says, of one among several that ended by itself 1; in words where its job wrote none."""
    if (state := _settled(rundir)).status not in ("pending", "running"):
        code = outcome.exit_code(state)
        return code if is_alone or code not in (Preempted.exit_code, Interrupted.exit_code) else 1
    job = (rundir.read_manifest().get("slurm") or {}).get("job_id")
    print(f"job {job} ended without a word: python -m runner logs {rundir.path}", file=sys.stderr)
    return 1
