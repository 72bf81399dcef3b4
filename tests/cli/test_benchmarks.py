"""Tasks of lm-eval."""

# ruff: noqa: F401 - fixtures are imported and requested by name

from __future__ import annotations

import importlib.util
from pathlib import Path

import mlflow
import pytest
from fixtures.trained_runs import _there, run_id, said, trained

from runner.tracking import metrics_log


def test_tasks_without_lm_eval_say_what_to_install(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    trained("first")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "lm_eval" else find(name, *a))
    code, _, err = said(capsys, "evaluate", "first", "--tasks", "arc_easy")
    assert (code, "runner[eval]" in err) == (2, True)


@pytest.mark.extras
def test_tasks_of_lm_eval_from_a_local_file(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    pytest.importorskip("lm_eval", reason="lm-eval is an extra: uv sync --extra eval")
    run = trained("first")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"q": "1+1=", "choices": ["2", "3"], "answer": 0}\n' * 3)
    (tmp_path / "faq.yaml").write_text(
        "task: local_faq\ndataset_path: json\noutput_type: multiple_choice\ntest_split: test\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\n"
        "doc_to_text: '{{q}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: '{{answer}}'\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    words = ("evaluate", "first", "--tasks", str(tmp_path / "faq.yaml"))
    assert said(capsys, *words)[0] == 0
    found = metrics_log.read_evaluations(run)[-1]
    assert (found["name"], found["tasks"], found["rows"]) == ("local_faq", "local_faq", 3)
    assert found["metrics"]["eval_local_faq/acc"] in (0.0, 1.0)
    client = mlflow.MlflowClient(run.read_manifest()["mlflow"]["uri"])
    there = client.get_run(run_id(run)).data.metrics
    assert there["eval_local_faq/acc"] == found["metrics"]["eval_local_faq/acc"]
    assert said(capsys, *words, "--base")[0] == 0, "the same rows once more"
    assert "eval_local_faq/base_acc" in metrics_log.read_evaluations(run)[-1]["metrics"]

    before = run.evaluations.read_text()
    with rows.open("a") as handle:
        handle.write('{"q": "2+2=", "choices": ["4", "5"], "answer": 0}\n')
    for refused, part in {
        words: "--tasks=local_faq: was used before for other rows (3 of the task local_faq)",
        ("evaluate", "first", "--name", "local_faq"): "--name=local_faq: was used before for other rows",
        ("evaluate", "first", "--tasks", "arc_esy"): "did you mean",
    }.items():
        code, _, err = said(capsys, *refused)
        assert (code, part in err) == (2, True), err
    assert run.evaluations.read_text() == before
    assert said(capsys, *words, "--limit", "1")[0] == 0, "which is called otherwise"
    assert metrics_log.read_evaluations(run)[-1]["name"] == "local_faq_1"
