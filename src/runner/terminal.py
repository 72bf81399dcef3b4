"""What the person at the terminal sees: a header, a progress bar with loss and ETA, a summary and what to do next.

Every line also goes into train.log; on something that is no terminal the bar becomes one line a record.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.secrets import redact

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

log = logging.getLogger("runner")


@contextmanager
def logging_to(path: Path, *, speaks: bool = True) -> Iterator[None]:
    """While the block runs, ``runner``'s messages go to ``path``, with everybody's warnings, and to the terminal.

    ``speaks``: False leaves the terminal out.
    """
    to_file = _File(path, encoding="utf-8")
    to_file.setFormatter(_Redacted("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    to_file.setLevel(logging.INFO)
    to_terminal = _Terminal()
    to_terminal.setFormatter(_TerminalFormat())
    to_terminal.addFilter(_is_ours)
    root, own = logging.getLogger(), logging.getLogger("runner")
    levels = root.level, own.level
    handlers = (to_file, to_terminal) if speaks else (to_file,)
    for handler in handlers:
        root.addHandler(handler)
    own.setLevel(logging.INFO)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        for handler in handlers:
            root.removeHandler(handler)
        to_file.close()
        root.setLevel(levels[0])
        own.setLevel(levels[1])


@contextmanager
def piped() -> Iterator[None]:
    """Print while the block runs; a reader that has had enough (``| head``) ends it quietly."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is flushed at the exit


def quiet_libraries() -> None:
    """No progress bars and no chatter of libraries between our own lines; what they warn of goes into the log."""
    import warnings

    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_warning()
    transformers_logging.disable_default_handler()
    transformers_logging.enable_propagation()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft|torch")


def _is_ours(record: logging.LogRecord) -> bool:
    """What the terminal shows: our messages, and warnings raised in our code. The log has everybody's."""
    if record.name == "py.warnings":
        return f"{os.sep}runner{os.sep}" in record.getMessage().partition(": ")[0]
    return record.name.partition(".")[0] == "runner" and not hasattr(record, "quiet")


class _Terminal(logging.Handler):
    """Writes to what ``sys.stderr`` is at that moment: a live progress bar stands in for it."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


class _File(logging.FileHandler):
    """train.log, which must not be what a run fails of: on a full disk its lines are lost; the terminal has them."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        if not isinstance(sys.exception(), OSError):
            super().handleError(record)

    def close(self) -> None:
        with suppress(OSError):
            super().close()


class _Redacted(logging.Formatter):
    """Cuts secrets out of the finished record: message, arguments and traceback."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


class _TerminalFormat(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        if record.name == "py.warnings":  # "path:line: Category: message\n  source line"
            text = text.split(": ", 2)[-1].splitlines()[0]
        if record.levelno >= logging.WARNING:
            text = f"{record.levelname.lower()}: {text}"
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return redact(text)


class Display:
    """The progress of one run."""

    def __init__(self, total_steps: int) -> None:
        self.total_steps = total_steps
        self.bar: Progress | None = None
        self.task: Any = None

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
        if self.bar:
            self.bar.update(self.task, description=f"evaluating {done}/{total}" if done < total else "training")

    def record(self, step: int, metrics: dict[str, float]) -> None:
        """One record: the bar moves, or a line is written."""
        text = shown(metrics) + self._eta(step, metrics)
        if self.bar:
            self.bar.update(self.task, completed=step, shown=text, description="training")
        log.info(f"step {step}/{self.total_steps}  {text}", extra={"quiet": True} if self.bar else {})

    def _eta(self, step: int, metrics: dict[str, float]) -> str:
        """What the steps that are left will take, evaluations not counted."""
        left = (self.total_steps - step) * metrics.get("train/step_seconds", 0.0)
        return f"  eta {duration(left)}" if left else ""


def shown(metrics: dict[str, float]) -> str:
    """The metrics worth a glance, in one line."""
    picked = {
        "train/loss": ("loss", "{:.4f}"),
        "train/grad_norm": ("grad norm", "{:.3g}"),
        "train/learning_rate": ("lr", "{:.2e}"),
        "train/tokens_per_second": ("tok/s", "{:.0f}"),
        "eval/loss": ("eval loss", "{:.4f}"),
        "eval/token_accuracy": ("accuracy", "{:.3f}"),
    }
    return "  ".join(f"{label} {form.format(metrics[k])}" for k, (label, form) in picked.items() if k in metrics)


def header(lines: dict[str, str]) -> None:
    """What is about to happen, a line a fact."""
    width = max(map(len, lines))
    for label, text in lines.items():
        log.info(f"{label:<{width}}  {text}")


def loading(what: str) -> None:
    """Say on the terminal (stderr) what takes the next seconds."""
    print(f"loading {what} …", file=sys.stderr)


def say(text: str) -> None:
    """A line on the terminal (stdout) and in the log."""
    text = redact(text)
    print(text)
    log.info(text, extra={"quiet": True})


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A table on the terminal (stdout) and, as plain lines, in the log."""
    from rich.table import Table

    drawn = Table(title=title, title_justify="left", show_header=any(columns))
    for column in columns:
        drawn.add_column(column, overflow="fold")
    for row in rows:
        drawn.add_row(*row)
    console().print(drawn)
    for row in [columns, *rows] if any(columns) else rows:
        log.info("  ".join(cell.replace("\n", " ") for cell in row), extra={"quiet": True})


def console() -> Console:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 120, highlight=False, markup=False, soft_wrap=False)


def nearest(path: Path) -> str:
    """The path as one would type it here: relative where it lies below the current directory."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def told_apart(names: Sequence[str], width: int) -> list[str]:
    """The names within ``width`` characters: cut at the end, or where they would be alike then, at the beginning."""
    cut = {name: name if len(name) <= width else name[: width - 1] + "…" for name in names}
    for alike in {text: [name for name in cut if cut[name] == text] for text in cut.values()}.values():
        if len(alike) > 1 and width > 2:
            pairs = zip(min(alike), max(alike), strict=False)
            shared = "".join(one for one, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            part = max(shared.rfind(mark) + 1 for mark in ",/ ") or len(shared)
            rest = told_apart([name[part:] for name in alike], width - 1)
            cut |= {name: f"…{text.lstrip('…')}" for name, text in zip(alike, rest, strict=True)}
    return [cut[name] for name in names]


def duration(seconds: float) -> str:
    """``45 s``, ``3 min 20 s``, ``2 h 05 min``."""
    seconds = int(seconds + 0.5)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def _bar() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn("{task.fields[shown]}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
