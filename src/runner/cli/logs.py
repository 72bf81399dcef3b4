"""The verb ``logs``: print or follow the log of a run, or the reason why there is no log yet."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from runner import streams, terminal
from runner.cli.args import RUN, Args, Option, Verb
from runner.config import schema
from runner.errors import ConfigError, Fault
from runner.tracking import lookup, run_status
from runner.tracking.run_status import RunStatus
from runner.tracking.rundir import RunDir
from runner.tracking.sweepdir import home_of, slurm_room

VERB = Verb(
    "logs RUN",
    f"""Prints the log of a run: its train.log or, if the run died before the worker wrote one, the output that Slurm or
the launcher captured.

  python -m runner logs outputs/2026-01-31/12-00-00
  python -m runner logs ablation/lora.r=8 -f        follow it until the run ends
  python -m runner logs 3f2a --rank 1               the warnings of its second process

{RUN}, or a Slurm job id;
a job of a sweep is SWEEP/LABEL.""",
    Option(
        "-f, --follow",
        "print new lines until the run has ended, then print its status; Ctrl-C stops following, not the run",
    ),
    Option("--rank N", "the log of rank N; 0 is the main process", schema.Whole, 0),
)

POLL_S, SLURM_POLL_S = 0.3, 10.0


def main(argv: list[str]) -> int:
    """The verb; returns the exit code: 0, or 130 if following was interrupted.

    Raises:
        ConfigError: no RUN or several, a sweep, or an unknown option.
    """
    args = VERB.read(argv)
    rundir, rank = _named_run(args), args["--rank"]
    with streams.piped():
        if args["--follow"]:
            return _follow(rundir, rank)
        _show(rundir, rank)
    return 0


def _named_run(args: Args) -> RunDir:
    if len(args.words) != 1:
        raise VERB.misused(f"takes one run, not {len(args.words)}" if args.words else "needs a run")
    folder = lookup.resolve(args.words[0], args.outputs_dir)
    if isinstance(folder, RunDir):
        return folder
    paths = [terminal.typed(terminal.nearest(rundir.path)) for rundir in lookup.runs_of(folder)]
    listed = "".join(f"\n      python -m runner logs {path}" for path in paths)
    raise ConfigError(
        Fault("", f"'{args.words[0]}' is a sweep, and each of its runs has its own log", f"use one of these:{listed}")
    )


def _show(rundir: RunDir, rank: int) -> None:
    files = _files(rundir, rank)
    for path in files:
        if path != rundir.rank_log(rank):
            print(f"==> {terminal.nearest(path)}", flush=True)
        with path.open("rb") as handle:
            _copy(handle.read())
    if not files:
        (run,) = run_status.of([rundir])
        print(_why_no_log(run, rank), file=sys.stderr)


def _files(rundir: RunDir, rank: int) -> list[Path]:
    """The log files of a rank: its own log, else the output that the launcher captured."""
    if _has_text(rundir.rank_log(rank)):
        return [rundir.rank_log(rank)]
    captured = _slurm_output(rundir, rank)
    return [path for path in (*captured, *([rundir.terminal_log] if rank == 0 else [])) if _has_text(path)]


def _slurm_output(rundir: RunDir, rank: int) -> list[Path]:
    """stdout and stderr files that submitit configured, of a rank of the run's latest Slurm job."""
    try:
        job = str((rundir.read_manifest().get("slurm") or {}).get("job_id") or "")
    except lookup.DAMAGED:
        return []
    folder = slurm_room(home_of(rundir))
    return [path for end in ("out", "err") for path in sorted(folder.rglob(f"{job}_{rank}_log.{end}"))] if job else []


def _has_text(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def _why_no_log(run: RunStatus, rank: int) -> str:
    if run.state.attempt and rank:
        return f"rank {rank} of {run.label} does not exist or logged no warnings; leave --rank out to see the main log"
    reason = f": {run.reason}" if run.reason else ""
    return f"no log yet, the run is {run.status}{reason}" if run.is_live else f"no log: the run is {run.status}{reason}"


def _copy(content: bytes) -> None:
    sys.stdout.write(content.decode(errors="replace"))
    sys.stdout.flush()


@dataclass
class _Followed:
    """The log files of a run, and how many bytes of each were printed."""

    rundir: RunDir
    rank: int
    shown: dict[Path, int]

    def show_new(self) -> bool:
        """Print new text; returns whether there was any."""
        any_new = False
        for path in _files(self.rundir, self.rank):
            position = self.shown.get(path, 0)
            size = path.stat().st_size
            if size == position:
                continue
            with path.open("rb") as handle:
                handle.seek(position if size > position else 0)  # a shorter file was started again
                content = handle.read()
            _copy(content)
            self.shown[path] = (position if size > position else 0) + len(content)
            any_new = True
        return any_new


def _follow(rundir: RunDir, rank: int) -> int:
    followed, printed, due = _Followed(rundir, rank, {}), "", 0.0
    try:
        while True:
            any_new = followed.show_new()
            if not any_new and time.monotonic() >= due:
                (run,) = run_status.of([rundir])
                due = time.monotonic() + (SLURM_POLL_S if run.job else POLL_S)
                if not run.is_live:
                    break
                status = f"{run.status}{': ' + run.reason if run.reason else ''}"
                if run.status != "running" and status != printed:
                    print(f"-- {status}", file=sys.stderr)
                printed = status
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        print("stopped following; the run continues", file=sys.stderr)
        return 130
    followed.show_new()
    if not followed.shown:
        print(_why_no_log(run, rank), file=sys.stderr)
    step = f" at step {run.state.step}/{run.state.total_steps}" if run.state.total_steps else ""
    print(f"-- {run.label}: {run.status}{step}{': ' + run.reason if run.reason else ''}", file=sys.stderr)
    return 0
