"""Stopping on request: SIGTERM from a scheduler, Ctrl-C from a person."""

from __future__ import annotations

import signal
from types import FrameType

from runner.errors import Fault, Interrupted, Preempted, Stopped


class Stop:
    """Turns signals into a Stopped that is raised where nothing is lost.

    Before ``defer()`` a signal raises at once, wherever the program is; after it the signal only sets a flag which
    ``check()`` reads. A second Ctrl-C does not wait.
    """

    def __init__(self) -> None:
        self.requested: Stopped | None = None
        self._deferred = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> Stop:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def defer(self) -> None:
        """From now on wait for ``check``."""
        self._deferred = True

    def check(self) -> None:
        """Raise the Stopped that was asked for, if any."""
        if self.requested is not None:
            raise self.requested

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        again = self.requested is not None
        if number == signal.SIGTERM:
            self.requested = Preempted(Fault("", "stopped by SIGTERM; the state is saved"))
        else:
            self.requested = Interrupted(Fault("", "interrupted; the state is saved"))
        if again and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self._deferred:
            raise self.requested
