"""evaluate against the numbers of training and of transformers."""

# ruff: noqa: F401 - fixtures are imported, then asked for by name

from __future__ import annotations

import json
from pathlib import Path

import mlflow
import pytest
from fixtures.trained_runs import _there, logits, run_id, said, trained
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

from runner.cli import main
from runner.tracking import metrics_log

# evaluate


@pytest.mark.parametrize("name", ["first", "whole", "four"])
def test_the_held_out_rows_give_what_training_measured(capsys: pytest.CaptureFixture[str], name: str):
    run = trained(name)
    before = len(metrics_log.read_evaluations(run))
    assert said(capsys, "evaluate", name)[0] == 0
    assert said(capsys, "evaluate", name, "--base")[0] == 0
    tuned, base = metrics_log.read_evaluations(run)[before:]
    summary = run.read_state().summary
    assert tuned["metrics"]["eval_held_out/loss"] == pytest.approx(summary["eval/loss"], rel=1e-9)
    assert base["metrics"]["eval_held_out/base_loss"] == pytest.approx(summary["eval/loss before"], rel=1e-9)
    assert (tuned["rows"], tuned["is_base"], base["is_base"]) == (4, False, True)


def test_other_data_is_measured_whole_and_the_run_in_mlflow_has_it(capsys: pytest.CaptureFixture[str], place: Path):
    run = trained("first")
    words = ("evaluate", "first", "data=local", "data.path=rows.jsonl")
    assert said(capsys, *words)[0] == 0
    assert said(capsys, *words, "data.eval_rows=2", "--name", "two")[0] == 0
    whole, two = metrics_log.read_evaluations(run)[-2:]
    assert (whole["name"], whole["rows"], two["name"], two["rows"]) == ("rows", 6, "two", 2)
    assert whole["data"]["uri"].endswith("rows.jsonl")
    client = mlflow.MlflowClient(run.read_manifest()["mlflow"]["uri"])
    there = client.get_run(run_id(run))
    assert there.data.metrics["eval_rows/loss"] == whole["metrics"]["eval_rows/loss"]
    assert there.data.metrics["eval_two/loss"] == two["metrics"]["eval_two/loss"]
    assert there.info.status == "FINISHED"
    assert main.run(["sync", str(run.path)]) == 0  # nothing twice
    assert len(client.get_metric_history(run_id(run), "eval_rows/loss")) == 1
    assert (place / "rows.jsonl").exists()


def test_loss_on_other_data_is_that_of_transformers(capsys: pytest.CaptureFixture[str]):
    """The mean over the answers' tokens, their ends included, one conversation after the other."""
    run = trained("first")
    assert said(capsys, "evaluate", "first", "data=local", "data.path=rows.jsonl", "--name", "check")[0] == 0
    found = metrics_log.read_evaluations(run)[-1]
    model, tokenizer = AutoPeftModelForCausalLM.from_pretrained(run.model), AutoTokenizer.from_pretrained(run.model)
    total, count = 0.0, 0
    for line in Path("rows.jsonl").read_text().splitlines():
        messages = json.loads(line)["messages"]
        given = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
        answer = tokenizer(messages[1]["content"] + "<|im_end|>")["input_ids"]
        ids = tokenizer(given)["input_ids"] + answer
        chances = logits(model, ids).log_softmax(-1)
        total -= sum(float(chances[len(ids) - len(answer) - 1 + i, token]) for i, token in enumerate(answer))
        count += len(answer)
    assert found["trained_tokens"] == count
    assert found["metrics"]["eval_check/loss"] == pytest.approx(total / count, rel=1e-5)


def test_rows_that_were_trained_on_are_warned_of(capsys: pytest.CaptureFixture[str]):
    trained("first")
    assert "trained on" in said(capsys, "evaluate", "first", "data=chitchat", "data.eval_rows=2")[2]


def test_what_cannot_be_evaluated_is_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    from runner.models import pretrained

    run = trained("first")
    before = run.evaluations.read_text() if run.evaluations.exists() else ""
    monkeypatch.setattr(pretrained, "load", lambda *_: pytest.fail("a model was loaded"))
    for words, part in {
        ("optim=adamw",): "cannot be changed",
        ("data.eval_fraction=0.5",): "no effect",
        ("data.eval_rows=1,2",): "one value",
        ("data.pth=x",): "no such key",
        ("data=locl",): "did you mean 'local'",
        ("data=local", "data.path=nowhere.jsonl"): "no such file",
        ("rows.jsonl",): "is not an override",
        ("--limit", "3"): "has no effect without --tasks",
        ("--name", "a/b"): "is not a valid metric name",
    }.items():
        code, _, err = said(capsys, "evaluate", "first", *words)
        assert (code, part in err) == (2, True), (words, err)
    assert (run.evaluations.read_text() if run.evaluations.exists() else "") == before
