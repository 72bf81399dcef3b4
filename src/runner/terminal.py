"""Terminal output: header, progress bar with loss and ETA, tables, messages.

Every line is also written to train.log. Without a terminal (a pipe, a file), one line per record replaces the bar.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.errors import visible
from runner.secrets import redact
from runner.streams import Output

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

log = logging.getLogger("runner")
PROGRESS_S = 10.0
"""Seconds between two lines about the progress of something slow, and before the first one."""


class Display:
    """The progress bar of one run; log lines if stderr is no terminal."""

    def __init__(self, total_steps: int) -> None:
        self.total_steps = total_steps
        self.bar: Progress | None = None
        self.task: Any = None
        self.evaluation: Callable[[int, int], None] = lambda *_: None

    def __enter__(self) -> Display:
        if sys.stderr.isatty():
            self.bar = _bar()
            self.task = self.bar.add_task("starting", total=self.total_steps, shown="")
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()

    def evaluating(self, done: int, total: int) -> None:
        """Show the progress of an evaluation, which begins with ``done`` 0: in the bar, or as a line now and then."""
        if not done:
            every_s, show = (0.0, self._describe) if self.bar else (PROGRESS_S, None)
            self.evaluation = progress("evaluating", every_s, show)
        self.evaluation(done, total)
        if done == total:
            self._describe("training")

    def _describe(self, text: str) -> None:
        if self.bar:
            self.bar.update(self.task, description=text)

    def record(self, step: int, metrics: dict[str, float]) -> None:
        """Show one record of metrics: update the bar, or write a line."""
        text = shown(metrics) + self._eta(step, metrics)
        if self.bar:
            self.bar.update(self.task, completed=step, shown=text, description="training")
        log.info(f"step {step}/{self.total_steps}  {text}", extra={"quiet": True} if self.bar else {})

    def _eta(self, step: int, metrics: dict[str, float]) -> str:
        """The estimated time of the remaining steps, without evaluations."""
        seconds = (self.total_steps - step) * metrics.get("train/step_seconds", 0.0)
        return f"  eta {duration(seconds)}" if seconds else ""


def shown(metrics: dict[str, float]) -> str:
    """The most important metrics as one line: ``loss 2.3456  lr 1.00e-04``."""
    formats = {
        "train/loss": ("loss", "{:.4f}"),
        "train/grad_norm": ("grad norm", "{:.3g}"),
        "train/learning_rate": ("lr", "{:.2e}"),
        "train/tokens_per_second": ("tok/s", "{:.0f}"),
        "eval/loss": ("eval loss", "{:.4f}"),
        "eval/token_accuracy": ("accuracy", "{:.3f}"),
        "eval/rewards/accuracies": ("accuracy", "{:.3f}"),
        "train/reward": ("reward", "{:.3g}"),
        "eval/reward": ("reward", "{:.3g}"),
        "train/rewards/margins": ("margin", "{:.3g}"),
        "eval/rewards/margins": ("margin", "{:.3g}"),
    }
    return "  ".join(f"{label} {form.format(metrics[k])}" for k, (label, form) in formats.items() if k in metrics)


def header(lines: dict[str, str]) -> None:
    """Log what the run will do: one line ``label  text`` for each entry."""
    width = max(map(len, lines))
    for label, text in lines.items():
        log.info(f"{label:<{width}}  {text}")


def loading(what: str) -> None:
    """Print ``loading WHAT …`` to stderr before something that takes seconds."""
    print(f"loading {what} …", file=sys.stderr)


def progress(
    what: str, every_s: float = PROGRESS_S, show: Callable[[str], None] | None = None
) -> Callable[[int, int], None]:
    """Returns a function (done, count) that shows a line every few seconds, with the estimated time left.

    ``show``: gets the line instead of stderr.
    """
    began = shown_at = time.monotonic()

    def update(done: int, count: int) -> None:
        nonlocal shown_at
        now = time.monotonic()
        if now - shown_at < every_s or done >= count:
            return
        shown_at = now
        eta = f"  eta {duration((now - began) / done * (count - done))}" if done else ""
        (show or _print)(f"{what} {done}/{count}{eta}")

    return update


def _print(text: str) -> None:
    print(text, file=sys.stderr)


class Stopwatch:
    """Seconds spent in each part of a run."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timing(self, part: str) -> Iterator[None]:
        """Add the time of the block to ``part``; the time of a block inside it counts for the inner part only."""
        began, before = time.monotonic(), sum(self.seconds.values())
        try:
            yield
        finally:
            inner = sum(self.seconds.values()) - before
            self.seconds[part] = self.seconds.get(part, 0.0) + time.monotonic() - began - inner


def print_line(text: str) -> None:
    """Print a line to stdout and write it to the log."""
    text = visible(redact(text))
    print(text)
    log.info(text, extra={"quiet": True})


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a table to stdout and write its rows to the log as plain lines."""
    from rich.table import Table

    grid = Table(title=title, title_justify="left", show_header=any(columns))
    for column in columns:
        grid.add_column(column, overflow="fold")
    for row in rows:
        grid.add_row(*row)
    console().print(grid)
    for row in [columns, *rows] if any(columns) else rows:
        log.info("  ".join(cell.replace("\n", " ") for cell in row), extra={"quiet": True})


def console(*, stderr: bool = False, width: int | None = None) -> Console:
    """A rich console that escapes control characters in the text of its tables; on stdout 120 wide without a terminal,
    or ``width``."""
    stream = sys.stderr if stderr else sys.stdout
    file: Any = stream.raw if isinstance(stream, Output) else stream
    width = width or (None if stream.isatty() or stderr else 120)
    return _escaping()(file=file, width=width, highlight=False, markup=False, soft_wrap=False)


def nearest(path: Path) -> str:
    """The path as the user would type it: relative if it is below the current directory, else absolute."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def typed(path: Path | str, key: str = "") -> str:
    """The path as a word of a command line that can be copied into a shell; with ``key``: the override ``key=path``."""
    text = str(path)
    if not key:
        return shlex.quote(text)
    if not re.fullmatch(r"[\w/.:@+%-]+( [\w/.:@+%-]+)*", text, re.ASCII):  # Hydra takes the others in quotes only
        text = "'" + text.replace("'", "\\'") + "'"
    return shlex.quote(f"{key}={text}")


def distinct_names(names: Sequence[str], width: int) -> list[str]:
    """The names cut to ``width`` characters; names that would become equal lose their common beginning instead."""
    short = {name: name if len(name) <= width else name[: width - 1] + "…" for name in names}
    alike: dict[str, list[str]] = {}
    for name, text in short.items():
        alike.setdefault(text, []).append(name)
    for equal in alike.values():
        if len(equal) > 1 and width > 2:
            pairs = zip(min(equal), max(equal), strict=False)
            prefix = "".join(one for one, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            start = max(prefix.rfind(mark) + 1 for mark in ",/ ") or len(prefix)
            endings = distinct_names([name[start:] for name in equal], width - 1)
            short |= {name: f"…{text.lstrip('…')}" for name, text in zip(equal, endings, strict=True)}
    return [short[name] for name in names]


def duration(seconds: float) -> str:
    """``45 s``, ``3 min 20 s``, ``2 h 05 min``."""
    seconds = int(seconds + 0.5)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


@functools.cache
def _escaping() -> type[Console]:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment
    from rich.text import Text

    class Escaping(Console):
        def render_str(self, text: str, *args: Any, **options: Any) -> Text:
            return super().render_str(visible(text), *args, **options)

        def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
            for segment in super().render(renderable, options):
                yield segment if segment.control else segment._replace(text=visible(segment.text))

    return Escaping


def _bar() -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn("{task.fields[shown]}"),
        TimeElapsedColumn(),
        console=console(stderr=True),
        transient=True,
    )
