"""Signal handling: stop a run on SIGTERM, SIGUSR1, SIGUSR2 (Slurm's warnings), SIGHUP (a closed terminal) or Ctrl-C."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import FrameType

from runner.errors import Interrupted, Preempted, Stopped

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGINT)
STAY_IGNORED = (signal.SIGHUP, signal.SIGUSR1)
"""Signals that are not handled if they were ignored when the program started, as SIGHUP is under nohup."""
ONE_GESTURE_S = 0.5
"""Two SIGINTs within this time are one Ctrl-C: the terminal sends one, a launcher may forward another."""


@contextmanager
def signals_to(
    handler: Callable[[int, FrameType | None], object] | signal.Handlers, numbers: Sequence[signal.Signals] = SIGNALS
) -> Iterator[None]:
    """While the block runs, these signals call ``handler``, except those that are ignored and stay so."""
    previous = {number: signal.signal(number, handler) for number in numbers if not stays_ignored(number)}
    try:
        yield
    finally:
        for number, old_handler in previous.items():
            signal.signal(number, old_handler)


@contextmanager
def time_limit(seconds: float, error: type[BaseException] = TimeoutError, again_s: float = 0.0) -> Iterator[None]:
    """Raise ``error`` in a block that takes longer; only the main thread has a limit (it gets the signals).

    ``again_s``: a block that catches the error is interrupted again after this time; 0: only once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_alarm(*_: object) -> None:
        raise error

    handler = signal.signal(signal.SIGALRM, on_alarm)
    before = signal.setitimer(signal.ITIMER_REAL, seconds, again_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *before)
        signal.signal(signal.SIGALRM, handler)


def stays_ignored(number: int) -> bool:
    return number in STAY_IGNORED and signal.getsignal(number) is signal.SIG_IGN


def restore_defaults() -> None:
    """Remove the handlers that a forked process has inherited, and keep what is ignored."""
    for number in SIGNALS:
        if not stays_ignored(number):
            signal.signal(number, signal.SIG_DFL)


class Stop:
    """Turns signals into a ``Stopped`` exception that is raised at a safe point.

    A signal only sets ``requested``, and ``check()`` raises. Within ``at_once()`` the signal handler raises at once.
    A second Ctrl-C, more than ONE_GESTURE_S after the first, raises KeyboardInterrupt at once.
    """

    def __init__(self) -> None:
        self.requested: Stopped | None = None
        self.was_hasty = False
        """Whether the exception was raised outside ``check()``, so that the other ranks may still be training."""
        self._at_once = False
        self._first_at = 0.0
        self._handling = ExitStack()

    def __enter__(self) -> Stop:
        self._handling.enter_context(signals_to(self._on_signal))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # a launcher may have blocked the signals until now
        return self

    def __exit__(self, *_: object) -> None:
        self._handling.close()

    def check(self) -> None:
        """Raise ``requested``, if a signal has arrived."""
        if self.requested is not None:
            raise self.requested

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Stopping is safe anywhere within the block: a signal raises immediately.

        If a library catches or replaces the exception, ``Stopped`` is raised at the end of the block.
        """
        self._at_once = True
        try:
            self.check()
            yield
        except Exception as error:
            if self.requested is not None:
                raise self.requested from error
            raise
        finally:
            self._at_once = False
        self.check()

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        first, now = self._first_at, time.monotonic()
        self._first_at = first or now
        name = signal.Signals(number).name
        self.requested = Interrupted("interrupted") if number == signal.SIGINT else Preempted(f"stopped by {name}")
        if number == signal.SIGINT and first and now - first > ONE_GESTURE_S:
            self.was_hasty = True
            raise KeyboardInterrupt
        if self._at_once:
            self.was_hasty = True
            raise self.requested
