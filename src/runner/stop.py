"""Stopping on request: SIGTERM from a scheduler, Ctrl-C from a person."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

from runner.errors import Interrupted, Preempted, Stopped


@contextmanager
def signals_to(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """While the block runs, SIGTERM and SIGINT call ``handler``."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


class Stop:
    """Turns signals into a Stopped that is raised where nothing is lost.

    A signal only sets a flag which ``check()`` reads; within ``at_once()`` it raises wherever the program is. A second
    Ctrl-C waits for nothing: it is a KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.requested: Stopped | None = None
        self._at_once = False
        self._handling = ExitStack()

    def __enter__(self) -> Stop:
        self._handling.enter_context(signals_to(self._on_signal))
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
        again = self.requested is not None
        self.requested = Preempted("stopped by SIGTERM") if number == signal.SIGTERM else Interrupted("interrupted")
        if again and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self._at_once:
            raise self.requested
