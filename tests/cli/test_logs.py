"""logs of runs that are at work and of runs that ended."""

# ruff: noqa: F401, F811 - fixtures are imported, then asked for by name

from __future__ import annotations

import subprocess
import sys

import pytest
from fixtures.run_folders import _in_a_new_folder, a_sweep, holding, played, processes

from runner.cli import main

# logs


def test_logs_come_from_where_the_words_are(capfd: pytest.CaptureFixture[str]):
    sweep = a_sweep("ablation")
    rundir = played("000", "failed", sweep, label="seed=1", slurm={"job_id": "77_1", "cluster": "slurm"})
    assert main.run(["logs", "seed=1"]) == 0
    assert "no log: the run is failed" in capfd.readouterr().err
    home = sweep.path / "slurm"
    home.mkdir()
    (home / "77_1_0_log.err").write_text("no module named torch\n")
    (home / "77_10_0_log.err").write_text("of another task\n")
    rundir.terminal_log.write_text("on the terminal\n")
    assert main.run(["logs", "seed=1"]) == 0
    out = capfd.readouterr().out
    assert "no module named torch" in out
    assert "on the terminal" in out
    assert "another task" not in out
    rundir.log.write_text("step 3/3\n")
    rundir.rank_log(1).write_text("a warning\n")
    assert main.run(["logs", "seed=1"]) == 0
    assert capfd.readouterr().out == "step 3/3\n"
    assert main.run(["logs", "seed=1", "--rank", "1"]) == 0
    assert capfd.readouterr().out == "a warning\n"
    assert main.run(["logs", "ablation"]) == 2
    assert "python -m runner logs outputs/sweeps/ablation/000" in capfd.readouterr().err


def test_following_a_run_to_its_end(processes: list[subprocess.Popen[str]]):
    rundir = played("a/1", "running")
    worker = holding(rundir, processes)
    rundir.log.write_text("step 1/3\n")
    command = [sys.executable, "-m", "runner", "logs", "a/1", "-f"]
    following = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    processes.append(following)
    assert following.stdout
    assert following.stdout.readline() == "step 1/3\n"
    with rundir.log.open("a") as handle:
        handle.write("step 2/3\n")
    assert following.stdout.readline() == "step 2/3\n"
    with rundir.log.open("a") as handle:
        handle.write("step 3/3\n")
    rundir.cancel_request.write_text("enough")
    worker.terminate()
    out, err = following.communicate()
    assert (out, following.returncode) == ("step 3/3\n", 0)
    assert err == "-- a/1: killed at step 3/3: enough\n"


def test_a_reader_that_goes_away_is_no_error():
    rundir = played("a/1")
    rundir.log.write_text("step\n" * 100000)
    done = subprocess.run(
        f"{sys.executable} -m runner logs a/1 | head -1", shell=True, capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("step\n", "")
