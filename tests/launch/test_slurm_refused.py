"""What Slurm does not take, or cannot be asked, is refused before anything is there; two submitters at once."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import TINY, cancel_jobs, jobs_of, prepared
from test_slurm import SHORT, SLURM, job_of, runner, slurm_says, until

from runner.tracking import slurm_client
from runner.tracking.sweepdir import SweepDir

HELD = "+launcher.additional_parameters.hold=true"
SWEEP = ("-m", "seed=1,2")

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


def refused(*words: str, **environment: str) -> str:
    """The one message with which a command line is refused, for one run and for a sweep; nothing is left behind."""
    said = []
    for mode in ((), SWEEP):
        done = runner(*mode, *SHORT, "launcher=slurm", *words, **environment)
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("    → ") == 1
        assert "Traceback" not in done.stderr
        assert done.stdout == ""
        assert not list(Path().iterdir())
        said.append(done.stderr)
    assert said[0] == said[1]
    return said[0]


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
def test_without_a_command_of_slurms_the_launcher_says_so(
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


# A controller that is down


@pytest.fixture(params=["closed", "mute"])
def silent(slurm: None, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The settings of a Slurm whose controller is down: its port is closed, or nobody who listens there answers."""
    settings = Path(os.environ["SLURM_CONF"])
    folder = tmp_path_factory.mktemp("settings")
    for file in settings.parent.glob("*.conf"):
        if file.name != "slurmdbd.conf":
            shutil.copy(file, folder)
    lines = [line for line in settings.read_text().splitlines() if not line.startswith("SlurmctldPort=")]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if request.param == "mute":
            listener.listen()
        port = listener.getsockname()[1]
        text = "\n".join([*lines, f"SlurmctldPort={port}", "MessageTimeout=2"])
        (folder / settings.name).write_text(text + "\n")
        yield str(folder / settings.name)


def stub(command: Path, line: str) -> None:
    """A command that does this, and fails."""
    command.write_text(f"#!/bin/sh\n{line}\nexit 1\n")
    command.chmod(0o755)


@pytest.mark.slurm
def test_a_controller_that_is_down_is_told_in_its_own_words_and_soon(
    silent: str, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
):
    """Without sbatch and squeue, each of which would try for a minute."""
    there = tmp_path_factory.mktemp("bin")
    for command in ("sbatch", "squeue"):
        stub(there / command, f"echo {command} >>{there}/asked")
    said = refused(SLURM_CONF=silent, PATH=f"{there}:{os.environ['PATH']}")
    assert not (there / "asked").exists()
    assert said.startswith("error: launcher=slurm: the Slurm controller does not answer: Slurmctld(primary) at ")
    assert " is DOWN\n" in said
    assert "contact the administrators of the cluster" in said
    with monkeypatch.context() as patched:
        patched.setenv("SLURM_CONF", silent)
        patched.setattr(slurm_client, "LONGEST_PING_S", 0.0)
        assert slurm_client.silence() == "no answer within 0 s"


@pytest.mark.slurm
def test_a_search_without_a_controller_is_refused_as_well(silent: str):
    words = ("search=random", "search.trials=2", "search.at_once=1", "optim.learning_rate=interval(1e-4,1e-2)")
    done = runner("-m", *SHORT, "launcher=slurm", *words, SLURM_CONF=silent)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("the Slurm controller does not answer: ") == 1
    assert not list(Path().iterdir())


@pytest.mark.slurm
def test_without_a_controller_status_tells_what_it_knows(silent: str):
    rooms = Path("outputs", "mine")
    done, waiting, alone = (prepared(rooms / name, *TINY) for name in ("done", "waiting", "alone"))
    done.write_state(status="completed", step=3, total_steps=3)
    waiting.update_manifest(slurm={"job_id": "7", "name": "runner-x", "cluster": "slurm"})
    (alone.path / "slurm").mkdir()
    note = {"name": "runner-x", "job_id": None, "cluster": "slurm", "folders": [str(alone.path.absolute())]}
    (alone.path / "slurm" / "runner-x.json").write_text(json.dumps(note))
    asked = runner("status", "--json", SLURM_CONF=silent)
    assert asked.returncode == 0, asked.stderr
    found = {Path(run["folder"]).name: (run["status"], run["reason"]) for run in json.loads(asked.stdout)}
    assert found["done"] == ("completed", "")
    assert found["waiting"] == ("unknown", "submitted as Slurm job 7; Slurm does not answer")
    assert found["alone"][0] == "pending"
    assert asked.stderr.count("Slurm does not answer") == 1
    assert waiting.read_state().status == "pending"


@pytest.mark.slurm
def test_slurm_is_asked_whether_it_answers_before_it_is_asked_anything(silent: str):
    """squeue waits for a controller that is down, for each submission anew."""
    Path("bin").mkdir()
    stub(Path("bin/squeue"), "echo asked >>asked")
    for name in ("a", "b"):
        rundir = prepared(Path("outputs", "mine", name), *TINY)
        rundir.update_manifest(slurm={"job_id": "7", "name": "runner-x", "cluster": "slurm"})
    there = {"PATH": f"{Path('bin').absolute()}:{os.environ['PATH']}"}
    assert runner("status", **there, SLURM_CONF=silent).returncode == 0
    assert not Path("asked").exists()
    assert runner("status", **there).returncode == 0
    assert Path("asked").read_text() == "asked\n", "once for all of them, where it answers"


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
        said = [process.communicate(timeout=300)[1] for process in both]
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


# No job is left behind by a test


@pytest.mark.slurm
def test_what_a_test_leaves_in_the_queue_is_cancelled_noted_or_not(slurm: None):
    Path("below").mkdir()
    for words in (["--array=0-1"], ["--chdir=below"]):
        slurm_says("sbatch", "--hold", "--output=/dev/null", *words, "--wrap=true")
    assert len(jobs_of(Path.cwd())) == 3
    assert len(jobs_of(Path("below").absolute())) == 1
    cancel_jobs(Path("below").absolute())
    assert len(jobs_of(Path.cwd())) == 2
    cancel_jobs(Path.cwd())
    assert jobs_of(Path.cwd()) == []
