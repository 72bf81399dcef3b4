"""stdout and stderr of this program: control characters are escaped, and text that cannot be written is dropped.

All text reaches the terminal through ``Output``: names of files and runs, rows of data and answers of a model may
contain escape sequences that would move the cursor, rename the window or hide a line.
"""

from __future__ import annotations

import errno
import os
import secrets
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from runner.errors import Fault, ReaderLeft, RunnerError, visible

_OWN = f"\ufdd0{secrets.token_hex(8)}\ufdd1"
"""Stands for the escape character in our own styles; no data can contain this text."""
_GONE = (errno.EPIPE, errno.EIO, errno.EBADF)
"""Errors of a pipe whose reader has left, a closed terminal and a closed file."""


def styled(text: str, style: str) -> str:
    """The text in one of the terminal's styles, such as 31 (red) or 4 (underlined)."""
    return f"{_OWN}[{style}m{text}{_OWN}[0m"


CLEAR = f"{_OWN}[2J{_OWN}[H"
"""Printed: clears the terminal."""


class Raw:
    """A text stream that drops what cannot be written, for text with our own escape sequences (rich's tables)."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.is_result = False
        """Whether the text is the result of the command: then an error ends the command."""

    def write(self, text: str) -> int:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        with self._dropping():
            self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        with self._dropping():
            self._stream.flush()

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextmanager
    def _dropping(self) -> Iterator[None]:
        try:
            yield
        except ValueError:  # the stream was closed
            pass
        except OSError as error:
            is_gone = error.errno in _GONE
            if is_gone:
                self._discard()
            if self.is_result and is_gone:
                raise ReaderLeft from error
            if self.is_result:
                remedy = "free disk space, or write the output to another disk"
                raise RunnerError(Fault("stdout", f"cannot be written: {error.strerror}", remedy)) from error

    def close(self) -> None:
        """Write what is buffered; if that fails, discard it: Python flushes the stream once more when it exits."""
        self.is_result = False
        try:
            self._stream.flush()
        except ValueError:
            pass
        except OSError:
            self._discard()

    def _discard(self) -> None:
        """Send this and all further text to /dev/null."""
        with suppress(OSError, ValueError):
            number, nowhere = self._stream.fileno(), os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)
            os.close(nowhere)
            self._stream.flush()


class Output(Raw):
    """A text stream that escapes control characters, except in our own styles, and drops what cannot be written."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self.raw = Raw(stream)

    def write(self, text: str) -> int:
        start = "\r" if text.startswith("\r") else ""  # a progress bar, ours or a library's, draws its line again
        super().write(start + "\x1b".join(map(visible, text[len(start) :].split(_OWN))))
        return len(text)


@contextmanager
def guarded() -> Iterator[None]:
    """While the block runs, ``sys.stdout`` and ``sys.stderr`` are an ``Output``.

    So a pipe whose reader has left, a closed terminal or a full disk does not stop a run.
    """
    if isinstance(sys.stdout, Output) and isinstance(sys.stderr, Output):
        yield
        return
    _open_closed()
    before, ours = (sys.stdout, sys.stderr), (Output(sys.stdout), Output(sys.stderr))
    sys.stdout, sys.stderr = ours  # type: ignore[assignment]
    try:
        yield
    finally:
        for stream in ours:
            stream.close()
        sys.stdout, sys.stderr = before


@contextmanager
def piped() -> Iterator[None]:
    """For a block that only prints: end the command quietly when the reader of stdout has left (``| head``).

    Raises:
        ReaderLeft: the reader of the pipe has left, or the terminal was closed.
        RunnerError: stdout cannot be written, for example because a disk is full.
    """
    streams = [stream for stream in (sys.stdout, getattr(sys.stdout, "raw", None)) if isinstance(stream, Raw)]
    before = [stream.is_result for stream in streams]
    for stream in streams:
        stream.is_result = True
    try:
        yield
        sys.stdout.flush()
    finally:
        for stream, was_result in zip(streams, before, strict=True):
            stream.is_result = was_result


def _open_closed() -> None:
    """Connect standard streams that were closed (``>&-``) with /dev/null.

    Otherwise the next file that is opened gets the number of the stream, and others write into it.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
            setattr(sys, name, os.fdopen(number, mode, closefd=False))
