"""Stopping on request: SIGTERM from a scheduler, Ctrl-C from a person."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from runner.errors import Interrupted, Preempted, Stopped


class Stop:
    """Turns signals into a Stopped that is raised where nothing is lost.

    A signal only sets a flag which ``check()`` reads; within ``at_once()`` it raises wherever the program is. A second
    Ctrl-C waits for nothing: it is a KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.requested: Stopped | None = None
        self._at_once = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> Stop:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

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
