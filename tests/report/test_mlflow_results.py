"""Results of runs from MLflow are those of their folders, and cost few questions."""

# ruff: noqa: F401, F811 - fixtures are imported, then asked for by name

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from fixtures.compared_runs import as_json, copied, counted, data_of, runner, said
from fixtures.mirrored_runs import Server
from fixtures.mlflow_pages import shown

from runner.tracking.mlflow import store
from runner.tracking.rundir import RunDir

# Where the runs come from


def test_folders_database_and_server_say_the_same(
    real: Path, server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(real)
    server.kill()
    shutil.copy(real / "outputs" / "mlflow.db", server.folder / "server.db")
    server.start()
    try:
        found = {
            way: as_json(capsys, *words, "--by", "seed")
            for way, words in {
                "folders": (), "embedded": ("runner",), "database": ("uri=outputs/mlflow.db", "small"),
                "server": (f"uri={server.uri}", "runner"),
            }.items()
        }  # fmt: skip
    finally:
        server.kill()
    for way, board in found.items():
        assert board["parameters"] == ["quant", "seed"], way
        assert board["metrics"] == ["eval/loss", "eval/best_loss", "train/tokens_per_second", "memory/peak_rss_gib",
                                    "train/seconds"], way  # fmt: skip
        assert {run["quant"] for run in board["runs"]} == {"none", "8bit"}, way
        numbers = [{key: run[key] for key in ("label", "status", *board["metrics"])} for run in board["runs"]]
        expected = found["folders"]["runs"]
        assert numbers == [{key: run[key] for key in number} for run, number in zip(expected, numbers, strict=True)]
        assert [group["setting"] for group in board["groups"]] == [
            group["setting"] for group in found["folders"]["groups"]
        ], way
    best = found["database"]["runs"][0]
    for word in (best["mlflow_run_id"][:12], best["label"]):
        assert as_json(capsys, "uri=outputs/mlflow.db", word)["runs"][0]["mlflow_run_id"] == best["mlflow_run_id"]
    runs = found["folders"]["runs"]
    losses = [run["eval/loss"] for run in runs]
    assert losses == sorted(losses)
    assert [run["is_best"] for run in runs] == [True, False, False, False]
    state = RunDir(Path(runs[0]["folder"])).read_state()
    assert (runs[0]["eval/loss"], runs[0]["train/seconds"]) == (state.summary["eval/loss"], state.seconds)


def test_many_runs_cost_no_more_questions_than_few(real: Path, tmp_path: Path):
    few = counted(real, "uri=outputs/mlflow.db", "--where", "seed=1")
    assert few == "{'queries': 5} False False"
    many = tmp_path / "many.db"
    shutil.copy(real / "outputs" / "mlflow.db", many)
    store.connect.cache_clear()
    client = store.connect(f"sqlite:///{many}")
    experiment = client.get_experiment_by_name("runner").experiment_id
    for _ in range(10):
        client.set_terminated(client.create_run(experiment).info.run_id)
    assert counted(real, f"uri={many}") == few


def test_a_server_is_asked_once_for_all_runs(real: Path, server: Server):
    server.kill()
    shutil.copy(real / "outputs" / "mlflow.db", server.folder / "server.db")
    server.start()
    try:
        assert counted(real, f"uri={server.uri}", "runner") == "{'requests': 2} False False"
    finally:
        server.kill()


def test_curves_of_runs_without_a_folder_come_from_mlflow(copied: Path, tmp_path: Path):
    found = json.loads(runner("compare", "--json", cwd=copied).stdout)
    shutil.rmtree(copied / "outputs" / "sweeps")
    uri = f"uri={copied}/outputs/mlflow.db"
    done = runner("compare", uri, "--html", str(tmp_path / "page.html"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    shown = data_of(tmp_path / "page.html")
    assert [curve["eval"][0] for curve in shown["curves"].values()] == [[0, 1, 2]] * 4
    assert shown["curves"]["0"]["eval"][3][-1] == pytest.approx(found["runs"][0]["eval/loss"], rel=1e-5)
    tokens = shown["curves"]["0"]["eval"][1]
    assert tokens[0] == 0 < tokens[1] < tokens[2]


def test_an_experiment_that_is_not_there_names_those_that_are(real: Path, capsys: pytest.CaptureFixture[str]):
    code, _, err = said(capsys, f"uri={real}/outputs/mlflow.db", "runer")
    assert code == 2
    assert "there is no experiment, sweep or run 'runer'" in err
    assert "did you mean 'runner'? experiments: " in err
