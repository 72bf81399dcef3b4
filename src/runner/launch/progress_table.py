"""Progress of several runs: a live table on a terminal, otherwise one line per event.

All progress is read from run folders. Which run has started or ended is reported by a queue, or found by ``follow``.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from runner import terminal
from runner.files import stamp
from runner.secrets import redact
from runner.tracking import metrics_log, naming
from runner.tracking.rundir import RunDir
from runner.tracking.state_file import FINAL, State

if TYPE_CHECKING:
    from rich.live import Live
    from rich.table import Table

REFRESH_EVERY_S, LOG_EVERY_S = 0.5, 30.0
OVER = (*FINAL, "preempted", "cancelled", "refused")


def follow(rundirs: list[RunDir], is_over: Callable[[], bool]) -> None:
    """Show the progress of runs on any machine, read from their folders, until ``is_over()`` returns True."""
    before = [rundir.read_state() for rundir in rundirs]
    with ProgressTable(rundirs, at_once=None) as table:
        while True:
            over = is_over()
            for number, rundir in enumerate(rundirs):
                if table.has_changed(number):
                    _update(table, number, rundir.read_state(), before[number])
            table.refresh()
            if over:
                return
            time.sleep(REFRESH_EVERY_S)


def _update(table: ProgressTable, number: int, state: State, before: State) -> None:
    """Show a new state. An end that equals ``before`` is that of an earlier launch, unless the run is completed."""
    shown = table.rows[number].status
    if state.status == "running" and shown not in ("starting", "running"):
        table.started(number)
    elif state.status in OVER and shown != state.status and (state.status == "completed" or state != before):
        table.ended(number, state.status, state.reason)


@dataclass
class Row:
    """One line of the table: a run."""

    rundir: RunDir
    label: str
    status: str = "waiting"
    state: State = field(default_factory=State)
    loss: float | None = None
    reason: str = ""
    started_at: float | None = None
    """Monotonic clock, in seconds; also set if another process trains the run."""
    seconds: float | None = None
    """Seconds from start to end."""
    logged_at: float = 0.0
    """Time of the last line that was printed for this run."""
    state_stamp: tuple[int, ...] = ()
    """``stamp`` of the state.json that was read last."""

    @property
    def is_active(self) -> bool:
        return self.status in ("starting", "running", "elsewhere")

    def remaining_s(self) -> float | None:
        """Seconds until the last step, at the average speed so far; None if not known yet."""
        return self.state.remaining_s() if self.status in ("running", "elsewhere") else None


class ProgressTable:
    """The table. ``started``, ``elsewhere`` and ``ended`` report events; ``refresh`` reads the progress of the runs."""

    def __init__(self, rundirs: list[RunDir], at_once: int | None, total: int = 0) -> None:
        self.rows: list[Row] = []
        self.total = total
        """Number of runs at the end, if they are proposed one after the other."""
        for rundir in rundirs:
            self.add(rundir)
        self.at_once = at_once
        self.notice = ""
        """A line below the table, for example that the queue is stopping."""
        self._live: Live | None = None
        self._refreshed_at = 0.0

    def add(self, rundir: RunDir) -> int:
        """Add a run, or reset the line of one that is launched again; returns its number."""
        row = Row(rundir, naming.label(rundir.read_manifest(), rundir.path))
        for number, known in enumerate(self.rows):
            if known.rundir.path == rundir.path:
                self.rows[number] = row
                return number
        self.rows.append(row)
        return len(self.rows) - 1

    @property
    def count(self) -> int:
        """Number of runs, including those that have not been proposed yet."""
        return max(self.total, len(self.rows))

    def __enter__(self) -> ProgressTable:
        if sys.stderr.isatty():
            from rich.live import Live

            # No refresh thread: the queue forks processes while the table is shown.
            console = terminal.console(stderr=True)
            self._live = Live(
                console=console, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False
            )
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._draw()
        if self._live:
            with contextlib.suppress(OSError):
                self._live.stop()

    def started(self, number: int) -> None:
        saved = self.rows[number].rundir.saved_step()
        self._start(number, "starting", f"resumes from step {saved}" if saved else "started")

    def elsewhere(self, number: int) -> None:
        """Another process trains this run; the queue waits for it."""
        pid = self.rows[number].rundir.read_state().pid
        self._start(number, "elsewhere", f"another process (pid {pid}) trains this run; waiting for it to end")

    def ended(self, number: int, status: str, reason: str = "") -> None:
        """The run has ended, or was not started; ``status``: the status in state.json, ``cancelled`` or ``refused``."""
        row = self.rows[number]
        self._read(row)
        row.status, row.reason = status, reason
        row.seconds = time.monotonic() - row.started_at if row.started_at is not None else None
        row.loss = row.state.summary.get("eval/loss", row.loss) if status == "completed" else row.loss
        self._log(number, _ending(row))

    def has_changed(self, number: int) -> bool:
        """Whether state.json was written since it was last read."""
        return stamp(self.rows[number].rundir.state) != self.rows[number].state_stamp

    def refresh(self) -> None:
        """Read and show the progress of the runs, at most twice a second."""
        now = time.monotonic()
        if now - self._refreshed_at < REFRESH_EVERY_S:
            return
        self._refreshed_at = now
        for number, row in enumerate(self.rows):
            if row.is_active:
                self._read(row)
                if row.status == "starting" and row.state.status == "running":
                    row.status = "running"
                if row.state.step and now - row.logged_at >= LOG_EVERY_S:
                    self._log(number, _progress(row))
        self._draw()

    def summary(self) -> str:
        """``3/6 done, about 4 min 00 s left``."""
        done, remaining = sum(row.status in OVER for row in self.rows), self._remaining_s()
        about = f", about {terminal.duration(remaining)} left" if remaining is not None else ""
        return f"{done}/{self.count} done{about}"

    def _start(self, number: int, status: str, line: str) -> None:
        self.rows[number].status, self.rows[number].started_at = status, time.monotonic()
        self._log(number, line)

    def _read(self, row: Row) -> None:
        with contextlib.suppress(OSError, ValueError, TypeError):  # removed or damaged: keep the last state
            if (latest := stamp(row.rundir.state)) != row.state_stamp:
                row.state, row.state_stamp = row.rundir.read_state(), latest
                _, row.loss = metrics_log.last_of(row.rundir, "train/loss") or ("", row.loss)

    def _remaining_s(self) -> float | None:
        """Seconds until all runs have ended, if waiting runs take as long as the others; None if not known yet."""
        pairs = [(row, seconds) for row in self.rows if (seconds := row.remaining_s()) is not None]
        totals = [row.seconds for row in self.rows if row.status == "completed" and row.seconds is not None]
        totals += [time.monotonic() - row.started_at + seconds for row, seconds in pairs if row.started_at is not None]
        waiting = sum(row.status in ("waiting", "starting") for row in self.rows) + self.count - len(self.rows)
        if (waiting and not totals) or not (waiting or pairs):
            return None
        active = [seconds for _, seconds in pairs]
        at_once = self.at_once or max(1, len(active))
        return max([*active, (sum(active) + waiting * (sum(totals) / max(len(totals), 1))) / at_once])

    def _log(self, number: int, text: str) -> None:
        row = self.rows[number]
        row.logged_at = time.monotonic()
        if not self._live:
            _write(f"[{number + 1}/{self.count}] {row.label}: {text}")

    def _draw(self) -> None:
        if self._live:
            with contextlib.suppress(OSError):  # the terminal was closed: go on without it
                self._live.update(self._table(self._live.console.height - 6), refresh=True)

    def _table(self, height: int) -> Table:
        from rich.table import Table

        table = Table(caption=self.summary() + (f"\n{self.notice}" if self.notice else ""), caption_justify="left")
        for column in ("#", "run", "status", "step", "loss", "left"):
            table.add_column(column, overflow="fold" if column == "run" else "ellipsis")
        shown = sorted(range(len(self.rows)), key=lambda n: (_urgency(self.rows[n]), n))[: max(height, 3)]
        for number in sorted(shown):
            table.add_row(str(number + 1), *_cells(self.rows[number]))
        if hidden := len(self.rows) - len(shown):
            table.add_row("…", f"{hidden} more", "", "", "", "")
        return table


def _urgency(row: Row) -> int:
    """Sort key: runs with a low value are shown if the terminal has no room for all."""
    return 0 if row.is_active else 1 if row.status in ("failed", "killed") else 2 if row.status == "waiting" else 3


def _cells(row: Row) -> list[str]:
    remaining = row.remaining_s()
    took = f"took {terminal.duration(row.seconds)}" if row.seconds is not None else ""
    status = row.status if row.status in ("running", "waiting", "completed") or not row.reason else ""
    return [
        row.label,
        status or redact(f"{row.status}: {row.reason}"),
        f"{row.state.step}/{row.state.total_steps}" if row.state.total_steps else "",
        f"{row.loss:.4f}" if row.loss is not None else "",
        terminal.duration(remaining) if remaining is not None else took,
    ]


def _progress(row: Row) -> str:
    loss = f"  loss {row.loss:.4f}" if row.loss is not None else ""
    remaining = row.remaining_s()
    eta = f"  eta {terminal.duration(remaining)}" if remaining is not None else ""
    return f"step {row.state.step}/{row.state.total_steps}{loss}{eta}"


def _ending(row: Row) -> str:
    if row.status == "completed" and row.started_at is None:
        return "already completed"
    took = f" after {terminal.duration(row.seconds)}" if row.seconds is not None else ""
    if row.status == "completed":
        result = f", loss {row.loss:.4f}" if row.loss is not None else ""
    else:
        result = f" at step {row.state.step}/{row.state.total_steps}" if row.state.step else ""
    return redact(f"{row.status}{took}{result}" + (f": {row.reason}" if row.reason else ""))


def _write(text: str) -> None:
    with contextlib.suppress(OSError):  # the terminal or the pipe was closed
        print(text, file=sys.stderr, flush=True)
