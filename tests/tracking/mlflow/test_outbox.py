"""The files of a run are sent together."""

# ruff: noqa: F401, F811 - fixtures are imported, then asked for by name

from __future__ import annotations

from pathlib import Path

from fixtures.mirrored_runs import commits_of, outputs

from runner.tracking.mlflow import store
from runner.tracking.mlflow.outbox import Outbox


def test_files_folders_and_texts_are_sent_once_without_a_query(outputs: Path) -> None:
    client, outbox = store.connect(f"sqlite:///{outputs}/mlflow.db"), Outbox()
    run = client.create_run(client.create_experiment("files", (outputs / "mlartifacts").as_uri()))
    (outputs / "model").mkdir()
    (outputs / "model" / "weights").write_text("w")
    (outputs / "train.log").write_text("the log")
    outbox.add(outputs / "model", outputs / "train.log", outputs / "missing")
    outbox.texts |= {"environment.json": "{}", "answers/step-1.json": "é"}
    (outputs / "train.log").write_text("the log, longer")
    with commits_of(client) as commits:
        outbox.send(client, run)
        outbox.send(client, run)
    assert commits == []
    folder = outputs / "mlartifacts" / run.info.run_id / "artifacts"
    sent = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}
    log = "the log, longer"
    assert sent == {"model/weights": "w", "train.log": log, "environment.json": "{}", "answers/step-1.json": "é"}
    assert (outbox.paths, outbox.texts) == ({}, {})
