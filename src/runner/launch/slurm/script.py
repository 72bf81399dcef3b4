"""The sbatch script of a run, and what Slurm thinks of it before anything is submitted."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.errors import Fault, LaunchError, suggest
from runner.tracking import slurm_client
from runner.train.memory import heap

if TYPE_CHECKING:
    from runner.launch.slurm.request import SlurmRequest

COMPLAINTS = (
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
"""(key, what Slurm says when it is that key that it does not like)."""

CANDIDATES = (
    "nodelist", "exclude", "constraint", "gpus_per_node", "mem_gb", "cpus_per_task", "tasks_per_node", "nodes",
)  # fmt: skip
"""Keys to leave out, one at a time, where Slurm only says that it has no such nodes."""

OURS = ("array", "output", "error", "open-mode", "job-name", "signal", "requeue", "no-requeue", "wrap")
"""Options of sbatch without which the runs could neither be found again nor continued."""

KEYS = {
    "partition": ("PARTITION",), "account": ("ACCOUNT",), "qos": ("QOS",), "timeout_min": ("TIMELIMIT",),
    "constraint": ("CONSTRAINT",), "reservation": ("RESERVATION",), "exclude": ("EXCLUDE",),
    "gpus_per_node": ("GPUS_PER_NODE", "GPUS", "GPUS_PER_TASK", "GPUS_PER_SOCKET"),
    "mem_gb": ("MEM_PER_NODE", "MEM_PER_CPU", "MEM_PER_GPU"),
}  # fmt: skip
"""Key → the variables, without SBATCH_, that sbatch would believe rather than the script."""

OTHER_NAMES = {"array": "ARRAY_INX", "switches": "REQ_SWITCH"}
"""Options of sbatch whose variable is not called as they are."""


def parameters(asked: SlurmRequest, name: str, setup: list[str]) -> dict[str, Any]:
    """What submitit writes into the header, by its own names; ``setup`` comes after the user's lines."""
    wanted = {
        "job_name": name,
        "partition": asked.partition,
        "account": asked.account,
        "qos": asked.qos,
        "time": asked.timeout_min,
        "nodes": asked.nodes,
        "ntasks_per_node": asked.tasks,
        "gpus_per_node": asked.gpus_per_node or None,
        "cpus_per_task": asked.cpus_per_task,
        "mem": None if asked.mem_gb is None else f"{int(asked.mem_gb * 1024)}MB",
        "constraint": asked.constraint,
        "exclude": asked.exclude,
        "nodelist": asked.nodelist,
        "signal_delay_s": asked.signal_delay_s,
        "setup": [*(f"module load {shlex.quote(module)}" for module in asked.modules), *asked.setup, *setup],
        "srun_args": list(asked.srun_args),
        "wckey": None,  # submitit's own default names itself, and clusters that track keys refuse it
    }
    more = {"requeue": True, "reservation": asked.reservation, **asked.additional_parameters}
    kept = {key: value for key, value in wanted.items() if value is not None or key == "wckey"}
    return {**kept, "additional_parameters": {key: value for key, value in more.items() if value is not None}}


def setup_lines(asked: SlurmRequest, folder: Path, name: str, code: Path | None) -> list[str]:
    """What the script does before srun, so that each task finds its pickle, its code and its share of the machine."""
    pickle = shlex.quote(str(folder / f"{name}.pkl"))
    own = "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
    lines = [
        "# the pickle is here even where the submitting process did not live to put it under the job's id",
        f'cp -n {pickle} {shlex.quote(str(folder))}/"{own}"_submitted.pkl',
        "export SLURM_KILL_BAD_EXIT=1  # a rank that dies ends the others",
        "export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}  # srun does not take it from sbatch since 22.05",
        "export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SRUN_CPUS_PER_TASK}",
        "export RUNNER_TRACEBACK=1",
        f"export {heap.VARIABLE}={shlex.quote(heap.tunables())}",
    ]
    if code:
        quoted = shlex.quote(str(code))
        lines += [
            f"export RUNNER_SNAPSHOT={quoted} PYTHONSAFEPATH=1",
            f'export PYTHONPATH={quoted}"${{PYTHONPATH:+:$PYTHONPATH}}:$PWD"',
        ]
    return lines


def command(asked: SlurmRequest, folder: Path) -> str:
    """The words that srun starts in each task."""
    return f"{python(asked)} -u -m submitit.core._submit {shlex.quote(str(folder))}"


def python(asked: SlurmRequest) -> str:
    """The interpreter of the job, in its container where one is asked for."""
    return " ".join(filter(None, (asked.container, asked.python or shlex.quote(sys.executable))))


def script(asked: SlurmRequest, folder: Path, name: str, code: Path | None, runs: int) -> str:
    """The script of one run, or of an array of so many, as submitit writes it."""
    from submitit.slurm.slurm import _make_sbatch_string  # its executor calls this, and refuses where srun is missing

    made = parameters(asked, name, setup_lines(asked, folder, name, code))
    if runs > 1:
        made.update(map_count=runs, array_parallelism=asked.array_parallelism or runs)
    return str(_make_sbatch_string(command=command(asked, folder), folder=folder, **made))


@contextmanager
def environment(asked: SlurmRequest) -> Iterator[None]:
    """Without the variables that would make sbatch ignore what was asked for, or that belong to the job we are in."""
    from submitit.helpers import clean_env

    removed = {name: os.environ.pop(name) for name in _overriding(asked) if name in os.environ}
    conf = os.environ.get("SLURM_CONF")
    try:
        if "SLURM_JOB_ID" not in os.environ:
            yield
            return
        with clean_env():
            if conf:
                os.environ["SLURM_CONF"] = conf
            yield
    finally:
        os.environ.update(removed)


def _overriding(asked: SlurmRequest) -> set[str]:
    """The variables that stand above what was asked for, above what is ours, or make sbatch wait for the job's end."""
    of_keys = [name for key, names in KEYS.items() if getattr(asked, key) is not None for name in names]
    options = [*OURS, "wait", *(name.replace("_", "-") for name in asked.additional_parameters)]
    of_options = [OTHER_NAMES.get(option, option.upper().replace("-", "_")) for option in options]
    return {f"SBATCH_{name}" for name in [*of_keys, *of_options]}


def refuse(asked: SlurmRequest) -> None:
    """Show Slurm the script, without submitting it.

    Raises:
        LaunchError: with Slurm's own reason, at the key that it is about where that can be told.
    """
    said = _complaint(asked)
    if not said:
        return
    key = next((key for key, pattern in COMPLAINTS if re.search(pattern, said, re.IGNORECASE)), "")
    if key == "nodelist" and asked.nodelist is None:
        key = "exclude"
    if not key:
        given = (key for key in CANDIDATES if getattr(asked, key) not in (None, _WITHOUT.get(key)))
        key = next((key for key in given if not _complaint(_without(asked, key))), "")
    value = getattr(asked, key) if key else "slurm"
    remedy = _remedy(asked, key) or "change what is asked for; sinfo shows what there is"
    raise LaunchError(Fault(f"launcher.{key}" if key else "launcher", f"Slurm refuses it: {said}", remedy, value))


def _without(asked: SlurmRequest, key: str) -> SlurmRequest:
    nothing: dict[str, Any] = {key: _WITHOUT.get(key)}
    return replace(asked, **nothing)


_WITHOUT = {"nodes": 1}
"""What asks for nothing, where that is not null."""


def _complaint(asked: SlurmRequest) -> str:
    """Slurm's reason to refuse, in its own words; empty where it would take the job."""
    text = script(asked, Path("slurm"), "runner", None, 1)
    try:
        with environment(asked):
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


def _remedy(asked: SlurmRequest, key: str) -> str:
    if key == "partition":
        names = slurm_client.partitions()
        return f"{suggest(str(asked.partition), names)} partitions: {', '.join(names)}".strip()
    if key == "timeout_min":
        return f"ask for less; the longest time of each partition: {_each('%R %l', asked)}"
    if key == "nodes":
        return f"ask for fewer; nodes of each partition: {_each('%R %D', asked)}"
    if key in ("gpus_per_node", "mem_gb", "cpus_per_task", "tasks_per_node"):
        return f"ask for less; what a node has (CPUs, MB, GPUs): {_each('%R %c %m %G', asked)}"
    return {
        "constraint": f"features of the nodes: {_each('%f', asked)}",
        "nodelist": f"nodes: {_each('%N', asked)}",
        "exclude": f"nodes: {_each('%N', asked)}",
        "reservation": "scontrol show reservation lists them",
        "account": "sacctmgr show associations user=$USER lists yours",
        "qos": "sacctmgr show qos lists them",
        "additional_parameters": "names are those of sbatch's long options, without the dashes",
    }.get(key, "")


def _each(format: str, asked: SlurmRequest) -> str:
    return ", ".join(slurm_client.sinfo(format, asked.partition))
