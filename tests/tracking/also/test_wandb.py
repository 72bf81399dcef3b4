"""Runs in Weights & Biases, offline: what its own files contain."""

# ruff: noqa: F401, F811 - fixtures are imported, then asked for by name

from __future__ import annotations

import importlib.util
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fixtures.mirrored_runs import assert_mirrored, finish, make_run, outputs

from runner.tracking import metrics_log
from runner.tracking.also import wandb
from runner.tracking.mirror import follow, spawn
from runner.tracking.rundir import RunDir

pytestmark = pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs wandb")
BLOCK, FILE_HEADER = 32768, 7


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")


def records(rundir: RunDir) -> Iterator[Any]:
    """The records in the file that ``wandb sync`` sends, whose format is that of LevelDB's log."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = rundir.path.glob("wandb/offline-run-*/*.wandb")
    data, position, content = path.read_bytes(), FILE_HEADER, b""
    while position < len(data):
        if (left := BLOCK - position % BLOCK) < 7:
            position += left
            continue
        size, kind = struct.unpack_from("<HB", data, position + 4)
        content += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record, content = Record(), b""
            record.ParseFromString(data[position - size : position])
            yield record


def history(rundir: RunDir, name: str) -> list[tuple[int, float]]:
    rows = [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records(rundir)
        if record.WhichOneof("record_type") == "history"
    ]
    return [(row["_step"], row[name]) for row in rows if name in row]


def expected(rundir: RunDir, name: str) -> list[tuple[int, float]]:
    return [(record["step"], record[name]) for record in metrics_log.read(rundir) if name in record]


def test_a_run_is_in_wandb_as_in_its_folder(outputs: Path) -> None:
    rundir = make_run(outputs, also="wandb", tags={"team": "nlp"}, notes="why")
    metrics_log.append(rundir, {"step": 0, "time": 1.7e9, "eval/loss": 4.0})
    finish(rundir, status="failed")
    metrics_log.append(rundir, {"step": 5, "time": 1.7e9, "eval/loss": 3.0})
    assert follow.follow(rundir) == 0
    assert spawn.read_report(rundir)["also"] == {"wandb": ""}
    assert_mirrored(rundir, "FAILED")
    for name in ("train/loss", "eval/loss"):
        assert history(rundir, name) == expected(rundir, name)
    kinds = {record.WhichOneof("record_type"): record for record in records(rundir)}
    run = kinds["run"].run
    assert (run.run_id, run.project, run.display_name) == (rundir.read_manifest()["id"], "tests", "run")
    assert (list(run.tags), run.notes) == (["team:nlp"], "why")
    assert kinds["exit"].exit.exit_code == 1


def test_a_resumed_run_has_no_point_twice(outputs: Path) -> None:
    rundir = finish(make_run(outputs, also=["wandb"]), range(1, 6), "preempted")
    assert follow.follow(rundir) == 0
    assert "preempting" in {record.WhichOneof("record_type") for record in records(rundir)}
    metrics_log.rewind(rundir, 3)
    finish(rundir, range(4, 9))
    assert follow.follow(rundir) == 0
    assert history(rundir, "train/loss") == expected(rundir, "train/loss")
    assert "preempting" not in {record.WhichOneof("record_type") for record in records(rundir)}


def test_a_server_that_does_not_answer_cannot_keep_the_upload() -> None:
    """W&B's own limit, which holds at the end of the process, too."""
    found = wandb.settings()
    assert (found.init_timeout, found.finish_timeout, found.finish_timeout_raises) == (60, 120, True)
