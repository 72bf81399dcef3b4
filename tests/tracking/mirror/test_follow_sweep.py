"""One process mirrors all runs of a sweep: real processes, real kills, and no training."""

# ruff: noqa: F401, F811 - fixtures are imported, then asked for by name

from __future__ import annotations

import fcntl
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import until
from fixtures.mirrored_runs import Server, assert_mirrored, finish, outputs, shows_loss
from fixtures.mirrored_sweeps import (
    THIS,
    add_jobs,
    enough,
    make_sweep,
    only_parents,
    parent_of,
    queue,
    start_worker,
    statuses,
    worker,
)
from fixtures.web_servers import Web, web

from runner.tracking import webhook
from runner.tracking.mirror import follow_sweep, spawn, sync
from runner.tracking.mlflow import parent_run
from runner.tracking.state_file import DIED
from runner.tracking.sweepdir import SweepDir

# --- one process follows all ------------------------------------------------------------------------------------------


class Queue:
    """A queue of its own process: holds the lock and starts the workers it is told to."""

    def __init__(self, sweep: SweepDir) -> None:
        self.process = subprocess.Popen([sys.executable, str(THIS), "queue", str(sweep.path)], stdin=subprocess.PIPE)
        until(sweep.is_worked_on)

    def end(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        assert self.process.wait() == 0


def started(sweep: SweepDir) -> subprocess.Popen[bytes]:
    process = spawn.start_sweep_mirror(sweep)
    assert process
    assert spawn.wait_opened(process, sweep) == ""
    return process


def test_a_sweep_from_its_start_to_its_end(tmp_path: Path) -> None:
    """Runs that begin later, runs at the same time, a failure, a cancelled one, one that was never started."""
    sweep = make_sweep(tmp_path, 5)
    first, second, third, fourth, _ = sweep.rundirs()
    queue = Queue(sweep)
    process = started(sweep)
    assert statuses(sweep) == ["-"] * 5
    workers = [start_worker(first), start_worker(second, "failed")]
    until(lambda: statuses(sweep)[:3] == ["RUNNING", "RUNNING", "-"])
    until(lambda: shows_loss(second))
    fourth.write_state(status="killed", reason="cancelled")
    enough(second)
    until(lambda: statuses(sweep) == ["RUNNING", "FAILED", "-", "KILLED", "-"])
    until(lambda: parent_of(sweep).data.tags["runner.jobs_failed"] == "1")
    assert parent_of(sweep).info.status == "RUNNING"
    workers.append(start_worker(third))
    enough(first)
    enough(third)
    assert [worker.wait() for worker in workers] == [0, 0, 0]
    (added,) = add_jobs(sweep, 1)
    assert spawn.open_in_mlflow(sweep) == ""
    finish(added)
    until(lambda: statuses(sweep)[-1] == "FINISHED")
    assert process.poll() is None, "a queue is at work"
    queue.end()
    result = spawn.wait_sweep_mirror(process, sweep)
    assert result == spawn.SweepResult(0, f"mlflow ui --backend-store-uri sqlite:///{tmp_path}/mlflow.db")
    assert statuses(sweep) == ["FINISHED", "FAILED", "FINISHED", "KILLED", "-", "FINISHED"]
    assert (parent_of(sweep).info.status, only_parents(sweep)) == ("FAILED", 1)
    for rundir, status in ((first, "FINISHED"), (second, "FAILED"), (third, "FINISHED"), (added, "FINISHED")):
        assert_mirrored(rundir, status)


def test_the_end_of_a_sweep_is_reported_by_the_process_that_uploads_it(
    outputs: Path, web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(webhook.VARIABLE, web.url)
    sweep = make_sweep(outputs, 2, webhook=webhook.hidden(web.url))
    for rundir, status in zip(sweep.rundirs(), ("completed", "failed"), strict=True):
        finish(rundir, status=status)
    assert parent_run.open_sweep(sweep) == ""
    for _ in range(2):  # the second has nothing to upload
        assert follow_sweep._Mirror(sweep, "").run() == 0
    (message,) = web.messages
    assert (message["counts"], message["status"]) == ({"completed": 1, "failed": 1}, "FAILED")


def test_kill_9_of_the_queue_and_of_a_worker(outputs: Path) -> None:
    sweep = make_sweep(outputs, 3)
    first, second, _ = sweep.rundirs()
    queue = Queue(sweep)
    process = started(sweep)
    workers = [start_worker(first), start_worker(second)]
    until(lambda: statuses(sweep)[:2] == ["RUNNING", "RUNNING"])
    queue.process.kill()
    queue.process.wait()
    workers[0].kill()
    until(lambda: statuses(sweep)[0] == "KILLED")
    assert (first.read_state().status, first.read_state().reason) == ("killed", DIED)
    assert process.poll() is None, "the other run goes on without its queue"
    enough(second)
    assert spawn.wait_sweep_mirror(process, sweep).incomplete == 0
    assert process.returncode == 0
    assert_mirrored(second, "FINISHED")
    assert parent_of(sweep).info.status == "KILLED", "nobody will start the third"
    assert statuses(sweep) == ["KILLED", "FINISHED", "-"]
    queue = Queue(sweep)
    process = started(sweep)
    assert parent_of(sweep).info.status == "RUNNING"
    queue.end()
    assert process.wait() == 0
    assert [worker.wait() for worker in workers] == [-9, 0]


def test_the_next_mirror_goes_on_where_one_was_killed(outputs: Path) -> None:
    sweep = make_sweep(outputs, 2)
    first, second = sweep.rundirs()
    queue = Queue(sweep)
    killed, waiting = started(sweep), started(sweep)
    worker = start_worker(first)
    until(lambda: statuses(sweep)[0] == "RUNNING" and shows_loss(first))
    finish(second)
    until(lambda: spawn.read_report(second).get("uploaded"))
    killed.kill()
    killed.wait()
    enough(first)
    assert worker.wait() == 0
    queue.end()
    assert waiting.wait() == 0
    assert_mirrored(first, "FINISHED")
    assert_mirrored(second, "FINISHED")
    assert parent_of(sweep).info.status == "FINISHED"


def test_a_run_that_has_a_mirror_is_left_alone(outputs: Path) -> None:
    sweep = make_sweep(outputs, 1)
    (rundir,) = sweep.rundirs()
    queue = Queue(sweep)
    with rundir.mirror_lock.open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        process = started(sweep)
        finish(rundir)
        queue.end()
        time.sleep(2.5)
        assert process.poll() is None
        assert statuses(sweep) == ["-"]
    assert process.wait() == 0
    assert_mirrored(rundir, "FINISHED")


def test_a_thousand_that_wait_are_not_read(outputs: Path) -> None:
    """Between two looks nothing of a run that did not change is opened: counted by the kernel, in bytes."""
    sweep = make_sweep(outputs, 40)
    queue = Queue(sweep)
    process = started(sweep)
    until(lambda: "created the parent run of the sweep in MLflow" in sweep.mirror_log.read_text())
    time.sleep(2)
    before = _bytes_read(process.pid)
    time.sleep(5)
    read = _bytes_read(process.pid) - before
    queue.end()
    assert process.wait() == 0
    size = sum(rundir.state.stat().st_size for rundir in sweep.rundirs())
    assert read < size, f"{read} bytes in five seconds, where all state files are {size}"


def _bytes_read(pid: int) -> int:
    counted = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
    return int(counted["rchar"])


@pytest.mark.slow
def test_a_server_that_goes_and_comes_back(tmp_path: Path, server: Server) -> None:
    """It is away when the sweep begins: the runs are made as soon as it answers; away at the end: sync brings it."""
    server.kill()
    sweep = make_sweep(tmp_path, 4, server.uri)
    first, second, *_ = sweep.rundirs()
    queue = Queue(sweep)
    process = spawn.start_sweep_mirror(sweep)
    assert "refused" in spawn.wait_opened(process, sweep)
    worker = start_worker(first)
    server.start()
    until(lambda: sweep.read().get("mlflow"))
    until(lambda: statuses(sweep) == ["RUNNING", "-", "-", "-"])
    until(lambda: shows_loss(first))
    server.kill()
    enough(first)
    assert worker.wait() == 0
    finish(second)
    queue.end()
    result = spawn.wait_sweep_mirror(process, sweep, 120)
    assert process
    assert (process.returncode, result.incomplete) == (3, 2)
    assert "refused" in result.message
    server.start()
    assert [found.problem for found in sync.sync([sweep.path]) if found.status != "pending"] == ["", "", ""]
    assert (statuses(sweep)[:2], only_parents(sweep)) == (["FINISHED", "FINISHED"], 1)
    assert_mirrored(first, "FINISHED")
    noted = sweep.read()["mlflow"]
    assert noted["url"] == f"{server.uri}/#/experiments/{noted['experiment_id']}/runs/{noted['parent_run_id']}"
    assert parent_of(sweep).info.status == "KILLED"
