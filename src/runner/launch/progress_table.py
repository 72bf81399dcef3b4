"""How far several runs are, told while they run: a live table on a terminal, elsewhere a line for each event.

It reads run folders and knows nothing of processes: a queue says which run has begun or ended, or ``follow`` finds it
out from the folders alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner import terminal
from runner.files import stamp
from runner.secrets import redact
from runner.tracking.rundir import FINAL, RunDir, State

if TYPE_CHECKING:
    from rich.live import Live
    from rich.table import Table

LOOK_EVERY_S, TELL_EVERY_S = 0.5, 30.0
OVER = (*FINAL, "preempted", "cancelled", "refused")


def follow(rundirs: list[RunDir], is_over: Callable[[], bool]) -> None:
    """Show how far the runs are until ``is_over()``; whoever works on them, and wherever, is read off their folders."""
    before = [rundir.read_state() for rundir in rundirs]
    with ProgressTable(rundirs, at_once=None) as table:
        while True:
            over = is_over()
            for number, rundir in enumerate(rundirs):
                if table.has_changed(number):
                    _take_over(table, number, rundir.read_state(), before[number])
            table.look()
            if over:
                return
            time.sleep(LOOK_EVERY_S)


def _take_over(table: ProgressTable, number: int, state: State, before: State) -> None:
    """Show what a state says; what it said before the run was handed over again is past."""
    shown = table.rows[number].status
    if state.status == "running" and shown not in ("starting", "running"):
        table.started(number)
    elif state.status in OVER and shown != state.status and (state.status == "completed" or state != before):
        table.ended(number, state.status, state.reason)


@dataclass
class Row:
    """What is shown of one run."""

    rundir: RunDir
    label: str
    status: str = "waiting"
    state: State = field(default_factory=State)
    loss: float | None = None
    reason: str = ""
    began: float | None = None
    """Seconds of the monotonic clock; also when it is worked on elsewhere."""
    seconds: float | None = None
    """From its beginning to its end."""
    told: float = 0.0
    """When the last line on it was written."""
    read: tuple[int, ...] = ()
    """Which state.json was read last."""

    @property
    def is_watched(self) -> bool:
        return self.status in ("starting", "running", "elsewhere")

    def left_s(self) -> float | None:
        """Seconds until its last step, at the speed so far."""
        state = self.state
        if self.status not in ("running", "elsewhere") or not state.step or not state.seconds:
            return None
        left = state.seconds / state.step * (state.total_steps - state.step)
        return max(0.0, left - (time.time() - state.updated))


class ProgressTable:
    """The table; every change is told by its methods, and ``look`` reads how far the runs are, twice a second."""

    def __init__(self, rundirs: list[RunDir], at_once: int | None, total: int = 0) -> None:
        self.rows: list[Row] = []
        self.total = total
        """How many there will be, where they are proposed one after the other."""
        for rundir in rundirs:
            self.add(rundir)
        self.at_once = at_once
        self.notice = ""
        """What is said below the table: that it is being stopped."""
        self._live: Live | None = None
        self._looked = 0.0

    def add(self, rundir: RunDir) -> int:
        """One more run, or one again that goes on; returns its number."""
        manifest = rundir.read_manifest()
        row = Row(rundir, str(manifest.get("label") or manifest.get("name") or rundir.path.name))
        known = next((number for number, each in enumerate(self.rows) if each.rundir.path == rundir.path), None)
        if known is not None:
            self.rows[known] = row
            return known
        self.rows.append(row)
        return len(self.rows) - 1

    @property
    def count(self) -> int:
        """All runs, those that are still to be proposed too."""
        return max(self.total, len(self.rows))

    def __enter__(self) -> ProgressTable:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            # No thread that refreshes: processes are forked beside this table.
            terminal = Console(stderr=True, markup=False, highlight=False)
            self._live = Live(
                console=terminal, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False
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
        self._begin(number, "starting", f"goes on from step {saved}" if saved else "started")

    def elsewhere(self, number: int) -> None:
        """Another process works on this run: it is waited for."""
        pid = self.rows[number].rundir.read_state().pid
        self._begin(number, "elsewhere", f"is being worked on (pid {pid}); waiting for it")

    def ended(self, number: int, status: str, reason: str = "") -> None:
        """The run is over, or was not started; ``status`` is that of its state, ``cancelled`` or ``refused``."""
        row = self.rows[number]
        self._read(row)
        row.status, row.reason = status, reason
        row.seconds = time.monotonic() - row.began if row.began is not None else None
        row.loss = row.state.summary.get("eval/loss", row.loss) if status == "completed" else row.loss
        self._tell(number, _ending(row))

    def notify(self, text: str) -> None:
        """Say something on all of them."""
        self.notice = text
        if not self._live:
            _write(text)
        self._draw()

    def has_changed(self, number: int) -> bool:
        """Whether the run's state was written since it was last read."""
        return stamp(self.rows[number].rundir.state) != self.rows[number].read

    def look(self) -> None:
        """Read how far the runs are and show it; does nothing more often than twice a second."""
        now = time.monotonic()
        if now - self._looked < LOOK_EVERY_S:
            return
        self._looked = now
        for number, row in enumerate(self.rows):
            if row.is_watched:
                self._read(row)
                if row.status == "starting" and row.state.status == "running":
                    row.status = "running"
                if row.state.step and now - row.told >= TELL_EVERY_S:
                    self._tell(number, _progress(row))
        self._draw()

    def summary(self) -> str:
        """``3/6 done, about 4 min 00 s left``."""
        done, left = sum(row.status in OVER for row in self.rows), self._left_s()
        about = f", about {terminal.duration(left)} left" if left is not None else ""
        return f"{done}/{self.count} done{about}"

    def _begin(self, number: int, status: str, line: str) -> None:
        self.rows[number].status, self.rows[number].began = status, time.monotonic()
        self._tell(number, line)

    def _read(self, row: Row) -> None:
        with contextlib.suppress(OSError, ValueError, TypeError):  # removed, or damaged: what was known stays
            if (seen := stamp(row.rundir.state)) != row.read:
                row.state, row.read = row.rundir.read_state(), seen
                row.loss = _last_loss(row.rundir.metrics) or row.loss

    def _left_s(self) -> float | None:
        """Of all of them: what runs to its end, and what waits at the pace of the others."""
        lefts = [left for row in self.rows if (left := row.left_s()) is not None]
        whole = [row.seconds for row in self.rows if row.status == "completed" and row.seconds is not None]
        whole += [time.monotonic() - row.began + left for row in self.rows
                  if row.began is not None and (left := row.left_s()) is not None]  # fmt: skip
        waiting = sum(row.status in ("waiting", "starting") for row in self.rows) + self.count - len(self.rows)
        if (waiting and not whole) or not (waiting or lefts):
            return None
        together = self.at_once or max(1, len(lefts))
        return max([*lefts, (sum(lefts) + waiting * (sum(whole) / max(len(whole), 1))) / together])

    def _tell(self, number: int, text: str) -> None:
        row = self.rows[number]
        row.told = time.monotonic()
        if not self._live:
            _write(f"[{number + 1}/{self.count}] {row.label}: {text}")

    def _draw(self) -> None:
        if self._live:
            with contextlib.suppress(OSError):  # a terminal that was closed is no reason to stop
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
    """What is shown first where there is no room for all."""
    return 0 if row.is_watched else 1 if row.status in ("failed", "killed") else 2 if row.status == "waiting" else 3


def _cells(row: Row) -> list[str]:
    left = row.left_s()
    time_of = f"took {terminal.duration(row.seconds)}" if row.seconds is not None else ""
    status = row.status if row.status in ("running", "waiting", "completed") or not row.reason else ""
    return [
        row.label,
        status or redact(f"{row.status}: {row.reason}"),
        f"{row.state.step}/{row.state.total_steps}" if row.state.total_steps else "",
        f"{row.loss:.4f}" if row.loss is not None else "",
        terminal.duration(left) if left is not None else time_of,
    ]


def _progress(row: Row) -> str:
    loss = f"  loss {row.loss:.4f}" if row.loss is not None else ""
    left = row.left_s()
    return f"step {row.state.step}/{row.state.total_steps}{loss}" + (
        f"  eta {terminal.duration(left)}" if left is not None else ""
    )


def _ending(row: Row) -> str:
    if row.status == "completed" and row.began is None:
        return "completed already: nothing to do"
    took = f" after {terminal.duration(row.seconds)}" if row.seconds is not None else ""
    if row.status == "completed":
        far = f", loss {row.loss:.4f}" if row.loss is not None else ""
    else:
        far = f" at step {row.state.step}/{row.state.total_steps}" if row.state.step else ""
    return redact(f"{row.status}{took}{far}" + (f": {row.reason}" if row.reason else ""))


def _last_loss(metrics: Path, tail: int = 8192) -> float | None:
    """The loss of the last record that has one."""
    with contextlib.suppress(OSError), metrics.open("rb") as handle:
        handle.seek(max(0, os.fstat(handle.fileno()).st_size - tail))
        for line in reversed(handle.read().splitlines()):
            with contextlib.suppress(ValueError, TypeError, KeyError):  # the first line of the tail is only a part
                record: dict[str, Any] = json.loads(line)
                return float(record["train/loss"])
    return None


def _write(text: str) -> None:
    with contextlib.suppress(OSError):  # a terminal that was closed, a pipe that nobody reads
        print(text, file=sys.stderr, flush=True)
