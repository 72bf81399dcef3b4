"""Questions to Slurm: only jobs with our id and our name are ours, whatever the user's environment sets."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from conftest import TINY, prepared, until
from fixtures.slurm_runs import SHORT, SLURM, runner, slurm_says

from runner.cli import cancel
from runner.launch.slurm import submission
from runner.tracking import run_status, slurm_client, slurm_commands, slurm_jobs
from runner.tracking.rundir import RunDir
from runner.tracking.slurm_client import Job, JobRef

HELD = "+launcher.additional_parameters.hold=true"
HOSTILE = {
    "SQUEUE_FORMAT": "%A", "SQUEUE_FORMAT2": "jobid", "SQUEUE_SORT": "-i", "SQUEUE_STATES": "COMPLETED",
    "SQUEUE_USERS": "nobody", "SQUEUE_PARTITION": "low", "SQUEUE_NAMES": "other", "SQUEUE_ARRAY": "0",
    "SACCT_FORMAT": "State", "SINFO_FORMAT": "%N", "SINFO_PARTITION": "low", "SINFO_SORT": "-N",
    "SCANCEL_INTERACTIVE": "1", "SCANCEL_NAME": "other", "SCANCEL_STATE": "RUNNING", "SCANCEL_PARTITION": "low",
    "SBATCH_EXPORT": "NONE", "SBATCH_WAIT": "1", "SBATCH_JOB_NAME": "mine", "SBATCH_OUTPUT": "/dev/null",
    "SLURM_EXPORT_ENV": "NONE", "SLURM_TIME_FORMAT": "relative", "SLURM_BITSTR_LEN": "1", "SLURM_WAIT": "1",
    "SLURM_STDOUTMODE": "/dev/null", "SLURM_NTASKS": "7", "SLURM_DEBUG": "5", "SRUN_EXPORT_ENV": "NONE",
}  # fmt: skip
"""Defaults of a user for Slurm's commands."""


def foreign_job(*options: str) -> str:
    """Somebody else's job, which waits."""
    return slurm_says("sbatch", "--parsable", "--hold", "--output=/dev/null", *options, "--wrap=true")


def state_of(id: str) -> str:
    return slurm_says("squeue", "-h", "--array", "--states=all", "-o", "%T", "-j", id)


def played(folder: Path, id: str) -> RunDir:
    """A run that was submitted as the job of this number."""
    rundir = prepared(folder, *TINY)
    rundir.update_manifest(slurm={"job_id": id, "name": "runner-0123456789ab", "cluster": "slurm", "submitted": 1.0})
    return rundir


def test_an_early_record_of_accounting_is_completed_by_the_controller():
    early, controller = Job("7", "FAILED", exit_code=0, nodes="n1"), Job("7", "FAILED", "NonZeroExitCode", "n1")
    assert slurm_client.completed_by(early, controller) == Job("7", "FAILED", "NonZeroExitCode", "n1", 0)
    other = Job("7", "NODE_FAIL", nodes="n1")
    assert slurm_client.completed_by(other, controller) == other, "the reason of another state"


@pytest.mark.slurm
@pytest.mark.parametrize("options", [(), ("--array=0-2",)], ids=["job", "array"])
def test_a_job_of_the_same_number_is_not_ours(slurm: None, options: tuple[str, ...]):
    foreign = foreign_job(*options)
    id = f"{foreign}_1" if options else foreign
    rundir = played(Path("run").absolute(), id)
    ref = slurm_jobs.ref(rundir.read_manifest())
    assert slurm_client.jobs([ref]) == {}
    assert slurm_client.jobs([JobRef(id, "wrap")])[JobRef(id, "wrap")].state == "PENDING"
    assert submission.is_queued([rundir]) == [False]
    assert submission.wait_until_left([rundir]) == []
    [found] = run_status.of([rundir])
    assert (found.status, found.job) == ("unknown", None)
    assert found.reason == f"submitted as Slurm job {id}; Slurm no longer lists this job"
    slurm_client.cancel([ref])
    cancel.main(["run"])
    waiting = ["PENDING"] * (3 if options else 1)
    assert state_of(foreign).split() == waiting
    slurm_client.cancel([JobRef(id, "wrap")])
    until(lambda: state_of(foreign).split().count("PENDING") == len(waiting) - 1)


@pytest.mark.slurm
def test_a_run_whose_number_was_used_again_is_submitted(slurm: None):
    words = (*SHORT, *SLURM, HELD, "hydra.run.dir=run", "tracking=offline")
    assert runner(*words).returncode == 0
    rundir = RunDir(Path("run").absolute())
    ours = slurm_jobs.ref(rundir.read_manifest())
    slurm_client.cancel([ours])
    foreign = foreign_job()
    rundir.update_manifest(slurm={**rundir.read_manifest()["slurm"], "job_id": foreign})
    again = runner(*words)
    assert again.returncode == 0, again.stderr
    assert "is already queued" not in again.stderr
    new = slurm_jobs.ref(rundir.read_manifest())
    assert new.id not in (foreign, ours.id)
    assert slurm_client.jobs([new])[new].state == "PENDING"
    assert state_of(foreign) == "PENDING"


@pytest.mark.slurm
def test_two_jobs_with_one_number_differ_by_name(slurm: None):
    foreign = foreign_job("--job-name=runner-mine")
    refs = [JobRef(foreign, "runner-mine"), JobRef(foreign, "runner-older"), JobRef("", "")]
    assert list(slurm_client.jobs(refs)) == [refs[0]]
    until(lambda: slurm_says("sacct", "-nXP", "-j", foreign, "-o", "JobName") == "runner-mine")
    assert list(slurm_client._sacct(refs[:2])) == [refs[0]]


@pytest.mark.slurm
@pytest.mark.slow
def test_defaults_of_the_user_for_slurms_commands_change_nothing(slurm: None):
    words = ("-m", *SHORT, *SLURM, "seed=1,2", "sweep=both")
    done = runner(*words, "launcher.wait=true", **HOSTILE)
    assert done.returncode == 0, done.stderr
    status = json.loads(runner("status", "both", "--json", **HOSTILE).stdout)
    assert status[0]["counts"] == {"completed": 2}
    held = ("-m", *SHORT, *SLURM, HELD, "seed=3,4", "sweep=held")
    assert runner(*held, **HOSTILE).returncode == 0
    again = runner(*held, **HOSTILE)
    assert again.stderr.count("is already queued") == 2
    cancelled = runner("cancel", "held", **HOSTILE)
    assert cancelled.returncode == 0, cancelled.stdout + cancelled.stderr
    assert cancelled.stdout.count("killed: cancelled before it started") == 2
    wrong = runner(*SHORT, *SLURM, "launcher.partition=mainn", **HOSTILE)
    assert "did you mean 'main'? partitions: main, low" in wrong.stderr


@pytest.mark.slurm
@pytest.mark.slow
def test_a_job_that_inherits_nothing_gets_what_it_needs(slurm: None):
    words = (*SHORT, *SLURM, "launcher.wait=true", "hydra.run.dir=run", "tracking=offline")
    done = runner(*words, "+launcher.additional_parameters.export=NONE")
    assert done.returncode == 0, done.stderr


def test_the_environment_of_slurms_commands_is_our_own(monkeypatch: pytest.MonkeyPatch):
    for name, value in {**HOSTILE, "SLURM_JOB_ID": "7", "RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_CONF", "/there")
    environment = slurm_commands.environment()
    assert not {*HOSTILE, "SLURM_JOB_ID", "RANK"} & set(environment)
    assert (environment["SLURM_CONF"], environment["PATH"]) == ("/there", os.environ["PATH"])


@pytest.mark.slurm
@pytest.mark.parametrize("name", ["SLURM_CLUSTERS", "SBATCH_CLUSTERS"])
def test_another_cluster_is_refused(slurm: None, name: str):
    done = runner(*SHORT, *SLURM, **{name: "far"})
    assert done.returncode == 2
    assert f"{name} is set, but jobs can be followed only on the cluster of this machine" in done.stderr
    assert not list(Path().iterdir())
