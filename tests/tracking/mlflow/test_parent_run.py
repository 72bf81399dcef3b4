"""Sweeps in MLflow, with a real database."""

# ruff: noqa: F401, F811 - fixtures are imported, then asked for by name

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import until
from fixtures import versions
from fixtures.mirrored_runs import assert_mirrored, finish, fork, outputs, the_run
from fixtures.mirrored_sweeps import add_jobs, children_of, client_of, make_sweep, only_parents, parent_of, statuses
from fixtures.web_servers import Web, web

from runner.files import copy_of
from runner.tracking import webhook
from runner.tracking.mirror import spawn, sync
from runner.tracking.mlflow import parent_run, store
from runner.tracking.mlflow.run import MlflowRun
from runner.tracking.state_file import DIED, State
from runner.tracking.sweepdir import SweepDir

OFFLINE = {"_target_": "runner.tracking.trackers.offline", "experiment": "tests", "run_name": None, "log_model": False}


# --- the runs are made ------------------------------------------------------------------------------------------------


def test_parent_and_children(outputs: Path) -> None:
    sweep = make_sweep(outputs, 3)
    sweep.update(commands=[["python", "-m", "runner", "-m", "lora.r=0,1,2", "data.path=/far/rows.jsonl"]])
    assert parent_run.open_sweep(sweep, queued=True) == ""
    parent = parent_of(sweep)
    assert (parent.info.run_name, parent.info.status) == ("s", "RUNNING")
    assert parent.data.tags["runner.jobs"] == "3"
    assert parent.data.tags["runner.jobs_waiting"] == "3"
    assert (parent.data.params, parent.data.tags["runner.kind"]) == ({"lora.r": "0,1,2"}, "sweep")
    assert parent.data.tags["mlflow.source.name"] == "python -m runner -m lora.r=0,1,2 data.path=rows.jsonl"
    assert statuses(sweep) == ["-"] * 3, "a job that has not started has no run, and so no false start time"
    second = finish(sweep.rundirs()[1])
    MlflowRun.of(second).update()
    child = children_of(sweep)[second.read_manifest()["id"]]
    assert (child.info.run_name, child.data.tags["runner.sweep"]) == ("lora.r=1", "s")
    assert (child.info.start_time, child.data.tags["runner.kind"]) == (1_700_000_000_000, "run")
    before = sweep.read()["mlflow"]
    add_jobs(sweep, 2)
    assert parent_run.open_sweep(sweep, queued=True) == ""
    assert (sweep.read()["mlflow"], only_parents(sweep)) == (before, 1)
    assert statuses(sweep) == ["-", "FINISHED", "-", "-", "-"]


def test_the_parent_has_the_tags_and_notes_of_its_runs(outputs: Path) -> None:
    sweep = make_sweep(outputs, 2, **{**OFFLINE, "tags": {"team": "nlp"}, "notes": "which rank?"})
    assert parent_run.open_sweep(sweep, offline=True) == ""
    tags = parent_of(sweep).data.tags
    assert (tags["team"], tags["mlflow.note.content"], tags["runner.kind"]) == ("nlp", "which rank?", "sweep")


def test_the_end_of_a_sweep_is_reported_once(outputs: Path, web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(webhook.VARIABLE, web.url)
    sweep = make_sweep(outputs, 2, webhook=webhook.hidden(web.url))
    assert parent_run.open_sweep(sweep, queued=True) == ""
    for number, rundir in enumerate(sweep.rundirs()):
        finish(rundir, status="completed" if number else "failed")
        assert [parent_run.update_parent(sweep, queued=not number, notifies=True) for _ in range(2)] == ["", ""]
        assert len(web.messages) == number
    (message,) = web.messages
    assert (message["kind"], message["counts"]) == ("sweep", {"completed": 1, "failed": 1})
    assert message["mlflow_run_id"] == parent_of(sweep).info.run_id


def test_a_sweep_rebuilt_from_its_runs_keeps_its_parent(outputs: Path) -> None:
    sweep = make_sweep(outputs, 2)
    assert parent_run.open_sweep(sweep, queued=True) == ""
    MlflowRun.of(finish(sweep.rundirs()[0])).update()
    before = sweep.read()
    for file in (sweep.manifest, copy_of(sweep.manifest)):
        file.write_text("{")
    assert parent_run.open_sweep(sweep, queued=True) == ""
    assert only_parents(sweep) == 1
    after = sweep.read()
    assert (after["id"], after["mlflow"], after["jobs"]) == (before["id"], before["mlflow"], before["jobs"])


@pytest.mark.cold
@pytest.mark.parametrize("is_fresh", [True, False])
@pytest.mark.unmeasured
def test_six_open_at_once(tmp_path: Path, fresh_database: Path, is_fresh: bool) -> None:
    if not is_fresh:  # making it lets one after another in; so here they have it, and start at the same moment
        shutil.copy(fresh_database, tmp_path / "mlflow.db")
    sweep = make_sweep(tmp_path, 8)
    together = time.monotonic() + (0.5 if is_fresh else 2.0)
    children = [fork(functools.partial(_open_at, sweep, together, is_fresh)) for _ in range(6)]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 6
    assert only_parents(sweep) == 1


def _open_at(sweep: SweepDir, together: float, is_fresh: bool) -> None:
    if not is_fresh:
        store.connect(f"sqlite:///{sweep.path.parents[1]}/mlflow.db")
    time.sleep(max(0.0, together - time.monotonic()))
    assert parent_run.open_sweep(sweep, queued=True) == ""


def test_killed_while_the_parent_is_made(outputs: Path) -> None:
    """Wherever it dies, and even where the ids were not noted yet, the next one makes what is missing and no more."""
    sweep = make_sweep(outputs, 30)
    for pause in (0.05, 0.1, 0.2):
        child = fork(lambda: parent_run.open_sweep(sweep) and None)
        time.sleep(pause)
        os.kill(child, 9)
        os.waitpid(child, 0)
    sweep.update(mlflow=None)
    parent_run.open_sweep(sweep)
    assert only_parents(sweep) == 1


def test_opening_takes_as_many_calls_for_a_thousand_jobs_as_for_one(outputs: Path) -> None:
    client, calls = store.connect(f"sqlite:///{outputs}/mlflow.db"), Counter[str]()
    counted = [name for name in dir(client) if not name.startswith("_") and callable(getattr(client, name))]

    def counting(name: str) -> Any:
        plain = getattr(client, name)

        def call(*arguments: Any, **named: Any) -> Any:
            calls[name] += 1
            return plain(*arguments, **named)

        return call

    for name in counted:
        setattr(client, name, counting(name))
    try:
        totals = []
        for count in (1, 12):
            calls.clear()
            parent_run.open_sweep(make_sweep(outputs, count, name=f"s{count}"), queued=True)
            totals.append(calls.total())
    finally:
        for name in counted:
            delattr(client, name)
    assert totals[1] <= totals[0]


def test_offline_leaves_no_trace_until_sync(outputs: Path) -> None:
    sweep = make_sweep(outputs, 2, **OFFLINE)
    assert spawn.start_sweep_mirror(sweep) is None
    assert spawn.open_in_mlflow(sweep) == ""
    assert parent_run.open_sweep(sweep) == ""
    assert "mlflow" not in sweep.read()
    for rundir in sweep.rundirs():
        finish(rundir)
    results = sync.sync([outputs])
    assert [result.problem for result in results] == ["", "", ""]
    assert results[-1].folder == sweep.path
    assert statuses(sweep) == ["FINISHED"] * 2
    for rundir in sweep.rundirs():
        assert_mirrored(rundir, "FINISHED")
    parent = parent_of(sweep)
    assert (parent.info.status, parent.data.tags["runner.jobs_completed"]) == ("FINISHED", "2")


def test_what_was_brought_elsewhere_stays_there(outputs: Path, fresh_database: Path, tmp_path: Path) -> None:
    sweep = make_sweep(outputs, 1, **OFFLINE)
    (rundir,) = [finish(rundir) for rundir in sweep.rundirs()]
    (tmp_path / "other.db").write_bytes(fresh_database.read_bytes())
    other = f"sqlite:///{tmp_path}/other.db"
    for uri in (other, None, other):
        assert [result.problem for result in sync.sync([sweep.path], uri)] == ["", ""]
        assert {rundir.read_manifest()["mlflow"]["uri"], sweep.read()["mlflow"]["uri"]} == {other}


def test_another_store_has_a_parent_of_its_own(outputs: Path, fresh_database: Path, tmp_path: Path) -> None:
    sweep = make_sweep(outputs, 2)
    parent_run.open_sweep(sweep, queued=True)
    for rundir in sweep.rundirs():
        finish(rundir)
    first = sweep.read()["mlflow"]["parent_run_id"]
    (tmp_path / "other.db").write_bytes(fresh_database.read_bytes())
    other = f"sqlite:///{tmp_path}/other.db"
    assert {result.problem.startswith(sync.ELSEWHERE) for result in sync.sync([sweep.path], other)} == {True}
    assert sweep.read()["mlflow"]["parent_run_id"] == first, "a sweep is not led away from its store"
    database = Path(sweep.read()["mlflow"]["uri"].removeprefix("sqlite:///"))
    for uri, same in ((other, False), (None, True)):
        aside = database.rename(tmp_path / "gone.db") if uri else tmp_path / "gone.db"  # then it may go elsewhere
        if not uri:
            aside.rename(database)
        assert [result.problem for result in sync.sync([sweep.path], uri)] == ["", "", ""]
        assert (sweep.read()["mlflow"]["parent_run_id"] == first) is same
        assert (parent_of(sweep).info.status, statuses(sweep)) == ("FINISHED", ["FINISHED"] * 2)


def test_a_store_that_does_not_answer_does_not_stop_the_sweep(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, 2, "http://127.0.0.1:9")
    problem = spawn.open_in_mlflow(sweep)
    assert "refused" in problem
    assert "127.0.0.1:9" in problem
    assert "mlflow" not in sweep.read()
    process = subprocess.run(
        [sys.executable, "-m", "runner.mirror", "--open", str(sweep.path)], capture_output=True, text=True, check=False
    )
    assert process.returncode == 3
    assert "refused" in process.stdout
    assert process.stderr == ""


# --- what was deleted -------------------------------------------------------------------------------------------------


def test_a_deleted_parent_is_restored_by_who_works_on_the_sweep(outputs: Path) -> None:
    sweep = make_sweep(outputs, 2)
    parent_run.open_sweep(sweep, queued=True)
    parent, client = sweep.read()["mlflow"]["parent_run_id"], client_of(sweep)
    for bring in (lambda: parent_run.open_sweep(sweep), lambda: parent_run.update_parent(sweep)):
        client.delete_run(parent)
        assert bring() == ""
        assert client.get_run(parent).info.lifecycle_stage == "active"
    finish(sweep.rundirs()[0])
    client.delete_run(parent)
    problem = sync.sync([sweep.path])[-1].problem
    assert f"mlflow runs restore --run-id {parent}" in problem, "sync does not bring back what somebody threw away"
    assert client.get_run(parent).info.lifecycle_stage == "deleted"
    assert_mirrored(sweep.rundirs()[0], "FINISHED")
    client.restore_run(parent)
    assert len(children_of(sweep)) == 1


@versions.mlflow_3
def test_a_parent_that_is_gone_for_good_is_made_anew(outputs: Path) -> None:
    sweep = make_sweep(outputs, 3)
    parent_run.open_sweep(sweep, queued=True)
    for rundir in sweep.rundirs()[:2]:
        MlflowRun.of(finish(rundir)).update()
    first, before = sweep.read()["mlflow"]["parent_run_id"], children_of(sweep)
    client_of(sweep).delete_run(first)
    uri = sweep.read()["mlflow"]["uri"]
    collect = ["mlflow", "gc", "--backend-store-uri", uri, "--tracking-uri", uri, "--run-ids", first]
    subprocess.run([sys.executable, "-m", *collect], check=True, capture_output=True, cwd=outputs)
    assert parent_run.update_parent(sweep, queued=True) == ""
    assert sweep.read()["mlflow"]["parent_run_id"] != first
    after = children_of(sweep)
    assert len(after) == 2
    assert {key: run.info.run_id for key, run in after.items()} == {key: run.info.run_id for key, run in before.items()}


# --- what the parent says ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("states", "queued", "status"),
    [
        ("running failed", False, "RUNNING"), ("pending completed", True, "RUNNING"), ("preempted", True, "RUNNING"),
        ("completed completed", True, "FINISHED"), ("completed failed killed", True, "FAILED"),
        ("pending failed", False, "FAILED"), ("pending completed", False, "KILLED"),
        ("completed killed", True, "KILLED"),
    ],
)  # fmt: skip
def test_status_of_the_parent(states: str, queued: bool, status: str) -> None:
    found: list[Any] = states.split()
    assert parent_run.parent_status([State(status=each) for each in found], queued) == status


def test_the_parent_follows_its_children(outputs: Path) -> None:
    sweep = make_sweep(outputs, 3)
    parent_run.open_sweep(sweep, queued=True)
    first, second, third = sweep.rundirs()
    assert parent_run.update_parent(sweep) == ""
    assert parent_of(sweep).info.status == "KILLED", "no queue, no scheduler: nobody will start them"
    second.update_manifest(slurm={"job_id": "12_1"})
    parent_run.update_parent(sweep)
    assert parent_of(sweep).info.status == "RUNNING"
    parent_run.update_parent(sweep, queued=False)
    assert parent_of(sweep).info.status == "KILLED", "who asked the scheduler knows better"
    finish(first)
    finish(second, status="failed")
    third.write_state(status="killed", reason="cancelled")
    assert [result.problem for result in sync.sync([sweep.path])] == [""] * 4
    parent = parent_of(sweep)
    counts = {key.removeprefix("runner.jobs_"): value for key, value in parent.data.tags.items() if "jobs_" in key}
    assert counts == {"completed": "1", "failed": "1", "killed": "1", "pruned": "0", "running": "0", "waiting": "0"}
    assert parent.info.status == "FAILED"
    assert parent.info.end_time == max(int(rundir.read_state().updated * 1000) for rundir in sweep.rundirs())
    cancelled = the_run(third)
    assert (cancelled.info.status, cancelled.data.tags["runner.reason"]) == ("KILLED", "cancelled")
    assert cancelled.info.end_time >= cancelled.info.start_time


def test_sync_leaves_jobs_of_slurm_to_slurm(outputs: Path) -> None:
    """Its process is gone, but Slurm may have queued it again, here or elsewhere."""
    sweep = make_sweep(outputs, 2)
    ours, dead = sweep.rundirs()
    for rundir, scheduler_id in ((ours, "12_0"), (dead, "")):
        finish(rundir).write_state(status="running", host=os.uname().nodename, scheduler_id=scheduler_id)
    results = sync.sync([sweep.path])
    assert "running as Slurm job 12_0; to check this: python -m runner status" in results[0].problem
    assert (ours.read_state().status, dead.read_state().reason) == ("running", DIED)
    assert (statuses(sweep), parent_of(sweep).info.status) == (["RUNNING", "KILLED"], "RUNNING")


@versions.mlflow_3
def test_the_mirror_of_one_job_keeps_the_parent(outputs: Path) -> None:
    """As under Slurm: each job has its own mirror, and nobody made the runs before."""
    sweep = make_sweep(outputs, 2)
    first, second = sweep.rundirs()
    finish(first, status="running")
    with first.held():
        process = spawn.start_mirror(first)
        until(lambda: sweep.read().get("mlflow") and parent_of(sweep).data.tags.get("runner.jobs_running") == "1")
        assert statuses(sweep) == ["RUNNING", "-"]
        first.write_state(status="completed")
        assert process
        assert process.wait() == 0
    parent = parent_of(sweep)
    assert (parent.info.status, parent.data.tags["runner.jobs_completed"]) == ("KILLED", "1")
    assert MlflowRun.of(second).uri == sweep.read()["mlflow"]["uri"]
