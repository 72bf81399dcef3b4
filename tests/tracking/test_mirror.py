"""A run folder in MLflow: with real databases, a real server, real processes and real kills.

This file is also the worker that the tests start: ``python tests/test_mirror.py FOLDER FIRST LAST DELAY ENDING``.
"""

from __future__ import annotations

import functools
import http.client
import http.server
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from runner.cli import sync as sync_verb
from runner.config import bind
from runner.data.dataset import DataReport
from runner.errors import ConfigError, TrackingError
from runner.tracking import metrics_log
from runner.tracking.machine import gpu_handles
from runner.tracking.mirror import follow, spawn, sync
from runner.tracking.mirror.sampler import Sampler
from runner.tracking.mlflow import store, upload
from runner.tracking.mlflow.run import DIED, MlflowRun
from runner.tracking.rundir import RunDir, State

THIS = Path(__file__).resolve()


REPORT = asdict(DataReport(rows_read=7, train_rows=5, eval_rows=2, train_tokens=99))


def make_run(outputs: Path, name: str = "run", uri: str | None = None, **changes: Any) -> RunDir:
    """A run folder as the submitter leaves it."""
    rundir = RunDir(outputs / "runs" / name)
    rundir.path.mkdir(parents=True)
    option = {"uri": uri, "experiment": "tests", "run_name": None, "log_model": "adapter"}
    sampled = {"system_metrics": False, "system_interval_s": 0.5}
    node = {"_target_": "runner.tracking.trackers.mlflow", **option, **sampled, **changes}
    config = {"seed": 0, "outputs_dir": str(outputs), "lora": {"r": 8, "target_modules": ["q", "v"]}, "tracking": node}
    rundir.config.write_text(yaml.safe_dump(config))
    rundir.update_manifest(
        id=uuid.uuid4().hex,
        signature="0123456789abcdef",
        name=name,
        command=["python", "-m", "runner", "lora.r=8"],
        git={"sha": "c0ffee", "dirty": True},
        versions={"torch": "2.5.1"},
        data={"name": "chitchat", "digest": "d" * 64, "uri": "/data/rows.jsonl", "report": REPORT},
    )
    rundir.dirty_diff.write_text("+ a line\n")
    rundir.write_state(status="pending")
    return rundir


def finish(rundir: RunDir, steps: range = range(1, 6), status: str = "completed") -> RunDir:
    """The folder as a worker leaves it at the end."""
    for step in steps:
        metrics_log.append(rundir, {"step": step, "time": 1.7e9 + step, "train/loss": 1 / step, "train/tokens": step})
    rundir.log.write_text("the log\n")
    rundir.samples.write_text(
        json.dumps([{"prompt": "Hi", "before": "x"}, {"prompt": "Ho", "before": "y", "after": "z"}])
    )
    rundir.model.mkdir(exist_ok=True)
    (rundir.model / "adapter_config.json").write_text("{}")
    rundir.write_state(status=status, started=1.7e9, attempt=rundir.read_state().attempt + 1)
    return rundir


def history(client: Any, run_id: str, key: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in client.get_metric_history(run_id, key)]


def the_run(rundir: RunDir) -> Any:
    """The run in MLflow of this folder; there must be one and no more."""
    noted = rundir.read_manifest()["mlflow"]
    client = store.connect(noted["uri"])
    runs = client.search_runs([noted["experiment_id"]], f"tags.`runner.id` = '{rundir.read_manifest()['id']}'")
    assert [run.info.run_id for run in runs] == [noted["run_id"]]
    return client.get_run(noted["run_id"])


def assert_mirrored(rundir: RunDir, status: str) -> Any:
    """MLflow has each point of the folder once, and says how the run ended."""
    run = the_run(rundir)
    assert run.info.status == status
    client, spool = store.connect(rundir.read_manifest()["mlflow"]["uri"]), metrics_log.read(rundir)
    for key in {key for record in spool for key in record} - {"step", "time"}:
        expected = [(record["step"], record[key]) for record in spool if key in record]
        assert sorted(history(client, run.info.run_id, key)) == expected, key
    return run


@pytest.fixture(scope="session")
def fresh_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    database = tmp_path_factory.mktemp("fresh") / "mlflow.db"
    began = time.monotonic()
    store.connect(f"sqlite:///{database}")
    print(f"a fresh database took {time.monotonic() - began:.1f} s")
    return database


@pytest.mark.cold  # where processes are warm databases are copied
def test_who_is_killed_while_making_the_database_leaves_none_that_nobody_can_open(tmp_path: Path):
    """As a job's mirror is, when the job is requeued right after its start."""
    database = tmp_path / "mlflow.db"
    code = f"from runner.tracking.mlflow import store; store.connect('sqlite:///{database}')"
    maker = subprocess.Popen([sys.executable, "-c", code])
    begun = [database, database.with_name(".mlflow.db.new")]
    while not any(path.exists() and path.stat().st_size > 100_000 for path in begun):
        assert maker.poll() is None, "it was done before it could be killed"
        time.sleep(0.001)
    maker.kill()
    maker.wait()
    assert not database.exists(), "killed too late, or made in place"
    assert store.connect(f"sqlite:///{database}").search_experiments()
    assert [path.name for path in tmp_path.glob("*mlflow.db*") if path.suffix != ".lock"] == ["mlflow.db"]


@pytest.fixture
def outputs(tmp_path: Path, fresh_database: Path) -> Path:
    """An outputs folder whose database is there already: making one takes seconds."""
    shutil.copy(fresh_database, tmp_path / "mlflow.db")
    return tmp_path


# --- what MLflow is told, in this process -----------------------------------------------------------------------------


def test_a_whole_run(outputs: Path) -> None:
    rundir = finish(make_run(outputs))
    MlflowRun.of(rundir).update()
    run, client = assert_mirrored(rundir, "FINISHED"), store.connect(f"sqlite:///{outputs}/mlflow.db")
    assert run.info.run_name == "run"
    assert run.info.start_time == 1_700_000_000_000
    assert run.info.end_time == int(rundir.read_state().updated * 1000)
    assert run.data.params["lora.r"] == "8"
    assert run.data.params["lora.target_modules"] == '["q", "v"]'
    assert run.data.params["tracking.uri"] == "null"
    expected = {
        "runner.signature": "0123456789abcdef", "runner.status": "completed", "runner.git_sha": "c0ffee",
        "runner.git_dirty": "true", "runner.attempt": "1", "runner.folder": str(rundir.path),
        "runner.id": rundir.read_manifest()["id"],
        "runner.kind": "run", "runner.command": "python -m runner lora.r=8",
        "mlflow.source.name": "python -m runner lora.r=8", "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": "c0ffee", "mlflow.runName": "run",
    }  # fmt: skip
    assert expected.items() <= run.data.tags.items()
    assert "runner.reason" not in run.data.tags
    (given,) = run.inputs.dataset_inputs
    assert (given.dataset.name, given.dataset.digest, given.dataset.source_type) == ("chitchat", "d" * 36, "local")
    assert json.loads(given.dataset.profile) == REPORT
    assert [(tag.key, tag.value) for tag in given.tags] == [("mlflow.data.context", "training")]
    kept = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert kept == {
        "config.yaml", "manifest.json", "train.log", "samples.json", "environment.json", "dirty.diff", "model"
    }  # fmt: skip
    assert run.info.artifact_uri.startswith(f"file://{outputs}/mlartifacts/")
    assert rundir.read_manifest()["mlflow"]["url"] is None


def test_samples_are_a_table(outputs: Path) -> None:
    rundir = finish(make_run(outputs))
    MlflowRun.of(rundir).update()
    run, client = the_run(rundir), store.connect(f"sqlite:///{outputs}/mlflow.db")
    table = client.load_table(run.info.experiment_id, "samples.json", [run.info.run_id])
    assert list(table["prompt"]) == ["Hi", "Ho"]
    assert list(table["after"])[1] == "z"


def test_again_and_again_changes_nothing(outputs: Path) -> None:
    rundir = finish(make_run(outputs))
    MlflowRun.of(rundir).update()
    first = the_run(rundir)
    same = MlflowRun.of(rundir)
    for _ in range(3):
        same.update()
    assert assert_mirrored(rundir, "FINISHED").to_dictionary() == first.to_dictionary()


def test_a_crash_before_the_id_was_noted_makes_no_second_run(outputs: Path) -> None:
    rundir = finish(make_run(outputs))
    MlflowRun.of(rundir).update()
    first = rundir.read_manifest()["mlflow"]["run_id"]
    for noted in (None, {"run_id": "0" * 32}):
        rundir.update_manifest(mlflow=noted)
        MlflowRun.of(rundir).update()
        assert rundir.read_manifest()["mlflow"]["run_id"] == first
    assert_mirrored(rundir, "FINISHED")


def test_a_copied_folder_is_a_run_of_its_own(outputs: Path) -> None:
    rundir = finish(make_run(outputs))
    MlflowRun.of(rundir).update()
    twin = RunDir(outputs / "runs" / "twin")
    shutil.copytree(rundir.path, twin.path)
    twin.update_manifest(id="another")
    MlflowRun.of(twin).update()
    assert rundir.read_manifest()["mlflow"]["run_id"] != twin.read_manifest()["mlflow"]["run_id"]
    assert_mirrored(twin, "FINISHED")


def test_a_resume_goes_on_with_the_same_run(outputs: Path) -> None:
    """The worker died at step 5, its checkpoint is of step 3: 4 and 5 come again and are in MLflow once."""
    rundir = finish(make_run(outputs), range(1, 6), "preempted")
    live = MlflowRun.of(rundir)
    live.update()
    assert assert_mirrored(rundir, "KILLED").data.tags["runner.status"] == "preempted"
    metrics_log.rewind(rundir, 3)
    rundir.write_state(status="running", reason="")
    live.update()
    assert the_run(rundir).info.status == "RUNNING"
    config = yaml.safe_load(rundir.config.read_text())
    rundir.config.write_text(yaml.safe_dump({**config, "seed": 1, "added": "x"}))
    finish(rundir, range(4, 9))
    MlflowRun.of(rundir).update()
    run = assert_mirrored(rundir, "FINISHED")
    assert run.data.params["seed"] == "0", "params never change in MLflow"
    assert json.loads(run.data.tags["runner.changed_params"]) == {"seed": "1"}
    assert run.data.params["added"] == "x"
    assert live.sent == 3
    live.update()
    assert live.sent == 8, "a mirror that was there all the time sees the file cut back and grown anew"
    assert_mirrored(rundir, "FINISHED")


def test_deleted_runs_and_experiments_are_said_and_not_made_anew(outputs: Path) -> None:
    rundir = finish(make_run(outputs))
    MlflowRun.of(rundir).update()
    noted, client = rundir.read_manifest()["mlflow"], store.connect(f"sqlite:///{outputs}/mlflow.db")
    client.delete_run(noted["run_id"])
    assert "was deleted" in MlflowRun.of(rundir).try_update()
    client.restore_run(noted["run_id"])
    assert MlflowRun.of(rundir).try_update() == ""
    client.delete_experiment(noted["experiment_id"])
    assert "tracking.experiment=tests: was deleted in MLflow" in MlflowRun.of(rundir).try_update()


def test_limits_of_mlflow(outputs: Path) -> None:
    rundir = make_run(outputs)
    config = yaml.safe_load(rundir.config.read_text())
    many = {f"key{i}": i for i in range(250)}
    strange = {"*.weight": 1, "a//b": 2, "../up": 3, "käse": 4, "empty": "", "nothing": {}, "hf_token": "geheim"}
    config["extra"] = {**many, **strange, "long": "x" * 9000}
    rundir.config.write_text(yaml.safe_dump(config))
    rundir.update_manifest(command=["word"] * 4000, name="n" * 120)
    wide = {f"wide/{i}": float(i) for i in range(700)}
    for step in range(4):
        metrics_log.append(rundir, {"step": step, "time": 1.7e9, **wide})
    metrics_log.append(rundir, {"step": 4, "time": 1.7e9, **{f"wider/{i}": 1.0 for i in range(2300)}})
    rundir.write_state(status="completed", started=1.7e9)
    MlflowRun.of(rundir).update()
    run = the_run(rundir)
    assert len(run.data.params) == len(list(bind.flatten(config))), "no param is dropped"
    assert run.data.params["extra.key249"] == "249"
    assert run.data.params["extra._.weight"] == "1"
    assert run.data.params["extra.empty"] == '""'
    assert run.data.params["extra.hf_token"] == "***"
    assert run.data.params["extra.long"].endswith("[cut: 9000 characters; whole in config.yaml]")
    assert len(run.data.params["extra.long"]) == 6000
    assert run.data.tags["runner.cut_params"] == "extra.long"
    assert len(run.data.tags["mlflow.source.name"]) == 8000
    assert len(run.data.metrics) == 3000
    client = store.connect(f"sqlite:///{outputs}/mlflow.db")
    assert history(client, run.info.run_id, "wide/699") == [(step, 699.0) for step in range(4)]


def test_a_record_is_not_split_between_batches() -> None:
    groups = [[1] * 600, [2] * 600, [3] * 300, [4] * 2500, [5]]
    batches = list(upload.batches(groups, 1000))
    assert [len(batch) for batch in batches] == [600, 900, 1000, 1000, 501]
    assert [item for batch in batches for item in batch] == [item for group in groups for item in group]
    assert set(batches[1]) == {2, 3}


def test_numbers_that_are_none(outputs: Path) -> None:
    rundir = make_run(outputs)
    for step, value in enumerate([math.nan, math.inf, -math.inf, 1.0]):
        metrics_log.append(rundir, {"step": step, "time": 1.7e9, "a": value})
    rundir.write_state(status="failed", reason="the loss is nan", started=1.7e9)
    for _ in range(2):
        MlflowRun.of(rundir).update()
    run, client = the_run(rundir), store.connect(f"sqlite:///{outputs}/mlflow.db")
    (_, nan), (_, inf), (_, minus), (_, one) = sorted(history(client, run.info.run_id, "a"), key=lambda point: point[0])
    assert math.isnan(nan)
    assert (inf, minus, one) == (sys.float_info.max, -sys.float_info.max, 1.0)
    assert (run.info.status, run.data.tags["runner.reason"]) == ("FAILED", "the loss is nan")


@pytest.mark.parametrize(
    ("log_model", "adapter", "kept"), [("adapter", True, 1), ("adapter", False, 0), (True, False, 1), (False, True, 0)]
)
def test_the_model_is_kept_when_it_is_asked_for(outputs: Path, log_model: Any, adapter: bool, kept: int) -> None:
    rundir = finish(make_run(outputs, log_model=log_model))
    if not adapter:
        (rundir.model / "adapter_config.json").rename(rundir.model / "config.json")
    MlflowRun.of(rundir).update()
    client = store.connect(f"sqlite:///{outputs}/mlflow.db")
    assert len(client.list_artifacts(the_run(rundir).info.run_id, "model")) == kept
    rundir.write_state(status="running")
    rundir.write_state(status="completed")
    MlflowRun.of(rundir).update()
    assert len(the_run(rundir).outputs.model_outputs) == kept, "the column Models names it, once"


def test_artifacts_that_cannot_be_stored_leave_no_run_running(outputs: Path) -> None:
    rundir = finish(make_run(outputs))
    live = MlflowRun.of(rundir)
    rundir.write_state(status="running")
    live.update()
    (place,) = (outputs / "mlartifacts").iterdir()
    shutil.rmtree(place / "artifacts")
    (place / "artifacts").write_text("in the way")
    rundir.write_state(status="completed")
    assert live.try_update() != ""
    assert the_run(rundir).info.status == "FINISHED"
    (place / "artifacts").unlink()
    assert live.try_update() == ""
    assert "runner.mirrored" in the_run(rundir).data.tags


def test_the_machine_is_sampled() -> None:
    sampler = Sampler(Path())
    child = subprocess.Popen([sys.executable, "-c", "x = bytearray(80_000_000)\nwhile True: pass"])
    try:
        time.sleep(0.3)
        sampler.sample(child.pid)
        time.sleep(0.5)
        found = sampler.sample(child.pid)
    finally:
        child.kill()
        child.wait()
    assert 80 < found["system/process_memory_megabytes"] < 200
    assert 20 < found["system/process_cpu_percentage"] < 150
    assert 0 < found["system/system_memory_usage_percentage"] < 100
    assert {"system/cpu_utilization_percentage", "system/system_memory_usage_megabytes"} <= set(found)
    assert "system/process_memory_megabytes" not in sampler.sample(child.pid), (
        "a process that is gone costs only itself"
    )


@pytest.mark.gpu
def test_only_our_gpus_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    if not list(gpu_handles()):
        pytest.skip("no GPU that NVML can see")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    found = Sampler(Path()).sample(os.getpid())
    assert {name for name in found if name.endswith("memory_usage_megabytes")} >= {
        "system/gpu_0_memory_usage_megabytes"
    }
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not [name for name in Sampler(Path()).sample(os.getpid()) if "gpu" in name]


# --- how long it follows a folder ------------------------------------------------------------------------------------


def test_it_follows_a_worker_to_its_end(outputs: Path) -> None:
    rundir = finish(make_run(outputs, system_metrics=True), status="running")
    with rundir.held(), ThreadPoolExecutor() as threads:
        following = threads.submit(follow.follow, rundir)
        eventually(lambda: rundir.system.exists() and len(rundir.system.read_text().splitlines()) > 1)
        metrics_log.append(rundir, {"step": 6, "time": 1.7e9, "train/loss": 0.0})
        rundir.write_state(status="completed")
        assert following.result(20) == 0
    assert assert_mirrored(rundir, "FINISHED").data.metrics["system/disk_available_megabytes"] > 0
    assert spawn.read_report(rundir) == {
        "sent": 6, "unsent": 0, "problem": "", "told": rundir.read_state().updated
    }  # fmt: skip


def test_it_closes_the_run_of_a_dead_worker(outputs: Path) -> None:
    rundir = finish(make_run(outputs), status="running")
    assert follow.follow(rundir) == 0
    assert rundir.read_state().reason == DIED
    assert assert_mirrored(rundir, "KILLED").data.tags["runner.reason"] == DIED


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


# --- processes --------------------------------------------------------------------------------------------------------


def start_worker(
    rundir: RunDir, first: int, last: int, delay: float, ending: str = "completed"
) -> subprocess.Popen[str]:
    command = [sys.executable, str(THIS), str(rundir.path), str(first), str(last), str(delay), ending]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def enough(rundir: RunDir) -> None:
    """Tell the worker of this folder that its next step is its last."""
    (rundir.path / "enough").touch()


def result_of(worker: subprocess.Popen[str]) -> dict[str, Any]:
    said = worker.communicate(timeout=80)[0]
    assert worker.returncode == 0, said
    return dict(json.loads(said.splitlines()[-1]))


def eventually(holds: Callable[[], Any], seconds: float = 30.0) -> Any:
    end = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)
    return found


def mirrors_of(rundir: RunDir) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if "runner.mirror" in command and str(rundir.path) in command:
            found.append(process)
    return found


@pytest.mark.cold
def test_beside_a_worker(tmp_path: Path) -> None:
    """From nothing: a database made on the way, records mirrored while the worker works, a result to show."""
    rundir = make_run(tmp_path, system_metrics=True)
    worker = start_worker(rundir, 1, 9999, 0.05)
    eventually(lambda: rundir.read_manifest().get("mlflow"))
    assert the_run(rundir).info.status == "RUNNING"
    (process,) = mirrors_of(rundir)
    _assert_small(process)
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
    eventually(lambda: rundir.read_manifest().get("mlflow") and len(metrics_log.read(rundir)) > 20)
    worker.kill()
    worker.communicate()
    eventually(lambda: not mirrors_of(rundir))
    assert (rundir.read_state().status, rundir.read_state().reason) == ("killed", DIED)
    first = assert_mirrored(rundir, "KILLED").info.run_id

    reached = len(metrics_log.read(rundir)) - 5
    metrics_log.rewind(rundir, reached)
    worker = start_worker(rundir, reached + 1, 9999, 0.02)
    client = store.connect(f"sqlite:///{outputs}/mlflow.db")
    eventually(lambda: len(history(client, first, "train/loss")) > reached + 20)
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


@pytest.mark.cold
def test_six_start_together_on_a_fresh_database(tmp_path: Path) -> None:
    runs = [finish(make_run(tmp_path, f"run{number}")) for number in range(6)]
    together = time.monotonic() + 0.3
    children = [fork(functools.partial(_first_try, rundir, together)) for rundir in runs]
    for child in children:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    for rundir in runs:
        assert_mirrored(rundir, "FINISHED")
    names = [found.name for found in store.connect(f"sqlite:///{tmp_path}/mlflow.db").search_experiments()]
    assert sorted(names) == ["Default", "tests"]


def _first_try(rundir: RunDir, together: float) -> None:
    time.sleep(max(0.0, together - time.monotonic()))
    if problem := MlflowRun.of(rundir).try_update():
        raise AssertionError(problem)


def fork(action: Callable[[], None]) -> int:
    """Run ``action`` in a process of its own that has MLflow imported already; returns its pid."""
    import mlflow  # noqa: F401

    if child := os.fork():
        return child
    try:
        signal.alarm(60)
        action()
        os._exit(0)
    except BaseException as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(1)


def test_a_run_that_was_refused_leaves_nothing(tmp_path: Path) -> None:
    gone, idle = make_run(tmp_path, "gone"), make_run(tmp_path, "idle")
    with gone.held() as mine:
        assert mine
        processes = [spawn.start_mirror(rundir, yaml.safe_load(rundir.config.read_text())) for rundir in (gone, idle)]
        time.sleep(0.3)
        shutil.rmtree(gone.path)
        assert [process.wait(30) for process in processes if process] == [0, 0]
    assert not gone.path.exists()
    assert not (tmp_path / "mlflow.db").exists()
    assert idle.mirror_log.read_text() == ""
    assert spawn.wait_mirror(processes[1], idle).message == ""


def test_sync_of_offline_dead_and_broken_runs(outputs: Path) -> None:
    offline = {
        "_target_": "runner.tracking.trackers.offline",
        "experiment": "later",
        "run_name": "named",
        "log_model": False,
    }
    done, dead, waiting, broken, elsewhere = (make_run(outputs, name) for name in ("a", "b", "c", "d", "e"))
    for rundir in (done, dead):
        config = yaml.safe_load(rundir.config.read_text())
        rundir.config.write_text(yaml.safe_dump({**config, "tracking": offline}))
        finish(rundir)
    dead.write_state(status="running", pid=999_999_999, host=os.uname().nodename)
    finish(elsewhere).write_state(status="running", host="another-machine")
    finish(broken).config.write_text("{")
    results = {result.folder: result for result in sync.sync([outputs])}
    assert len(results) == 5
    assert (results[done.path].status, results[done.path].problem) == ("completed", "")
    assert (results[dead.path].status, dead.read_state().reason) == ("killed", DIED)
    assert "not started yet" in results[waiting.path].problem
    assert "config.yaml cannot be read" in results[broken.path].problem
    assert "another-machine" in results[elsewhere.path].problem
    assert elsewhere.read_state().status == "running", "who is not on that machine cannot know"
    assert assert_mirrored(done, "FINISHED").info.run_name == "named"
    ended = assert_mirrored(dead, "KILLED").info.end_time
    assert ended == int(dead.metrics.stat().st_mtime * 1000), "it ended with its last record, not when we looked"


def test_the_verb_sync(outputs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    rundir = finish(make_run(outputs))
    assert sync_verb.main([str(outputs)]) == 0
    assert capsys.readouterr().out == f"{rundir.path}  completed  uploaded\n"
    before = rundir.mirror_report.read_bytes(), rundir.manifest.read_bytes()
    with pytest.raises(TrackingError, match="refused") as refused:
        sync_verb.main([str(outputs), "uri=http://127.0.0.1:9"])
    assert len(refused.value.faults) == 1, "said once, not for each run"
    with pytest.raises(ConfigError, match=r"is already in sqlite:.*, and a run can be in one store only"):
        sync_verb.main([str(rundir.path), f"uri=sqlite:///{outputs}/other.db"])
    assert (rundir.mirror_report.read_bytes(), rundir.manifest.read_bytes()) == before
    assert capsys.readouterr().out == "", "what is in MLflow, and nothing else"
    assert sync_verb.main(["run", f"outputs_dir={outputs}"]) == 0
    assert capsys.readouterr().out == f"{rundir.path}  completed  uploaded\n"
    assert sync_verb.main(["--help"]) == 0
    assert "uri=URI" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="--force: no such option"):
        sync_verb.main(["--force"])
    monkeypatch.chdir(outputs / "mlartifacts")
    with pytest.raises(ConfigError, match="outputs contains no run"):
        sync_verb.main([])


def test_sync_says_what_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="contains no run"):
        sync.sync([tmp_path])
    with pytest.raises(ConfigError, match="did you mean 'http'"):
        sync.sync([tmp_path], "htp://host")


# --- a server ---------------------------------------------------------------------------------------------------------


class Server:
    """A real MLflow server that can be killed and started again over the same database."""

    def __init__(self, folder: Path, database: Path) -> None:
        shutil.copy(database, folder / "server.db")
        self.folder, self.port = folder, _free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self.launch()
        eventually(self.answers, 60)

    def launch(self) -> None:
        options = {
            "--backend-store-uri": f"sqlite:///{self.folder}/server.db",
            "--artifacts-destination": str(self.folder / "artifacts"),
            "--port": str(self.port),
            "--workers": "1",
        }
        command = [sys.executable, "-m", "mlflow", "server", *(word for option in options.items() for word in option)]
        with (self.folder / "server.log").open("ab") as log:
            plain = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # ten processes fewer
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, start_new_session=True, cwd=self.folder, env=plain
            )

    def running(self) -> Server:
        if not self.process:
            self.start()
        return self

    def answers(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def kill(self) -> None:
        if self.process:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, fresh_database: Path) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("server"), fresh_database)
    yield made
    made.kill()


@pytest.mark.slow
def test_a_server_that_comes_late_dies_and_comes_back(tmp_path: Path, server: Server) -> None:
    """The worker is never held up, MLflow is told as soon as it listens, and sync brings what it missed."""
    server.kill()
    rundir = make_run(tmp_path, uri=server.uri)
    worker = start_worker(rundir, 1, 9999, 0.05)
    try:
        eventually(lambda: rundir.mirror_log.exists())
        server.launch()  # takes longer to come up than the mirror
        eventually(lambda: "refused" in _problem(rundir))
        eventually(lambda: _problem(rundir) == "" and rundir.read_manifest().get("mlflow"))
        assert the_run(rundir).info.status == "RUNNING"
        server.kill()
        eventually(lambda: "refused" in _problem(rundir))
        enough(rundir)
        result = result_of(worker)
    finally:
        worker.kill()
    written = len(metrics_log.read(rundir))
    assert 0 < result["unsent"] <= written
    assert result["slowest"] < 1.0, "no record waited for the server"
    assert "refused" in result["message"]
    assert rundir.read_state().status == "completed"
    assert sync.sync([rundir.path])[0].unsent == written
    server.start()
    (synced,) = sync.sync([rundir.path])
    assert (synced.unsent, synced.problem, synced.url) == (0, "", rundir.read_manifest()["mlflow"]["url"])
    assert_mirrored(rundir, "FINISHED")


def test_a_server_takes_what_a_database_takes(tmp_path: Path, server: Server) -> None:
    rundir = make_run(tmp_path, uri=server.running().uri)
    config = yaml.safe_load(rundir.config.read_text())
    rundir.config.write_text(yaml.safe_dump({**config, "empty": "", "long": "x" * 7000}))
    metrics_log.append(rundir, {"step": 0, "time": 1.7e9, "odd": math.nan, "high": math.inf})
    finish(rundir)
    for _ in range(2):
        MlflowRun.of(rundir).update()
    run, client = the_run(rundir), store.connect(server.uri)
    assert math.isnan(history(client, run.info.run_id, "odd")[0][1])
    assert history(client, run.info.run_id, "high") == [(0, sys.float_info.max)]
    assert sorted(history(client, run.info.run_id, "train/loss")) == [(step, 1 / step) for step in range(1, 6)]
    assert (run.data.params["empty"], len(run.data.params["long"])) == ('""', 6000)
    assert len(run.inputs.dataset_inputs) == 1
    assert {item.path for item in client.list_artifacts(run.info.run_id, "model")} == {"model/adapter_config.json"}
    assert rundir.read_manifest()["mlflow"]["url"] == (
        f"{server.uri}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"
    )
    assert not (tmp_path / "mlflow.db").exists()


class Cutting:
    """A proxy of a server that forwards each request, and cuts the line before the answer to some of them."""

    def __init__(self, server: Server, *paths: str, times: int) -> None:
        left, port, made = Counter(dict.fromkeys(paths, times)), server.port, self
        self.cut = 0

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                upstream = http.client.HTTPConnection("127.0.0.1", port)
                upstream.request(self.command, self.path, body, dict(self.headers))
                answer = upstream.getresponse()
                content = answer.read()
                if hit := next((path for path in paths if self.path.endswith(path) and left[path] > 0), None):
                    left[hit] -= 1
                    made.cut += 1
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                self.send_response(answer.status)
                self.send_header("Content-Type", answer.getheader("Content-Type") or "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_PATCH = do_PUT = do_DELETE = do_POST  # noqa: N815 - names of the base class

            def log_message(self, *_: Any) -> None:
                pass

        self.proxy = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.uri = f"http://127.0.0.1:{self.proxy.server_address[1]}"
        threading.Thread(target=self.proxy.serve_forever, daemon=True).start()


@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_lost_answer_doubles_neither_runs_nor_models(tmp_path: Path, server: Server, times: int) -> None:
    """The server does what it is asked, but its answer is lost; MLflow's client asks a second time by itself."""
    proxy = Cutting(server.running(), "/runs/create", "/mlflow/logged-models", times=times)
    rundir = finish(make_run(tmp_path, uri=proxy.uri))
    problems = [MlflowRun.of(rundir).try_update() for _ in range(4)]
    assert problems[-1] == ""
    assert proxy.cut >= times
    run, client = assert_mirrored(rundir, "FINISHED"), store.connect(server.uri)
    query = f"tags.`runner.id` = '{rundir.read_manifest()['id']}'"
    assert len(client.search_runs([run.info.experiment_id], query)) == 1
    models = client.search_logged_models([run.info.experiment_id], f"tags.`runner.run_id` = '{run.info.run_id}'")
    assert [(model.model_id, str(model.status)) for model in models] == [(run.data.tags["runner.model_id"], "READY")]


def test_sync_closes_a_double_that_appears_later(tmp_path: Path, server: Server) -> None:
    """As when a slow server handles a request after its client has given up."""
    rundir = finish(make_run(tmp_path, uri=server.running().uri))
    assert sync.sync([rundir.path])[0].problem == ""
    run, client = the_run(rundir), store.connect(server.uri)
    double = client.create_run(run.info.experiment_id, run.info.start_time, {"runner.id": run.data.tags["runner.id"]})
    with_metrics = client.create_run(run.info.experiment_id, None, {"runner.id": run.data.tags["runner.id"]})
    client.log_metric(with_metrics.info.run_id, "kept", 1.0)
    assert sync.sync([rundir.path])[0].problem == ""
    closed, kept = (client.get_run(each.info.run_id) for each in (double, with_metrics))
    assert (closed.info.status, closed.info.lifecycle_stage) == ("KILLED", "deleted")
    assert (kept.info.status, kept.info.lifecycle_stage) == ("KILLED", "active"), "what has numbers is not deleted"
    assert kept.data.tags["runner.double_of"] == run.info.run_id
    assert client.get_run(run.info.run_id).info.status == "FINISHED"


def test_a_damaged_folder_does_not_stop_the_sync_of_the_others(outputs: Path) -> None:
    state, manifest, sound = (finish(make_run(outputs, name)) for name in ("a", "b", "c"))
    state.state.write_text('{"status": "comp')
    manifest.manifest.write_text("")
    results = {result.folder: result for result in sync.sync([outputs])}
    assert "state.json is damaged" in results[state.path].problem
    assert "manifest.json is damaged" in results[manifest.path].problem
    assert (results[sound.path].status, results[sound.path].problem) == ("completed", "")


def test_a_run_whose_folder_is_removed_does_not_stay_running(outputs: Path) -> None:
    rundir = make_run(outputs)
    with rundir.held():
        rundir.write_state(status="running", started=time.time(), host=os.uname().nodename)
        metrics_log.append(rundir, {"step": 1, "time": time.time(), "train/loss": 1.0})
        follower = follow.Follower(MlflowRun.of(rundir), updates_parent=False)
        assert not follower.step()
        run = the_run(rundir)
        assert run.info.status == "RUNNING"
        shutil.rmtree(rundir.path)
        assert follower.step()
    run = store.connect(f"sqlite:///{outputs}/mlflow.db").get_run(run.info.run_id)
    assert (run.info.status, run.data.tags["runner.status"]) == ("KILLED", "killed")
    assert "was removed" in run.data.tags["runner.reason"]


def test_credentials_are_used_and_never_written(tmp_path: Path, server: Server) -> None:
    rundir = finish(make_run(tmp_path))
    (result,) = sync.sync([rundir.path], server.running().uri.replace("://", "://me:hunter2hunter2@"))
    assert result.problem == ""
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == "hunter2hunter2"
    assert str(result.url).startswith(server.uri)
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or b"hunter2" not in path.read_bytes(), path


def _assert_small(process: psutil.Process) -> None:
    before, began = process.cpu_times(), time.monotonic()
    time.sleep(3)
    after = process.cpu_times()
    busy = (after.user + after.system - before.user - before.system) / (time.monotonic() - began)
    resident = process.memory_info().rss / 1e6
    print(f"a mirror at work: {resident:.0f} MB, {busy:.1%} of a core")
    assert resident < 350
    assert busy < 0.25


def _problem(rundir: RunDir) -> str:
    return str(spawn.read_report(rundir).get("problem", ""))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def work(folder: str, first: str, last: str, delay: str, ending: str) -> None:
    """A worker without a model: holds the folder, starts the mirror, writes records, says how it ended."""
    rundir, slowest = RunDir(Path(folder)), 0.0
    with rundir.held() as mine:
        assert mine
        proc = spawn.start_mirror(rundir, yaml.safe_load(rundir.config.read_text()))
        state: State = rundir.read_state()
        rundir.write_state(
            status="running", attempt=state.attempt + 1, pid=os.getpid(), host=os.uname().nodename, started=time.time()
        )
        for step in range(int(first), int(last) + 1):
            time.sleep(float(delay))
            began = time.monotonic()
            metrics_log.append(
                rundir, {"step": step, "time": time.time(), "train/loss": 1 / step, "train/tokens": step}
            )
            slowest = max(slowest, time.monotonic() - began)
            if (rundir.path / "enough").exists():
                break
        rundir.write_state(status=ending)
        result = spawn.wait_mirror(proc, rundir)
    print(json.dumps({"url": result.url, "unsent": result.unsent, "message": result.message, "slowest": slowest}))


if __name__ == "__main__":
    work(*sys.argv[1:])
