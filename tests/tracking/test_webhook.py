"""Messages about the end of runs, to a real web server."""

# ruff: noqa: F401, F811 - fixtures are imported, then asked for by name

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
from conftest import composed, prepared
from fixtures.web_servers import Web, web

from runner.errors import ConfigError
from runner.tracking import webhook
from runner.tracking.rundir import RunDir
from runner.tracking.sweepdir import SweepDir

SECRET = "hush-hush-hush"
RUN = ("model=tiny", "train.max_steps=1")


def test_a_run_says_how_it_ended(tmp_path: Path, web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    rundir = RunDir(tmp_path)
    rundir.update_manifest(name="first", mlflow={"run_id": "abc", "url": None})
    summary = {"eval/loss": 3.61, "eval/loss before": 4.08, "eval/f1": math.nan, "steps": 30}
    state = rundir.write_state(status="completed", step=30, total_steps=30, seconds=200.0, summary=summary)
    monkeypatch.setenv(webhook.VARIABLE, web.url)
    assert webhook.notify(webhook.hidden(web.url), webhook.of_run(rundir, state)) == ""
    (message,) = web.messages
    assert message["text"] == ("run first completed, step 30/30, eval/loss 3.6100 (before: 4.0800), 3 min 20 s"), (
        "Slack shows this text"
    )
    known = {"kind": "run", "run": "first", "status": "completed", "reason": "", "loss": 3.61, "mlflow_run_id": "abc"}
    assert known.items() <= message.items()
    assert message["metrics"] == {"eval/loss": 3.61, "eval/loss before": 4.08}, "JSON has no NaN"


def test_a_sweep_says_what_came_of_its_runs(tmp_path: Path) -> None:
    sweep = SweepDir(tmp_path)
    ends = [
        ("lora.r=4", "completed", "", {"eval/loss": 2.5}),
        ("lora.r=8", "completed", "", {"eval/loss": 2.25}),
        ("lora.r=16", "failed", "out of memory", {}),
    ]
    jobs = {label: {"folder": label, "label": label} for label, *_ in ends}
    sweep.update(name="ranks", jobs=jobs)
    for rundir, (label, status, reason, summary) in zip(sweep.rundirs(), ends, strict=True):
        rundir.update_manifest(label=label)
        rundir.write_state(status=status, reason=reason, summary=summary)
    states = [rundir.read_state() for rundir in sweep.rundirs()]
    message = webhook.of_sweep(sweep, "FAILED", states)
    assert message["text"] == (
        "sweep ranks ended: 2 completed, 1 failed; lowest eval/loss 2.2500 (lora.r=8)\nlora.r=16: out of memory"
    )
    assert (message["status"], message["loss"], message["failed"]) == ("FAILED", 2.25, {"lora.r=16": "out of memory"})


@pytest.mark.parametrize(
    ("answer", "problem"), [(500, "HTTP Error 500"), (302, "HTTP Error 302"), (0, "no answer within 0.3 s")]
)
def test_a_message_that_does_not_arrive_is_one_line(
    web: Web, monkeypatch: pytest.MonkeyPatch, answer: int, problem: str
) -> None:
    monkeypatch.setattr(webhook, "TIMEOUT_S", 0.3 if not answer else 60)
    monkeypatch.setenv(webhook.VARIABLE, web.url)
    web.answers.append(answer)
    line = webhook.notify(webhook.hidden(web.url), {"text": "x"})
    assert problem in line
    assert SECRET not in line
    assert "\n" not in line


def test_without_its_secret_nothing_is_sent(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(webhook.VARIABLE, web.url)
    assert webhook.notify(None, {"text": "x"}) == ""
    assert "RUNNER_WEBHOOK" in webhook.notify("https://another.host/***", {"text": "x"})
    assert web.messages == []


def test_the_secret_is_in_no_file_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"https://someone:{SECRET}1@chat.example.org:8080/{SECRET}/2?x={SECRET}"
    rundir = prepared(tmp_path / "run", *RUN, f"tracking.webhook='{url}'")
    assert composed(*RUN)["tracking"]["webhook"] == "https://chat.example.org:8080/***", "of the environment"
    assert os.environ[webhook.VARIABLE] == url
    for path in filter(Path.is_file, rundir.path.rglob("*")):
        assert SECRET not in path.read_text(), path
    assert composed(*RUN, "tracking.webhook=null")["tracking"]["webhook"] is None


@pytest.mark.parametrize("url", ["hooks.slack.com/services/T0", "ftp://host/x", "https:///x", "http://host:port/"])
def test_what_is_no_url_is_refused_without_showing_it(url: str) -> None:
    with pytest.raises(ConfigError, match=r"tracking.webhook: is no URL of a web server") as error:
        composed(*RUN, f"tracking.webhook='{url}'")
    assert url not in str(error.value)
    assert os.environ[webhook.VARIABLE] == ""
