"""``status --watch`` on a terminal: one screen with the progress of all runs."""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from types import FrameType

from runner import streams, terminal
from runner.cli.status_table import COLOURS, Group, coloured, eta_s, loss_of
from runner.tracking import metrics_log
from runner.tracking.run_status import RunStatus

TITLES = ("run", "status", "", "step", "", "loss", "left", "memory")
NARROWEST, WIDEST = 16, 48
"""Characters of the column of names."""
LEAVES_FIRST = (2, 4, 7, 6)
"""Columns that a narrow terminal does not show: bar, loss curve, memory, time left."""
BAR, CURVE = 10, 16
BLOCKS = "▁▂▃▄▅▆▇█"


class Screen:
    """The alternate screen of the terminal, as editors use it: the text that was there before comes back at the end."""

    def __enter__(self) -> Screen:
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(_ended_by_signals())
        self._reads_keys = sys.stdin is not None and sys.stdin.isatty()
        if self._reads_keys:
            self._stack.enter_context(_single_keys())
        print(streams.OTHER_SCREEN, end="", flush=True)
        self._stack.callback(lambda: print(streams.FIRST_SCREEN, end="", flush=True))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def draw(self, lines: Sequence[str]) -> None:
        """Draw the lines over those before, without an empty screen in between."""
        text = "\n".join(f"{line}{streams.REST_OF_LINE}" for line in lines)
        print(f"{streams.START}{text}{streams.REST_OF_SCREEN}", end="", flush=True)

    def waits(self, seconds: float) -> bool:
        """Wait; False as soon as the user presses q."""
        until = time.monotonic() + seconds
        while (remaining := until - time.monotonic()) > 0:
            if not self._reads_keys:
                time.sleep(remaining)
            elif select.select([sys.stdin], [], [], remaining)[0]:
                keys = os.read(sys.stdin.fileno(), 64)
                if b"q" in keys.lower():
                    return False
                self._reads_keys = bool(keys)  # nothing: the terminal was closed
        return True


def lines(groups: Sequence[Group], width: int, height: int) -> list[str]:
    """The screen: runs that proceed first, then the latest others, as many as there is room for."""
    rows = [(run, bool(group.sweep)) for group in groups for run in group.runs]
    rows.sort(key=lambda row: not row[0].is_live)
    counts = Counter(run.status for run, _ in rows)
    title = ", ".join(f"{counts[status]} {status}" for status in COLOURS if counts[status])
    title = f"{time.strftime('%H:%M:%S')}  {title}  (q: quit, the runs continue)"
    shown = [run for run, _ in rows[: max(height - 4, 1)]]
    labels = terminal.distinct_names([run.label for run in shown], WIDEST)
    table = [TITLES, *(_cells(run, label) for run, label in zip(shown, labels, strict=True))]
    more = [f"and {len(rows) - len(shown)} more: python -m runner status --all"] if len(rows) > len(shown) else []
    return [_cut(title, width), "", *_aligned(table, shown, width), *(_cut(line, width) for line in more)]


def curve(values: Sequence[float], width: int = CURVE) -> str:
    """The values as a line of blocks, the largest as the highest; of more than ``width`` values the means of parts."""
    finite = [value for value in values if math.isfinite(value)]
    parts = min(width, len(finite))
    edges = [len(finite) * number // parts for number in range(parts + 1)] if parts else []
    means = [sum(finite[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means, default=0.0), max(means, default=0.0)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((mean - low) * scale)] for mean in means)


def _cells(run: RunStatus, label: str) -> tuple[str, ...]:
    state, records = run.state, metrics_log.recent(run.rundir)
    done = BAR * state.step // state.total_steps if state.total_steps else 0
    bar = "█" * min(done, BAR) + "░" * (BAR - min(done, BAR)) if state.total_steps else ""
    losses = [float(record["train/loss"]) for record in records if "train/loss" in record]
    loss, eta = loss_of(run), eta_s(run)
    peaks = (each.get("memory/peak_allocated_gib", each.get("memory/peak_rss_gib")) for each in reversed(records))
    peak = next((value for value in peaks if value is not None), None)
    return (
        label,
        run.status,
        bar if _draws_blocks() else "",
        f"{state.step}/{state.total_steps}" if state.total_steps else "",
        curve(losses) if _draws_blocks() else "",
        f"{loss[1]:.4f} {loss[0]}" if loss else "",
        terminal.duration(eta) if eta is not None else "",
        f"{peak:.1f} GiB" if peak is not None else "",
    )


def _aligned(table: Sequence[Sequence[str]], runs: Sequence[RunStatus], width: int) -> Iterator[str]:
    """The table in columns, of which some are left out, and the names cut, where the terminal is narrow."""
    widths = [max(len(row[column]) for row in table) for column in range(len(TITLES))]
    kept = [column for column in range(len(TITLES)) if any(row[column] for row in table[1:])]
    for column in LEAVES_FIRST:
        if sum(widths[each] + 2 for each in kept) - widths[0] + min(widths[0], NARROWEST) > width and column in kept:
            kept.remove(column)
    widths[0] = max(NARROWEST, min(widths[0], width - sum(widths[each] + 2 for each in kept if each)))
    for row, status in zip(table, ["", *(run.status for run in runs)], strict=True):
        cells = {column: _cut(row[column], widths[column]).ljust(widths[column]) for column in kept}
        line = "  ".join(cells.values()).rstrip()
        if status and len(line) <= width:
            yield "  ".join({**cells, 1: coloured(cells[1], status)}.values()).rstrip()
        else:
            yield _cut(line, width)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(width - 1, 0)] + "…"


def _draws_blocks() -> bool:
    return (getattr(sys.stdout, "encoding", None) or "").lower().replace("-", "") == "utf8"


@contextlib.contextmanager
def _single_keys() -> Iterator[None]:
    """Inside the block, keys are read one by one and not shown; Ctrl-C still interrupts."""
    import termios
    import tty

    number = sys.stdin.fileno()
    before = termios.tcgetattr(number)
    tty.setcbreak(number, termios.TCSANOW)
    try:
        yield
    finally:
        termios.tcsetattr(number, termios.TCSANOW, before)


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Inside the block, SIGTERM and SIGHUP raise SystemExit, so that the terminal is left as it was."""

    def end(number: int, _: FrameType | None) -> None:
        sys.exit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
