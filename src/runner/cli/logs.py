"""The verb ``logs``: what a run has printed, wherever that lies, and what there is to say while it lies nowhere."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from runner import terminal
from runner.cli import args
from runner.errors import ConfigError, Fault
from runner.tracking import lookup, run_status
from runner.tracking.run_status import RunStatus
from runner.tracking.rundir import RunDir
from runner.tracking.sweepdir import home_of, slurm_room

HELP = """python -m runner logs RUN [-f] [--rank N] [outputs_dir=FOLDER]

What a run has printed: its train.log; and where that does not exist, because it died before the worker could speak,
what Slurm or the terminal caught.

  python -m runner logs outputs/2026-01-31/12-00-00
  python -m runner logs ablation/lora.r=8 -f        follow it until the run ends
  python -m runner logs 3f2a --rank 1               the warnings of its second process

RUN is a run folder, a name, a Slurm job id, or the beginning (4 characters or more) of an MLflow run id; a job of a
sweep is SWEEP/LABEL.
  -f, --follow   go on until the run has ended, and say how; Ctrl-C ends the following, not the run
  --rank N       the log of process N; 0, which speaks for the run, is the default"""

POLL_S, SLURM_POLL_S = 0.3, 10.0


def main(argv: list[str]) -> int:
    """The verb; returns the exit code: 0, or 130 where following was interrupted.

    Raises:
        ConfigError: no RUN or several, a sweep, or an option that is none.
    """
    words = args.read(argv, HELP, flags=("-f", "--follow"), valued=("--rank",))
    if words is None:
        return 0
    rundir, rank = _the_run(words), _rank(words)
    with terminal.piped():
        if words.has("-f") or words.has("--follow"):
            return _follow(rundir, rank)
        _show(rundir, rank)
    return 0


def _the_run(words: args.Args) -> RunDir:
    if len(words.words) != 1:
        problem = "needs a run" if not words.words else f"shows one run, and {len(words.words)} are named"
        raise ConfigError(Fault("logs", problem, HELP.splitlines()[0]))
    found = lookup.resolve(words.words[0], words.outputs_dir)
    if isinstance(found, RunDir):
        return found
    commands = [f"python -m runner logs {terminal.nearest(rundir.path)}" for rundir in lookup.runs_of(found)]
    listed = "".join(f"\n      {command}" for command in commands)
    raise ConfigError(Fault("", f"'{words.words[0]}' is a sweep; its runs have a log each", f"one of these:{listed}"))


def _rank(words: args.Args) -> int:
    text = words.options.get("--rank", "0")
    if not text.isdecimal():
        raise ConfigError(Fault("--rank", "must be the number of a process: 0, 1, …", HELP.splitlines()[0], text))
    return int(text)


def _show(rundir: RunDir, rank: int) -> None:
    files = _files(rundir, rank)
    for path in files:
        if path != rundir.rank_log(rank):
            print(f"==> {terminal.nearest(path)}", flush=True)
        with path.open("rb") as handle:
            _copy(handle.read())
    if not files:
        (run,) = run_status.of([rundir])
        print(_why_none(run, rank), file=sys.stderr)


def _files(rundir: RunDir, rank: int) -> list[Path]:
    """Where its words are: its own log, else what the launcher caught of its process."""
    if _is_spoken(rundir.rank_log(rank)):
        return [rundir.rank_log(rank)]
    caught = _of_slurm(rundir, rank)
    return [path for path in (*caught, *([rundir.terminal_log] if rank == 0 else [])) if _is_spoken(path)]


def _of_slurm(rundir: RunDir, rank: int) -> list[Path]:
    """What submitit made Slurm write of the process, of the latest job of this run."""
    try:
        job = str((rundir.read_manifest().get("slurm") or {}).get("job_id") or "")
    except lookup.DAMAGED:
        return []
    home = slurm_room(home_of(rundir))
    return [path for end in ("out", "err") for path in sorted(home.rglob(f"{job}_{rank}_log.{end}"))] if job else []


def _is_spoken(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def _why_none(run: RunStatus, rank: int) -> str:
    """Why there is no log."""
    if run.state.attempt and rank:
        return (
            f"process {rank} of {run.label} had nothing to warn of, or there is none; logs without --rank has the rest"
        )
    said = f": {run.reason}" if run.reason else ""
    return f"no log yet, the run is {run.status}{said}" if run.is_live else f"no log: the run is {run.status}{said}"


def _copy(content: bytes) -> None:
    sys.stdout.buffer.write(content)
    sys.stdout.flush()


@dataclass
class _Followed:
    """The files of a run and how much of each has been shown."""

    rundir: RunDir
    rank: int
    shown: dict[Path, int]

    def show_new(self) -> bool:
        """Print what came since; returns whether anything did."""
        any_new = False
        for path in _files(self.rundir, self.rank):
            position = self.shown.get(path, 0)
            size = path.stat().st_size
            if size == position:
                continue
            with path.open("rb") as handle:
                handle.seek(position if size > position else 0)  # shorter: it was begun anew
                content = handle.read()
            _copy(content)
            self.shown[path] = (position if size > position else 0) + len(content)
            any_new = True
        return any_new


def _follow(rundir: RunDir, rank: int) -> int:
    followed, told, due = _Followed(rundir, rank, {}), "", 0.0
    try:
        while True:
            any_new = followed.show_new()
            if not any_new and time.monotonic() >= due:
                (run,) = run_status.of([rundir])
                due = time.monotonic() + (SLURM_POLL_S if run.job else POLL_S)
                if not run.is_live:
                    break
                waits = f"{run.status}{': ' + run.reason if run.reason else ''}"
                if run.status != "running" and waits != told:
                    print(f"-- {waits}", file=sys.stderr)
                told = waits
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        print("no longer following; the run goes on", file=sys.stderr)
        return 130
    followed.show_new()
    if not followed.shown:
        print(_why_none(run, rank), file=sys.stderr)
    step = f" at step {run.state.step}/{run.state.total_steps}" if run.state.total_steps else ""
    print(f"-- {run.label}: {run.status}{step}{': ' + run.reason if run.reason else ''}", file=sys.stderr)
    return 0
