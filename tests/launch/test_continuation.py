"""``resume=RUN`` with a later end: a new run that goes on where a completed one ended."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY
from safetensors.torch import load_file

from runner.cli import main
from runner.tracking import metrics_log, origin
from runner.tracking.manifest import read_config
from runner.tracking.rundir import RunDir

TIMES = ("per_second", "seconds", "mfu", "fraction", "memory/", "time")


def train(*words: str) -> RunDir:
    assert main.run([*words]) == 0
    return RunDir(Path(next(word for word in words if word.startswith("hydra.run.dir=")).partition("=")[2]).absolute())


def weights(rundir: RunDir) -> dict[str, list[float]]:
    file = next(rundir.model.glob("*model.safetensors"))
    return {name: tensor.flatten().tolist() for name, tensor in load_file(file).items()}


def records(rundir: RunDir) -> list[dict[str, Any]]:
    kept = [
        {k: v for k, v in each.items() if not any(time in k for time in TIMES)} for each in metrics_log.read(rundir)
    ]
    return [each for each in kept if len(each) > 1]


@pytest.fixture
def here(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_where_the_schedule_is_the_same_the_result_is_that_of_one_run(here: Path, capsys: pytest.CaptureFixture[str]):
    options = (
        *TINY[:-1],
        "schedule=constant",
        "lora.lora_dropout=0.2",
        "train.sample_prompts=1",
        "train.sample_tokens=2",
    )
    first = train(*options, "train.max_steps=2", "hydra.run.dir=first")
    before = {path: path.stat().st_mtime_ns for path in first.path.rglob("*")}
    capsys.readouterr()
    longer = train("resume=first", "train.max_steps=4", "hydra.run.dir=longer")
    assert "goes on from step 2 of" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in first.path.rglob("*")} == before
    whole = train(*options, "train.max_steps=4", "hydra.run.dir=whole")
    assert weights(longer) == weights(whole)
    at_the_end_of_first = [each for each in records(longer) if each["step"] == 2 and "eval/loss" in each]
    assert [each for each in records(longer) if each not in at_the_end_of_first] == records(whole)
    assert longer.samples.read_text() == whole.samples.read_text()
    recorded, of_whole = longer.read_manifest(), whole.read_manifest()
    assert (recorded["signature"], recorded["choices"]) == (of_whole["signature"], of_whole["choices"])
    (entry,) = recorded[origin.FIELD]
    assert (entry["how"], entry["where"], entry["step"]) == ("resume", str(first.path), 2)
    assert origin.chain(recorded).startswith(str(entry["name"]))


@pytest.mark.parametrize("lora", ["lora", "none"])
def test_where_it_differs_a_run_from_the_weights_trains_what_is_missing(
    here: Path, capsys: pytest.CaptureFixture[str], lora: str
):
    first = train(*TINY, f"lora={lora}", "train.max_steps=3", "optim.learning_rate=1e-2", "hydra.run.dir=first")
    capsys.readouterr()
    longer = train("resume=first", "train.max_steps=5", "hydra.run.dir=longer", "name=longer")
    said = capsys.readouterr().err
    assert "a new run of max_steps=2 from the weights of" in said
    assert re.search(r"the learning rates of a longer run differ from step \d on, so optimizer, schedule", said)
    last, new = first.read_state().summary, longer.read_state().summary
    assert last["eval/loss"] != last["eval/loss before"]
    assert new["eval/loss before"] == pytest.approx(last["eval/loss"], rel=1e-4)
    assert read_config(longer)["train"]["max_steps"] == longer.read_state().step == 2
    (entry,) = longer.read_manifest()[origin.FIELD]
    assert entry["where"] == str(first.path)
    assert entry["weights_sha256"] == first.read_manifest()["weights_sha256"]


def test_epochs_that_were_not_trained_are_missing(here: Path, capsys: pytest.CaptureFixture[str]):
    epochs = ("train.max_steps=null", "train.num_train_epochs=2", "train.max_minutes=1e-9")
    state = train(*TINY, *epochs, "hydra.run.dir=first").read_state()
    reached = 2 * state.step / state.total_steps
    assert 0 < reached < 1, "it ended after its first step"
    capsys.readouterr()
    assert main.run(["resume=first", f"train.num_train_epochs={reached / 2}"]) == 2
    assert f"the run has trained {round(reached, 6)} already" in capsys.readouterr().err
    longer = train("resume=first", "train.num_train_epochs=3", "hydra.run.dir=longer")
    assert read_config(longer)["train"]["num_train_epochs"] == pytest.approx(3 - reached)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["train.max_steps=1"], "train.max_steps=1: the run has trained 2 already"),
        (["train.num_train_epochs=1"], "which has another kind of end"),
        (["train.max_steps=4", "lora.r=16"], "cannot change train.max_steps=4, lora.r=16"),
        (["train.max_steps=null"], "train: needs one new end"),
    ],
)
def test_what_is_no_later_end_is_refused(
    completed: Path, capsys: pytest.CaptureFixture[str], words: list[str], problem: str
):
    before = sorted(completed.parent.rglob("*"))
    assert main.run([f"resume={completed}", *words, f"outputs_dir={completed.parent}"]) == 2
    assert problem in capsys.readouterr().err
    assert sorted(completed.parent.rglob("*")) == before


@pytest.fixture(scope="module")
def completed(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    return train(*TINY, "train.max_steps=2", f"hydra.run.dir={tmp_path_factory.mktemp('end') / 'run'}").path
