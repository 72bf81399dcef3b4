"""A mirror follows a run folder: real processes, real kills."""

# ruff: noqa: F401, F811 - fixtures are imported, then asked for by name

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import until
from fixtures.mirrored_runs import (
    Server,
    _free_port,
    assert_mirrored,
    enough,
    finish,
    fork,
    history,
    make_run,
    outputs,
    start_worker,
    the_run,
)
from fixtures.web_servers import Web, web

from runner.tracking import metrics_log, webhook
from runner.tracking.mirror import backlog, follow, spawn, sync
from runner.tracking.mlflow import store
from runner.tracking.mlflow.run import DIED, MlflowRun
from runner.tracking.rundir import RunDir

# --- how long it follows a folder ------------------------------------------------------------------------------------


def test_it_follows_a_worker_to_its_end(outputs: Path) -> None:
    rundir = finish(make_run(outputs, system_metrics=True), status="running")
    with rundir.held(), ThreadPoolExecutor() as threads:
        following = threads.submit(follow.follow, rundir)
        until(lambda: rundir.system.exists() and len(rundir.system.read_text().splitlines()) > 1)
        metrics_log.append(rundir, {"step": 6, "time": 1.7e9, "train/loss": 0.0})
        rundir.write_state(status="completed")
        assert following.result(20) == 0
    assert assert_mirrored(rundir, "FINISHED").data.metrics["system/disk_available_megabytes"] > 0
    assert spawn.read_report(rundir) == {
        "sent": 6, "unsent": 0, "problem": "", "uploaded": rundir.read_state().updated
    }  # fmt: skip


def test_it_closes_the_run_of_a_dead_worker(outputs: Path) -> None:
    rundir = finish(make_run(outputs), status="running")
    assert follow.follow(rundir) == 0
    assert rundir.read_state().reason == DIED
    assert assert_mirrored(rundir, "KILLED").data.tags["runner.reason"] == DIED


def test_a_reason_that_comes_during_the_last_upload_is_uploaded(outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rundir, uploads = finish(make_run(outputs), status="killed"), list[str]()
    update = MlflowRun.try_update

    def slowly(run: MlflowRun, **how: bool) -> str:
        uploads.append(update(run, **how))
        if len(uploads) == 1:
            rundir.write_state(reason="not requeued")
        return uploads[-1]

    monkeypatch.setattr(MlflowRun, "try_update", slowly)
    assert follow.follow(rundir) == 0
    assert assert_mirrored(rundir, "KILLED").data.tags["runner.reason"] == "not requeued"
    assert (len(uploads), backlog.is_behind(rundir)) == (2, False)
    rundir.write_state(reason="another")
    assert backlog.is_behind(rundir)


def test_it_waits_for_what_is_new(outputs: Path) -> None:
    """A resumed run says ``killed`` until its worker has built the model: that end is an old one."""
    rundir = finish(make_run(outputs), status="killed")
    with rundir.held(), ThreadPoolExecutor() as threads:
        following = threads.submit(follow.follow, rundir, rundir.read_state().updated)
        time.sleep(0.5)
        assert not following.done()
        rundir.write_state(status="completed")
        assert following.result(20) == 0
    assert_mirrored(rundir, "FINISHED")


def test_it_gives_up_after_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "GRACE_S", 0.3)
    rundir = finish(make_run(tmp_path, uri=f"http://127.0.0.1:{_free_port()}"))
    assert follow.follow(rundir) == follow.GAVE_UP
    report = spawn.read_report(rundir)
    assert (report["sent"], report["unsent"]) == (0, 5)
    assert "refused" in report["problem"]


def test_the_end_of_a_run_is_reported_to_its_webhook(outputs: Path, web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(webhook.VARIABLE, web.url)
    rundir = finish(make_run(outputs, webhook=webhook.hidden(web.url)), status="running")
    assert follow.follow(rundir) == 0
    (message,) = web.messages
    assert (message["run"], message["status"], message["reason"]) == ("run", "killed", DIED)
    assert message["mlflow_run_id"] == rundir.read_manifest()["mlflow"]["run_id"]
    web.answers.append(404)
    assert follow.follow(rundir) == 0, "it does not fail the upload"
    assert "404" in spawn.read_report(rundir)["webhook"]
    assert not backlog.is_behind(rundir)


# --- processes --------------------------------------------------------------------------------------------------------


def result_of(worker: subprocess.Popen[str]) -> dict[str, Any]:
    said = worker.communicate()[0]
    assert worker.returncode == 0, said
    return dict(json.loads(said.splitlines()[-1]))


def mirrors_of(rundir: RunDir) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if "runner.mirror" in command and str(rundir.path) in command:
            found.append(process)
    return found


@pytest.mark.cold
@pytest.mark.slow
def test_beside_a_worker(tmp_path: Path) -> None:
    """From nothing: a database made on the way, records mirrored while the worker works, a result to show."""
    rundir = make_run(tmp_path, system_metrics=True)
    worker = start_worker(rundir, 1, 9999, 0.05)
    until(lambda: rundir.read_manifest().get("mlflow"))
    assert the_run(rundir).info.status == "RUNNING"
    (process,) = mirrors_of(rundir)
    assert process.memory_info().rss < 350e6
    assert process.net_connections() == [], "no telemetry, no network"
    assert os.getsid(process.pid) != os.getsid(worker.pid), "Ctrl-C does not reach it"
    process.terminate()  # nor does a SIGTERM meant for the job stop it
    enough(rundir)
    result = result_of(worker)
    assert (result["unsent"], result["url"]) == (0, None)
    assert result["message"] == f"mlflow ui --backend-store-uri sqlite:///{tmp_path}/mlflow.db"
    run = assert_mirrored(rundir, "FINISHED")
    assert run.data.metrics["system/process_memory_megabytes"] > 10
    assert run.data.tags["runner.attempt"] == "1"
    packages = json.loads((Path(run.info.artifact_uri.removeprefix("file://")) / "environment.json").read_text())
    assert packages["packages"]["mlflow"]
    assert not (Path.cwd() / "mlruns").exists()


def test_kill_9_of_the_worker_then_of_the_mirror(outputs: Path) -> None:
    rundir = make_run(outputs)
    worker = start_worker(rundir, 1, 10_000, 0.02)
    until(lambda: rundir.read_manifest().get("mlflow") and len(metrics_log.read(rundir)) > 20)
    worker.kill()
    worker.communicate()
    until(lambda: not mirrors_of(rundir))
    assert (rundir.read_state().status, rundir.read_state().reason) == ("killed", DIED)
    first = assert_mirrored(rundir, "KILLED").info.run_id

    reached = len(metrics_log.read(rundir)) - 5
    metrics_log.rewind(rundir, reached)
    worker = start_worker(rundir, reached + 1, 9999, 0.02)
    client = store.connect(f"sqlite:///{outputs}/mlflow.db")
    until(lambda: len(history(client, first, "train/loss")) > reached + 20)
    for process in mirrors_of(rundir):
        process.kill()
    enough(rundir)
    result = result_of(worker)
    assert result["unsent"] > 0
    assert "the upload process ended with exit code -9" in result["message"]
    assert the_run(rundir).info.status == "RUNNING"
    (synced,) = sync.sync([rundir.path])
    assert (synced.status, synced.unsent, synced.problem) == ("completed", 0, "")
    run = assert_mirrored(rundir, "FINISHED")
    assert (run.info.run_id, run.data.tags["runner.attempt"]) == (first, "2")


def test_kill_9_of_the_mirror_in_the_middle_of_its_batches(outputs: Path) -> None:
    """Six mirrors in a row, each killed at another moment, then one that may finish: each point is there once."""
    rundir = make_run(outputs)
    wide = {f"wide/{i}": float(i) for i in range(40)}
    for step in range(300):
        metrics_log.append(rundir, {"step": step, "time": 1.7e9 + step, **wide})
    rundir.write_state(status="completed", started=1.7e9)
    for attempt in range(6):
        child = fork(lambda: MlflowRun.of(rundir).update())
        time.sleep(0.05 + 0.1 * attempt)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    MlflowRun.of(rundir).update()
    assert_mirrored(rundir, "FINISHED")


@pytest.mark.slow
def test_a_server_that_comes_late_dies_and_comes_back(tmp_path: Path, server: Server) -> None:
    """The worker is never held up, MLflow is told as soon as it listens, and sync brings what it missed."""
    server.kill()
    rundir = make_run(tmp_path, uri=server.uri)
    worker = start_worker(rundir, 1, 9999, 0.05)
    try:
        until(lambda: "refused" in _problem(rundir))
        server.start()
        until(lambda: _problem(rundir) == "" and rundir.read_manifest().get("mlflow"))
        assert the_run(rundir).info.status == "RUNNING"
        server.kill()
        until(lambda: "refused" in _problem(rundir))
        before = len(metrics_log.read(rundir))
        until(lambda: len(metrics_log.read(rundir)) > before + 5)  # no record waits for the server
        enough(rundir)
        result = result_of(worker)
    finally:
        worker.kill()
    written = len(metrics_log.read(rundir))
    assert 0 < result["unsent"] <= written
    assert "refused" in result["message"]
    assert rundir.read_state().status == "completed"
    assert sync.sync([rundir.path])[0].unsent == written
    server.start()
    (synced,) = sync.sync([rundir.path])
    assert (synced.unsent, synced.problem, synced.url) == (0, "", rundir.read_manifest()["mlflow"]["url"])
    assert_mirrored(rundir, "FINISHED")


def _problem(rundir: RunDir) -> str:
    return str(spawn.read_report(rundir).get("problem", ""))
