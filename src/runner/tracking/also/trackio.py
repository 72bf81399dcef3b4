"""``tracking.also=[trackio]``: a run in trackio's local database, or where its environment variables say.

Its name ends with the beginning of our id, because trackio finds a run by its name. trackio stores no status.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping

from runner.tracking.also.tracker import About
from runner.tracking.state_file import State


class Trackio:
    """A run in trackio. Needs the package trackio."""

    def __init__(self, about: About) -> None:
        import trackio
        from trackio.sqlite_storage import SQLiteStorage

        name = f"{about.name} {about.identity[:8]}"
        with contextlib.redirect_stdout(io.StringIO()):
            self._run = trackio.init(
                project=about.project,
                name=name,
                group=about.sweep,
                config={**about.config, "tags": dict(about.tags), "notes": about.notes},
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        self._known = {(log["step"], key) for log in SQLiteStorage.get_logs(about.project, name) for key in log}
        self._first = 0 if self._known else self._run._next_step
        """The first step that a remote trackio, whose records are not at hand, does not have yet."""

    def log(self, step: int, _time_s: float, metrics: Mapping[str, float]) -> None:
        missing = {key: value for key, value in metrics.items() if (step, key) not in self._known}
        if missing and step >= self._first:
            self._run.log(missing, step=step)

    def flush(self) -> None:
        """trackio stores by itself, twice a second."""

    def close(self, _state: State | None) -> None:
        from trackio import context_vars

        with contextlib.redirect_stdout(io.StringIO()):
            self._run.finish()
        context_vars.current_run.set(None)  # else trackio closes it once more when the process exits, and prints that
