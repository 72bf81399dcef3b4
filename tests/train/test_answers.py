"""Metrics of the answers to held-out prompts: built in and of the user's, tables, refusals, and what resumes keep."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, composed, prepared
from test_loop import Recorded, parts_of

from runner.errors import ConfigError, DataError
from runner.tasks.reward_functions import Rewards
from runner.train import answers, evaluation

ASKED = (*TINY, "train.metric_rows=2", "train.metric_tokens=4", "train.max_steps=2")
OWN = """
def is_short(prompts, completions, completion_ids, reference, **columns):
    assert len(prompts) == len(completions) == len(completion_ids) == len(reference)
    return [None if index == 0 else len(ids) for index, ids in enumerate(completion_ids)]


def has_key(completions, key, **_):
    return [0.0 if each is None else 1.0 for each in key]


def place(prompts, completions, **_):
    if len(prompts) > 2:  # before training, the answer to one prompt is scored twice
        assert [prompts.index(each) for each in prompts] == [0, 0, 0, 3, 3, 3]
        assert len(set(completions)) > 2
    return list(range(len(prompts)))


def broken(**_):
    return [1.0]
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "lab.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_functions_get_the_columns_of_all_prompts(own: Path):
    prompts = [answers.Prompt([1], {"reference": "a"}), answers.Prompt([2], {"reference": "b", "key": "k"})]
    functions = Rewards(["lab.py:has_key"], (str(own / "lab.py"),), [1.0], 5.0)
    questions = answers.Questions(prompts, functions, most_tokens=4, at_a_time=2)
    tokenizer = SimpleNamespace(decode=lambda ids, **_: str(ids))
    for shares in (prompts, prompts[:1]):  # a rank may have the first prompt alone
        scores = questions.scored(shares, [[3]] * len(shares), tokenizer)[1]
        assert scores[:, 0].tolist() == [0.0, 1.0][: len(shares)]


def test_the_prompt_ends_where_the_answer_begins(tmp_path: Path, cache: Path):
    run_inputs, parts = parts_of(tmp_path, *ASKED, "train.metrics=[exact_match]")
    questions = parts.answering.questions
    assert len(questions.prompts) == 2
    samples = [(sample["prompt"], sample["reference"].strip()) for sample in run_inputs.splits.samples]
    tokenizer = run_inputs.tokenizer
    for prompt in questions.prompts:
        assert (tokenizer.decode(prompt.ids), prompt.columns["reference"]) in samples, "none is cut"
    ((label, text),) = run_inputs.notes
    assert (label, text) == ("metrics", "exact_match 1 for the reference answer to the first of 2 prompts")


def test_the_answers_are_those_of_transformers_and_are_kept(own: Path, cache: Path):
    _, parts = parts_of(own / "run", *ASKED, "train.metrics=[f1,lab.py:is_short]", "train.per_device_batch_size=2")
    recorded = Recorded()
    metrics = evaluation.evaluate(parts, 0, recorded.hooks())
    table = json.loads((own / "run" / "answers" / "step-000000.json").read_text())
    assert [set(row) for row in table] == [{"prompt", "reference", "answer", "f1", "is_short"}] * 2
    for prompt, row in zip(parts.answering.questions.prompts, table, strict=True):
        ids = torch.tensor([prompt.ids])
        out = parts.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False
        )
        text = parts.answering.tokenizer.decode(out[0, len(prompt.ids) :], skip_special_tokens=True)
        assert row["answer"] == text.strip()
    assert table[0]["is_short"] is None
    assert metrics["eval/f1"] == pytest.approx(sum(row["f1"] for row in table) / 2)
    assert metrics["eval/is_short"] == pytest.approx(sum(row["is_short"] for row in table[1:]))


def test_several_answers_to_each_prompt_are_sampled_and_averaged(own: Path, cache: Path):
    settings = ("train.metric_samples=3", "train.metric_temperature=1.5", "train.per_device_batch_size=2")
    _, parts = parts_of(own / "run", *ASKED, *settings, "train.metrics=[lab.py:place]")
    assert parts.answering.questions.at_a_time == 1
    assert parts.answering.metrics(0, lambda _: None) == {"place": 2.5}
    assert len(json.loads((own / "run" / "answers" / "step-000000.json").read_text())) == 2


def test_pass_at_k_is_of_the_answers_to_one_prompt() -> None:
    scores = np.array([[0.5, 1.0], [0.5, 0.0], [1.0, 0.0], [np.nan, 0.0]])  # of two prompts, and two functions
    assert answers.Metric("pass_at_2", 1, 2).of(scores, 2).tolist() == [1.0, 0.0]
    assert answers.Metric("pass_at_1", 1, 1).of(scores, 2).tolist() == [0.5, 0.0]
    assert np.nansum(answers.Metric("own", 0, None).of(scores, 2)) == 2.0


def test_a_function_that_fails_is_named_before_the_model_is_loaded(own: Path, cache: Path):
    with pytest.raises(DataError, match=r"train\.metrics: lab\.py:broken returned 1 numbers for 2 answers"):
        parts_of(own / "run", *ASKED, "train.metrics=[lab.py:broken]")


REFUSED = [
    ("train.metrics=[exact_matc]", "did you mean 'exact_match'"),
    ("train.metrics=[lab.py:is_shor]", "did you mean 'is_short'"),
    ("train.metrics=[f1,f1]", "gives two metrics the name eval/f1"),
    ("train.metrics=[nowhere.py:f]", "no such file"),
    ("train.metrics=[f1] task=pretrain", "rows of task=pretrain have no prompts with answers"),
    ("train.metrics=[f1] task=reward data=chitchat_pairs", "rows of task=reward have no prompts"),
    ("train.metrics=[f1] task=kto", "rows of task=kto have no prompts"),
    ("train.metrics=[lab.py:is_short] train.metric_for_best_model=eval/is_short train.eval_steps=1",
     "set train.greater_is_better to true or false"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "problem"), REFUSED, ids=[words for words, _ in REFUSED])
def test_what_cannot_be_computed_is_refused(own: Path, words: str, problem: str):
    with pytest.raises(ConfigError) as caught:
        composed(*TINY, "train.max_steps=2", *words.split())
    (fault,) = caught.value.faults
    assert problem in f"{fault.problem} {fault.remedy}"


def test_the_functions_are_kept_with_the_run(own: Path, cache: Path):
    rundir = prepared(own / "run", *ASKED, "train.metrics=[lab.py:is_short]")
    assert (rundir.code / "lab.py").read_text() == OWN
    (own / "lab.py").unlink()
    from runner.train import inputs
    from runner.train.options import Options

    questions = inputs.inputs(Options.of(rundir)).questions
    assert isinstance(questions, answers.Questions)
    assert questions.functions.names == ["is_short"]
