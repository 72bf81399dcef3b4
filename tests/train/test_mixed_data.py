"""Runs on a mixture and several sets to evaluate on: their metrics, resume to the bit, changed data, the manifest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import prepared
from fixtures.stopped_runs import SHORT, preempted_run

from runner.tracking import manifest, metrics_log
from runner.tracking.rundir import RunDir
from runner.train import worker

NOT_COMPARED = ("time", "step_seconds", "per_second", "mfu", "wait_fraction", "gib", "seconds")


def rows_file(path: Path, name: str, count: int) -> str:
    rows = [{"text": f"{name} {n}: " + f"{name} is {n * n}. " * (n % 7 + 1)} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    files = {name: rows_file(tmp_path / f"{name}.jsonl", name, count) for name, count in (("code", 60), ("talk", 90))}
    return [
        *SHORT, "data=mix", "data/format=text", "task=pretrain", "data.eval_fraction=0.2", "data.max_length=64",
        "data.sources.code.weight=0.3", *(f"data.sources.{name}.path={path}" for name, path in files.items()),
        f"data.evals.law.path={rows_file(tmp_path / 'law.jsonl', 'law', 12)}",
    ]  # fmt: skip


def numbers(rundir: RunDir) -> list[dict[str, float]]:
    return [
        {key: value for key, value in record.items() if not key.endswith(NOT_COMPARED)}
        for record in metrics_log.read(rundir)
    ]


def test_a_mixture_logs_each_set_and_resumes_to_the_bit(options: list[str], tmp_path: Path, cache: Path) -> None:
    whole = prepared(tmp_path / "whole", *options)
    assert worker.work(whole) == 0
    records = numbers(whole)
    training = [record for record in records if "train/loss" in record]
    assert all({"train/loss/code", "train/loss/talk"} & set(record) for record in training)
    for record in training:
        losses = [record[name] for name in ("train/loss/code", "train/loss/talk") if name in record]
        assert min(losses) - 1e-6 <= record["train/loss"] <= max(losses) + 1e-6
    last = [record for record in records if "eval/loss" in record][-1]
    assert {
        f"eval/{name}/{metric}" for name in ("code", "talk", "law") for metric in ("loss", "token_accuracy")
    } <= set(last)
    losses = [last[f"eval/{name}/loss"] for name in ("code", "talk")]
    assert min(losses) < last["eval/loss"] < max(losses), "of the sources, without law"
    assert {"eval/law/loss before", "eval/law/loss"} <= set(whole.read_state().summary)
    data = whole.read_manifest()["data"]
    assert (set(data["sources"]), set(data["evals"])) == ({"code", "talk"}, {"law"})
    assert data["report"]["eval_rows"] == sum(each["report"]["eval_rows"] for each in data["sources"].values())
    resumed = preempted_run(tmp_path / "resumed", *options)
    assert worker.work(resumed) == 0
    assert numbers(resumed) == records
    weights = [run.read_manifest()["weights_sha256"] for run in (whole, resumed)]
    assert weights[0] == weights[1]


def test_a_changed_source_is_named_on_resume(
    options: list[str], tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rundir = preempted_run(tmp_path / "run", *options)
    rows_file(tmp_path / "law.jsonl", "law", 13)
    assert worker.work(rundir) == 2
    assert "data.evals.law: file://" in caplog.text
    assert "has changed since this run began" in caplog.text


def test_hub_commits_of_sources_are_those_of_the_first_attempt(options: list[str], tmp_path: Path) -> None:
    hub = ["data.sources.web.source=hub", "data.sources.web.path=OWNER/NAME"]
    rundir = prepared(tmp_path / "run", *options, *hub)
    rundir.update_manifest(data={"sources": {"web": {"revision": "abc"}, "code": {"revision": None}}})
    cfg = manifest.pinned(manifest.read_config(rundir), rundir)
    assert cfg["data"]["sources"]["web"]["revision"] == "abc"
    assert "revision" not in cfg["data"]["sources"]["code"]
