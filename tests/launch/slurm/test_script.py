"""The script of a job of Slurm, and the environment that it leaves out."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from conftest import option
from fixtures.slurm_runs import SHORT, runner, slurm_says

from runner.launch.slurm import script
from runner.tracking.rundir import RunDir


def without_place(script: str, folder: str, name: str) -> list[str]:
    """The lines of a script, with what is only known at its submission called by one name."""
    lines = script.replace(str(Path(folder).absolute()), "RUN").replace(folder, "RUN").replace(name, "NAME")
    return [line for line in lines.replace(str(Path("RUN").absolute()), "RUN").splitlines() if "RUN/code" not in line]


@pytest.mark.slurm
@pytest.mark.slow
def test_the_script_is_the_planned_one_and_its_lines_take_effect(slurm: None):
    words = (
        *SHORT, "tracking=offline", "launcher=slurm", "launcher.setup=['export SEEN_BY_THE_JOB=yes']",
        "launcher.container='env IN_A_BOX=1'", "launcher.cpus_per_task=2", "launcher.mem_gb=1.5",
        "launcher.gpus_per_node=1", "launcher.account=root", "launcher.qos=normal", "launcher.partition=main",
    )  # fmt: skip
    planned = runner("plan", *words).stdout
    done = runner(*words, "launcher.wait=true", "hydra.run.dir=there", SBATCH_PARTITION="low")
    assert done.returncode == 0, done.stderr
    rundir = RunDir(Path("there").absolute())
    job = rundir.read_manifest()["slurm"]
    script = Path("there/slurm", f"{job['job_id']}_submission.sh").read_text()
    for line in without_place(script, str(rundir.path), job["name"]):
        if "job-name" not in line:
            assert line in "\n".join(without_place(planned, "RUN", "NAME")), line
    asked = slurm_says(
        "sacct", "-nPX", "-j", job["job_id"], "-o", "Partition,AllocCPUS,ReqMem,QOS,Account,AllocTRES,State"
    )
    assert asked.startswith(("main|2|1.50G|normal|root|", "main|2|1536M|normal|root|"))
    assert "gres/gpu=1" in asked


def test_variables_do_not_override_what_was_asked_for(monkeypatch: pytest.MonkeyPatch):
    for name in list(os.environ):
        if name.startswith(("SBATCH_", "SLURM_JOB_ID")):
            monkeypatch.delenv(name)
    kept = {"SBATCH_PARTITION": "low", "SBATCH_MEM_PER_CPU": "9"}
    of_ours = dict.fromkeys(("JOB_NAME", "SIGNAL", "NO_REQUEUE", "ARRAY_INX", "OUTPUT", "ERROR", "OPEN_MODE"), "1")
    removed = {
        f"SBATCH_{name}": value for name, value in {**of_ours, "TIMELIMIT": "1", "WAIT": "1", "EXPORT": "NONE"}.items()
    }
    of_given = dict.fromkeys(("SBATCH_GPUS_PER_NODE", "SBATCH_GPUS", "SBATCH_MEM_PER_NODE", "SBATCH_HINT"), "9")

    def seen_by_sbatch(**asked: object) -> dict[str, str]:
        with script.environment(option("launcher", "slurm", **asked)().request):
            return {name: value for name, value in os.environ.items() if name.startswith("SBATCH_")}

    for name, value in {**kept, **removed, **of_given}.items():
        monkeypatch.setenv(name, value)
    assert seen_by_sbatch() == {**kept, **of_given}
    told = list(script.overridden(option("launcher", "slurm")().request))
    assert sorted(note.partition(" ")[0] for note in told) == sorted(removed), "what sbatch does not get is said"
    assert "SBATCH_TIMELIMIT has no effect: launcher.timeout_min=60 has priority" in told
    asked = {"gpus_per_node": 0, "mem_gb": 1.0, "additional_parameters": {"hint": "nomultithread"}}
    del kept["SBATCH_MEM_PER_CPU"]
    assert seen_by_sbatch(**asked) == kept
    assert os.environ["SBATCH_JOB_NAME"] == os.environ["SBATCH_TIMELIMIT"] == "1", "they are back"


@pytest.mark.parametrize(("mem_gb", "written"), [(1.5, "1536MB"), (0.0001, "1MB")])
def test_memory_is_rounded_up_because_0_is_all_of_the_node(mem_gb: float, written: str):
    request = option("launcher", "slurm", mem_gb=mem_gb)().request
    assert script.parameters(request, "name", [])["mem"] == written
