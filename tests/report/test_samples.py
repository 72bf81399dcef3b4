"""The answers of runs, from MLflow where their folders are on another machine."""

from __future__ import annotations

from pathlib import Path

from runner.report import samples
from runner.report.results import Result
from runner.tracking.mlflow import store, upload


def test_answers_of_runs_without_a_folder_come_from_the_table_in_mlflow(tmp_path: Path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = store.connect(uri)
    experiment = store.experiment_id(client, "runner", tmp_path / "mlartifacts")
    runs = [store.create_run(client, experiment, str(number), "run", 1.7e9, {}) for number in range(3)]
    rows = [{"prompt": "Who?", "before": "none", "after": "x" * 5000}, {"prompt": "Why?", "after": "so"}]
    for run in runs[:2]:
        upload.send_table(client, client.get_run(run.info.run_id), rows, "samples.json")
    shown = [Result(run="", label="", status="completed", mlflow_id=run.info.run_id) for run in runs]
    found, note = samples.gather(shown, uri)
    assert (sorted(found), note) == ([0, 1], ""), "a run without a table has no answers, which is no problem"
    assert found[0] == [{"prompt": "Who?", "before": "none", "after": "x" * samples.LONGEST}, rows[1]]
    (Path(runs[1].info.artifact_uri.removeprefix("file://")) / "samples.json").unlink()
    found, note = samples.gather(shown, uri)
    assert sorted(found) == [0]
    assert note.startswith("the answers of 1 runs could not be read from MLflow: ")
