"""The parent of a sweep in MLflow shows its leaderboard."""

# ruff: noqa: F401, F811 - fixtures are imported, then asked for by name

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from fixtures.compared_runs import copied
from fixtures.mlflow_pages import shown

from runner.report import publish
from runner.tracking.mlflow import parent_run, store, upload
from runner.tracking.sweepdir import SweepDir

# The parent of a sweep in MLflow


@pytest.fixture(scope="module")
def pages(real: Path) -> Iterator[str]:
    """The address of MLflow's pages of the real sweep's experiment."""
    with shown(f"outputs_dir={real / 'outputs'}") as (_, address):
        yield address.partition("/runs")[0]


def text_of(address: str, last: str) -> str:
    """What stands on a page, without its tags, once a browser has run its scripts: they end with these words.

    Headless Chromium writes a page down when its own clock says so, which on a busy machine may be too early.
    """
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("no Chromium here (Debian: apt install chromium)")
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=2400,1400", "--dump-dom",
        "--virtual-time-budget=30000", address,
    ]  # fmt: skip
    for _ in range(5):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        kept = re.sub(r"<(script|style).*?</\1>", " ", done.stdout, flags=re.DOTALL)
        text = " ".join(html.unescape(re.sub(r"<[^>]+>", " ", kept)).split())
        if last in text:
            break
    return text


@pytest.mark.slow
def test_what_a_person_sees_in_mlflow(real: Path, pages: str):
    sweep = SweepDir(real / "outputs" / "sweeps" / "small")
    parent, runs = sweep.read()["mlflow"]["parent_run_id"], sweep.rundirs()
    best = min(runs, key=lambda rundir: rundir.read_state().summary["eval/loss"])

    table = text_of(f"{pages}/runs", "5 matching runs")
    assert "5 matching runs" in table
    assert "small" in table
    assert best.read_manifest()["label"] not in table, "children are folded below their parent"

    own = text_of(f"{pages}/runs?workflowType=machine_learning&viewStateShareKey=runner", "5 matching runs")
    columns = own.partition("Run Name")[2].partition("matching runs")[0]
    names = ("best/eval/loss", "eval/loss", "train/tokens_per_second", "memory/peak_rss_gib")
    assert set(columns.split()) >= set(names), "loss, speed and memory in sight"
    assert f"{best.read_state().summary['eval/loss']:.6f}"[:6] in columns, "the best child's loss on the parent"

    story = text_of(f"{pages}/runs/{parent}", best.read_manifest()["label"])
    assert f"Best of this sweep : {best.read_manifest()['label']}" in story
    assert f"{best.read_state().summary['eval/loss']:.4f}" in story
    assert "Status Finished" in story
    children = story.partition("Child runs")[2].partition("Source")[0]
    assert all(rundir.read_manifest()["label"] in children for rundir in runs)

    name = upload.plain(best.read_manifest()["model"]["name"])
    child = text_of(f"{pages}/runs/{best.read_manifest()['mlflow']['run_id']}", name)
    assert "chitchat" in child.partition("Datasets")[2], "the column Dataset is filled"
    assert "Parent run small" in child
    assert name in child.partition("Logged models")[2].partition("Registered prompts")[0], "so is the column Models"

    ids = json.dumps([rundir.read_manifest()["mlflow"]["run_id"] for rundir in runs])
    experiment = pages.rpartition("/")[2]
    address = (
        f"{pages.partition('/#')[0]}/#/compare-runs?runs={quote(ids)}&experiments={quote(json.dumps([experiment]))}"
    )
    compared = text_of(address, "Parallel Coordinates Plot")
    assert "Comparing 4 Runs from 1 Experiment" in compared
    assert "Parallel Coordinates Plot" in compared
    assert "eval/loss" in compared


def test_the_parent_shows_the_leaderboard_and_follows_when_runs_are_added(copied: Path):
    sweep = SweepDir(copied / "outputs" / "sweeps" / "small")
    noted = sweep.read()["mlflow"]
    client = store.connect(noted["uri"])

    def parent() -> object:
        return client.get_run(noted["parent_run_id"])

    best = min(sweep.rundirs(), key=lambda rundir: rundir.read_state().summary["eval/loss"])
    data = parent().data
    assert data.metrics["best/eval/loss"] == best.read_state().summary["eval/loss"]
    assert data.tags["runner.best_run_id"] == best.read_manifest()["mlflow"]["run_id"]
    assert data.tags["runner.best_run"] == best.read_manifest()["label"]
    assert f"/runs/{data.tags['runner.best_run_id']})" in data.tags["mlflow.note.content"]
    assert "**What to try next**\n\n- quant: " in data.tags["mlflow.note.content"]
    there = {found.path for found in client.list_artifacts(noted["parent_run_id"])}
    assert there >= {"leaderboard.json", "compare.html"}
    file = Path(client.download_artifacts(noted["parent_run_id"], "leaderboard.json"))
    table = json.loads(file.read_text())
    assert [row[table["columns"].index("is_best")] for row in table["data"]] == [1.0, 0.0, 0.0, 0.0]
    before = data.tags["runner.leaderboard"]
    assert parent_run.update_parent(sweep, publish=publish.send) == ""
    assert parent().data.tags["runner.leaderboard"] == before, "nothing new, nothing sent"
    client.set_tag(noted["parent_run_id"], "mlflow.note.content", "mine")
    best.write_state(reason="looked at again")
    assert parent_run.update_parent(sweep, publish=publish.send) == ""
    assert parent().data.tags["runner.leaderboard"] != before
    assert parent().data.tags["mlflow.note.content"] == "mine", "what somebody wrote stays"


def test_a_running_sweep_shows_its_best_run_so_far(copied: Path, monkeypatch: pytest.MonkeyPatch):
    """In one write for each run that ends."""
    sweep = SweepDir(copied / "outputs" / "sweeps" / "small")
    noted = sweep.read()["mlflow"]
    client, sent = store.connect(noted["uri"]), []
    runs = sorted(sweep.rundirs(), key=lambda rundir: rundir.read_state().summary["eval/loss"])
    states, label = zip(*((run.read_state(), run.read_manifest()["label"]) for run in runs), strict=True)
    for tag in ("runner.best_run", publish.STAMP, publish.COUNTED):
        client.delete_tag(noted["parent_run_id"], tag)
    log_batch = client.log_batch

    def spy(*args: Any, **batch: Any) -> None:
        sent.append({point.key: point.value for point in batch["metrics"]})
        log_batch(*args, **batch)

    monkeypatch.setattr(client, "log_batch", spy)

    def seen(*completed: int) -> tuple[str | None, str | None]:
        """(the best run, of how many) when these runs are completed and the others run."""
        now = [replace(state, status="completed" if i in completed else "running") for i, state in enumerate(states)]
        publish.send(client, client.get_run(noted["parent_run_id"]), sweep, runs, now, False)
        tags = client.get_run(noted["parent_run_id"]).data.tags
        return tags.get("runner.best_run"), tags.get(publish.COUNTED)

    assert seen() == (None, None)
    assert seen(2) == (label[2], "1")
    assert seen(1, 2) == seen(1, 2) == (label[1], "2")
    assert [each["best/eval/loss"] for each in sent] == [states[2].summary["eval/loss"], states[1].summary["eval/loss"]]
