"""``launcher=slurm``: a run is a Slurm job, a sweep is a job array; submitted with submitit."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le

from runner.config import bind
from runner.config.schema import Count, Leaf, Positive, Script, Text, Whole
from runner.errors import Fault, LaunchError
from runner.launch.launcher import Source
from runner.launch.slurm import monitor, script, submit
from runner.launch.slurm.request import SlurmRequest
from runner.tracking import slurm_commands
from runner.tracking.mirror import backlog, spawn
from runner.tracking.mlflow import parent_run
from runner.tracking.rundir import RunDir
from runner.tracking.sweepdir import SweepDir, slurm_room

SLURM_ONLY = (
    "partition", "account", "qos", "cpus_per_task", "mem_gb", "constraint", "exclude", "nodelist", "reservation",
    "modules", "setup", "srun_args", "additional_parameters",
)  # fmt: skip
"""Keys that have an effect only on a real Slurm cluster."""

NO_EFFECT = {
    "slurm": (),
    "local": (*SLURM_ONLY, "gpus_per_node", "array_parallelism", "max_requeues"),
    "debug": (
        *SLURM_ONLY, "gpus_per_node", "array_parallelism", "max_requeues", "container", "python", "timeout_min",
        "signal_delay_s", "snapshot",
    ),
}  # fmt: skip
"""``launcher.cluster`` → the keys that have no effect there."""

USE_LOCAL = "use launcher=local or launcher=accelerate to share the GPUs of this machine"


@dataclass(frozen=True)
class Slurm:
    """Launcher that submits runs with the resources in ``request``."""

    request: SlurmRequest

    @property
    def processes(self) -> int:
        return self.request.processes

    @property
    def is_detached(self) -> bool:
        return not self.request.wait and self.request.cluster != "debug"

    def check(self, at_once: int | None = None) -> None:  # noqa: ARG002 - Slurm queues them
        """Test the request with ``sbatch --test-only``.

        Raises:
            LaunchError: Slurm is not reachable or refuses the request; contains Slurm's reason.
        """
        if self.request.cluster == "slurm":
            slurm_commands.refuse_unreachable()
            script.refuse(self.request)
            for note in script.overridden(self.request):
                print(f"note: {note}", file=sys.stderr)

    def plan(self, runs: int) -> str:
        """The sbatch script. RUN replaces the folder of the run or sweep, NAME the job's name."""
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
        """Submit the runs that are not queued yet; with ``wait``, follow all of them until they end."""

        def open_in_mlflow() -> None:
            _upload([rundir.path for rundir in rundirs if _is_again(rundir)], rundirs)
            if sweep:
                spawn.open_in_mlflow(sweep)  # create the parent run before the first job starts

        if self.request.cluster == "debug":
            open_in_mlflow()
            return submit.run_here(self.request, rundirs, sweep)
        try:
            refused = submit.submit(self.request, rundirs, sweep, open_in_mlflow)
        except LaunchError:
            _mark_refused(sweep, rundirs)
            raise
        _mark_refused(sweep, refused)
        if rundirs and not self.request.wait:
            submit.print_next_command(sweep.path if sweep else rundirs[0].path)
        submitted = [rundir for rundir in rundirs if rundir not in refused]
        codes = monitor.follow(submitted) if self.request.wait else [0] * len(submitted)
        code_of = dict(zip(submitted, codes, strict=True))
        return [code_of.get(rundir, 1) for rundir in rundirs]

    def serve(self, source: Source, sweep: SweepDir, at_once: int | None) -> int:
        """Submit proposed runs, ``at_once`` at the same time. Ctrl-C and SIGTERM do not end submitted jobs."""
        print("this command submits runs until the search ends, whatever launcher.wait is", file=sys.stderr)
        submit.print_next_command(sweep.path)
        limit = at_once or self.request.array_parallelism
        assert limit, "checked by algorithms.check_combination"
        request = replace(self.request, array_parallelism=None)  # the limit is applied here: no job dependencies
        if not (code := monitor.serve(source, limit, lambda rundir: submit.submit(request, [rundir], sweep))):
            _notify(sweep)
        return code


def _mark_refused(sweep: SweepDir | None, refused: list[RunDir]) -> None:
    """Update the status in MLflow of runs that were not submitted."""
    _upload([sweep.path] if sweep else [rundir.path for rundir in refused if rundir.read_state().attempt], refused)


def _notify(sweep: SweepDir) -> None:
    """Send the message about the end of a search: its jobs do not know which of them is the last."""
    states = [rundir.read_state() for rundir in sweep.rundirs()]
    parent_run.notify(sweep, parent_run.parent_status(states, False), states)


def _is_again(rundir: RunDir) -> bool:
    """Whether the run waits for another attempt: MLflow shows how the last one ended until the job starts."""
    state = rundir.read_state()
    return state.status == "pending" and state.attempt > 0


def _upload(folders: list[Path], rundirs: list[RunDir]) -> None:
    if folders and any(map(backlog.is_wanted, rundirs)):
        backlog.upload(folders)


def slurm(
    *,
    cluster: Literal["slurm", "local", "debug"],
    partition: Text | None,
    account: Text | None,
    qos: Text | None,
    timeout_min: Count,
    nodes: Count,
    gpus_per_node: Annotated[int, Ge(0), Le(1024)] | None,
    tasks_per_node: Count | None,
    cpus_per_task: Count | None,
    mem_gb: Positive | None,
    constraint: Text | None,
    exclude: Text | None,
    nodelist: Text | None,
    reservation: Text | None,
    modules: list[Text],
    setup: list[Script],
    container: Text | None,
    python: Text | None,
    srun_args: list[Text],
    additional_parameters: dict[str, Leaf],
    array_parallelism: Count | None,
    max_requeues: Whole,
    signal_delay_s: Count,
    snapshot: Literal["keep", "new", "none"],
    wait: bool,
) -> Slurm:
    """Jobs on a Slurm cluster, one srun task per process of a run."""
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
    """Find impossible combinations, keys without effect, and sbatch options that have their own key."""
    if cluster != "slurm" and nodes > 1:
        yield Fault("nodes", f"cluster={cluster} uses only this machine", "set nodes to 1", nodes)
    if cluster == "debug" and (tasks_per_node or 1) > 1:
        remedy = "set cluster=local for several processes"
        yield Fault("tasks_per_node", "cluster=debug runs one process", remedy, tasks_per_node)
    if signal_delay_s >= timeout_min * 60:
        problem = f"the job would get the signal to save before it starts (launcher.timeout_min={timeout_min})"
        yield Fault("signal_delay_s", problem, "set it to less than the time limit", signal_delay_s)
    values = {
        "additional_parameters": additional_parameters, "gpus_per_node": gpus_per_node, "timeout_min": timeout_min,
        "signal_delay_s": signal_delay_s, **others,
    }  # fmt: skip
    for key in NO_EFFECT[cluster]:
        if values[key] and values[key] != _defaults()[key]:
            other = USE_LOCAL if key in ("gpus_per_node", "array_parallelism") else "set cluster=slurm"
            yield Fault(key, f"has no effect with cluster={cluster}", f"remove it, or {other}", values[key])
    keys = {"time": "timeout_min", "ntasks-per-node": "tasks_per_node", "mem": "mem_gb", "nodes": "nodes"}
    for name, value in additional_parameters.items():
        option = name.replace("_", "-")
        key = keys.get(option, option.replace("-", "_"))
        if option in script.OURS:
            yield Fault(f"additional_parameters.{name}", "is set by runner itself", "remove it", value)
        elif key in ("nodes", "timeout_min", "gpus_per_node", "tasks_per_node", *others):
            yield Fault(f"additional_parameters.{name}", "has its own key", f"set launcher.{key}", value)


@functools.cache
def _defaults() -> dict[str, Any]:
    """Values in conf/launcher/slurm.yaml: a key that has its default value was not set by the user."""
    import yaml

    return dict(yaml.safe_load((bind.config_dir() / "launcher" / "slurm.yaml").read_text()))
