"""What a job of Slurm is made of and how it ends: its script, its array, its code, and what is decided from inside."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, jobs_of, node, option, prepared
from submitit.local.local import start_controller
from test_slurm import SHORT, SLURM, has_left_the_queue, job_of, mlflow_runs, runner, slurm_says, until, weights

from runner.cli import main
from runner.config import bind
from runner.data import formats
from runner.errors import LaunchError
from runner.launch.slurm import monitor, script, snapshot, submission, submit
from runner.sweep import table
from runner.tracking import manifest, slurm_client
from runner.tracking.rundir import DIED, RunDir
from runner.tracking.slurm_client import Job
from runner.tracking.sweepdir import SweepDir, slurm_room

HELD = "+launcher.additional_parameters.hold=true"
OWN_FUNCTION = (
    "data=local", "data.path=rows.jsonl", "data/format=custom", "data.format.function=mine.py:text", "task=pretrain",
)  # fmt: skip
ENDLESS = (*TINY, "train.max_steps=100000", "train.save_steps=1000")


def write_rows() -> None:
    rows = [{"a": f"what is {n}?", "b": f"it is {n * n}"} for n in range(40)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


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


@pytest.mark.slurm
@pytest.mark.slow
def test_whoever_is_killed_after_sbatch_need_not_come_back(slurm: None):
    """The job finds what it is to do in its run's folder; submitit alone would wait for its pickle and fail."""
    Path("bin").mkdir()
    real = shutil.which("sbatch")
    Path("bin/sbatch").write_text(
        f'#!/bin/bash\n[[ "$*" == *--test-only* ]] || trap "kill -9 $PPID" EXIT\n{real} "$@"\n'
    )
    Path("bin/sbatch").chmod(0o755)
    words = (*SHORT, *SLURM, "hydra.run.dir=alone", "tracking=offline")
    killed = runner(*words, PATH=f"{Path('bin').absolute()}:{os.environ['PATH']}")
    assert killed.returncode == -signal.SIGKILL
    rundir = RunDir(Path("alone").absolute())
    until(lambda: rundir.read_state().status == "completed")
    assert "slurm" not in rundir.read_manifest(), "it was killed too late"


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
def test_a_sweep_that_sbatch_did_not_take_is_not_said_to_run(slurm: None):
    Path("bin").mkdir()
    real = shutil.which("sbatch")
    refusal = 'echo "sbatch: error: Slurm is full" >&2\nexit 1\n'
    Path("bin/sbatch").write_text(f'#!/bin/bash\n[[ "$*" == *--test-only* ]] && exec {real} "$@"\n{refusal}')
    Path("bin/sbatch").chmod(0o755)
    words = ("-m", *SHORT, *SLURM, HELD, "seed=1,2")
    done = runner(*words, PATH=f"{Path('bin').absolute()}:{os.environ['PATH']}")
    assert done.returncode == 2, done.stderr
    assert "Slurm accepted 0 of 2 runs and refused the next: Slurm is full" in done.stderr
    assert [run.info.status for run in mlflow_runs()] == ["KILLED"] * 3
    assert runner(*words).returncode == 0
    assert sorted(run.info.status for run in mlflow_runs()) == ["RUNNING", "SCHEDULED", "SCHEDULED"]


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
    [run] = mlflow_runs()
    assert (run.info.status, run.data.tags["runner.reason"]) == ("KILLED", state.reason)


@pytest.mark.slurm
@pytest.mark.slow
def test_a_search_goes_on_as_jobs_end(slurm: None):
    words = ("-m", *SHORT, *SLURM, "search=random", "search.trials=3", "optim.learning_rate=interval(1e-4,1e-2)")
    refused = runner(*words)
    assert refused.returncode == 2
    assert not list(Path().iterdir())
    assert "set it, for example search.at_once=8" in refused.stderr
    done = runner(*words, "search.at_once=2", "sweep=found")
    assert done.returncode == 0, done.stderr
    rundirs = SweepDir(Path("outputs/sweeps/found").absolute()).rundirs()
    assert [rundir.read_state().status for rundir in rundirs] == ["completed"] * 3
    losses = [rundir.read_state().summary["eval/loss"] for rundir in rundirs]
    assert f"best     eval/loss {min(losses):.6g}" in done.stdout
    runs = mlflow_runs()
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert sum("mlflow.parentRunId" in run.data.tags for run in runs) == len(runs) - 1 == 3


@pytest.mark.slurm
@pytest.mark.slow
def test_a_function_of_the_users_is_frozen_with_the_code(slurm: None):
    write_rows()
    write_functions("mine.py", ' + " "')
    words = (*SHORT, *OWN_FUNCTION, "tracking=offline")
    here = runner(
        *words, "hydra.run.dir=here", RUNNER_CACHE=str(Path("cache").absolute())
    )  # its rows are not the job's
    assert here.returncode == 0, here.stderr
    done = runner(*words, *SLURM, HELD, "hydra.run.dir=queued")
    assert done.returncode == 0, done.stderr
    rundir = RunDir(Path("queued").absolute())
    Path("mine.py").write_text('def text(row):\n    raise SystemExit("edited")\n')
    Path("joining_of_mine.py").write_text('raise SystemExit("edited as well")\n')
    slurm_says("scontrol", "release", job_of(rundir))
    until(lambda: has_left_the_queue(rundir))
    assert rundir.read_state().status == "completed", rundir.read_state().reason
    assert weights(rundir) == weights(RunDir(Path("here")))


def write_functions(file: str, between: str) -> None:
    """A function of the user's in a file, and what it imports from another one beside it."""
    Path(file).parent.mkdir(exist_ok=True)
    Path(file).write_text("import joining_of_mine\n\ndef text(row):\n    return joining_of_mine.join(row)\n")
    text = f'def join(row):\n    return row["a"]{between} + row["b"]\n'
    Path(file).with_name("joining_of_mine.py").write_text(text)


def test_what_a_function_imports_from_beside_it_is_frozen_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    write_rows()
    write_functions("own/mine.py", "")
    Path("own/unrelated.py").write_text("")
    function = ("data.format.function=own/mine.py:text",)
    words = (*TINY, *(word for word in OWN_FUNCTION if "function" not in word), *function)
    rundir = prepared(tmp_path / "run", *words)
    assert sorted(path.name for path in rundir.code.iterdir()) == ["joining_of_mine.py", "mine.py"]
    write_functions("own/mine.py", ' + " and "')
    row = {"a": "1", "b": "2"}
    assert formats.of(manifest.read_config(rundir)["data"]["format"])(row) == "12"
    again = prepared(tmp_path / "again", *words)
    assert formats.of(manifest.read_config(again)["data"]["format"])(row) == "1 and 2"


def test_a_snapshot_is_a_package_of_its_own_and_changes_with_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    checkout = tmp_path / "checkout"
    shutil.copytree(snapshot.PACKAGE, checkout / "src" / "runner", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(snapshot.bind.config_dir(), checkout / "conf")
    subprocess.run(["git", "init", "-q", str(checkout)], check=True)
    (checkout / ".gitignore").write_text("*.secret\n")
    (checkout / "src/runner/key.secret").write_text("not code")
    monkeypatch.setattr(snapshot, "PACKAGE", checkout / "src" / "runner")
    monkeypatch.setattr(snapshot.bind, "config_dir", lambda: checkout / "conf")
    first = snapshot.take(tmp_path)
    assert snapshot.take(tmp_path) == first
    assert not list(first.rglob("*.secret"))
    (checkout / "src/runner/train/loop.py").open("a").write("# an uncommitted change\n")
    second = snapshot.take(tmp_path)
    assert second != first
    code = "from runner.config import bind; from runner.train import loop; print(loop.__file__, bind.config_dir())"
    environment = {**os.environ, "PYTHONPATH": str(second), "PYTHONSAFEPATH": "1"}
    said = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True).split()
    assert said == [f"{second}/runner/train/loop.py", f"{second}/runner/conf"]
    assert (second / "runner/train/loop.py").read_text().endswith("# an uncommitted change\n")
    assert not (first / "runner/train/loop.py").read_text().endswith("# an uncommitted change\n")


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
    asked = {"gpus_per_node": 0, "mem_gb": 1.0, "additional_parameters": {"hint": "nomultithread"}}
    del kept["SBATCH_MEM_PER_CPU"]
    assert seen_by_sbatch(**asked) == kept
    assert os.environ["SBATCH_JOB_NAME"] == os.environ["SBATCH_TIMELIMIT"] == "1", "they are back"


@pytest.mark.parametrize(
    ("cluster", "asked", "remedy"),
    [
        ("local", {"gpus_per_node": 2}, "launcher=accelerate"),
        ("local", {"array_parallelism": 2}, "launcher=local"),
        ("local", {"max_requeues": 3}, "remove it, or set cluster=slurm"),
        ("debug", {"container": "apptainer exec x"}, "remove it, or set cluster=slurm"),
        ("debug", {"python": "/usr/bin/python3"}, "remove it, or set cluster=slurm"),
        ("debug", {"array_parallelism": 2}, "launcher=local"),
        ("debug", {"gpus_per_node": 1}, "launcher=local"),
        ("debug", {"snapshot": "new"}, "remove it, or set cluster=slurm"),
        ("debug", {"timeout_min": 5}, "remove it, or set cluster=slurm"),
        ("debug", {"signal_delay_s": 5}, "remove it, or set cluster=slurm"),
    ],
)
def test_what_nobody_heeds_without_slurm_is_refused(cluster: str, asked: dict[str, object], remedy: str):
    assert not list(bind.find_faults(node("launcher", "slurm", **asked), "launcher"))
    assert not list(bind.find_faults(node("launcher", "slurm", cluster=cluster), "launcher"))
    (fault,) = bind.find_faults(node("launcher", "slurm", cluster=cluster, **asked), "launcher")
    assert (fault.key, fault.problem) == (f"launcher.{next(iter(asked))}", f"has no effect with cluster={cluster}")
    assert remedy in fault.remedy


def supervised(folder: Path) -> tuple[RunDir, subprocess.Popen[bytes]]:
    """A run that a process other than this one sees to; it is what submitit's local cluster looks like."""
    rundir = prepared(folder, *TINY)
    slurm_room(folder).mkdir()
    process = start_controller(slurm_room(folder), "sleep 60")
    rundir.update_manifest(slurm={"job_id": str(process.pid), "cluster": "local"})
    return rundir, process


class One:
    """Proposes this run; see launch/launcher.py: Source."""

    def __init__(self, rundir: RunDir) -> None:
        self.left, self.has_ended = [rundir], False

    def next(self) -> RunDir | None:
        return self.left.pop() if self.left else None

    def ended(self, rundir: RunDir) -> None:  # noqa: ARG002
        self.has_ended = True

    def poll(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_search_does_not_follow_a_job_that_it_did_not_submit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its earlier job does not leave its nodes: an end of that one would be taken for this one's."""
    rundir, sweep = prepared(tmp_path / "run", *TINY), SweepDir(tmp_path)
    rundir.update_manifest(slurm={"job_id": "7", "name": "runner-x", "cluster": "slurm"})
    rundir.write_state(status="failed")
    monkeypatch.setattr(slurm_client, "jobs", lambda refs: {ref: Job(ref.id, "COMPLETING") for ref in refs})
    monkeypatch.setattr(slurm_client, "settings", lambda *_: {})
    monkeypatch.setattr(submission, "LONGEST_LEAVE_S", -1.0)
    source = One(rundir)
    with pytest.raises(LaunchError, match="launcher=run: not submitted: the run's earlier job has not left its nodes"):
        option("launcher", "slurm")().serve(source, sweep, 1)
    assert not source.has_ended


def test_a_job_that_does_not_leave_keeps_no_other_run_of_a_search_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class Two:
        """Proposes two runs, and hears of ends."""

        total = 2

        def __init__(self) -> None:
            self.left, self.ended_runs = [RunDir(tmp_path / name) for name in ("well", "stuck")], []

        def next(self) -> RunDir | None:
            return self.left.pop() if self.left else None

        def ended(self, rundir: RunDir) -> None:
            self.ended_runs.append(rundir.path.name)

        def poll(self) -> None:
            pass

    asked: list[str] = []

    def submit(rundir: RunDir) -> list[RunDir]:
        asked.append(rundir.path.name)
        return [rundir] if rundir.path.name == "stuck" else []

    monkeypatch.setattr(submission, "is_queued", lambda rundirs: [False] * len(rundirs))
    monkeypatch.setattr(monitor, "FIRST_PAUSE_S", 0.0)
    monkeypatch.setattr(monitor, "SETTLING_S", 0.0)
    source = Two()
    with pytest.raises(LaunchError, match="launcher=stuck: not submitted: the run's earlier job"):
        monitor.serve(source, 1, submit)
    assert asked == ["stuck", "well", "stuck"], "and once more after a job has ended"
    assert source.ended_runs == ["well"]


def test_sigterm_ends_the_following_and_not_the_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rundir, process = supervised(tmp_path / "run")
    before = signal.getsignal(signal.SIGTERM)
    timer = threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    try:
        assert monitor.follow([rundir]) == [75]
        assert "stopped following; 1 of 1 runs are still active" in capsys.readouterr().err
        source = One(rundir)
        assert monitor.serve(source, 1, lambda _: []) == 75
        assert "stopped the search; 1 runs are still active" in capsys.readouterr().err
        assert not source.has_ended
        assert process.poll() is None
    finally:
        timer.cancel()
        process.kill()
        process.wait()
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_table_of_a_sweep_says_how_runs_stand_and_not_what_the_dead_wrote(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    rundir = prepared(tmp_path / "run", *TINY)
    rundir.write_state(status="running", attempt=1, host=os.uname().nodename)
    table.sweep([("seed=1", rundir)], is_detached=False)
    shown = capsys.readouterr().out
    assert f"killed  seed=1: {DIED}" in shown
    assert "running" not in shown
    assert "the same command again" in shown
