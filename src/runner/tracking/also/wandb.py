"""``tracking.also=[wandb]``: a run in Weights & Biases, with the settings of its own environment variables.

It has the id of our run: so a resumed run continues it. Online, W&B reports the last step that it has. Offline
(``WANDB_MODE=offline``) its files are below ``wandb`` in the run folder; they are written again at each attempt of the
run, because ``wandb sync`` replaces a run of the same id.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from typing import Any

from runner.tracking.also.tracker import About
from runner.tracking.state_file import DONE, State

NOT_IN_PROJECT = re.compile(r"[/\\#?%:]")
LONGEST_PROJECT, LONGEST_TAG = 128, 64
INIT_S, FINISH_S = 60.0, 120.0
"""Limits of time, so that a server that does not answer cannot keep the process that uploads, nor its end."""


def settings() -> Any:
    """The settings of a run: quiet, without what MLflow has already, and limited in time."""
    import wandb

    limits = {"finish_timeout": FINISH_S, "finish_timeout_raises": True}  # of newer versions
    known = {name: value for name, value in limits.items() if name in wandb.Settings.model_fields}
    quiet = {"silent": True, "console": "off", "disable_git": True, "disable_code": True, "x_disable_stats": True}
    return wandb.Settings(**quiet, init_timeout=INIT_S, **known)


class WeightsAndBiases:
    """A run in Weights & Biases. Needs the package wandb."""

    def __init__(self, about: About) -> None:
        import wandb

        mode = os.environ.get("WANDB_MODE", "")
        if mode in ("offline", "dryrun"):
            for folder in about.rundir.path.glob(f"wandb/offline-run-*-{about.identity}"):
                shutil.rmtree(folder)
        self._run = wandb.init(
            id=about.identity,
            resume="allow",
            reinit="create_new",
            project=os.environ.get("WANDB_PROJECT") or NOT_IN_PROJECT.sub("-", about.project)[:LONGEST_PROJECT],
            name=about.name,
            group=about.sweep,
            config=dict(about.config),
            tags=[f"{name}:{value}"[:LONGEST_TAG] for name, value in about.tags.items()],
            notes=about.notes,
            dir=str(about.rundir.path),
            settings=settings(),
        )
        self._first = self._run.step
        """The first step that W&B does not have yet."""

    def log(self, step: int, time_s: float, metrics: Mapping[str, float]) -> None:
        if step >= self._first:
            self._run.log({**metrics, "time": time_s}, step=step)

    def flush(self) -> None:
        """W&B sends by itself."""

    def close(self, state: State | None) -> None:
        if state is None:
            self._run.finish()
            return
        if state.status == "preempted":
            self._run.mark_preempting()
        self._run.summary.update({"runner/status": state.status, "runner/reason": state.reason})
        self._run.finish(exit_code=0 if state.status in DONE else 1)
