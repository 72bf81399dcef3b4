"""ui: MLflow's own server on a real database, asked for its pages, and ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import psutil
import pytest
from fixtures.mlflow_pages import shown

from runner.cli import main
from runner.tracking.mlflow import store


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a database in which there is one run."""
    folder = tmp_path_factory.mktemp("outputs")
    client = store.connect(f"sqlite:///{folder}/mlflow.db")
    client.create_experiment("other")
    store.create_run(client, store.experiment_id(client, "runner", folder / "mlartifacts"), "some id", "a run", 1.7e9)
    return folder


def get(address: str) -> str:
    with urllib.request.urlopen(address, timeout=20) as answer:
        assert answer.status == 200
        return str(answer.read().decode())


def busy(port: int = 0) -> socket.socket:
    taken = socket.socket()
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    taken.bind(("127.0.0.1", port))
    taken.listen()
    return taken


def test_pages_are_served_until_ctrl_c(outputs: Path, capfd: pytest.CaptureFixture[str]):
    with shown(f"outputs_dir={outputs}") as (proc, page):
        address, _, query = page.partition("?")
        base, _, experiment = address.removesuffix("/runs").partition("/#/experiments/")
        assert address.endswith("/runs")
        assert "workflowType=machine_learning" in query, "else MLflow opens its mode for GenAI"
        assert query.endswith("&viewStateShareKey=runner"), "the columns and charts of this experiment"
        assert base.startswith("http://127.0.0.1:")
        assert "<title>MLflow" in get(base)
        found = get(f"{base}/api/2.0/mlflow/experiments/get?experiment_id={experiment}")
        assert '"name": "runner"' in found
        # The same address for whoever names that server, and nothing is started for it.
        assert main.run(["ui", f"uri={base}", "--no-browser"]) == 0
        assert capfd.readouterr().out.split()[-1] == page
        assert main.run(["ui", f"uri={base}", "--experiment", "other"]) == 0
        other = capfd.readouterr().out.split()[-1]
        assert other != page
        assert "viewStateShareKey" not in other, "MLflow would report that it has no such view"
        assert main.run(["ui", f"uri={base}", "--experiment", "rumner"]) == 2
        assert "experiments: Default, other, runner" in capfd.readouterr().err
        assert main.run(["ui", f"uri={base}", "--port", "5001"]) == 2
        assert "has no effect on the running server of uri" in capfd.readouterr().err

        family = psutil.Process(proc.pid).children(recursive=True)
        assert family
        proc.send_signal(signal.SIGINT)
        assert proc.wait() == 0
        assert not [member for member in family if member.is_running()]
        assert "press Ctrl-C to stop" in proc.communicate()[1]


def test_a_port_that_is_taken(outputs: Path, capfd: pytest.CaptureFixture[str]):
    with busy() as taken:
        port = taken.getsockname()[1]
        assert main.run(["ui", f"outputs_dir={outputs}", "--port", str(port)]) == 2
        said = capfd.readouterr().err
        assert f"--port={port}: is in use by another program" in said
        assert "is free; or leave --port out" in said


def test_an_experiment_that_is_not_there_is_refused_before_mlflow_starts(
    outputs: Path, capfd: pytest.CaptureFixture[str]
):
    assert main.run(["ui", f"outputs_dir={outputs}", "--experiment", "rumner"]) == 2
    said = capfd.readouterr().err
    assert "did you mean 'runner'? experiments: Default, other, runner" in said
    assert "starting MLflow" not in said


@pytest.mark.slow
def test_a_signal_during_the_start_leaves_no_process(outputs: Path):
    with busy() as taken:
        port = taken.getsockname()[1]
    command = [sys.executable, "-m", "runner", "ui", f"outputs_dir={outputs}", "--port", str(port)]
    proc = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert proc.stderr
    assert "starting" in proc.stderr.readline()
    while not (family := psutil.Process(proc.pid).children(recursive=True)):
        pass
    proc.terminate()
    assert proc.wait() == 0
    assert not [member for member in family if member.is_running()]
    busy(port).close()


@pytest.mark.slow
def test_a_database_that_no_server_takes(tmp_path: Path):
    (tmp_path / "mlflow.db").write_text("this is no database, and never was one")
    command = [sys.executable, "-m", "runner", "ui", f"outputs_dir={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ})
    assert done.returncode == 2
    assert "file is not a database" in done.stderr
    assert "Traceback" not in done.stderr.partition("error:")[0]


def test_arguments_that_ui_cannot_use_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    with busy() as nobody:
        port = nobody.getsockname()[1]
    for words, said in (
        ([f"outputs_dir={tmp_path}"], "no runs in MLflow yet"),
        ([f"outputs_dir={tmp_path}/none"], "is not a folder"),
        (["--port", "high"], "must be a whole number"),
        (["--port=70000"], "must be a whole number"),
        (["--prot", "1"], "did you mean '--port'"),
        (["--backend-store-uri", "sqlite:///x.db"], "no such option\n    → write uri=…"),
        (["some"], "unexpected argument of ui"),
        ([f"uri=http://127.0.0.1:{port}"], "does not answer like an MLflow server"),
        (["uri=ftp://somewhere"], "is not a URI scheme supported by MLflow"),
    ):
        assert main.run(["ui", *words]) == 2, words
        told = capfd.readouterr().err
        assert said in told, told
        assert "Traceback" not in told
    assert main.run(["ui", "--help"]) == 0
