"""Stopping on request: SIGTERM or SIGUSR2 (Slurm's warning) from a scheduler, Ctrl-C from a person."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

from runner.errors import Interrupted, Preempted, Stopped

SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
ONE_GESTURE_S = 0.5


@contextmanager
def signals_to(handler: Callable[[int, FrameType | None], None], *more: signal.Signals) -> Iterator[None]:
    """While the block runs, SIGTERM, SIGUSR2, SIGINT and ``more`` call ``handler``; what nohup had ignored stays so."""
    wanted = [*SIGNALS, *(number for number in more if signal.getsignal(number) is not signal.SIG_IGN)]
    before = {number: signal.signal(number, handler) for number in wanted}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


class Stop:
    """Turns signals into a Stopped that is raised where nothing is lost.

    A signal only sets a flag which ``check()`` reads; within ``at_once()`` it raises wherever the program is. A second
    Ctrl-C waits for nothing: it is a KeyboardInterrupt. What comes within a moment of the first is the same Ctrl-C: it
    reaches a process from the terminal, and from a launcher that passes it on.
    """

    def __init__(self) -> None:
        self.requested: Stopped | None = None
        self.was_hasty = False
        """Whether the program was stopped where it happened to be, which the other ranks know nothing of."""
        self._at_once = False
        self._first_at = 0.0
        self._handling = ExitStack()

    def __enter__(self) -> Stop:
        self._handling.enter_context(signals_to(self._on_signal))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # a launcher may have held them back until now
        return self

    def __exit__(self, *_: object) -> None:
        self._handling.close()

    def check(self) -> None:
        """Raise the Stopped that was asked for, if any."""
        if self.requested is not None:
            raise self.requested

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """While the block runs nothing is lost by stopping: raise a Stopped in the middle of it.

        A library that eats the exception, or makes another one of it, only delays it to the end of the block.
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
        named = signal.Signals(number).name
        self.requested = Interrupted("interrupted") if number == signal.SIGINT else Preempted(f"stopped by {named}")
        if number == signal.SIGINT and first and now - first > ONE_GESTURE_S:
            self.was_hasty = True
            raise KeyboardInterrupt
        if self._at_once:
            self.was_hasty = True
            raise self.requested
