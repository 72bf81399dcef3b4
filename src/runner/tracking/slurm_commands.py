"""Run Slurm's commands: with which environment, how long to wait, what to do when Slurm does not answer.

What the commands report about the cluster is here, what they report about jobs in ``slurm_client``.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from runner.errors import Fault, LaunchError

OF_SLURM = (
    "SLURM_", "SLURMD_", "SRUN_", "SBATCH_", "SALLOC_", "SQUEUE_", "SACCT_", "SINFO_", "SCANCEL_", "SCONTROL_",
    "SUBMITIT_",
)  # fmt: skip

CONNECTION = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT")

OF_RANKS = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
"""Environment variables of torch.distributed."""

LONGEST_WAIT_S = 60.0
"""Timeout of a Slurm command: a busy controller is slow."""

LONGEST_PING_S = 20.0
"""Timeout of ``scontrol ping``: twice Slurm's default MessageTimeout."""


def lines(command: list[str], *, or_none: bool = False) -> list[str]:
    """Output lines of a Slurm command; ``or_none``: empty if the command is missing or fails."""
    try:
        done = _run(command, LONGEST_WAIT_S)
        problem = "" if done.returncode == 0 else done.stderr or done.stdout or f"exit code {done.returncode}"
    except FileNotFoundError:
        problem = "is not on this machine's PATH"
    except subprocess.TimeoutExpired:
        problem = f"no answer within {LONGEST_WAIT_S:.0f} s"
    except OSError as error:
        problem = f"cannot be started: {error.strerror}"
    if not problem:
        return [line for line in done.stdout.splitlines() if line.strip()]
    if or_none:
        return []
    raise LaunchError(Fault("", f"{command[0]}: {_first_line(problem)}", "retry when Slurm answers"))


def settings(*names: str) -> dict[str, str]:
    """Name → value from ``scontrol show config``; names that Slurm does not list are missing."""
    pairs = [re.split(r"\s*=\s*", line, maxsplit=1) for line in lines(["scontrol", "show", "config"])]
    return {pair[0]: pair[1] for pair in pairs if len(pair) == 2 and pair[0] in names}


def partitions() -> list[str]:
    """The names of all partitions."""
    return sinfo("%R")


def sinfo(format: str, partition: str | None = None) -> list[str]:
    """Distinct output lines of sinfo for the partitions or nodes of the cluster; empty if sinfo fails."""
    command = ["sinfo", "--noheader", f"--format={format}", *([f"--partition={partition}"] if partition else [])]
    return list(dict.fromkeys(line.strip() for line in lines(command, or_none=True)))


def environment() -> dict[str, str]:
    """The environment of every call of a Slurm command.

    Without the user's defaults for these commands (formats, filters, sort orders, confirmations, what jobs inherit) and
    without what describes the job that this process runs in.
    """
    return {
        name: value
        for name, value in os.environ.items()
        if name in CONNECTION or not (name.startswith(OF_SLURM) or name in OF_RANKS)
    }


def refuse_unreachable() -> None:
    """Fail at once if Slurm cannot be reached; sbatch would wait a minute.

    Raises:
        LaunchError: a command is missing, or no controller answers.
    """
    for command in ("sbatch", "srun", "squeue", "scontrol"):
        if shutil.which(command) is None:
            remedy = "start from a machine of the cluster, or set launcher.cluster=local to run here"
            raise LaunchError(Fault("launcher", f"{command} is not on this machine's PATH", remedy, "slurm"))
    for name in ("SLURM_CLUSTERS", "SBATCH_CLUSTERS"):
        if value := os.environ.get(name):
            problem = f"{name} is set, but jobs can be followed only on the cluster of this machine"
            raise LaunchError(Fault("launcher", problem, "unset it, or start from a machine of that cluster", value))
    conf = os.environ.get("SLURM_CONF")
    if conf and not Path(conf).is_file():
        raise LaunchError(Fault("launcher", f"SLURM_CONF={conf} is not a file", "correct or unset SLURM_CONF", "slurm"))
    if problem := silence():
        remedy = "contact the administrators of the cluster, or set launcher.cluster=local to run here"
        raise LaunchError(Fault("launcher", f"the Slurm controller does not answer: {problem}", remedy, "slurm"))


def silence() -> str:
    """Why no controller answers ``scontrol ping``, with Slurm's message; empty if one answers.

    Returns at once if the connection is refused, else after Slurm's MessageTimeout, at most 20 s. squeue and sbatch
    retry for longer.
    """
    try:
        done = _run(["scontrol", "ping"], LONGEST_PING_S)
    except FileNotFoundError:
        return "scontrol is not on this machine's PATH"
    except subprocess.TimeoutExpired:
        return f"no answer within {LONGEST_PING_S:.0f} s"
    except OSError as error:  # process limit reached, or no memory
        return f"scontrol cannot be started: {error.strerror}"
    return "" if re.search(r"is UP", done.stdout) else _first_line(done.stdout + done.stderr)


def _run(command: list[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env=environment(), capture_output=True, text=True, errors="replace", timeout=timeout_s, check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


def _first_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return re.sub(r"^\w+: (error|fatal): ", "", lines[0]) if lines else "no output"
