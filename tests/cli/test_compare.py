"""compare, from folders, a database and a server."""

# ruff: noqa: F401, F811 - fixtures are imported, then asked for by name

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

import pytest
from fixtures.compared_runs import a_sweep, as_json, counted, here, played, runner, said
from fixtures.mirrored_runs import Server

from runner.tracking import metrics_log
from runner.tracking.mlflow import store


@pytest.mark.parametrize("word", ["outputs/sweeps/played", "played"])
def test_each_folder_is_read_once(here: Path, word: str):
    sweep = a_sweep()
    for n in range(12):
        played(sweep, r=2**n, loss=float(n))
    assert counted(here, word) == "{'files': 48} False False"


def test_a_word_may_be_several_things(here: Path, capsys: pytest.CaptureFixture[str]):
    one, other = a_sweep("outputs/sweeps/one"), a_sweep("outputs/sweeps/other")
    played(one, 4, 2.0), played(one, 8, 1.0), played(other, 16, 3.0)
    labels = {
        words: [run["run"] for run in as_json(capsys, *words)["runs"]]
        for words in (("one",), ("one/lora.r=4", "other"), ("outputs/sweeps",), ())
    }
    assert labels[("one",)] == ["001-job", "000-job"]
    assert labels[("one/lora.r=4", "other")] == ["one/000-job", "other/000-job"]
    assert labels[("outputs/sweeps",)] == ["one/001-job", "one/000-job", "other/000-job"]
    assert labels[()] == ["000-job"], "no word is the latest sweep"


# What is shown


def test_what_did_not_complete_is_shown_as_what_it_is(here: Path, capsys: pytest.CaptureFixture[str]):
    sweep = a_sweep()
    played(sweep, 4, 2.0)
    played(sweep, 8, 0.5, status="failed", reason="the loss is nan at step 7", step=7)
    played(sweep, 16, None, status="killed", reason="cancelled by me", step=0)
    played(sweep, 32, 1.0)
    (sweep.path / "003-job" / "state.json").write_text("{")
    code, out, _ = said(capsys)
    assert code == 0
    lines = [line for line in out.splitlines() if re.match(r" (★ )?00\d-job", line)]
    assert [line.replace("★", "").split()[1] for line in lines] == ["completed", "failed", "damaged", "killed"]
    assert "★ 000-job" in lines[0]
    assert "failed  001-job: the loss is nan at step 7" in out
    assert "killed  002-job: cancelled by me" in out
    assert "python -m runner logs outputs/sweeps/played/001-job" in out


def test_best_is_the_smallest_after_training_began(here: Path, capsys: pytest.CaptureFixture[str]):
    played(a_sweep(), 4, 9.0)
    (run,) = as_json(capsys)["runs"]
    assert (run["eval/loss"], run["eval/best_loss"]) == (9.0, 8.75), "5.0 was before the first step"


def test_what_was_evaluated_later_can_be_asked_for(here: Path, capsys: pytest.CaptureFixture[str]):
    sweep = a_sweep()
    for r, loss in ((4, 1.0), (8, 2.0)):
        record = {"time": 200.0, "step": 20, "name": "held_out", "metrics": {"eval_held_out/loss": -loss}}
        metrics_log.append_to(played(sweep, r, loss).evaluations, record)
    found = as_json(capsys, "--sort", "eval_held_out/loss", "--where", "eval_held_out/loss<0")
    assert [run["eval_held_out/loss"] for run in found["runs"]] == [-2.0, -1.0]
    assert found["best"] == "001-job"


def test_the_forms_hold_the_same(here: Path, capsys: pytest.CaptureFixture[str]):
    sweep = a_sweep()
    for r, seed, loss in ((4, 0, 1.0), (4, 1, 1.1), (8, 0, 2.0), (8, 1, 2.1)):
        played(sweep, r, loss, seed=seed, label=f"a|b,lora.r={r},seed={seed}")
    words = ("--by", "seed", "--pareto", "loss,time")
    code, out, _ = said(capsys, *words, "--markdown")
    assert code == 0
    heading, *tables, legend, _, found = out.strip().split("\n\n")
    assert found.startswith("- lora.r: loss still falls towards the smallest value: 4 is better than 8 by 1.0000")
    assert legend.startswith("★ best run: loss (smaller is better); ◆ Pareto front of loss")
    assert heading == "**mean ± 95 % confidence interval over seed**"
    groups, runs = ([re.split(r"(?<!\\)\|", line)[1:-1] for line in table.splitlines()] for table in tables)
    assert [cell.strip() for cell in groups[0]][:3] == ["lora.r", "n", "loss"]
    assert [cell.strip() for cell in groups[2]][:3] == ["4", "2", "1.0500 ± 0.6353"]
    assert len({len(row) for row in runs}) == 1
    assert "★◆ 000-job" in runs[2][0]
    code, out, _ = said(capsys, *words, "--csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [(row["run"], row["lora.r"], float(row["eval/loss"])) for row in rows] == [
        ("000-job", "4", 1.0), ("001-job", "4", 1.1), ("002-job", "8", 2.0), ("003-job", "8", 2.1)
    ]  # fmt: skip
    found = as_json(capsys, *words)
    assert found["pareto"] == {"axes": ["eval/loss", "train/seconds"], "front": ["000-job"]}
    assert found["groups"][0]["means"]["eval/loss"]["n"] == 2


def test_runs_that_differ_in_the_seed_alone_are_one_line_under_its_explanation(
    here: Path, capsys: pytest.CaptureFixture[str]
):
    sweep = a_sweep()
    for seed, loss in enumerate((1.0, 1.5, 2.0)):
        played(sweep, 8, loss, seed=seed)
    code, out, _ = said(capsys, "--by", "seed")
    lines = [line.strip() for line in out.splitlines() if line.strip()]
    assert code == 0
    assert lines[0] == (
        "mean ± 95 % confidence interval over seed; nothing else differs, so there is no other setting to compare with"
    )
    assert lines[1].split()[:2] == ["n", "loss"]
    assert lines[3].split()[:4] == ["3", "1.5000", "±", "1.2421"]
    assert lines[4] == "3 runs (3 completed): --all shows them"
    assert "compared with best" not in out
    assert "001-job" in said(capsys, "--by", "seed", "--all")[1]
    for form in ("--markdown", "--html=page.html"):
        assert said(capsys, "--by", "seed", form)[0] == 0
    assert "nothing else differs" in Path("page.html").read_text(encoding="utf-8")


def test_the_page_is_of_what_was_compared(here: Path, capsys: pytest.CaptureFixture[str]):
    sweep = a_sweep("other/sweeps/played")
    played(sweep, 4, 2.0, seed=1), played(sweep, 8, 1.0, seed=1), played(sweep, 8, 1.0, seed=2)
    _, out, _ = said(capsys, "outputs_dir=other", "--where", "seed=1", "--by", "seed")
    assert "runner compare outputs_dir=other --where=seed=1 --by=seed --html compare.html" in out


def test_runs_of_several_stores_do_not_stand_side_by_side(here: Path, capsys: pytest.CaptureFixture[str]):
    client = store.connect(f"sqlite:///{here}/theirs.db")
    store.create_run(client, store.experiment_id(client, "runner", here), "some id", "theirs", 1.7e9)
    played(a_sweep("outputs/sweeps/mine"), 4, 1.0)
    for words, told in {
        ("uri=theirs.db", "uri=other.db"): "uri: is given more than once.*read this MLflow store",
        ("uri=theirs.db", "theirs", "outputs/sweeps/mine"): "no experiment, sweep or run 'outputs/sweeps/mine' in "
        "sqlite:.*theirs.db.*to compare folders, leave out uri=",
        ("uri=theirs.db", "runner", "mine"): "'runner' is an experiment, but mine is not",
    }.items():
        code, out, err = said(capsys, *words)
        assert (code, out) == (2, "")
        assert re.search(told, err, re.DOTALL), err


def test_an_embedded_database_that_cannot_be_read_is_an_error(here: Path, capsys: pytest.CaptureFixture[str]):
    played(a_sweep(), 4, 1.0)
    code, _, err = said(capsys, "nosuch")
    assert (code, "database" in err) == (2, False)
    Path("outputs/mlflow.db").write_text("this is no database, and never was one")
    code, _, err = said(capsys, "nosuch")
    assert code == 2
    assert "there is no run or sweep 'nosuch'" in err
    assert "file is not a database" in err


def test_runs_of_different_tasks_are_refused(here: Path, capsys: pytest.CaptureFixture[str]):
    sweep = a_sweep()
    played(sweep, 4, 1.0), played(sweep, 8, 2.0, task="pretrain")
    code, out, err = said(capsys)
    assert (code, out) == (2, "")
    assert "different tasks (1 of sft, 1 of pretrain): their losses cannot be compared" in err
    assert said(capsys, "--where", "task=pretrain")[0] == 0


def test_no_password_is_shown(here: Path, server: Server, capsys: pytest.CaptureFixture[str]):
    server.running()
    uri = server.uri.replace("://", "://me:hunter2hunter2@")
    code, out, err = said(capsys, f"uri={uri}", "no such experiment")
    assert code == 2
    assert "no such experiment" in err
    assert "hunter2" not in out + err


def test_the_hints_name_what_can_be_typed(here: Path, capsys: pytest.CaptureFixture[str]):
    sweep = a_sweep("outputs/sweeps/with space")
    (played(sweep, 4, 1.0).path / "model").mkdir()
    played(sweep, 8, 2.0)
    _, out, _ = said(capsys, "with space")
    assert "runner diff 'outputs/sweeps/with space/000-job' 'outputs/sweeps/with space/001-job'" in out
    assert "runner generate 'outputs/sweeps/with space/000-job'" in out
    assert "runner compare 'with space' --html compare.html" in out


# What is refused


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["plaied"], r"no run or sweep 'plaied'.*did you mean 'played'"),
        (["--html"], "--html: needs a value"),
        (["--html", "--csv"], "--html: needs a value"),
        (["--wher", "x=1"], "no such option.*did you mean '--where'"),
        (["--csv", "--json"], "are several output formats"),
        (["--sort", "loss", "--sort", "r"], "--sort: is given more than once"),
        (["uri=a.db", "uri=b.db"], "uri: is given more than once"),
        (["--metrics", "nothing"], "no run has the metric 'nothing'.*available metrics: eval/best_loss, eval/loss"),
        (["--html", "file/page.html"], "--html=file/page.html: cannot be written"),
        (["--html", "outputs"], "--html=outputs: cannot be written"),
        (["--png", "file"], "--png=file: cannot be written"),
        (["uri=nothing.db"], "there is no such database"),
        (["uri=http://127.0.0.1:9", "x"], "the MLflow server http://127.0.0.1:9 does not answer: Connection refused"),
        (["outputs_dir=empty"], "no runs below empty yet"),
        (["waiting"], "none of the 2 runs is completed: 2 pending.*(lora.r=4|000-job)"),
    ],
)
def test_a_line_that_means_nothing_is_refused_in_one_message(
    words: list[str], expected: str, here: Path, capsys: pytest.CaptureFixture[str]
):
    waiting = a_sweep("outputs/sweeps/waiting")
    played(waiting, 4, None, status="pending"), played(waiting, 8, None, status="pending")
    sweep = a_sweep()
    played(sweep, 4, 1.0), played(sweep, 8, 2.0)
    Path("file").write_text("")
    Path("empty").mkdir()
    code, out, err = said(capsys, *words)
    assert (code, out) == (2, "")
    assert re.search(expected, err, re.DOTALL), err
    assert err.startswith("error: ")
