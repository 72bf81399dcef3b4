"""The command line as users meet it: what it does, what it says, what it leaves behind."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY
from fixtures.stopped_runs import stopped_after

from runner.cli import jobs, main
from runner.tracking import manifest, metrics_log
from runner.tracking.rundir import RunDir
from runner.tracking.sweepdir import SweepDir

QUICK = (*TINY, "train.max_steps=2")


@pytest.fixture(autouse=True)
def _in_a_new_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RUNNER_TRACEBACK", raising=False)


def runs() -> list[RunDir]:
    return sorted((RunDir(path.parent.resolve()) for path in Path("outputs").glob("*/*/state.json")), key=str)


def test_a_run_leaves_its_folder_and_prints_its_result(capfd: pytest.CaptureFixture[str]):
    assert main.run([*QUICK, "name=first"]) == 0
    (rundir,) = runs()
    assert rundir.read_state().status == "completed"
    assert {path.name for path in rundir.path.iterdir()} >= {
        ".hydra", "config.yaml", "manifest.json", "state.json", "metrics.jsonl", "train.log", "checkpoints", "model",
    }  # fmt: skip
    manifest = rundir.read_manifest()
    assert manifest["name"] == "first"
    assert manifest["data"]["digest"]
    assert manifest["command"][:3] == ["python", "-m", "runner"]
    said = capfd.readouterr()
    assert "held-out loss" in said.out
    assert str(rundir.model) in said.out
    assert "step 2/2" in said.err
    assert "step 2/2" in rundir.log.read_text()


def test_version_shows_the_libraries(capfd: pytest.CaptureFixture[str]):
    assert main.run(["--version"]) == 0
    first, *rest = capfd.readouterr().out.splitlines()
    assert first == f"runner {importlib.metadata.version('runner')}"
    assert f"torch {importlib.metadata.version('torch')}" in rest


def test_a_named_folder_is_skipped_when_its_run_is_completed(capfd: pytest.CaptureFixture[str]):
    command = [*QUICK, "hydra.run.dir=mine"]
    assert main.run(command) == 0
    capfd.readouterr()
    before = {path: path.stat().st_mtime_ns for path in Path("mine").rglob("*")}
    assert main.run(command) == 0
    assert "completed already" in capfd.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in Path("mine").rglob("*")} == before


def test_another_configuration_in_a_named_folder_is_refused_and_nothing_is_overwritten(
    capfd: pytest.CaptureFixture[str],
):
    assert main.run([*QUICK, "hydra.run.dir=mine"]) == 0
    before = {path: path.read_bytes() for path in Path("mine").rglob("*") if path.is_file()}
    assert main.run([*QUICK, "hydra.run.dir=mine", "seed=2"]) == 2
    assert "contains a run with another configuration" in capfd.readouterr().err
    assert {path: path.read_bytes() for path in Path("mine").rglob("*") if path.is_file()} == before


def test_resume_by_folder_and_by_itself(capfd: pytest.CaptureFixture[str]):
    command = [*TINY, "train.max_steps=5"]
    with pytest.MonkeyPatch.context() as patched:
        stopped_after(2, patched)
        assert main.run(command) == 75
    (rundir,) = runs()
    assert rundir.read_state().status == "preempted"
    assert main.run([f"resume={rundir.path}", "seed=1"]) == 2
    assert "cannot change seed=1" in capfd.readouterr().err
    assert main.run([*command, "resume=auto"]) == 0
    assert "resumed at step 2/5" in capfd.readouterr().err
    assert runs() == [rundir]
    assert (rundir.read_state().status, rundir.read_state().attempt) == ("completed", 2)
    assert [r["step"] for r in metrics_log.read(rundir) if "train/loss" in r] == list(range(1, 6))
    assert main.run([f"resume={rundir.path}"]) == 0
    assert "completed already" in capfd.readouterr().err


def test_an_unfinished_twin_is_mentioned_and_left_alone(capfd: pytest.CaptureFixture[str]):
    folder = Path("outputs/2020-01-01/00-00-00")
    cfg = configuration(*QUICK)
    manifest.create(cfg, folder, [], []).write_state(status="killed")
    assert main.run(list(QUICK)) == 0
    assert f"an unfinished run with this configuration is in {folder.resolve()}" in capfd.readouterr().err
    assert len(runs()) == 2
    assert RunDir(folder).read_state().status == "killed"


def configuration(*overrides: str) -> dict[str, object]:
    with jobs.composed(list(overrides)) as (_, found):
        return dict(found[0].cfg)


def test_a_failed_run_is_only_retried_when_asked(capfd: pytest.CaptureFixture[str]):
    command = [*QUICK, "hydra.run.dir=mine"]
    manifest.create(configuration(*command), Path("mine"), [], []).write_state(status="failed", reason="a NaN")
    assert main.run(command) == 2
    assert "failed: a NaN" in capfd.readouterr().err
    assert main.run([*command, "retry=true"]) == 0


def test_a_run_killed_while_it_was_prepared_can_be_started(capfd: pytest.CaptureFixture[str]):
    Path("mine/.hydra").mkdir(parents=True)
    Path("mine/config.yaml").write_text("half: ")
    assert main.run([*QUICK, "hydra.run.dir=mine"]) == 0
    assert RunDir(Path("mine")).read_state().status == "completed"


def test_an_empty_folder_of_the_users_stays_when_a_run_in_it_is_refused(capfd: pytest.CaptureFixture[str]):
    Path("project/mine").mkdir(parents=True)
    Path("rows.jsonl").write_text("")
    refused = ["model=tiny", "data=local", "data.path=rows.jsonl", "tracking=offline", "hydra.run.dir=project/mine"]
    assert main.run(refused) == 2
    assert Path("project/mine").is_dir()
    assert not list(Path("project/mine").iterdir())


def test_no_secret_reaches_any_file(capfd: pytest.CaptureFixture[str]):
    uri = "tracking.uri=http://bob:hunter2secret@127.0.0.1:9"
    assert main.run([*(o for o in QUICK if not o.startswith("tracking")), "tracking=server", uri]) == 0
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == "hunter2secret"
    (rundir,) = runs()
    files = [path for path in rundir.path.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert not [path for path in files if b"hunter2secret" in path.read_bytes()]
    said = capfd.readouterr()
    assert "hunter2secret" not in said.out + said.err
    assert "python -m runner sync" in said.out


def test_a_token_among_the_keys_is_refused(capfd: pytest.CaptureFixture[str]):
    token = "hf_" + "aB3dE5gH7j" * 4
    assert main.run([*QUICK, f"name={token}"]) == 2
    said = capfd.readouterr().err
    assert "looks like a secret" in said
    assert token not in said
    assert not Path("outputs").exists()


@pytest.mark.cold
def test_a_sweep_runs_every_job_and_shows_how_each_ended(capfd: pytest.CaptureFixture[str]):
    command = [
        sys.executable, "-m", "runner", "-m", *QUICK, "lora.r=2,4", "lora.target_modules=[q_proj],[nothing]",
        "hydra.sweep.dir=sweep",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stdout.count("completed") >= 2
    assert done.stdout.count("lora.target_modules") >= 2
    assert "Traceback" not in done.stderr
    states = [rundir.read_state().status for rundir in SweepDir(Path("sweep")).rundirs()]
    assert states == ["completed", "failed"] * 2
    assert main.run([*command[3:-2], "lora.target_modules=[q_proj]", command[-1]]) == 0
    assert "2 of 2 jobs are already completed" in capfd.readouterr().err


def test_a_home_folder_is_one_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert main.run([*QUICK, "outputs_dir='~/out'"]) == 0
    assert len(list((tmp_path / "home" / "out").glob("*/*/model"))) == 1
    assert not Path("~").exists()


def test_a_damaged_neighbour_stops_nobody():
    folder = Path("outputs/2020-01-01/00-00-00")
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{")
    assert main.run(list(QUICK)) == 0


def test_help_teaches(capfd: pytest.CaptureFixture[str]):
    for words in (["--help"], ["plan", "--help"]):
        with pytest.raises(SystemExit) if words == ["--help"] else _nothing() as ended:
            assert main.run(words) == 0
        if ended is not None:
            assert ended.value.code in (0, None)
    said = capfd.readouterr().out
    assert said.count("python -m runner") >= 8
    assert "quant: 4bit, 8bit, fp4, none" in said


class _nothing:  # noqa: N801
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


@pytest.mark.cold
def test_the_configuration_can_be_shown():
    done = subprocess.run(
        [sys.executable, "-m", "runner", "--cfg", "job", "quant=4bit"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "kind: nf4" in done.stdout
    typo = subprocess.run(
        [sys.executable, "-m", "runner", "--cfg", "job", "quant=4bits"], capture_output=True, text=True
    )
    assert typo.returncode == 2
    assert "did you mean '4bit'" in typo.stderr
    assert "Traceback" not in typo.stderr


@pytest.mark.parametrize("line", ["runner quant=", "runner plan quant="])
def test_tab_completion_offers_options(line: str):
    words = {**os.environ, "COMP_LINE": line, "COMP_POINT": str(len(line))}
    command = [sys.executable, "-m", "runner", "--shell-completion", "query=bash"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=words)
    assert "quant=4bit" in done.stdout


@pytest.mark.parametrize(("line", "verbs"), [("runner ", "plan"), ("runner pl", "plan"), ("runner exp", "export")])
def test_tab_completion_offers_verbs(line: str, verbs: str):
    words = {**os.environ, "COMP_LINE": line, "COMP_POINT": str(len(line))}
    command = [sys.executable, "-m", "runner", "--shell-completion", "query=bash"]
    offered = subprocess.run(command, capture_output=True, text=True, check=True, env=words).stdout.split()
    assert verbs in offered
    assert ("generate" in offered) == (line == "runner ")
    assert any("=" in word or word.startswith("experiment") for word in offered) or line == "runner pl"


def test_sync_brings_an_offline_run_to_mlflow(capfd: pytest.CaptureFixture[str]):
    import mlflow

    assert main.run(list(QUICK)) == 0
    (rundir,) = runs()
    assert main.run(["sync", str(rundir.path)]) == 0
    client = mlflow.MlflowClient(f"sqlite:///{Path('outputs/mlflow.db').resolve()}")
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert run.info.status == "FINISHED"
    assert run.data.params["lora.r"] == "8"
    assert run.data.tags["runner.signature"] == rundir.read_manifest()["signature"]
    assert [m.step for m in client.get_metric_history(run.info.run_id, "train/loss")] == [1, 2]
    assert json.loads(rundir.manifest.read_text())["mlflow"]["run_id"] == run.info.run_id
