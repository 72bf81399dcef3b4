"""Jobs of a Slurm cluster, through submitit: a run is a job, a sweep an array; the queue keeps them going."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge

from runner.config import bind
from runner.config.schema import Count, Positive
from runner.errors import Fault, LaunchError
from runner.launch.launcher import Source
from runner.launch.slurm import monitor, script, submit
from runner.launch.slurm.request import SlurmRequest
from runner.tracking import slurm_client
from runner.tracking.mirror import behind, spawn
from runner.tracking.rundir import RunDir
from runner.tracking.sweepdir import SweepDir, slurm_room

OF_SLURM = (
    "partition", "account", "qos", "cpus_per_task", "mem_gb", "constraint", "exclude", "nodelist", "reservation",
    "modules", "setup", "srun_args", "additional_parameters",
)  # fmt: skip
"""What only Slurm heeds."""

NO_EFFECT = {
    "slurm": (),
    "local": (*OF_SLURM, "gpus_per_node", "array_parallelism", "max_requeues"),
    "debug": (
        *OF_SLURM, "gpus_per_node", "array_parallelism", "max_requeues", "container", "python", "timeout_min",
        "signal_delay_s", "snapshot",
    ),
}  # fmt: skip
"""Cluster → the keys that nobody heeds there."""

SHARED_HERE = "launcher=local or launcher=accelerate share out the GPUs of this machine, and take turns"


@dataclass(frozen=True)
class Slurm:
    """The launcher: submits runs as the request says."""

    request: SlurmRequest

    @property
    def processes(self) -> int:
        return self.request.processes

    @property
    def is_detached(self) -> bool:
        return not self.request.wait and self.request.cluster != "debug"

    def check(self, at_once: int | None = None) -> None:  # noqa: ARG002 - Slurm queues them
        """Refuse what Slurm would refuse, by asking it.

        Raises:
            LaunchError: with Slurm's own reason.
        """
        if self.request.cluster == "slurm":
            slurm_client.refuse_unreachable()
            script.refuse(self.request)

    def plan(self, runs: int) -> str:
        """The sbatch script; RUN stands for the folder of the run, or of the sweep, and NAME for the job's name."""
        if self.request.cluster != "slurm":
            on = ", on its CPU" if self.request.cluster == "local" else ""
            return f"{self.request.processes} process(es) on this machine (launcher.cluster={self.request.cluster}){on}"
        home = Path("RUN")
        code = None if self.request.snapshot == "none" else home / "code"
        text = script.script(
            self.request, slurm_room(home), "NAME", code, min(runs, submit.longest_array(self.request))
        )
        return text.replace(str(home.absolute()), str(home))

    def launch(self, rundirs: list[RunDir], sweep: SweepDir | None) -> list[int]:
        """Submit the runs that are not in the queue; with ``wait`` follow all of them to their ends."""

        def open_in_mlflow() -> None:
            if sweep:
                spawn.open_in_mlflow(sweep)  # parent and children are there before the first job starts

        if self.request.cluster == "debug":
            open_in_mlflow()
            return submit.run_here(self.request, rundirs, sweep)
        try:
            left = submit.submit(self.request, rundirs, sweep, open_in_mlflow)
        except LaunchError:
            _tell_of_refusal(sweep, rundirs)
            raise
        _tell_of_refusal(sweep, left)
        if rundirs and not self.request.wait:
            submit.tell_how_to_watch(sweep.path if sweep else rundirs[0].path)
        taken = [rundir for rundir in rundirs if rundir not in left]
        codes = monitor.follow(taken) if self.request.wait else [0] * len(taken)
        found = dict(zip(taken, codes, strict=True))
        return [found.get(rundir, 1) for rundir in rundirs]

    def serve(self, source: Source, sweep: SweepDir, at_once: int | None) -> int:
        """Submit each run when there is room for it; Ctrl-C and SIGTERM end the proposing, not what was submitted."""
        print("runs are proposed from here as others end: this stays, whatever launcher.wait says", file=sys.stderr)
        submit.tell_how_to_watch(sweep.path)
        several = at_once or self.request.array_parallelism
        assert several, "checked by search.check_combination"
        each = replace(self.request, array_parallelism=None)  # heeded here: they do not wait for each other
        return monitor.serve(source, several, lambda rundir: submit.submit(each, [rundir], sweep))


def _tell_of_refusal(sweep: SweepDir | None, left: list[RunDir]) -> None:
    """Tell MLflow that nobody will start these runs of the sweep."""
    if sweep and any(map(behind.is_wanted, left)):
        behind.tell([sweep.path])


def slurm(
    *,
    cluster: Literal["slurm", "local", "debug"],
    partition: str | None,
    account: str | None,
    qos: str | None,
    timeout_min: Count,
    nodes: Count,
    gpus_per_node: Annotated[int, Ge(0)] | None,
    tasks_per_node: Count | None,
    cpus_per_task: Count | None,
    mem_gb: Positive | None,
    constraint: str | None,
    exclude: str | None,
    nodelist: str | None,
    reservation: str | None,
    modules: list[str],
    setup: list[str],
    container: str | None,
    python: str | None,
    srun_args: list[str],
    additional_parameters: dict[str, Any],
    array_parallelism: Count | None,
    max_requeues: Annotated[int, Ge(0)],
    signal_delay_s: Count,
    snapshot: Literal["keep", "new", "none"],
    wait: bool,
) -> Slurm:
    """Jobs of a Slurm cluster, one srun task for each process of a run."""
    return Slurm(SlurmRequest(**locals()))


def check_slurm(
    *,
    cluster: str,
    nodes: int,
    gpus_per_node: int | None,
    tasks_per_node: int | None,
    timeout_min: int,
    signal_delay_s: int,
    additional_parameters: dict[str, Any],
    **others: Any,
) -> Iterator[Fault]:
    """Combinations that cannot work, keys that nobody heeds, and options of sbatch that have a key of their own."""
    if cluster != "slurm" and nodes > 1:
        yield Fault("nodes", f"cluster={cluster} is this one machine", "set nodes to 1", nodes)
    if cluster == "debug" and (tasks_per_node or 1) > 1:
        yield Fault("tasks_per_node", "cluster=debug is one process", "set cluster=local for several", tasks_per_node)
    if signal_delay_s >= timeout_min * 60:
        problem = f"a job of {timeout_min} min would be told to save before it begins"
        yield Fault("signal_delay_s", problem, "set it to less than the time limit", signal_delay_s)
    told = {
        "additional_parameters": additional_parameters, "gpus_per_node": gpus_per_node, "timeout_min": timeout_min,
        "signal_delay_s": signal_delay_s, **others,
    }  # fmt: skip
    for key in NO_EFFECT[cluster]:
        if told[key] and told[key] != _defaults()[key]:
            remedy = SHARED_HERE if key in ("gpus_per_node", "array_parallelism") else "there is no Slurm"
            yield Fault(key, f"has no effect with cluster={cluster}", f"leave it out: {remedy}", told[key])
    keys = {"time": "timeout_min", "ntasks-per-node": "tasks_per_node", "mem": "mem_gb", "nodes": "nodes"}
    for name, value in additional_parameters.items():
        option = name.replace("_", "-")
        key = keys.get(option, option.replace("-", "_"))
        if option in script.OURS:
            yield Fault(f"additional_parameters.{name}", "is set by runner itself", "leave it out", value)
        elif key in ("nodes", "timeout_min", "gpus_per_node", "tasks_per_node", *others):
            yield Fault(f"additional_parameters.{name}", "has a key of its own", f"set launcher.{key}", value)


@functools.cache
def _defaults() -> dict[str, Any]:
    """The option's own YAML: what stands there nobody has asked for."""
    import yaml

    return dict(yaml.safe_load((bind.config_dir() / "launcher" / "slurm.yaml").read_text()))
