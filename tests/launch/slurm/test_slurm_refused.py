"""What Slurm does not take, or cannot be asked, is refused before anything is there; two submitters at once."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import jobs_of, until
from fixtures.slurm_runs import SHORT, SLURM, job_of, slurm_says
from fixtures.slurm_stubs import refused

from runner.tracking.sweepdir import SweepDir

HELD = "+launcher.additional_parameters.hold=true"

REFUSED = [
    ("launcher.partition=nope", "Invalid partition name specified", "partitions: "),
    ("launcher.account=nope", "Invalid account or account/partition combination", "sacctmgr show associations"),
    ("launcher.qos=nope", "Invalid qos specification", "sacctmgr show qos"),
    ("launcher.nodes=99", "More processors requested than permitted", "request fewer; nodes of each partition: "),
    ("launcher.gpus_per_node=9", "Requested node configuration is not available", "request less; resources of a node"),
    ("launcher.timeout_min=100000", "Requested time limit is invalid", "request less; time limit of each "),
    ("launcher.mem_gb=9999", "Requested node configuration is not available", "request less; resources of a node"),
]
"""(override, Slurm's own words, the beginning of the remedy)"""


@pytest.mark.slurm
@pytest.mark.parametrize(("override", "words", "remedy"), REFUSED, ids=[case[0] for case in REFUSED])
def test_what_slurm_would_not_take_is_refused_before_anything_is_there(
    slurm: None, override: str, words: str, remedy: str
):
    said = refused(override)
    assert said.startswith(f"error: {override}: Slurm refuses this request: ")
    assert words in said
    assert remedy in said.partition("    → ")[2]


@pytest.mark.parametrize("command", ["sbatch", "srun", "squeue", "scontrol"])
def test_without_the_commands_of_slurm_the_launcher_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
):
    there = tmp_path / "bin"
    there.mkdir()
    for other in {"sbatch", "srun", "squeue", "scontrol"} - {command}:
        (there / other).symlink_to("/bin/true")
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    said = refused(PATH=str(there))
    assert said.startswith(f"error: launcher=slurm: {command} is not on this machine's PATH")
    assert "launcher.cluster=local" in said


def test_a_slurm_conf_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if not shutil.which("sbatch"):
        pytest.skip("no sbatch here")
    monkeypatch.chdir(tmp_path)
    assert "SLURM_CONF=/nowhere/slurm.conf is not a file" in refused(SLURM_CONF="/nowhere/slurm.conf")


# Two at once


@pytest.mark.slurm
def test_two_that_submit_the_same_sweep_at_once_submit_each_run_once(slurm: None):
    words = ("-m", *SHORT, *SLURM, HELD, "seed=1,2,3", "sweep=both")
    command = [sys.executable, "-m", "runner", *words]
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
        for _ in range(2)
    ]
    try:
        said = [process.communicate()[1] for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], said
    rundirs = SweepDir(Path("outputs/sweeps/both").absolute()).rundirs()
    assert len(rundirs) == 3
    queued = jobs_of(Path.cwd())
    assert sorted(queued) == sorted(map(job_of, rundirs))
    assert len(queued) == 3
    (name,) = {rundir.read_manifest()["slurm"]["name"] for rundir in rundirs}
    array = queued[0].partition("_")[0]
    until(lambda: slurm_says("sacct", "-nX", "-o", "JobName%40", "-j", array).split()[:1] == [name])  # it is behind
    told = "".join(said)
    assert told.count("submitted 3 runs as job ") == 1
    assert told.count(" is already queued (job ") == 3
