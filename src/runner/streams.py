"""stdout and stderr of this program: control characters are escaped, and text that cannot be written is dropped.

All text reaches the terminal through ``Output``: names of files and runs, rows of data and answers of a model may
contain escape sequences that would move the cursor, rename the window or hide a line.
"""

from __future__ import annotations

import errno
import os
import secrets
import select
import stat
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from runner.errors import Fault, ReaderLeft, RunnerError, visible

_OWN = f"\ufdd0{secrets.token_hex(8)}\ufdd1"
"""Stands for the escape character in our own styles; no data can contain this text."""
_GONE = (errno.EPIPE, errno.EIO, errno.EBADF)
"""Errors of a pipe whose reader has left, a closed terminal and a closed file."""
PATIENCE_S = 1.0
"""How long ``unblocked`` output waits for a terminal that is stopped (Ctrl-S) or a pipe that is full."""
_GAP = b"\n[text is missing here: this output was blocked]\n"


def styled(text: str, style: str) -> str:
    """The text in one of the terminal's styles, such as 31 (red) or 4 (underlined)."""
    return f"{_OWN}[{style}m{text}{_OWN}[0m"


OTHER_SCREEN, FIRST_SCREEN = f"{_OWN}[?1049h{_OWN}[?25l", f"{_OWN}[?25h{_OWN}[?1049l"
"""Printed: the terminal shows its other screen, without a cursor; and its first one again."""
START, REST_OF_LINE, REST_OF_SCREEN = f"{_OWN}[H", f"{_OWN}[K", f"{_OWN}[J"
"""Printed: the cursor moves to the start; what follows it on its line, or on the screen, is cleared."""


class Raw:
    """A text stream that drops what cannot be written, for text with our own escape sequences (rich's tables)."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.is_result = False
        """Whether the text is the result of the command: then an error ends the command."""
        self.second: _Second | None = None
        """Where to write without blocking; None: writing waits for the terminal or the reader without a limit."""

    def write(self, text: str) -> int:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        data = text.encode(encoding, "backslashreplace")
        with self._dropping():
            if self.is_result or self.second is None or not self.second.write(data):
                self._stream.write(data.decode(encoding))
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


class _Second:
    """The terminal or pipe of a stream, opened a second time, to write without blocking.

    Not the stream itself: other programs that have it open would no longer block either.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._number = -1
        self._target: tuple[int, ...] = ()
        self._is_blocked = False

    def write(self, data: bytes) -> bool:
        """Write, or drop what cannot be written in time; False if the stream is no terminal or pipe."""
        self._follow()
        if self._number < 0:
            return False
        self._stream.flush()
        end, rest = time.monotonic() + PATIENCE_S, _GAP + data if self._is_blocked else data
        while rest:
            try:
                rest = rest[os.write(self._number, rest) :]
            except BlockingIOError:
                remaining_s = end - time.monotonic()
                if self._is_blocked or remaining_s <= 0 or not self._is_ready(remaining_s):
                    self._is_blocked = True
                    return True
        self._is_blocked = False
        return True

    def close(self) -> None:
        if self._number >= 0:
            os.close(self._number)
        self._number, self._target = -1, ()

    def _follow(self) -> None:
        """Open what the stream writes to now: the stream may have been redirected since."""
        try:
            number = self._stream.fileno()
            status = os.fstat(number)
            target = status.st_dev, status.st_ino, status.st_rdev
            if target == self._target:
                return
            self.close()
            self._target = target
            if stat.S_ISFIFO(status.st_mode) or os.isatty(number):
                self._number = os.open(f"/proc/self/fd/{number}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
        except (OSError, ValueError):  # no file, closed, a pipe without a reader, another user's terminal
            self._number = -1

    def _is_ready(self, timeout_s: float) -> bool:
        poll = select.poll()
        poll.register(self._number, select.POLLOUT)
        return bool(poll.poll(timeout_s * 1000))


@contextmanager
def unblocked() -> Iterator[None]:
    """While the block runs, a terminal that is stopped (Ctrl-S) or a full pipe delays it by PATIENCE_S at most.

    What cannot be written then is dropped; train.log has all of it.
    """
    streams = [stream for stream in _streams(sys.stdout, sys.stderr) if stream.second is None]
    for stream in streams:
        stream.second = _Second(stream._stream)
    try:
        yield
    finally:
        for stream in streams:
            if stream.second:
                stream.second.close()
            stream.second = None


def let_go() -> None:
    """Close what ``unblocked`` has opened: a reader need not wait for a forked process that leaves the terminal."""
    for stream in _streams(sys.stdout, sys.stderr):
        if stream.second:
            stream.second.close()


def _streams(*outputs: Any) -> list[Raw]:
    """The streams of this module among ``outputs``, and those below them."""
    return [stream for each in outputs for stream in (each, getattr(each, "raw", None)) if isinstance(stream, Raw)]


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
    streams = _streams(sys.stdout)
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
