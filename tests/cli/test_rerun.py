"""rerun and diff: real runs, in this process and in clones of the project, from folders and from MLflow alone."""

# ruff: noqa: F401 - fixtures are imported, then asked for by name

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlflow
import pytest
from conftest import TESTS, prepared, until
from fixtures.clones import QUICK, _in_a_new_folder, git, runner, trained

from runner.cli import main, rerun, worktree
from runner.errors import ConfigError
from runner.files import copy_of
from runner.report import diff
from runner.report.record import of_folder
from runner.tracking import checkout, manifest
from runner.tracking.rundir import RunDir

MIRRORED = (*(word for word in QUICK if not word.startswith("tracking")), "tracking.system_metrics=false")
PROJECT = TESTS.parent


def rows(path: Path, count: int = 40) -> Path:
    """Data of the user's own, in the format that ``data/format=alpaca`` reads."""
    lines = [{"instruction": f"What is {n} + 1?", "input": "", "output": f"It is {n + 1}."} for n in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def the_rerun(of: RunDir) -> RunDir:
    found = [path.parent for path in Path("outputs").absolute().glob("*/*/manifest.json")]
    (made,) = [RunDir(path) for path in found if (RunDir(path).read_manifest().get("rerun") or {}).get("id")]
    assert made.read_manifest()["rerun"]["id"] == of.read_manifest()["id"]
    return made


def test_a_rerun_is_the_same_bit_by_bit_and_reports_it(capfd: pytest.CaptureFixture[str]):
    original = trained("first")
    capfd.readouterr()
    assert main.run(["rerun", "first"]) == 0
    said = capfd.readouterr().err
    made = the_rerun(original)
    assert re.search(r"code +the same\nenvironment the same\nhardware +the same", said)
    same = "train/loss, eval/loss and all other compared metrics at 4 steps, bit for bit; the weights are identical"
    assert f"identical to the original: {same}" in said
    digest = original.read_manifest()["data"]["digest"]
    assert f"data        will be checked against the digest {digest[:12]}" in said
    assert f"data        the same rows as the original (digest {digest[:12]})\nrerun       identical" in said
    manifest = made.read_manifest()
    assert manifest["rerun"]["outcome"] == {"identical": True, "steps": 4, "first": None, "same_weights": True}
    assert manifest["signature"] == original.read_manifest()["signature"]
    assert manifest["weights_sha256"] == original.read_manifest()["weights_sha256"]
    assert manifest["name"] == f"rerun of {original.read_manifest()['name']}"
    assert {"config.yaml", "overrides.yaml", "hydra.yaml"} == {path.name for path in (made.path / ".hydra").iterdir()}

    assert main.run(["diff", "first", str(made.path)]) == 0
    said = capfd.readouterr().out
    assert "the same: configuration, code, environment, data, hardware" in said
    assert "identical, bit by bit, at all 4 steps that both runs have" in said


def test_other_numbers_are_found_where_they_begin(capfd: pytest.CaptureFixture[str]):
    original = trained("first")
    records = [json.loads(line) for line in original.metrics.read_text().splitlines()]
    for record in records:
        if record["step"] == 2:
            record["train/loss"] = math.nextafter(record["train/loss"], math.inf)
    original.metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    original.update_manifest(weights_sha256="0" * 32, hardware={**original.read_manifest()["hardware"], "cpus": 4096})
    original.update_manifest(versions={**original.read_manifest()["versions"], "torch": "2.4.9"})
    capfd.readouterr()
    assert main.run(["rerun", "first"]) == 0
    said = capfd.readouterr().err
    outcome = the_rerun(original).read_manifest()["rerun"]["outcome"]
    assert (outcome["identical"], outcome["first"][:2], outcome["same_weights"]) == (False, [2, "train/loss"], False)
    assert "not identical: first difference at step 2, train/loss was" in said
    assert re.search(r"environment torch: then 2\.4\.9, now \d", said)
    assert re.search(r"hardware +cpus: then 4096, now \d", said)
    assert said.index("cpus: then") < said.index("step 0/3"), "before it starts"


def test_where_and_how_may_be_changed_and_nothing_else(capfd: pytest.CaptureFixture[str]):
    original = trained("first")
    config = original.config.read_text()
    where = ["outputs_dir=elsewhere", "hydra.run.dir=again", "launcher.threads=1", "tracking.experiment=mine"]
    assert main.run(["rerun", "first", *where, "name=twice"]) == 0
    made = RunDir(Path("again").absolute())
    cfg = manifest.read_config(made)
    assert made.read_manifest()["name"] == "twice"
    assert cfg["outputs_dir"] == str(Path("elsewhere").absolute())
    assert cfg["launcher"]["threads"] == 1
    assert cfg["tracking"]["experiment"] == "mine"
    assert made.read_state().status == "completed"
    assert original.config.read_text() == config
    capfd.readouterr()

    for words, said in (
        (["quant=4bit"], "would change what is computed; a rerun accepts only where and how it runs"),
        (["hydra.run.dir=again"], "contains a run already"),
        (["launcher.thread=1"], "did you mean 'threads'"),
        (["launcher=nowhere"], "no such option"),
        (["launcher=accelerate", "launcher.processes=2"], "each would train the same"),
        (["tracking=server"], "needs a value"),
        (["--exactly"], "did you mean '--exact'"),
    ):
        assert main.run(["rerun", "first", *words]) == 2, words
        told = capfd.readouterr().err
        assert re.search(said, told, re.DOTALL), told
        assert "Traceback" not in told
    assert not list(Path("outputs").glob("*/*"))


def test_changed_data_is_refused_and_moved_data_is_found(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    data = rows(tmp_path / "rows.jsonl")
    mine = ("data=local", f"data.path={data}", "data/format=alpaca", "data.train_rows=null", "data.max_length=128")
    original = trained("first", *mine)
    moved = data.rename(tmp_path / "moved.jsonl")
    assert main.run(["rerun", "first"]) == 2
    assert "set KEY=… to their path here" in capfd.readouterr().err
    assert main.run(["rerun", "first", f"data.path={moved}"]) == 0
    assert "identical to the original" in capfd.readouterr().err
    made = the_rerun(original)
    assert made.read_manifest()["data"]["digest"] == original.read_manifest()["data"]["digest"]
    shutil.rmtree(made.path)

    with moved.open("a") as handle:
        handle.write('{"instruction": "And now?", "input": "", "output": "Something else."}\n')
    assert main.run(["rerun", "first", f"data.path={moved}"]) == 2
    assert "is not the data of the original run" in capfd.readouterr().err
    assert not list(Path("outputs").glob("*/*/config.yaml")), "what was refused leaves nothing"


def test_runs_that_cannot_be_repeated_or_compared_are_refused(capfd: pytest.CaptureFixture[str], tmp_path: Path):
    waiting = prepared(tmp_path / "waiting", *QUICK)
    begun = prepared(tmp_path / "begun", *QUICK, "lora.r=4")
    begun.write_state(status="killed", attempt=1, step=1)
    torn = prepared(tmp_path / "torn", *QUICK)
    torn.manifest.write_text("{")
    bare = prepared(tmp_path / "bare", *QUICK)
    bare.manifest.unlink()
    for rundir in (torn, bare):
        copy_of(rundir.manifest).unlink()
    Path("empty").mkdir()
    starting = prepared(tmp_path / "starting", *QUICK).lock.open("a")
    fcntl.flock(starting, fcntl.LOCK_EX)
    sweep = tmp_path / "outputs" / "sweeps" / "some"
    sweep.mkdir(parents=True)
    job = {"folder": str(begun.path), "label": "lora.r=4"}
    (sweep / "sweep.json").write_text(json.dumps({"name": "some", "jobs": {"x": job}}))
    for words, said in (
        (["diff", "begun"], "needs two runs, not 1"),
        (["diff", "begun", "begun"], "are the same run"),
        (["diff", "begun", "waiting"], "has not started: there is nothing to compare yet"),
        (["diff", "begun", "torn"], "torn.*is damaged"),
        (["diff", "begun", "bare"], "has no manifest.json"),
        (["diff", "begun", "empty"], "is not a run folder"),
        (["diff", "begun", "some"], "is a sweep, but one run is required"),
        (["diff", "begun", "nobody", "uri=sqlite:////nowhere/mlflow.db"], "no such database"),
        (["diff", "begun", "nobody", "uri=file:///tmp"], "no longer supports"),
        (["diff", "begun", "nobody", "uri="], "needs a value"),
        (["diff", "--json", "--markdown", "begun", "torn"], "leave one of them out"),
        (["rerun"], "needs a run"),
        (["rerun", "begun", "waiting"], "takes one run, not 2"),
        (["rerun", "waiting"], "has not started.*resume="),
        (
            ["rerun", "starting"],
            "starting is starting: there is nothing to repeat yet.*wait until the run has finished",
        ),
        (["rerun", "nobody"], "there is no run or sweep 'nobody'"),
        (["rerun", "empty", "--exact"], "is not a run folder"),
    ):
        assert main.run(words) == 2, words
        told = capfd.readouterr().err
        assert re.search(said, told, re.DOTALL), told
        assert "Traceback" not in told
    assert waiting.read_state().status == "pending"


def clone(folder: Path) -> Path:
    """The project as it is now, committed."""
    current = checkout.current()
    if current is None:
        pytest.skip("these tests do not lie in a git checkout")
    git(PROJECT, "clone", "-q", str(PROJECT), str(folder))
    if current.patch:
        subprocess.run(["git", "apply", "-"], cwd=folder, input=current.patch.encode(), check=True)
        git(folder, "add", "-A")
        git(folder, "commit", "-qm", "what is not committed yet")
    return folder


def halve_learning_rate(code: Path) -> None:
    """An uncommitted change of results: a line, and a file that git does not know."""
    (code / "src" / "runner" / "train" / "halved.py").write_text("FACTOR = 0.5\n")
    file = code / "src" / "runner" / "train" / "optim.py"
    text = file.read_text().replace("lr=learning_rate, weight_decay", "lr=learning_rate * FACTOR, weight_decay")
    file.write_text(text.replace("from runner.errors", "from runner.train.halved import FACTOR\nfrom runner.errors", 1))


@pytest.mark.slow
def test_a_run_of_another_clone_from_mlflow_alone(tmp_path: Path):
    """The original lies in a clone with uncommitted changes, and only MLflow has it when the other clone repeats it."""
    theirs, ours = clone(tmp_path / "theirs"), tmp_path / "ours"
    git(tmp_path, "clone", "-q", str(theirs), str(ours))
    halve_learning_rate(theirs)
    done = runner(theirs, *MIRRORED, "outputs_dir=there", "hydra.run.dir=there/original")
    assert done.returncode == 0, done.stderr
    original = of_folder(RunDir(Path("there/original").absolute()))
    assert original.manifest["git"]["dirty"]
    assert "halved.py" in original.patch
    uri, short = f"sqlite:///{tmp_path}/there/mlflow.db", original.mlflow_id[:8]
    shutil.rmtree("there/original")

    as_it_is = runner(ours, "rerun", short, f"uri={uri}", "hydra.run.dir=plain", "tracking=offline")
    assert as_it_is.returncode == 0, as_it_is.stderr
    assert re.search(r"src/runner/train/halved\.py  \+0 -1\n", as_it_is.stderr)
    assert re.search(r"src/runner/train/optim\.py  \+\d+ -\d+\n", as_it_is.stderr)
    assert "not identical: first difference at step 1, train/learning_rate was 0.0005 and is 0.001" in as_it_is.stderr

    exact = runner(ours, "rerun", short, f"uri={uri}", "--exact", "hydra.run.dir='exact, one'")
    assert exact.returncode == 0, exact.stderr
    assert "identical to the original: train/loss, eval/loss and all other compared metrics at 4 steps" in exact.stderr
    assert "the weights are identical" in exact.stderr
    manifest = RunDir(Path("exact, one")).read_manifest()
    assert {key: manifest[key] for key in ("git", "code_sha256")} == {
        key: original.manifest[key] for key in ("git", "code_sha256")
    }
    assert manifest["rerun"] | {"outcome": 0} == {
        "of": original.mlflow_id, "id": original.manifest["id"], "where": f"{short} in {uri}", "exact": True,
        "outcome": 0,
    }  # fmt: skip
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/outputs/mlflow.db")
    assert client.get_run(manifest["mlflow"]["run_id"]).data.tags["runner.rerun_of"] == original.mlflow_id

    told = runner(ours, "diff", "plain", "exact, one", "--patch")
    assert re.search(r"uncommitted changes +none +yes \(", told.stdout)
    assert re.search(r"^\+FACTOR = 0\.5$", told.stdout, re.MULTILINE)
    assert not git(ours, "status", "--porcelain")

    again = runner(ours, "rerun", short, f"uri={uri}", "--exact", "lora.r=4")
    assert again.returncode == 2
    (folder,) = [Path(line.split()[0]) for line in git(ours, "worktree", "list").splitlines()[1:]]
    (folder / "src" / "runner" / "train" / "halved.py").write_text("FACTOR = 2\n")
    assert runner(ours, "rerun", short, f"uri={uri}", "--exact", "tracking=nothing").returncode == 2
    assert (folder / "src" / "runner" / "train" / "halved.py").read_text() == "FACTOR = 0.5\n", (
        "an edited copy is made anew"
    )

    missing = runner(ours, "rerun", "0123abcd", f"uri={uri}")
    assert missing.returncode == 2
    assert f"there is no run '0123abcd' in {uri}" in missing.stderr
    assert original.mlflow_id in missing.stderr


def test_a_run_that_a_database_has_not_is_refused_without_mlflow(tmp_path: Path):
    assert main.run([*MIRRORED, "hydra.run.dir=first"]) == 0
    run = RunDir(Path("first").absolute())
    uri, of_it = f"sqlite:///{tmp_path}/outputs/mlflow.db", run.read_manifest()["mlflow"]["run_id"]
    program = (
        "import sys; from runner.report import record, store_lookup\n"
        f"assert record.of_store({of_it[:6]!r}, {uri!r}).folder.name == 'first'\n"
        f"try: record.of_store('ffffffff', {uri!r})\n"
        "except store_lookup.UnknownRunError as error: print(error)\n"
        "assert 'mlflow' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"there is no run 'ffffffff' in {uri}" in done.stdout
    assert of_it in done.stdout, "what there is"


@pytest.mark.slow
def test_ctrl_c_reaches_an_exact_rerun(tmp_path: Path):
    ours = clone(tmp_path / "ours")
    done = runner(ours, *QUICK, "train.max_steps=500", "train.save_steps=500", "hydra.run.dir=first", "seed=1")
    assert done.returncode == 0, done.stderr
    words = [sys.executable, "-m", "runner", "rerun", "first", "--exact", "hydra.run.dir=again"]
    proc = subprocess.Popen(words, env={**os.environ, "PYTHONPATH": str(ours / "src")}, stderr=subprocess.PIPE)
    try:
        until(lambda: RunDir(Path("again")).read_state().step >= 5)
        proc.send_signal(signal.SIGINT)
        said = proc.communicate()[1].decode()
    finally:
        proc.kill()
    state = RunDir(Path("again")).read_state()
    assert (proc.returncode, state.status) == (130, "killed"), said
    assert "the state is saved at step" in state.reason
    assert "when the rerun is completed" in said


def test_exact_is_refused_where_the_code_cannot_be_had(tmp_path: Path):
    """In a repository of its own: no commit, an unknown one, changes that do not apply or that were not kept."""
    run = of_folder(prepared(tmp_path / "run", *QUICK))

    def refused(**changes: Any) -> str:
        git_says = {**run.manifest["git"], **changes.pop("git", {})}
        changed = diff.Recorded(**{**vars(run), **changes, "manifest": {**run.manifest, "git": git_says}})
        with pytest.raises(ConfigError) as error:
            worktree.provide(changed)
        return str(error.value)

    assert "no commit is recorded" in refused(git={"sha": None})
    if checkout.current() is None:
        pytest.skip("these tests do not lie in a git checkout")
    assert "is not in" in refused(git={"sha": "0" * 40})
    assert "were not recorded" in refused(git={"dirty": True}, patch="")
    patch = "diff --git a/README.md b/README.md\n--- a/README.md\n+++ b/README.md\n@@ -1 +1 @@\n-nothing\n+more\n"
    before = git(PROJECT, "worktree", "list")
    assert "the recorded uncommitted changes do not apply" in refused(git={"dirty": True}, patch=patch)
    assert git(PROJECT, "worktree", "list") == before


def test_the_first_word_is_the_run_even_if_it_looks_like_an_override():
    assert rerun._split(["lora.r=8", "launcher.threads=1"]) == ("lora.r=8", ["launcher.threads=1"])
    assert rerun._split(["launcher.threads=1", "first"]) == ("first", ["launcher.threads=1"])
