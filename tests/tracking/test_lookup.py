"""RUN as people write it."""

# ruff: noqa: F401 - fixtures are imported, then asked for by name

from __future__ import annotations

import os
from pathlib import Path

import pytest
from fixtures.run_folders import _in_a_new_folder, a_sweep, played, said_of

from runner.errors import ConfigError
from runner.tracking import lookup
from runner.tracking.rundir import RunDir


def refused(word: str) -> str:
    with pytest.raises(ConfigError) as caught:
        lookup.resolve_run(word, Path("outputs"))
    return str(caught.value)


def test_a_run_is_found_by_the_name_of_its_folder():
    first, second = played("2026-11-23/23-07-46", name="a"), played("2026-11-23/23-08-00", name="b")
    assert lookup.resolve_run("23-07-46", Path("outputs")) == first
    assert lookup.resolve_run("2026-11-23/23-08-00", Path("outputs")) == second
    played("2026-11-24/23-07-46", name="c")
    said = refused("23-07-46")
    assert "is the name of 2 runs" in said
    assert "2026-11-24/23-07-46" in said
    said = refused("2026-11-23/23-0")
    assert "names that begin with '2026-11-23/23-0' (2):" in said
    assert "23-07-46" in said
    assert "23-08-00" in said
    assert "2026-11-24" not in said


def test_the_nearest_is_named_though_many_are_newer():
    played("old", name="First try,train.max_steps=300,train.eval_steps=50,optim.learning_rate=0.001", created=1.0)
    for number in range(lookup.SHOWN + 1):
        played(f"new-{number}", name=f"lora.r={number}", created=10.0 + number)
    assert "outputs/old" not in refused("nothing like it"), "the latest are listed"
    assert "names that begin with 'First' (1):\n      outputs/old  (run First try" in refused("First")
    assert "names that contain 'first' (1):\n      outputs/old  (run First try" in refused("first")
    assert "names that contain 'ora.r' (9):\n      outputs/new-8" in refused("ora.r")
    assert "did you mean 'optim.learning_rate=0.001'?" in refused("optim.learning_rate=0.01")
    assert lookup.resolve_run("optim.learning_rate=0.001", Path("outputs")).path.name == "old"


def test_too_few_characters_of_an_id_are_refused_with_their_number():
    run = played("one", mlflow={"run_id": "9abc" * 8})
    assert "for an MLflow run id give 4 characters or more" in refused("9")
    assert "4 characters or more" in refused("nothing like it")
    assert lookup.resolve_run("9abc", Path("outputs")) == run


def test_a_sweep_names_its_runs_the_best_first():
    sweep = a_sweep("small")
    for number, (quant, loss) in enumerate((("none", 2.0), ("8bit", 1.0), ("4bit", None))):
        summary = {"eval/loss": loss} if loss else {}
        run = played(f"00{number}", "completed" if loss else "failed", sweep, label=f"quant={quant}")
        run.write_state(summary=summary)
    lines = refused("small").splitlines()[-3:]
    assert lines[0].endswith("small/001  (quant=8bit, loss 1.0000) ★ the best")
    assert lines[1].endswith("small/000  (quant=none, loss 2.0000)")
    assert lines[2].endswith("small/002  (quant=4bit, failed)")


# RUN as people write it


def test_a_run_is_found_by_each_of_its_names(capsys: pytest.CaptureFixture[str]):
    single = played("2026-01-31/12-00-00", name="first", mlflow={"run_id": "3f2a99"}, slurm={"job_id": "123_4"})
    sweep = a_sweep("ablation", mlflow={"parent_run_id": "77aa00"})
    job = played("000-aa", sweep=sweep, label="quant=4bit,lora.r=8", mlflow={"run_id": "3f2b11"})
    outputs = Path("outputs")
    for word in ("outputs/2026-01-31/12-00-00", "2026-01-31/12-00-00", str(single.path), "first", "3f2a99", "3f2a",
                 "123_4"):  # fmt: skip
        assert lookup.resolve(word, outputs) == single, word
    for word in ("outputs/sweeps/ablation", "sweeps/ablation", "ablation", "77aa"):
        assert lookup.resolve(word, outputs) == sweep, word
    for word in ("quant=4bit,lora.r=8", "lora.r=8", "ablation/lora.r=8", "ablation/000-aa", "000-aa", "3f2b1"):
        assert lookup.resolve(word, outputs) == job, word
    with pytest.raises(ConfigError):
        lookup.resolve("ablation/lora.r=80", outputs)
    assert lookup.resolve_run("first", outputs) == single
    with pytest.raises(ConfigError, match=r"(?s)is a sweep.*000-aa"):
        lookup.resolve_run("ablation", outputs)


def test_what_is_not_there_or_ambiguous_is_refused_with_the_way_on(capsys: pytest.CaptureFixture[str]):
    one, two = played("a/1", name="twice"), played("a/2", name="twice")
    played("a/3", mlflow={"run_id": "3f2a99"})
    played("a/4", mlflow={"run_id": "3f2abb"})
    code, _, err = said_of("status", "twise", capsys=capsys)
    assert code == 2
    assert "did you mean 'twice'?" in err
    code, _, err = said_of("logs", "twice", capsys=capsys)
    assert code == 2
    assert "the name of 2 runs" in err
    assert os.path.relpath(one.path) in err
    assert os.path.relpath(two.path) in err
    assert said_of("cancel", "3f2a", capsys=capsys)[0] == 2  # two begin so
    code, _, err = said_of("status", "--wach", capsys=capsys)
    assert (code, "did you mean '--watch'?" in err) == (2, True)
    assert said_of("status", "outputs_dir=nowhere", capsys=capsys)[0] == 2
    assert said_of("logs", capsys=capsys)[0] == 2
    assert said_of("cancel", capsys=capsys)[0] == 2
    assert said_of("logs", "a/3", "--rank", "x", capsys=capsys)[0] == 2


def test_artifacts_of_mlflow_are_no_runs(tmp_path: Path):
    RunDir(tmp_path / "mlartifacts" / "0" / "artifacts").update_manifest(id="copy")
    rundir = RunDir(tmp_path / "run")
    rundir.update_manifest(id="x")
    assert lookup.find_runs(tmp_path) == [rundir]
