"""How a run ends, and what is said and written then: refused, stopped, out of memory, out of space, completed."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gate
import pytest
from conftest import TINY, fill, prepared
from fixtures.stopped_runs import SHORT, preempted_run, raising

from runner.errors import ConfigError, DataError, Fault, ResumeError, RunnerError, TrackingError
from runner.tracking import manifest, metrics_log
from runner.tracking.rundir import RunDir
from runner.train import inputs as build
from runner.train import loop, run_facts, worker
from runner.train.parts import Hooks, Parts


@pytest.mark.parametrize("kind", [ConfigError, DataError, ResumeError, TrackingError])
def test_what_is_refused_on_resume_leaves_the_state_as_it_was(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, kind: type[RunnerError]
):
    """The Hub may be down for an hour: the run is not the worse for it, and goes on afterwards."""
    rundir = preempted_run(tmp_path / "run", *SHORT)
    before = rundir.read_state()
    with monkeypatch.context() as patched:
        patched.setattr(build, "inputs", raising(kind(Fault("model.path", "the Hub is out of reach"))))
        assert worker.work(rundir) == 2
    assert rundir.read_state() == before
    assert (before.status, before.step) == ("preempted", 3)


def test_a_refusal_after_a_kill_without_a_record_sets_the_status_killed(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    rundir = preempted_run(tmp_path / "run", *SHORT)
    rundir.write_state(status="running", reason="")
    with monkeypatch.context() as patched:
        patched.setattr(build, "inputs", raising(DataError(Fault("data.path", "the Hub is out of reach"))))
        assert worker.work(rundir) == 2
    state = rundir.read_state()
    assert (state.status, state.step) == ("killed", 3)
    assert "worker killed (SIGKILL or out of memory)" in state.reason
    assert worker.work(rundir) == 0


def test_a_new_run_that_is_refused_leaves_nothing(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    rundir = prepared(tmp_path / "run", *SHORT)
    monkeypatch.setattr(build, "inputs", raising(ResumeError(Fault("", "no"))))
    assert worker.work(rundir) == 2
    assert not rundir.state.exists()


def test_a_fault_that_shows_while_training_is_a_failure(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    rundir = prepared(tmp_path / "run", *SHORT)
    monkeypatch.setattr(loop, "optimizer_step", raising(DataError(Fault("data", "row 7 is gone"))))
    assert worker.work(rundir) == 1
    assert (rundir.read_state().status, rundir.read_state().reason) == ("failed", "data: row 7 is gone")


def test_the_commits_of_the_first_attempt_are_used_again(tmp_path: Path):
    rundir = RunDir(tmp_path)
    train = {"micro_batch_size": None, "per_device_batch_size": 4}
    cfg = {"model": {"path": "o/m", "revision": "main"}, "data": {"path": "o/d", "revision": None}, "train": train}
    assert manifest.pinned(cfg, rundir) == cfg
    rundir.update_manifest(model={"revision": "a1"}, data={"revision": "b2"})
    pinned = manifest.pinned(cfg, rundir)
    assert (pinned["model"]["revision"], pinned["data"]["revision"]) == ("a1", "b2")
    local = {"model": {"path": "x"}, "data": {"path": "y"}, "train": train}
    assert manifest.pinned(local, rundir) == local


# Stopped


@pytest.mark.parametrize("eaten", ["not", "swallowed", "made another"])
def test_a_signal_while_loading_stops_the_run_whatever_libraries_catch(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, eaten: str
):
    rundir, inputs = prepared(tmp_path / "run", *SHORT), build.inputs

    def interrupted(*arguments: Any) -> build.Inputs:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
            raise AssertionError("nothing stopped it")
        except Exception:  # as datasets and huggingface_hub do
            raise AssertionError("an except Exception got hold of it") from None
        except BaseException as error:
            if eaten == "not":
                raise
            if eaten == "made another":
                raise DataError(Fault("data", "cannot be read")) from error
        return inputs(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(build, "inputs", interrupted)
        assert worker.work(rundir) == 75
    state = rundir.read_state()
    assert (state.status, state.reason) == ("preempted", "stopped by SIGTERM; nothing was trained yet")
    assert worker.work(rundir) == 0


@pytest.mark.cold
def test_a_real_sigterm_while_a_real_worker_loads(tmp_path: Path, cache: Path):
    rundir = prepared(tmp_path / "run", *SHORT)
    command = [sys.executable, "-m", "runner.worker", str(rundir.path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not rundir.log.exists():
        time.sleep(0.01)
    time.sleep(0.5)  # somewhere in the imports
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate()
    assert (process.returncode, rundir.read_state().status) == (75, "preempted"), err
    assert "nothing was trained yet" in rundir.read_state().reason
    assert f"resume={rundir.path}" in out
    assert "Traceback" not in err


def test_a_stop_of_a_resumed_run_names_the_saved_step(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    rundir = preempted_run(tmp_path / "run", *SHORT)
    assert rundir.read_state().reason == "stopped by SIGTERM; the state is saved at step 3"
    with monkeypatch.context() as patched:
        patched.setattr(build, "inputs", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        assert worker.work(rundir) == 130
    state = rundir.read_state()
    assert (state.status, state.reason) == ("killed", "interrupted; the state is saved at step 3")


def test_a_run_that_was_cancelled_is_killed_and_not_preempted(tmp_path: Path, cache: Path):
    rundir = prepared(tmp_path / "run", *SHORT)
    with pytest.MonkeyPatch.context() as patched:
        step = loop.optimizer_step

        def and_cancel(parts: Parts, progress: Any, hooks: Hooks) -> None:
            step(parts, progress, hooks)
            if progress.step == 3:
                rundir.cancel_request.write_text("cancelled by me")
                os.kill(os.getpid(), signal.SIGTERM)

        patched.setattr(loop, "optimizer_step", and_cancel)
        assert worker.work(rundir) == 130
    state = rundir.read_state()
    assert (state.status, state.reason) == ("killed", "cancelled by me; the state is saved at step 3")
    assert worker.work(rundir) == 130, "nobody has handed it over since"
    rundir.forget_cancel()
    assert worker.work(rundir) == 0


def test_what_is_cancelled_before_its_worker_comes_is_not_begun(tmp_path: Path, cache: Path):
    rundir = prepared(tmp_path / "run", *SHORT)
    with rundir.held():
        rundir.cancel_request.write_text("cancelled by me")
        rundir.forget_cancel()
    assert worker.work(rundir) == 130, "who holds the run was told, and is asked for the reason"
    state = rundir.read_state()
    assert (state.status, state.reason, state.attempt) == ("killed", "cancelled by me", 0)
    assert not rundir.log.exists()


def test_a_run_that_was_at_work_before_is_never_tidied_away(tmp_path: Path, cache: Path):
    rundir = prepared(tmp_path / "run", *SHORT)
    rundir.write_state(status="pending", attempt=1)  # handed over again
    rundir.config.write_text("{")
    assert worker.work(rundir) == 2
    assert rundir.manifest.exists()


def test_a_run_that_was_given_up_stays_so_until_it_is_asked_for_anew(tmp_path: Path, cache: Path):
    rundir = prepared(tmp_path / "run", *SHORT)
    with pytest.MonkeyPatch.context() as patched:
        step = loop.optimizer_step

        def and_preempt(parts: Parts, progress: Any, hooks: Hooks) -> None:
            step(parts, progress, hooks)
            if progress.step == 3:
                rundir.prune_request.write_text("given up at step 3")
                os.kill(os.getpid(), signal.SIGTERM)

        patched.setattr(loop, "optimizer_step", and_preempt)
        assert worker.work(rundir) == 0
    for status in ("pruned", "preempted", "killed"):  # whoever starts it: Slurm, or a search that is taken up
        state = rundir.read_state()
        assert (state.status, state.reason) == ("pruned", "given up at step 3; the state is saved at step 3")
        rundir.write_state(status=status, reason="")
        assert worker.work(rundir) == 0
    assert rundir.read_state().attempt == 1
    rundir.forget_requests()
    assert worker.work(rundir) == 0
    assert rundir.read_state().status == "completed"


@pytest.mark.parametrize("where", ["a sweep", "Slurm"])
def test_what_nobody_sees_refused_has_failed(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, where: str):
    if where == "Slurm":
        monkeypatch.setenv("SLURM_JOB_ID", "77")
    else:
        (tmp_path / "sweep.json").write_text("{}")
    rundir = prepared(tmp_path / "run", *SHORT)
    with monkeypatch.context() as patched:
        patched.setattr(build, "inputs", raising(DataError(Fault("data.path", "is empty", "fill it"))))
        assert worker.work(rundir) == 1
    state = rundir.read_state()
    assert (state.status, state.reason) == ("failed", "data.path: is empty\n    → fill it")
    assert worker.work(rundir) == 0


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ({}, ""),
        ({"SLURM_JOB_ID": "12"}, "12"),
        ({"SLURM_JOB_ID": "13", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "0"}, "12_0"),
    ],
)
def test_the_state_names_the_job_of_slurm(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], name: str
):
    for key in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(key, raising=False)
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    rundir = prepared(tmp_path / "run", *TINY, "train.max_steps=1")
    assert worker.work(rundir) == 0
    assert rundir.read_state().scheduler_id == name


def test_a_run_that_others_mirror_starts_no_mirror(tmp_path: Path, cache: Path, capfd: pytest.CaptureFixture[str]):
    options = [option for option in TINY if not option.startswith("tracking")]
    rundir = prepared(tmp_path / "run", *options, "train.max_steps=1", f"outputs_dir={tmp_path}")
    assert worker.work(rundir, mirrored=True) == 0
    assert not rundir.mirror_log.exists()
    assert "MLflow" not in capfd.readouterr().out


@pytest.mark.parametrize("leaving", [0, 64 * 1024], ids=["nothing", "no checkpoint"])
def test_a_full_disk_is_an_error_and_the_run_continues_when_there_is_room(
    small_disk: Path, cache: Path, capfd: pytest.CaptureFixture[str], leaving: int
):
    rundir = prepared(small_disk / "run", *SHORT)
    filler = fill(small_disk, leaving)
    assert worker.work(rundir) == 1
    told = capfd.readouterr().err
    assert "No space left" in told
    assert "→ free disk space" in told
    assert "Traceback" not in told
    if leaving:
        assert rundir.read_state().status == "failed"
        assert list(rundir.checkpoints.iterdir()) == []
    filler.unlink()
    assert worker.work(rundir) == 0
    assert [r["step"] for r in metrics_log.read(rundir) if "train/loss" in r] == [1, 2, 3, 4]


def test_a_full_disk_without_a_disk(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    """Where nothing can be mounted: no file of the run can be written from the second step on."""
    rundir = prepared(tmp_path / "run", *SHORT)
    full = raising(OSError(errno.ENOSPC, "No space left on device"))
    with monkeypatch.context() as patched:
        append = metrics_log.append

        def append_then_full(run: RunDir, record: dict[str, Any]) -> None:
            append(run, record)
            if record["step"] == 2:
                patched.setattr(os, "fsync", full)

        patched.setattr(metrics_log, "append", append_then_full)
        assert worker.work(rundir) == 1
    assert rundir.read_state().status == "running", "that could not be changed; whoever looks finds it dead"
    assert not rundir.is_alive()
    assert "free disk space" in rundir.log.read_text()
    assert worker.work(rundir) == 0


# Held by another worker


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_whoever_follows_another_worker_may_leave_and_the_run_goes_on(
    tmp_path: Path, cache: Path, number: signal.Signals, code: int
):
    rundir = prepared(tmp_path / "run", *SHORT)
    started = [sys.executable, gate.__file__, "2", str(rundir.path)]
    holding = subprocess.Popen(started, env=dict(os.environ), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not gate.has_come(rundir):
            assert holding.poll() is None
            time.sleep(0.01)
        following = subprocess.Popen(
            [sys.executable, "-m", "runner.worker", str(rundir.path)], stderr=subprocess.PIPE, text=True
        )
        assert following.stderr
        assert following.stderr.readline() == (
            f"{rundir.path} is being worked on (pid {holding.pid}); following its log\n"
        )
        following.send_signal(number)
        _, said = following.communicate()
        assert (following.returncode, said) == (code, "no longer following; the run goes on\n")
        assert holding.poll() is None
        gate.let_go(rundir)
        assert holding.wait() == 0
    finally:
        holding.kill()
        holding.wait()
    assert (rundir.read_state().status, rundir.read_state().attempt) == ("completed", 1)


# Completed


def test_the_log_has_the_end_and_the_warnings_of_libraries(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    from transformers.utils import logging as transformers_logging

    rundir, ending = prepared(tmp_path / "run", *SHORT), run_facts.numbers

    def and_warn(*arguments: Any) -> dict[str, Any]:
        transformers_logging.get_logger("transformers.modeling_utils").warning("a weight was not used")
        return ending(*arguments)

    monkeypatch.setattr(run_facts, "numbers", and_warn)
    assert worker.work(rundir) == 0
    written = rundir.log.read_text()
    assert f"run      {rundir.path}  completed" in written
    assert "transformers.modeling_utils: a weight was not used" in written
