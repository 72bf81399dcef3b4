"""Where log messages go: train.log and the terminal, without secrets and control characters."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from runner import PACKAGE
from runner.errors import visible
from runner.secrets import redact

VERBOSITY = "TRANSFORMERS_VERBOSITY"


@contextmanager
def logging_to(path: Path, *, speaks: bool = True) -> Iterator[None]:
    """While the block runs, write the messages of ``runner`` and all warnings to ``path``, and with ``speaks`` the
    messages of ``runner`` to the terminal (stderr) as well."""
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


def quiet_libraries() -> None:
    """Disable the progress bars and messages of transformers; the log gets its warnings, or what VERBOSITY asks for."""
    import warnings

    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    if not os.environ.get(VERBOSITY):  # transformers reads it when it is imported
        transformers_logging.set_verbosity_warning()
    transformers_logging.disable_default_handler()
    transformers_logging.enable_propagation()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft|torch")


def _is_ours(record: logging.LogRecord) -> bool:
    """Filter of the terminal: messages of ``runner``, and warnings raised in its code. train.log has all of them."""
    if record.name == "py.warnings":
        return record.getMessage().startswith(f"{PACKAGE}{os.sep}")
    return record.name.partition(".")[0] == "runner" and not hasattr(record, "quiet")


class _Terminal(logging.Handler):
    """Writes to the current ``sys.stderr``: a live progress bar replaces that object."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


class _File(logging.FileHandler):
    """train.log. Errors of the disk are ignored, so that a full disk loses log lines but does not stop the run."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        if not isinstance(sys.exception(), OSError):
            super().handleError(record)

    def close(self) -> None:
        with suppress(OSError):
            super().close()


class _Redacted(logging.Formatter):
    """Redacts secrets and escapes control characters in the formatted record: message, arguments and traceback."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(redact(super().format(record)))


class _TerminalFormat(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        if record.name == "py.warnings":  # "path:line: Category: message\n  source line"
            text = text.split(": ", 2)[-1].splitlines()[0]
        if record.levelno >= logging.WARNING:
            text = f"{record.levelname.lower()}: {text}"
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return visible(redact(text))
