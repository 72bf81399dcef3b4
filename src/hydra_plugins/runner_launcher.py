"""Hydra plugins: the launcher and the sweeper that connect Hydra's multirun to this program.

Hydra finds plugins only in the package ``hydra_plugins`` and imports this file at every start: no heavy imports here.
The work is done by ``sweep.session.Session``, which ``python -m runner -m`` passes to Hydra as the task function.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class RunnerLauncher(Launcher):
    """Run the jobs of any sweeper with the configured launcher (``launcher=local``, …)."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:  # noqa: ARG002
        self.session: Any = task_function

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Train one run per list of overrides; each returns its objective, the held-out loss."""
        returns: list[JobReturn] = self.session.launch(job_overrides, initial_job_idx)
        return returns


class RunnerSweeper(Sweeper):
    """Grid sweep: compose every combination of the swept values once, then launch all of them together."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.session: Any = task_function
        self.launcher: RunnerLauncher = RunnerLauncher()
        self.launcher.setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def sweep(self, arguments: list[str]) -> Any:
        return self.launcher.launch(self.session.grid(arguments), 0)


for group, name in (("hydra/launcher", "RunnerLauncher"), ("hydra/sweeper", "RunnerSweeper")):
    node = {"_target_": f"hydra_plugins.runner_launcher.{name}"}
    ConfigStore.instance().store(group=group, name="runner", node=node, provider="runner")
