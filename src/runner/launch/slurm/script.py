"""Create the sbatch script of a run, and test it with ``sbatch --test-only`` before anything is submitted."""

from __future__ import annotations

import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from runner.errors import Fault, LaunchError, suggest
from runner.launch.slurm import snapshot
from runner.launch.slurm.request import SlurmRequest
from runner.tracking import slurm_commands
from runner.train.memory import heap

REASONS = (
    ("partition", r"invalid partition|partition .*(not available|required)|access.* partition"),
    ("account", r"invalid account|account.* not (permitted|allowed)|invalid .*account"),
    ("qos", r"invalid qos|qos"),
    ("timeout_min", r"time limit"),
    ("nodes", r"node count"),
    ("reservation", r"reservation"),
    ("constraint", r"invalid feature|constraint"),
    ("nodelist", r"invalid node name|required node"),
    ("mem_gb", r"memory"),
    ("gpus_per_node", r"gres|gpu"),
    ("additional_parameters", r"unrecognized option|invalid option|unknown option|argument"),
)
"""(key, pattern of Slurm's messages about that key)."""

CANDIDATES = (
    "nodelist", "exclude", "constraint", "gpus_per_node", "mem_gb", "cpus_per_task", "tasks_per_node", "nodes",
)  # fmt: skip
"""Keys to remove one at a time, if Slurm only reports that no nodes match."""

OURS = ("array", "output", "error", "open-mode", "job-name", "signal", "requeue", "no-requeue", "wrap")
"""Options of sbatch that runner sets to find and resume runs."""

INHERITED = ("wait", "export")
"""Options of sbatch that a default in the user's environment must not set: sbatch would wait for the end of the job, or
the job would start without the variables that it needs."""

KEYS = {
    "partition": ("PARTITION",), "account": ("ACCOUNT",), "qos": ("QOS",), "timeout_min": ("TIMELIMIT",),
    "constraint": ("CONSTRAINT",), "reservation": ("RESERVATION",), "exclude": ("EXCLUDE",),
    "gpus_per_node": ("GPUS_PER_NODE", "GPUS", "GPUS_PER_TASK", "GPUS_PER_SOCKET"),
    "mem_gb": ("MEM_PER_NODE", "MEM_PER_CPU", "MEM_PER_GPU"),
}  # fmt: skip
"""Key → environment variables, without SBATCH_, that have priority over the script."""

OTHER_NAMES = {"array": "ARRAY_INX", "switches": "REQ_SWITCH"}
"""Options of sbatch whose environment variable has another name."""


def parameters(request: SlurmRequest, name: str, setup: list[str]) -> dict[str, Any]:
    """Parameters of submitit's executor; ``setup``: shell lines after the user's own."""
    options = {
        "job_name": name,
        "partition": request.partition,
        "account": request.account,
        "qos": request.qos,
        "time": request.timeout_min,
        "nodes": request.nodes,
        "ntasks_per_node": request.tasks,
        "gpus_per_node": request.gpus_per_node or None,
        "cpus_per_task": request.cpus_per_task,
        "mem": None if request.mem_gb is None else f"{math.ceil(request.mem_gb * 1024)}MB",
        "constraint": request.constraint,
        "exclude": request.exclude,
        "nodelist": request.nodelist,
        "signal_delay_s": request.signal_delay_s,
        "setup": [*(f"module load {shlex.quote(module)}" for module in request.modules), *request.setup, *setup],
        "srun_args": list(request.srun_args),
        "wckey": None,  # submitit's default is "submitit", which clusters that track wckeys refuse
    }
    options = {key: value for key, value in options.items() if value is not None or key == "wckey"}
    more = {"requeue": True, "reservation": request.reservation, **request.additional_parameters}
    return {**options, "additional_parameters": {key: value for key, value in more.items() if value is not None}}


def setup_lines(folder: Path, name: str, code: Path | None) -> list[str]:
    """Shell lines before srun: each task's pickle file, code snapshot, CPU threads and allocator settings."""
    pickle = shlex.quote(str(folder / f"{name}.pkl"))
    own = "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
    lines = [
        "# copy the pickle here: the submitting process may have died, and an old job may have had this id",
        f'cp {pickle} {shlex.quote(str(folder))}/"{own}"_submitted.pkl',
        "export SLURM_EXPORT_ENV=ALL  # srun passes on the lines below, also if sbatch passed on nothing",
        "export SLURM_KILL_BAD_EXIT=1  # a rank that fails ends the others",
        "export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}  # since 22.05, srun does not inherit it from sbatch",
        "export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SRUN_CPUS_PER_TASK}",
        "export RUNNER_TRACEBACK=1",
        f"export {heap.VARIABLE}={shlex.quote(heap.tunables())}",
    ]
    if code:
        path = shlex.quote(str(snapshot.importable(code)))
        lines += [
            f"export RUNNER_SNAPSHOT={shlex.quote(str(code))} PYTHONSAFEPATH=1",
            f'export PYTHONPATH={path}"${{PYTHONPATH:+:$PYTHONPATH}}"',
        ]
    return lines


def command(request: SlurmRequest, folder: Path) -> str:
    """The command that srun starts in each task."""
    return f"{python(request)} -u -m submitit.core._submit {shlex.quote(str(folder))}"


def python(request: SlurmRequest) -> str:
    """The job's Python interpreter, after the words of ``container``."""
    return " ".join(filter(None, (request.container, request.python or shlex.quote(sys.executable))))


def script(request: SlurmRequest, folder: Path, name: str, code: Path | None, runs: int) -> str:
    """The script of one run, or of an array of ``runs`` runs, as submitit creates it."""
    from submitit.slurm.slurm import _make_sbatch_string  # private; the public executor needs srun here

    options = parameters(request, name, setup_lines(folder, name, code))
    if runs > 1:
        options.update(map_count=runs, array_parallelism=request.array_parallelism or runs)
    return str(_make_sbatch_string(command=command(request, folder), folder=folder, **options))


@contextmanager
def environment(request: SlurmRequest) -> Iterator[None]:
    """While the block runs, this process has the environment for sbatch; the job inherits it.

    It is that of all Slurm commands, and the user's SBATCH_ defaults that do not override the script.
    """
    kept = set(slurm_commands.environment())
    if "SLURM_JOB_ID" not in os.environ:  # else they may be those of the job this process runs in
        kept |= {name for name in os.environ if name.startswith("SBATCH_")} - _overriding(request)
    removed = {name: os.environ.pop(name) for name in set(os.environ) - kept}
    try:
        yield
    finally:
        os.environ.update(removed)


def overridden(request: SlurmRequest) -> Iterator[str]:
    """A line for each SBATCH_ default of the user's that has no effect, as a key or runner itself sets its option."""
    keys = {f"SBATCH_{name}": key for key, names in KEYS.items() for name in names}
    for name in sorted(_overriding(request) & set(os.environ)) if "SLURM_JOB_ID" not in os.environ else ():
        key = keys.get(name)
        why = f"launcher.{key}={getattr(request, key)} has priority" if key else "runner sets this option itself"
        yield f"{name} has no effect: {why}"


def _overriding(request: SlurmRequest) -> set[str]:
    """Variables that override the user's keys or runner's own options, and those of INHERITED."""
    of_keys = [name for key, names in KEYS.items() if getattr(request, key) is not None for name in names]
    options = [*OURS, *INHERITED, *(name.replace("_", "-") for name in request.additional_parameters)]
    of_options = [OTHER_NAMES.get(option, option.upper().replace("-", "_")) for option in options]
    return {f"SBATCH_{name}" for name in [*of_keys, *of_options]}


def refuse(request: SlurmRequest) -> None:
    """Test the script with ``sbatch --test-only``.

    Raises:
        LaunchError: Slurm refuses it; contains Slurm's reason, and the key at fault if it can be determined.
    """
    reason = _refusal(request)
    if not reason:
        return
    key = next((key for key, pattern in REASONS if re.search(pattern, reason, re.IGNORECASE)), "")
    if key == "nodelist" and request.nodelist is None:
        key = "exclude"
    if not key:
        keys = (key for key in CANDIDATES if getattr(request, key) not in (None, _UNSET.get(key)))
        key = next((key for key in keys if not _refusal(_without(request, key))), "")
    value = getattr(request, key) if key else "slurm"
    remedy = _remedy(request, key) or "change the request; sinfo shows the available resources"
    raise LaunchError(
        Fault(f"launcher.{key}" if key else "launcher", f"Slurm refuses this request: {reason}", remedy, value)
    )


_UNSET = {"nodes": 1}
"""Values that request nothing, for keys where this is not null."""


def _without(request: SlurmRequest, key: str) -> SlurmRequest:
    change: dict[str, Any] = {key: _UNSET.get(key)}
    return replace(request, **change)


def _refusal(request: SlurmRequest) -> str:
    """Slurm's reason to refuse the job; empty if Slurm accepts it."""
    text = script(request, Path("slurm"), "runner", None, 1)
    try:
        with environment(request):
            done = subprocess.run(
                ["sbatch", "--test-only"], input=text, capture_output=True, text=True, timeout=60, check=False
            )
    except subprocess.TimeoutExpired:
        return "no answer within 60 s"
    if done.returncode == 0:
        return ""
    lines = [re.sub(r"^(sbatch: (error|fatal): |sbatch: |allocation failure: )+", "", line) for line in
             (done.stderr + done.stdout).splitlines() if line.strip()]  # fmt: skip
    return "; ".join(dict.fromkeys(line for line in lines if not line.startswith("Try ")))


def _remedy(request: SlurmRequest, key: str) -> str:
    if key == "partition":
        names = slurm_commands.partitions()
        return f"{suggest(str(request.partition), names)} partitions: {', '.join(names)}".strip()
    if key == "timeout_min":
        return f"request less; time limit of each partition: {_each('%R %l', request)}"
    if key == "nodes":
        return f"request fewer; nodes of each partition: {_each('%R %D', request)}"
    if key in ("gpus_per_node", "mem_gb", "cpus_per_task", "tasks_per_node"):
        return f"request less; resources of a node (CPUs, MB, GPUs): {_each('%R %c %m %G', request)}"
    return {
        "constraint": f"features of the nodes: {_each('%f', request)}",
        "nodelist": f"nodes: {_each('%N', request)}",
        "exclude": f"nodes: {_each('%N', request)}",
        "reservation": "scontrol show reservation lists them",
        "account": "sacctmgr show associations user=$USER lists yours",
        "qos": "sacctmgr show qos lists them",
        "additional_parameters": "use the names of sbatch's long options, without the dashes",
    }.get(key, "")


def _each(format: str, request: SlurmRequest) -> str:
    return ", ".join(slurm_commands.sinfo(format, request.partition))
