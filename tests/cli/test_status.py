"""status against real workers, a real queue, a real kill -9, and Slurm where one answers."""

# ruff: noqa: F401, F811 - fixtures are imported, then asked for by name

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
from conftest import until
from fixtures.run_folders import (
    HOLD,
    MIRRORED,
    _in_a_new_folder,
    a_sweep,
    holding,
    mlflow_status,
    played,
    processes,
    said_of,
    started,
    statuses,
    submitted,
)

from runner.errors import ConfigError
from runner.files import copy_of, is_held
from runner.tracking import lookup
from runner.tracking.rundir import RunDir
from runner.tracking.state_file import DIED
from runner.tracking.sweepdir import SweepDir


def test_damaged_folders_are_reported_and_left_out(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
):
    good = played("a/good")
    for number, text in enumerate(("", "{", "[]", '{"status": 3}', '{"colour": "red"}', "null")):
        played(f"a/bad{number}").state.write_text(text)
    bad, sweep = played("b/bad"), a_sweep("bad")
    for file in (bad.manifest, sweep.manifest):
        file.write_text("{")
        copy_of(file).unlink(missing_ok=True)
    played("b/odd").manifest.write_text('{"mlflow": 3}')
    found = statuses(capsys)
    assert found["a/good"]["status"] == "completed"
    assert [run["status"] for run in found.values()].count("damaged") == 8
    caplog.clear()
    assert lookup.resolve("a/good", Path("outputs")) == good
    with pytest.raises(ConfigError):
        lookup.resolve("nothing", Path("outputs"))
    assert "skipped, its files cannot be read" in caplog.text


def test_help_teaches_and_nothing_yet_is_no_error(capsys: pytest.CaptureFixture[str]):
    for verb in ("status", "logs", "cancel"):
        code, out, _ = said_of(verb, "--help", capsys=capsys)
        assert code == 0
        assert f"python -m runner {verb} " in out.splitlines()[0]
    assert said_of("status", capsys=capsys)[:2] == (
        0,
        "no runs below outputs yet: start one with python -m runner; runs elsewhere: python -m runner status FOLDER\n",
    )


# status


def test_the_table_has_the_latest_and_all_that_is_unfinished(capsys: pytest.CaptureFixture[str]):
    early = played("a/early", "preempted")
    for number in range(20):
        played(f"a/{number:02d}")
    sweep = a_sweep("ablation")
    for number, status in enumerate(("completed", "completed", "failed")):
        played(f"{number:03d}", status, sweep, label=f"seed={number}")
    code, out, _ = said_of("status", capsys=capsys)
    assert code == 0
    assert "2 completed, 1 failed" in out
    assert "seed=0" not in out
    assert os.path.relpath(early.path) in out
    shown = re.findall(r"outputs/a/\d\d", out)
    assert len(shown) == 14
    assert shown == sorted(shown, reverse=True)
    assert "and 6 older ones" in out
    assert out.endswith("these are the runs below outputs; runs elsewhere: python -m runner status FOLDER\n")
    assert len(re.findall(r"outputs/a/\d\d", said_of("status", "--all", capsys=capsys)[1])) == 20
    assert "seed=2" in said_of("status", "ablation", capsys=capsys)[1]
    assert "ablation" not in said_of("status", "outputs/a", capsys=capsys)[1]


def test_a_sweep_whose_command_died_tells_which_command_continues_it(capsys: pytest.CaptureFixture[str]):
    sweep = a_sweep("ablation", commands=[["python", "-m", "runner", "-m", "lora.r=8,16", "name=my run"]])
    for number, status in enumerate(("failed", "pending")):
        played(f"{number:03d}", status, sweep, label=f"seed={number}")
    assert re.search(r"seed=1 +pending.*\n +being prepared\n", said_of("status", "ablation", capsys=capsys)[1])
    os.utime(sweep.manifest, (0, 0))  # long ago
    again = "python -m runner -m lora.r=8,16 'name=my run'"
    out = said_of("status", capsys=capsys)[1]
    assert f"no process will start 1 of these runs: repeat the command: {again}\n" in out
    out = said_of("status", "ablation", capsys=capsys)[1]
    assert re.search(r"seed=1 +pending.*\n +no process will start this run: repeat the command\n", out)
    assert f"continue  repeat the command: {again} (completed runs are skipped)\n" in out
    assert f"retry     {again} retry=true\n" in out


def test_a_run_of_another_machine_has_the_status_unknown_there(capsys: pytest.CaptureFixture[str]):
    rundir = played("a/far", "running")
    rundir.write_state(host="elsewhere")
    before = rundir.state.read_bytes()
    found = statuses(capsys)["a/far"]
    assert found["status"] == "unknown"
    assert "elsewhere" in str(found["reason"])
    code, out, _ = said_of("cancel", "a/far", capsys=capsys)
    assert code == 1
    assert "not cancelled" in out
    assert rundir.state.read_bytes() == before
    assert not rundir.cancel_request.exists()


def kill_mirror(rundir: RunDir) -> None:
    """kill -9 of the process that would otherwise find out that the worker is dead; returns when it is gone."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"runner.mirror" in words and str(rundir.path).encode() in words:
            os.kill(int(folder.name), signal.SIGKILL)
    until(lambda: not is_held(rundir.mirror_lock))


def test_a_worker_at_work_then_killed_with_its_mirror(
    processes: list[subprocess.Popen[str]], capsys: pytest.CaptureFixture[str]
):
    folder = Path("outputs/2026-01-31/12-00-00").absolute()
    rundir = started(folder, processes, *MIRRORED, "name=mine")
    until(lambda: (rundir.read_manifest().get("mlflow") or {}).get("run_id"))
    _, out, err = said_of("status", "mine", capsys=capsys)
    state = rundir.read_state()
    assert re.search(rf"mine +running +\d+/100000 .* {state.pid}@{state.host}", out)
    assert "train" in out
    assert "not fully uploaded" not in err
    assert statuses(capsys)["mine"]["eta_s"]

    kill_mirror(rundir)
    processes[-1].kill()
    processes[-1].wait()
    assert rundir.read_state().status == "running"
    _, out, err = said_of("status", capsys=capsys)
    assert re.search(r"mine +killed", out)
    assert DIED in out
    assert (rundir.read_state().status, rundir.read_state().reason) == ("killed", DIED)
    assert "uploaded: 1 killed" in err
    assert mlflow_status(rundir) == "KILLED"
    assert "not fully uploaded" not in said_of("status", capsys=capsys)[2]
    assert "resume=outputs/2026-01-31/12-00-00" in said_of("status", "mine", capsys=capsys)[1]


def test_watching_ends_with_the_run(processes: list[subprocess.Popen[str]]):
    rundir = played("a/1", "running")
    processes.append(
        subprocess.Popen([sys.executable, "-c", HOLD, str(rundir.path)], stdout=subprocess.PIPE, text=True)
    )
    assert processes[0].stdout
    assert processes[0].stdout.readline()
    command = [sys.executable, "-m", "runner", "status", "--watch"]
    watching = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    processes.append(watching)
    assert watching.stdout
    until(lambda: "running" in watching.stdout.readline())
    processes[0].kill()
    out, _ = watching.communicate()
    assert watching.returncode == 0
    assert re.search(r"a/1 +killed", out)


@pytest.mark.slurm
def test_jobs_of_slurm_waiting_at_work_and_cancelled(slurm: None, capsys: pytest.CaptureFixture[str]):
    submitted("-m", "sweep=seeds", "seed=1,2,3", "launcher.array_parallelism=1")
    sweep = SweepDir(Path("outputs/sweeps/seeds").absolute())
    one, two, three = sweep.rundirs()
    assert statuses(capsys)["seed=2"]["status"] == "queued"
    until(lambda: statuses(capsys)["seed=2"]["reason"] == "Slurm: JobArrayTaskLimit")
    assert "no log yet, the run is queued" in said_of("logs", "seeds/seed=2", capsys=capsys)[2]
    until(lambda: one.read_state().step >= 3)
    job = one.read_manifest()["slurm"]["job_id"]
    assert lookup.resolve(job, Path("elsewhere")) == one, "Slurm knows where its output is"
    assert lookup.resolve(job.partition("_")[0], Path("elsewhere")) == sweep
    assert re.search(rf"seed=1 +running .* job {job} on n\d", said_of("status", "seeds", capsys=capsys)[1])

    subprocess.run(["scancel", two.read_manifest()["slurm"]["job_id"]], check=True)
    until(lambda: statuses(capsys)["seed=2"]["status"] == "killed")
    assert two.read_state().reason == "cancelled with scancel"

    assert said_of("cancel", "seeds", capsys=capsys)[0] == 0
    assert [rundir.read_state().status for rundir in sweep.rundirs()] == ["killed"] * 3
    assert three.read_state().reason.startswith("cancelled before it started by ")
    assert re.search("cancelled by .*; the state is saved at step", one.read_state().reason)
    states = subprocess.run(["squeue", "-h", "-o", "%T", "-j", job.split("_")[0]], capture_output=True, text=True)
    assert "PENDING" not in states.stdout
    assert "RUNNING" not in states.stdout
    # Slurm gives a job that it ends half a minute; what its mirror has not managed by then, the next who asks does.
    until(lambda: statuses(capsys) and {mlflow_status(rundir) for rundir in sweep.rundirs()} == {"KILLED"})


@pytest.mark.slurm
def test_jobs_of_slurm_that_died_without_a_record(slurm: None, capsys: pytest.CaptureFixture[str]):
    submitted("name=early", "launcher.setup=['echo going wrong >&2; exit 3']", "tracking=offline")
    until(lambda: statuses(capsys)["early"]["status"] == "failed")
    # The number is accounting's, which may be behind the controller; that one says NonZeroExitCode.
    why = r"Slurm: FAILED, .*(exit code 3|NonZeroExitCode), .*before the run started"
    assert re.match(why, str(statuses(capsys)["early"]["reason"]))
    assert (
        "going wrong"
        in subprocess.run(
            [sys.executable, "-m", "runner", "logs", "early"], capture_output=True, text=True, check=True
        ).stdout
    )

    submitted("name=shot", "tracking=offline")
    shot = lookup.resolve_run("shot", Path("outputs"))
    until(lambda: shot.read_state().step >= 3)
    os.kill(shot.read_state().pid, signal.SIGKILL)
    until(lambda: statuses(capsys)["shot"]["status"] != "running")
    assert shot.read_state().status == "killed"
    assert "Slurm: FAILED" in shot.read_state().reason


@pytest.mark.slurm
def test_a_job_of_slurm_that_is_requeued_lives_on_and_can_be_cancelled_meanwhile(
    slurm: None, capsys: pytest.CaptureFixture[str]
):
    submitted("name=again", "tracking=offline")
    again = lookup.resolve_run("again", Path("outputs"))
    until(lambda: again.read_state().step >= 3)
    seen = {"running"}
    subprocess.run(["scontrol", "requeue", again.read_manifest()["slurm"]["job_id"]], check=True)
    until(lambda: seen.add(str(statuses(capsys)["again"]["status"])) or "requeued" in seen)
    assert seen <= {"running", "stopping", "requeued"}
    assert again.read_state().status == "preempted"
    assert said_of("cancel", "again", capsys=capsys)[0] == 0
    assert again.read_state().status == "killed"
    assert again.read_state().reason.startswith("cancelled by ")


# Nothing heavy


@pytest.mark.parametrize("verb", ["status", "logs", "cancel"])
def test_the_verbs_load_nothing_heavy_where_there_are_runs(verb: str, processes: list[subprocess.Popen[str]]):
    rundir = played("a/1", "running")
    rundir.update_manifest(tracking="mlflow")
    rundir.log.write_text("step\n")
    holding(rundir, processes)
    code = f"from runner.cli import main\nimport sys\nmain.run(['{verb}', 'a/1'])\nprint(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stderr.split())
    assert "runner.tracking.run_status" in loaded
    assert not loaded & {"torch", "transformers", "mlflow", "peft", "datasets", "submitit", "hydra", "omegaconf"}
