"""register: a version in a real MLflow, used from there."""

# ruff: noqa: F401 - fixtures are imported, then asked for by name

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import mlflow
import pytest
from conftest import TINY
from fixtures.trained_runs import _there, asked_plainly, run_id, said, trained
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

from runner.cli import main

# register


@pytest.mark.slow
def test_a_registered_model_answers_in_a_process_of_its_own_and_over_http(capsys: pytest.CaptureFixture[str]):
    run = trained("first")
    code, out, err = said(capsys, "register", "first", "bot", "--alias", "champion")
    assert (code, "version  1 of bot, alias champion" in out) == (0, True), err
    assert "type hints" not in err
    assert said(capsys, "register", "first", "bot")[1].count("version  2 of bot") == 1
    uri = run.read_manifest()["mlflow"]["uri"]
    client = mlflow.MlflowClient(uri)
    version = client.get_model_version_by_alias("bot", "champion")
    assert (version.version, version.run_id) in ((1, run_id(run)), ("1", run_id(run)))
    assert client.get_run(run_id(run)).info.status == "FINISHED"
    assert version.description.startswith("# first\n")
    assert f"{run.read_state().summary['eval/loss']:.4f}" in version.description
    pins = Path(mlflow.artifacts.download_artifacts("models:/bot/1", tracking_uri=uri), "requirements.txt").read_text()
    assert f"transformers=={__import__('transformers').__version__}" in pins
    model = AutoPeftModelForCausalLM.from_pretrained(run.model)
    expected = asked_plainly(model, AutoTokenizer.from_pretrained(run.model), "Hello!", 8)
    program = (
        "import mlflow, json, sys\n"
        "found = mlflow.pyfunc.load_model('models:/bot@champion').predict(['Hello!'], params={'max_new_tokens': 8})\n"
        "print(json.dumps([found, 'runner' in sys.modules]))"
    )
    alone = {**os.environ, "MLFLOW_TRACKING_URI": uri, "PYTHONPATH": ""}
    done = subprocess.run([sys.executable, "-c", program], env=alone, capture_output=True, text=True, check=True)
    assert "type hints" not in done.stderr
    line = next(line for line in out.splitlines() if line.startswith("load ")).removeprefix("load ").strip()
    elsewhere = {key: value for key, value in alone.items() if key != "MLFLOW_TRACKING_URI"}
    assert line.startswith(f"MLFLOW_TRACKING_URI={uri} python -c ")
    line = line.replace(" python ", f" {sys.executable} ")
    subprocess.run(line, shell=True, cwd="/", env=elsewhere, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == [[expected], False]
    assert over_http("models:/bot/2", alone, {"inputs": ["Hello!"], "params": {"max_new_tokens": 8}}) == [expected]


def over_http(model: str, environment: dict[str, str], asked: dict[str, Any]) -> Any:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "models",
        "serve",
        "-m",
        model,
        "--env-manager",
        "local",
        "-p",
        str(port),
    ]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # it starts uvicorn by name
    server = subprocess.Popen(command, env={**environment, "PATH": path}, start_new_session=True)
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/invocations", json.dumps(asked).encode(), {"Content-Type": "application/json"}
    )
    try:
        while True:
            try:
                with urllib.request.urlopen(request) as answer:
                    return json.loads(answer.read())["predictions"]
            except OSError:
                assert server.poll() is None
                time.sleep(0.5)
    finally:
        os.killpg(server.pid, 9)
        server.wait()


def test_what_cannot_be_registered_is_refused(capsys: pytest.CaptureFixture[str]):
    run = trained("first")
    client = mlflow.MlflowClient(run.read_manifest()["mlflow"]["uri"])
    client.create_registered_model("theirs")
    for words, part in {
        ("first", "theirs"): "did not create",
        ("first", "a/b"): "is not a valid model name",
        ("first", "bot", "--alias", "v1"): "is not a valid alias",
        ("first",): "needs a name",
    }.items():
        code, _, err = said(capsys, "register", *words)
        assert (code, part in err) == (2, True), (words, err)
    assert not client.search_model_versions("name = 'theirs'")
    assert not list(run.path.glob(".register-*"))


def test_a_run_that_is_not_in_mlflow_is_not_registered(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert main.run([*TINY, "train.max_steps=1", f"hydra.run.dir={tmp_path / 'run'}"]) == 0
    code, _, err = said(capsys, "register", str(tmp_path / "run"), "bot")
    assert (code, "runner sync" in err) == (2, True)


@pytest.mark.slow
def test_the_printed_line_gives_the_score_of_an_answer(capsys: pytest.CaptureFixture[str]):
    sizes = ("data.train_rows=16", "data.eval_rows=8", "train.max_steps=2")
    words = ("model=tiny", "task=reward", "data=chitchat_pairs", "data.packing=false", *sizes)
    command = [sys.executable, "-m", "runner", *words, "hydra.run.dir=judge"]
    subprocess.run(command, check=True, capture_output=True)
    code, out, err = said(capsys, "register", "judge", "judge")
    assert code == 0, err
    (line,) = (line for line in out.splitlines() if line.startswith("load "))
    printed = line.removeprefix("load").strip().replace(" python ", f" {sys.executable} ", 1)
    done = subprocess.run(printed, shell=True, check=True, capture_output=True, text=True)
    heading, score = done.stdout.splitlines()
    assert heading.strip() == "reward"
    assert -100 < float(score.split()[1]) < 100
