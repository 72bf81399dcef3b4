"""status, logs and cancel against real workers, a real queue, a real kill -9, and Slurm where one answers."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import mlflow
import pytest
from conftest import TINY, prepared

from runner import terminal
from runner.cli import args, main
from runner.errors import ConfigError, Fault, LaunchError
from runner.files import is_held, write_atomic
from runner.tracking import lookup, machine, run_status, slurm_client
from runner.tracking.rundir import DIED, RunDir
from runner.tracking.sweepdir import SweepDir

MIRRORED = ("tracking=mlflow", "tracking.system_metrics=false")
ENDLESS = ("train.max_steps=100000", "train.save_steps=50000", "train.eval_steps=50000")
HOLD = """
import signal, sys, time
from pathlib import Path
from runner.tracking.rundir import RunDir
rundir = RunDir(Path(sys.argv[1]))
def end(*_):
    rundir.write_state(status="killed", reason=rundir.cancel_request.read_text())
    sys.exit(130)
signal.signal(signal.SIGTERM, end)
with rundir.held():
    print("held", flush=True)
    time.sleep(100)
"""
"""A worker that only holds its folder, and ends as one does that is cancelled."""


@pytest.fixture(autouse=True)
def _in_a_new_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    """What is put in here does not outlive the test, nor do the workers that it started."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for lock in Path.cwd().rglob("worker.lock"):
        if pid := run_status.holder(RunDir(lock.parent)):
            os.kill(pid, signal.SIGKILL)
    for process in started:
        process.kill()
        process.wait()


def until(condition: Callable[[], object], timeout_s: float = 300.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.1)


def played(folder: str, status: str = "completed", sweep: SweepDir | None = None, **manifest: object) -> RunDir:
    """A run folder without a run."""
    rundir = RunDir((sweep.path if sweep else Path("outputs").absolute()) / folder)
    rundir.write_state(status=status, step=3, total_steps=3, host=os.uname().nodename)
    rundir.config.write_text("tracking:\n  _target_: runner.tracking.trackers.offline\n")
    rundir.update_manifest(**{"name": folder, **manifest})
    if sweep:
        jobs = sweep.read().get("jobs", {})
        sweep.update(jobs={**jobs, str(len(jobs)): {"folder": folder, "label": str(manifest.get("label"))}})
    return rundir


def refused(word: str) -> str:
    with pytest.raises(ConfigError) as caught:
        lookup.resolve_run(word, Path("outputs"))
    return str(caught.value)


def test_a_run_is_found_by_the_name_of_its_folder():
    first, second = played("2026-11-23/23-07-46", name="a"), played("2026-11-23/23-08-00", name="b")
    assert lookup.resolve_run("23-07-46", Path("outputs")) == first
    assert lookup.resolve_run("2026-11-23/23-08-00", Path("outputs")) == second
    played("2026-11-24/23-07-46", name="c")
    said = refused("23-07-46")
    assert "is the name of 2 runs" in said
    assert "2026-11-24/23-07-46" in said
    said = refused("2026-11-23/23-0")
    assert "names that begin with '2026-11-23/23-0' (2):" in said
    assert "23-07-46" in said
    assert "23-08-00" in said
    assert "2026-11-24" not in said


def test_the_nearest_is_named_though_many_are_newer():
    played("old", name="First try,train.max_steps=300,train.eval_steps=50,optim.learning_rate=0.001", created=1.0)
    for number in range(lookup.SHOWN + 1):
        played(f"new-{number}", name=f"lora.r={number}", created=10.0 + number)
    assert "outputs/old" not in refused("nothing like it"), "the latest are listed"
    assert "names that begin with 'First' (1):\n      outputs/old  (run First try" in refused("First")
    assert "names that contain 'first' (1):\n      outputs/old  (run First try" in refused("first")
    assert "names that contain 'ora.r' (9):\n      outputs/new-8" in refused("ora.r")
    assert "did you mean 'optim.learning_rate=0.001'?" in refused("optim.learning_rate=0.01")
    assert lookup.resolve_run("optim.learning_rate=0.001", Path("outputs")).path.name == "old"


def test_too_few_characters_of_an_id_are_said_to_be_too_few():
    run = played("one", mlflow={"run_id": "9abc" * 8})
    assert "for an MLflow run id give 4 characters or more" in refused("9")
    assert "4 characters or more" in refused("nothing like it")
    assert lookup.resolve_run("9abc", Path("outputs")) == run


def test_a_sweep_names_its_runs_the_best_first():
    sweep = a_sweep("small")
    for number, (quant, loss) in enumerate((("none", 2.0), ("8bit", 1.0), ("4bit", None))):
        summary = {"eval/loss": loss} if loss else {}
        run = played(f"00{number}", "completed" if loss else "failed", sweep, label=f"quant={quant}")
        run.write_state(summary=summary)
    lines = refused("small").splitlines()[-3:]
    assert lines[0].endswith("small/001  (quant=8bit, loss 1.0000) ★ the best")
    assert lines[1].endswith("small/000  (quant=none, loss 2.0000)")
    assert lines[2].endswith("small/002  (quant=4bit, failed)")


def test_long_names_stay_apart_when_they_are_cut():
    fixed = "model=tiny,train.max_steps=20,data.max_length=128"
    names = [f"{fixed},lora.r={r},lora.lora_alpha={alpha}" for r in (8, 16) for alpha in (16, 32)]
    for width in (30, 48):
        shown = terminal.told_apart([*names, "short"], width)
        assert len(set(shown)) == 5
        assert max(map(len, shown)) <= width
    assert terminal.told_apart([*names, "short"], 48)[0] == "…lora.r=8,lora.lora_alpha=16"
    assert terminal.told_apart([names[0], names[0]], 20) == [f"{names[0][:19]}…"] * 2


def a_sweep(name: str, **said: object) -> SweepDir:
    sweep = SweepDir(Path("outputs/sweeps").absolute() / name)
    sweep.update(name=name, jobs={}, **said)
    return sweep


def said_of(*words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main.run(list(words))
    out, err = capsys.readouterr()
    return code, out, err


def statuses(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, dict[str, object]]:
    """What ``status --json`` says: label → the run, those of sweeps included."""
    code, out, _ = said_of("status", "--json", "--all", *words, capsys=capsys)
    assert code == 0
    found = json.loads(out)
    runs = [run for entry in found for run in entry.get("runs", [entry])]
    return {str(run["label"]): run for run in runs}


# RUN as people write it


def test_a_run_is_found_by_each_of_its_names(capsys: pytest.CaptureFixture[str]):
    single = played("2026-01-31/12-00-00", name="first", mlflow={"run_id": "3f2a99"}, slurm={"job_id": "123_4"})
    sweep = a_sweep("ablation", mlflow={"parent_run_id": "77aa00"})
    job = played("000-aa", sweep=sweep, label="quant=4bit,lora.r=8", mlflow={"run_id": "3f2b11"})
    outputs = Path("outputs")
    for word in ("outputs/2026-01-31/12-00-00", "2026-01-31/12-00-00", str(single.path), "first", "3f2a99", "3f2a",
                 "123_4"):  # fmt: skip
        assert lookup.resolve(word, outputs) == single, word
    for word in ("outputs/sweeps/ablation", "sweeps/ablation", "ablation", "77aa"):
        assert lookup.resolve(word, outputs) == sweep, word
    for word in ("quant=4bit,lora.r=8", "lora.r=8", "ablation/lora.r=8", "ablation/000-aa", "000-aa", "3f2b1"):
        assert lookup.resolve(word, outputs) == job, word
    with pytest.raises(ConfigError):
        lookup.resolve("ablation/lora.r=80", outputs)
    assert lookup.resolve_run("first", outputs) == single
    with pytest.raises(ConfigError, match=r"(?s)is a sweep.*000-aa"):
        lookup.resolve_run("ablation", outputs)


def test_what_is_not_there_or_ambiguous_is_refused_with_the_way_on(capsys: pytest.CaptureFixture[str]):
    one, two = played("a/1", name="twice"), played("a/2", name="twice")
    played("a/3", mlflow={"run_id": "3f2a99"})
    played("a/4", mlflow={"run_id": "3f2abb"})
    code, _, err = said_of("status", "twise", capsys=capsys)
    assert code == 2
    assert "did you mean 'twice'?" in err
    code, _, err = said_of("logs", "twice", capsys=capsys)
    assert code == 2
    assert "the name of 2 runs" in err
    assert os.path.relpath(one.path) in err
    assert os.path.relpath(two.path) in err
    assert said_of("cancel", "3f2a", capsys=capsys)[0] == 2  # two begin so
    code, _, err = said_of("status", "--wach", capsys=capsys)
    assert (code, "did you mean '--watch'?" in err) == (2, True)
    assert said_of("status", "outputs_dir=nowhere", capsys=capsys)[0] == 2
    assert said_of("logs", capsys=capsys)[0] == 2
    assert said_of("cancel", capsys=capsys)[0] == 2
    assert said_of("logs", "a/3", "--rank", "x", capsys=capsys)[0] == 2


def test_damaged_folders_are_said_and_left_out(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture):
    good = played("a/good")
    for number, text in enumerate(("", "{", "[]", '{"status": 3}', '{"colour": "red"}', "null")):
        played(f"a/bad{number}").state.write_text(text)
    played("b/bad").manifest.write_text("{")
    played("b/odd").manifest.write_text('{"mlflow": 3}')
    (a_sweep("bad").manifest).write_text("{")
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


def test_another_machine_is_believed_unless_somebody_there_can_say(capsys: pytest.CaptureFixture[str]):
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


@pytest.mark.parametrize(
    ("job", "status", "reason"),
    [
        (slurm_client.Job("7", "PENDING", "BeginTime"), "requeued", "Slurm: BeginTime"),
        (slurm_client.Job("7", "OUT_OF_MEMORY", signal=9), "failed", "Slurm: OUT_OF_MEMORY, signal 9"),
        (slurm_client.Job("7", "NODE_FAIL", nodes="n1"), "killed", "Slurm: NODE_FAIL, on n1"),
        (slurm_client.Job("7", "CANCELLED", is_guess=True), "killed", DIED),
    ],
)
def test_of_a_job_whose_worker_its_mirror_found_gone_slurm_knows_more(
    job: slurm_client.Job, status: str, reason: str, monkeypatch: pytest.MonkeyPatch
):
    rundir = played("run", "killed", slurm={"job_id": "7", "name": "runner-x", "cluster": "slurm", "submitted": 1.0})
    rundir.write_state(reason=DIED, attempt=1)
    monkeypatch.setattr(slurm_client, "silence", lambda: "")
    monkeypatch.setattr(slurm_client, "jobs", lambda refs: dict.fromkeys(refs, job))
    [found] = run_status.of([rundir])
    assert (found.status, found.reason) == (status, reason)
    assert rundir.read_state().status == ("killed" if status == "requeued" else status)


def test_a_job_that_nobody_noted_is_known_by_what_its_worker_wrote(monkeypatch: pytest.MonkeyPatch):
    rundir = played("run", "running")
    rundir.write_state(host="n7", scheduler_id="7")
    monkeypatch.setattr(slurm_client, "silence", lambda: "")
    monkeypatch.setattr(slurm_client, "jobs", lambda refs: {ref: slurm_client.Job(ref.id, "RUNNING") for ref in refs})
    assert run_status.of([rundir])[0].status == "running"


def test_slurm_that_answers_a_ping_alone_is_asked_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    questions = []

    def hang(of: object) -> NoReturn:
        questions.append(of)
        raise LaunchError(Fault("", "squeue: no answer within 60 s"))

    for attribute in ("named", "jobs"):
        monkeypatch.setattr(slurm_client, attribute, hang)
    monkeypatch.setattr(slurm_client, "silence", lambda: "")
    rundirs = [played(name, "pending") for name in ("a", "b")]
    for rundir in rundirs:
        note = {"name": rundir.path.name, "job_id": None, "cluster": "slurm", "folders": [str(rundir.path)]}
        write_atomic(rundir.path / "slurm" / "runner-x.json", json.dumps(note))
    noted = played("c", "pending", slurm={"job_id": "7", "name": "runner-x", "cluster": "slurm", "submitted": 1.0})
    assert run_status.of([*rundirs, noted])[2].status == "unknown"
    assert questions == ["a"]
    assert caplog.text.count("Slurm does not answer") == 1


def started(folder: Path, processes: list[subprocess.Popen[str]], *options: str) -> RunDir:
    """A real worker at its first steps."""
    rundir = prepared(folder, *TINY, *ENDLESS, *options)
    with (folder / "terminal").open("w") as output:
        command = [sys.executable, "-m", "runner.worker", str(folder)]
        processes.append(subprocess.Popen(command, stdout=output, stderr=output, text=True))
    until(lambda: rundir.read_state().step >= 3)
    return rundir


def mlflow_status(rundir: RunDir) -> str:
    noted = rundir.read_manifest()["mlflow"]
    return str(mlflow.MlflowClient(noted["uri"]).get_run(noted["run_id"]).info.status)


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
    assert "not fully uploaded to MLflow" not in err
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
    assert "not fully uploaded to MLflow" not in said_of("status", capsys=capsys)[2]
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
    out, _ = watching.communicate(timeout=60)
    assert watching.returncode == 0
    assert re.search(r"a/1 +killed", out)


# cancel


def holding(rundir: RunDir, processes: list[subprocess.Popen[str]]) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(rundir.path)], stdout=subprocess.PIPE, text=True)
    processes.append(process)
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    return process


def test_who_holds_the_folder_gets_the_signal_whatever_pid_stands_in_the_state(
    processes: list[subprocess.Popen[str]], capsys: pytest.CaptureFixture[str]
):
    stranger = subprocess.Popen(["sleep", "100"], text=True)
    processes.append(stranger)
    rundir = played("a/1", "running")
    worker = holding(rundir, processes)
    rundir.write_state(pid=stranger.pid)
    assert run_status.holder(rundir) == worker.pid
    code, out, _ = said_of("cancel", "a/1", capsys=capsys)
    assert code == 0
    assert worker.wait(10) == 130
    assert stranger.poll() is None
    assert f"cancelled by {machine.user()}@" in out
    assert rundir.read_state().status == "killed"


def test_a_recycled_pid_is_never_signalled(processes: list[subprocess.Popen[str]], capsys: pytest.CaptureFixture[str]):
    stranger = subprocess.Popen(["sleep", "100"], text=True)
    processes.append(stranger)
    rundir = played("a/1", "running")
    rundir.write_state(pid=stranger.pid)
    assert run_status.holder(rundir) is None
    code, out, _ = said_of("cancel", "a/1", capsys=capsys)
    assert (code, stranger.poll()) == (0, None)
    assert "nothing to cancel, the run is killed" in out
    assert rundir.read_state().reason == DIED


def test_what_is_over_is_left_as_it_is(capsys: pytest.CaptureFixture[str]):
    runs = [played(f"a/{status}", status) for status in ("completed", "failed", "killed")]
    before = [rundir.state.read_bytes() for rundir in runs]
    for rundir in runs:
        code, out, _ = said_of("cancel", str(rundir.path), capsys=capsys)
        assert code == 0
        assert f"nothing to cancel, the run is {rundir.read_state().status}" in out
        assert not rundir.cancel_request.exists()
    assert [rundir.state.read_bytes() for rundir in runs] == before


def test_a_preempted_run_that_nobody_wants_any_more_is_killed(capsys: pytest.CaptureFixture[str]):
    rundir = played("a/1", "preempted")
    assert said_of("cancel", "a/1", capsys=capsys)[0] == 0
    assert rundir.read_state().status == "killed"


SWEEP = ("model=tiny", "data.max_length=128", "data.train_rows=64", "data.eval_rows=4", "train.sample_prompts=0")


def started_sweep(processes: list[subprocess.Popen[str]]) -> SweepDir:
    """A real queue of four runs, the first of them at its first steps."""
    command = [sys.executable, "-m", "runner", "-m", *SWEEP, *MIRRORED, *ENDLESS, "sweep=seeds", "seed=1,2,3,4"]
    with Path("queue").open("w") as output:
        processes.append(subprocess.Popen(command, stdout=output, stderr=output, text=True))
    sweep = SweepDir(Path("outputs/sweeps/seeds").absolute())
    until(lambda: sweep.manifest.exists() and sweep.rundirs() and sweep.rundirs()[0].read_state().step >= 3)
    return sweep


def test_cancelling_runs_of_a_queue_and_then_all_of_it(
    processes: list[subprocess.Popen[str]], capsys: pytest.CaptureFixture[str]
):
    sweep = started_sweep(processes)
    one, two, three, four = sweep.rundirs()
    found = statuses(capsys)
    assert [run["status"] for run in found.values()] == ["running", "queued", "queued", "queued"]
    assert re.search(r"seeds/ +1 running, 3 queued", said_of("status", capsys=capsys)[1])

    assert said_of("cancel", "seeds/seed=3", capsys=capsys)[0] == 0
    assert three.read_state().status == "killed"
    assert three.read_state().reason.startswith("cancelled before it started by ")
    assert one.read_state().status == "running"

    assert said_of("cancel", "seeds/seed=1", capsys=capsys)[0] == 0
    assert one.read_state().status == "killed"
    assert "the state is saved at step" in one.read_state().reason
    until(lambda: two.read_state().status == "running")  # the queue goes on, past the third

    code, out, _ = said_of("cancel", "seeds", capsys=capsys)
    assert code == 0
    assert "nothing to cancel: 2 runs have ended already (2 killed)" in out
    assert processes[0].wait(60) == 1, "none is completed, and the queue itself was not stopped"
    assert [rundir.read_state().status for rundir in sweep.rundirs()] == ["killed"] * 4
    assert [rundir.read_state().attempt for rundir in sweep.rundirs()] == [1, 1, 0, 0]
    assert four.read_state().reason.startswith("cancelled before it started by ")
    said_of("status", "seeds", capsys=capsys)  # tells what nobody else did
    until(lambda: {mlflow_status(rundir) for rundir in sweep.rundirs()} == {"KILLED"})


def test_a_queue_that_died_and_its_worker_that_did_not(
    processes: list[subprocess.Popen[str]], capsys: pytest.CaptureFixture[str]
):
    sweep = started_sweep(processes)
    first = sweep.rundirs()[0]
    os.kill(processes[0].pid, signal.SIGKILL)
    processes[0].wait()
    found = list(statuses(capsys, "seeds").values())
    assert [run["status"] for run in found] == ["running", "pending", "pending", "pending"]
    assert {run["reason"] for run in found[1:]} == {run_status.NOBODY}
    os.kill(first.read_state().pid, signal.SIGKILL)
    until(lambda: not first.is_alive())
    _, out, _ = said_of("status", capsys=capsys)
    assert re.search(r"seeds/ +3 pending, 1 killed", out)
    assert run_status.NOBODY in out
    assert first.read_state().reason == DIED
    assert said_of("cancel", "seeds", capsys=capsys)[0] == 0
    assert {rundir.read_state().status for rundir in sweep.rundirs()} == {"killed"}


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
    out, err = following.communicate(timeout=60)
    assert (out, following.returncode) == ("step 3/3\n", 0)
    assert err == "-- a/1: killed at step 3/3: enough\n"


def test_a_reader_that_goes_away_is_no_error():
    rundir = played("a/1")
    rundir.log.write_text("step\n" * 100000)
    done = subprocess.run(
        f"{sys.executable} -m runner logs a/1 | head -1", shell=True, capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("step\n", "")


# Slurm


def submitted(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "runner", *words, *SWEEP, *ENDLESS, "launcher=slurm"], check=True)


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
def test_jobs_of_slurm_that_died_without_a_word(slurm: None, capsys: pytest.CaptureFixture[str]):
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
    rundir.log.write_text("step\n")
    holding(rundir, processes)
    code = f"from runner.cli import main\nimport sys\nmain.run(['{verb}', 'a/1'])\nprint(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stderr.split())
    assert "runner.tracking.run_status" in loaded
    assert not loaded & {"torch", "transformers", "mlflow", "peft", "datasets", "submitit", "hydra", "omegaconf"}


def test_words_of_a_verb():
    found = args.read(["a", "--rank=2", "-f", "lora.r=8"], "help", flags=("-f",), valued=("--rank",))
    assert found
    assert (found.words, found.options) == (["a", "lora.r=8"], {"--rank": "2", "-f": ""})
    with pytest.raises(ConfigError, match="needs a value"):
        args.read(["--rank"], "help", valued=("--rank",))
