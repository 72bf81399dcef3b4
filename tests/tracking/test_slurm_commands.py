"""Slurm is asked, and a controller that is down is known soon."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import TINY, prepared
from fixtures.slurm_runs import SHORT, runner
from fixtures.slurm_stubs import refused

from runner.tracking import slurm_commands

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
def test_a_controller_that_is_down_is_reported_with_its_own_message(
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
        patched.setattr(slurm_commands, "LONGEST_PING_S", 0.0)
        assert slurm_commands.silence() == "no answer within 0 s"


@pytest.mark.slurm
def test_a_search_without_a_controller_is_refused_as_well(silent: str):
    words = ("search=random", "search.trials=2", "search.at_once=1", "optim.learning_rate=interval(1e-4,1e-2)")
    done = runner("-m", *SHORT, "launcher=slurm", *words, SLURM_CONF=silent)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("the Slurm controller does not answer: ") == 1
    assert not list(Path().iterdir())


@pytest.mark.slurm
def test_status_works_without_a_controller(silent: str):
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
