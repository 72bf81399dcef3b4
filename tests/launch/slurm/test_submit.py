"""What is submitted to Slurm: one array, once, in its turn."""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, jobs_of, option, prepared, until
from fixtures.slurm_runs import SHORT, SLURM, has_left_the_queue, job_of, mlflow_runs, runner, slurm_says
from fixtures.users_functions import HELD, OWN_FUNCTION, write_rows

from runner.cli import main
from runner.launch.slurm import submission, submit
from runner.tracking import slurm_client
from runner.tracking.rundir import RunDir
from runner.tracking.slurm_client import Job
from runner.tracking.sweepdir import SweepDir, slurm_room

ENDLESS = (*TINY, "train.max_steps=100000", "train.save_steps=1000")


@pytest.mark.slurm
def test_a_sweep_beyond_the_longest_array_is_cut_and_throttled_as_one(slurm: None):
    longest = int(slurm_says("bash", "-c", "scontrol show config | sed -n 's/^MaxArraySize *= *//p'"))
    if longest > 50:
        pytest.skip(f"arrays of {longest} here; scripts/slurm-lab/up has short ones")
    count = longest + 2
    done = runner(
        "-m", *TINY, "train.max_steps=1", *SLURM, HELD, f"seed=range({count})", "launcher.array_parallelism=2"
    )
    assert done.returncode == 0, done.stderr
    rundirs = SweepDir(Path("outputs/sweeps/seed").absolute()).rundirs()
    ids = [job_of(rundir) for rundir in rundirs]
    assert len(set(ids)) == count
    first, second = dict.fromkeys(id.partition("_")[0] for id in ids)
    assert [id.partition("_")[0] for id in ids] == [first] * longest + [second] * 2
    told = slurm_says("squeue", "-h", "-j", f"{first},{second}", "-o", "%K")
    assert sorted(told.split()) == sorted([f"0-{longest - 1}%2", "0-1%2"])
    assert f"afterany:{first}" in slurm_says("scontrol", "-o", "show", "job", second)
    again = runner(
        "-m", *TINY, "train.max_steps=1", *SLURM, HELD, f"seed=range({count})", "launcher.array_parallelism=2"
    )
    assert again.returncode == 0, again.stderr
    assert [job_of(rundir) for rundir in rundirs] == ids, "what is in the queue is not submitted again"
    assert len(list(Path("outputs/sweeps/seed/slurm").glob("runner-*.json"))) == 2


@pytest.mark.slurm
def test_a_sweep_that_sbatch_refused_is_not_shown_as_running(slurm: None):
    Path("bin").mkdir()
    real = shutil.which("sbatch")
    refusal = 'echo "sbatch: error: Slurm is full" >&2\nexit 1\n'
    Path("bin/sbatch").write_text(f'#!/bin/bash\n[[ "$*" == *--test-only* ]] && exec {real} "$@"\n{refusal}')
    Path("bin/sbatch").chmod(0o755)
    words = ("-m", *SHORT, *SLURM, HELD, "seed=1,2")
    done = runner(*words, PATH=f"{Path('bin').absolute()}:{os.environ['PATH']}")
    assert done.returncode == 2, done.stderr
    assert "Slurm accepted 0 of 2 runs and refused the next: Slurm is full" in done.stderr
    assert [run.info.status for run in mlflow_runs()] == ["KILLED"], "the parent; a job has a run once it starts"
    assert runner(*words).returncode == 0
    assert [run.info.status for run in mlflow_runs()] == ["RUNNING"]


@pytest.mark.slurm
def test_a_sweep_is_submitted_although_its_terminal_is_closed_meanwhile(slurm: None):
    Path("bin").mkdir()
    real = shutil.which("sbatch")
    hangup = f'kill -HUP $PPID\nsleep 0.5\nexec {real} "$@"\n'
    Path("bin/sbatch").write_text(f'#!/bin/bash\n[[ "$*" == *--test-only* ]] && exec {real} "$@"\n{hangup}')
    Path("bin/sbatch").chmod(0o755)
    words = ("-m", *SHORT, *SLURM, HELD, "launcher.tasks_per_node=1,2", "tracking=offline")  # a submission each
    done = runner(*words, PATH=f"{Path('bin').absolute()}:{os.environ['PATH']}")
    assert done.returncode == 0, done.stderr
    rundirs = SweepDir(Path("outputs/sweeps/launcher.tasks_per_node").absolute()).rundirs()
    assert sorted(map(job_of, rundirs)) == sorted(jobs_of(Path.cwd()))
    assert len(rundirs) == 2


@pytest.mark.slurm
def test_what_failed_and_is_submitted_again_waits(slurm: None):
    words = ("-m", *SHORT, *SLURM, HELD, "seed=1,2")
    assert runner(*words).returncode == 0
    rundirs = SweepDir(Path("outputs/sweeps/seed").absolute()).rundirs()
    for rundir in rundirs:
        slurm_says("scancel", job_of(rundir))
        rundir.write_state(status="failed", reason="not today", attempt=1)
    until(lambda: all(map(has_left_the_queue, rundirs)))
    assert runner("sync", "outputs/sweeps/seed").returncode == 0
    assert {run.info.status for run in mlflow_runs()} == {"FAILED"}
    Path("bin").mkdir()
    real, no = shutil.which("sbatch"), 'echo "sbatch: error: no" >&2; exit 1'
    Path("bin/sbatch").write_text(f'#!/bin/bash\n[[ "$*" == *--test-only* ]] && exec {real} "$@"\n{no}\n')
    Path("bin/sbatch").chmod(0o755)
    refused = runner(*words, "retry=true", PATH=f"{Path('bin').absolute()}:{os.environ['PATH']}")
    assert refused.returncode != 0
    assert {(run.read_state().status, run.read_state().reason) for run in rundirs} == {("failed", "not today")}
    assert {run.info.status for run in mlflow_runs()} == {"FAILED"}
    again = runner(*words, "retry=true")
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("queued") == 2
    assert "not today" not in again.stdout
    assert [rundir.read_state().status for rundir in rundirs] == ["pending"] * 2
    assert sorted(run.info.status for run in mlflow_runs()) == ["RUNNING", "SCHEDULED", "SCHEDULED"]


@pytest.mark.slurm
def test_what_slurm_takes_of_a_sweep_is_shown_where_it_refuses_the_rest(slurm: None):
    Path("bin").mkdir()
    real = shutil.which("sbatch")
    once = '[[ -e taken ]] && echo "sbatch: error: Slurm is full" >&2 && exit 1\ntouch taken\n'
    Path("bin/sbatch").write_text(f'#!/bin/bash\n[[ "$*" == *--test-only* ]] && exec {real} "$@"\n{once}{real} "$@"\n')
    Path("bin/sbatch").chmod(0o755)
    there = {"PATH": f"{Path('bin').absolute()}:{os.environ['PATH']}"}
    words = ("-m", *TINY, "train.max_steps=1", *SLURM, HELD)
    done = runner(*words, "launcher.tasks_per_node=1,2", **there)  # a launcher each
    assert done.returncode == 1, done.stderr
    assert "Slurm accepted 0 of 1 runs and refused the next: Slurm is full" in done.stderr
    assert re.search(r"queued.*\n.*pending", done.stdout), done.stdout
    Path("taken").unlink()
    longest = int(slurm_says("bash", "-c", "scontrol show config | sed -n 's/^MaxArraySize *= *//p'"))
    if longest > 50:
        pytest.skip(f"arrays of {longest} here; scripts/slurm-lab/up has short ones")
    done = runner(*words, f"seed=range({longest + 1})", "sweep=long", **there)
    assert done.returncode == 1, done.stderr
    assert f"Slurm accepted {longest} of {longest + 1} runs and refused the next: Slurm is full" in done.stderr
    assert done.stdout.count("queued") == longest
    assert done.stdout.count("pending") == 1


@pytest.mark.slurm
def test_what_a_later_command_adds_to_a_sweep_waits_for_what_is_queued(slurm: None):
    words = ("-m", *TINY, "train.max_steps=1", *SLURM, HELD, "launcher.array_parallelism=1", "sweep=one")
    assert runner(*words, "seed=1,2").returncode == 0
    more = runner(*words, "seed=1,2,3,4")
    assert more.returncode == 0, more.stderr
    first, _, second, _ = (job_of(run).partition("_")[0] for run in SweepDir(Path("outputs/sweeps/one")).rundirs())
    assert first != second
    assert f"afterany:{first}" in slurm_says("scontrol", "-o", "show", "job", second)
    assert f"submitted 2 runs as job {second}, 1 at a time, after job {first}" in more.stderr


@pytest.mark.slurm
@pytest.mark.slow
def test_a_run_cancelled_outside_is_killed_and_one_requeued_too_often_stays_preempted(slurm: None):
    for name in ("cancelled", "tired"):
        done = runner(*ENDLESS, *SLURM, "launcher.max_requeues=0", f"hydra.run.dir={name}")
        assert done.returncode == 0, done.stderr
    cancelled, tired = RunDir(Path("cancelled").absolute()), RunDir(Path("tired").absolute())
    until(lambda: cancelled.read_state().step >= 3 and tired.read_state().step >= 3)
    slurm_says("scancel", job_of(cancelled))
    slurm_says("scancel", "--signal=USR2", job_of(tired))
    until(lambda: has_left_the_queue(cancelled) and has_left_the_queue(tired))
    assert cancelled.read_state().status == "killed"
    assert cancelled.read_state().reason.startswith("cancelled outside (scancel); the state is saved at step ")
    assert slurm_says("sacct", "-nPX", "-j", job_of(cancelled), "-o", "State").startswith("CANCELLED")
    assert tired.read_state().status == "preempted"
    assert tired.read_state().reason.startswith("not requeued again (launcher.max_requeues=0); stopped by SIGUSR2; ")
    assert slurm_says("sacct", "-nPX", "-j", job_of(tired), "-o", "ExitCode") == "75:0"


@pytest.mark.slurm
@pytest.mark.slow
def test_a_time_limit_that_leaves_no_time_to_train_is_not_requeued_for_ever(slurm: None):
    write_rows()
    slow = (
        "import os, time\n\ndef text(row):\n    time.sleep(300 * ('SLURM_JOB_ID' in os.environ))\n    return row['a']\n"
    )
    Path("mine.py").write_text(slow)  # a start that takes its time
    limit = ("launcher.timeout_min=1", "launcher.signal_delay_s=30", "launcher.wait=true")
    done = runner(*SHORT, *OWN_FUNCTION, *SLURM[:1], *limit, "hydra.run.dir=short")
    assert done.returncode == 75, done.stderr
    state = RunDir(Path("short").absolute()).read_state()
    assert [state.status, state.attempt] == ["preempted", 0]
    assert state.reason.startswith("not requeued: the time limit leaves no time to train; set a larger ")
    assert runner("sync", "short").returncode == 0  # or the job's own upload goes on and sends the reason
    [run] = until(lambda: [run for run in mlflow_runs() if run.data.tags["runner.reason"] == state.reason])
    assert run.info.status == "KILLED"


@pytest.mark.slow
def test_debug_works_in_this_process(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    launcher = option("launcher", "slurm", cluster="debug")()
    assert (launcher.processes, launcher.is_detached) == (1, False)
    before = dict(os.environ)
    done = prepared(tmp_path / "good", *TINY, "train.max_steps=2", "parallel=none")
    bad = prepared(tmp_path / "bad", *TINY, "train.max_steps=2", "optim.learning_rate=1e30", "parallel=none")
    assert launcher.launch([done], None) == [0]
    assert launcher.launch([bad], None) == [1]
    assert [done.read_state().status, bad.read_state().status] == ["completed", "failed"]
    assert done.read_manifest()["slurm"]["cluster"] == "debug"
    assert dict(os.environ) == before
    assert submission.is_queued([done]) == [False]


# What needs neither Slurm nor training


def test_a_job_that_is_leaving_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rundir = prepared(tmp_path / "run", *TINY)
    rundir.update_manifest(slurm={"job_id": "7", "name": "runner-x", "cluster": "slurm"})
    states = ["COMPLETING", "COMPLETING", "CANCELLED"]
    monkeypatch.setattr(slurm_client, "jobs", lambda refs: {ref: Job(ref.id, states.pop(0)) for ref in refs})
    monkeypatch.setattr(submission.time, "sleep", lambda _: None)
    rundir.write_state(status="killed", reason="cancelled by me")
    assert submission.wait_until_left([rundir]) == []
    assert states == []
    rundir.write_state(status="preempted")  # it goes back into the queue
    assert submission.wait_until_left([rundir]) == []
    states.append("COMPLETING")
    assert submission.is_queued([rundir]) == [True]
    rundir.write_state(status="failed")
    states += ["COMPLETING"] * 2
    monkeypatch.setattr(submission, "LONGEST_LEAVE_S", -1.0)
    assert submission.wait_until_left([rundir]) == [rundir]


@pytest.mark.parametrize(
    "stop", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")], ids=["Ctrl-C", "a full disk"]
)
def test_of_a_sweep_that_is_given_again_in_parts_those_that_are_taken_stay_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stop: BaseException
):
    """What stops the second part leaves the first as it is: it would be submitted twice."""
    sweep, earlier = SweepDir(tmp_path), {"job_id": "7", "cluster": "debug"}
    rundirs = [prepared(sweep.path / name, *TINY) for name in ("a", "b")]
    for rundir in rundirs:
        rundir.update_manifest(slurm=earlier)
        rundir.write_state(status="killed", reason="cancelled by me")
    begin, parts = submission.begin, [None, stop]

    def begun(*asked: Any) -> submission.Submission:
        if error := parts.pop(0):
            raise error
        return begin(*asked)

    monkeypatch.setattr(submission, "begin", begun)
    monkeypatch.setattr(submit, "_to_local", lambda *_: "8")
    request = option("launcher", "slurm", cluster="local", snapshot="none")().request
    if isinstance(stop, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            submit.submit(request, rundirs, sweep)
    else:
        assert submit.submit(request, rundirs, sweep) == rundirs[1:]
        assert "cannot be written: No space left on device; Slurm accepted 1 of 2 runs\n" in capsys.readouterr().err
    assert [job_of(rundir) for rundir in rundirs] == ["8", "7"]
    assert [rundir.read_state().status for rundir in rundirs] == ["pending", "killed"]


def test_what_is_completed_is_not_submitted_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rundir = prepared(tmp_path / "run", *TINY)
    rundir.write_state(status="completed")
    for launcher in (("launcher=slurm",), ("launcher=slurm", "launcher.cluster=local")):
        assert main.run([*TINY, *launcher, f"hydra.run.dir={rundir.path}"]) == 0
        assert "is completed already: nothing to do" in capsys.readouterr().err
    assert not slurm_room(rundir.path).exists()
