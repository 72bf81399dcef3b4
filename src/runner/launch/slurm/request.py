"""The settings of ``launcher=slurm``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Cluster = Literal["slurm", "local", "debug"]


@dataclass(frozen=True, kw_only=True)
class SlurmRequest:
    """Resources and options of each run's job; conf/launcher/slurm.yaml describes every field."""

    cluster: Cluster
    partition: str | None
    account: str | None
    qos: str | None
    timeout_min: int
    nodes: int
    gpus_per_node: int | None
    tasks_per_node: int | None
    cpus_per_task: int | None
    mem_gb: float | None
    constraint: str | None
    exclude: str | None
    nodelist: str | None
    reservation: str | None
    modules: list[str]
    setup: list[str]
    container: str | None
    python: str | None
    srun_args: list[str]
    additional_parameters: dict[str, Any]
    array_parallelism: int | None
    max_requeues: int
    signal_delay_s: int
    snapshot: Literal["keep", "new", "none"]
    wait: bool

    @property
    def tasks(self) -> int:
        """Processes of one run on each node."""
        return self.tasks_per_node or self.gpus_per_node or 1

    @property
    def processes(self) -> int:
        """World size of one run."""
        return self.nodes * self.tasks
