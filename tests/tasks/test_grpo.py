"""GRPO and its relatives: losses against the numbers of TRL 1.16, rollouts that depend on nothing but their seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import composed, prepared
from fixtures import killed_runs, two_models
from fixtures.ranks_of_a_run import several, worked
from fixtures.searches import searchable_is_logged
from fixtures.two_models import QUESTIONS

from runner.cli import main
from runner.config import bind
from runner.data.batches import Batches
from runner.data.collator import Batch
from runner.data.packing import IGNORED, Rows, one_by_one
from runner.data.texts import Texts
from runner.errors import ConfigError, Preempted
from runner.signals import Stop
from runner.tasks import grpo, rollout, sampling
from runner.tasks.reward_functions import Rewards
from runner.tasks.task import Task
from runner.tracking import metrics_log
from runner.train import worker

OF_TRL = {"grpo": 0.020201, "dapo": -0.024775, "dr_grpo": -0.011613, "cispo": 0.230511}
"""GRPOTrainer._compute_loss of TRL 1.16 on ``given_answers``, with max_completion_length=16."""


def task_of(**changes: Any) -> Task:
    node = bind.option("task", "grpo")
    node |= {"rewards": ["runner.tasks.example_rewards:lowercase_share"], "max_completion_length": 16, **changes}
    return grpo.grpo(**{key: value for key, value in node.items() if key != bind.TARGET})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, torch.nn.Module, Any]:
    return two_models.load(two_models.write(tmp_path_factory.mktemp("model") / "model"))


def given_answers(tokenizer: Any) -> tuple[list[int], torch.Tensor, list[int]]:
    """(prompt, answers (4, 9), their lengths): those of the numbers of TRL."""
    prompt = [{"role": "user", "content": QUESTIONS[0][0]}]
    text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    torch.manual_seed(0)
    return tokenizer(text, add_special_tokens=False)["input_ids"], torch.randint(0, 200, (4, 9)), [9, 5, 7, 9]


ADVANTAGES, OLD = [1.0, -0.5, 0.25, -0.75], -5.5


def batch_of(tokenizer: Any, numbers: list[int]) -> Batch:
    """The given answers with these numbers, end to end without padding where the model can."""
    prompt, answers, lengths = given_answers(tokenizer)
    documents = []
    for number in numbers:
        answer = answers[number, : lengths[number]].tolist()
        documents.append((np.array([*prompt, *answer]), np.array([*[IGNORED] * len(prompt), *answer])))
    empty = Batches(Rows.of(documents), packing=False, max_length=99, rows_per_batch=4, accumulation=1, seed=0,
                    shuffle=False, pad_id=0)  # fmt: skip
    batch = empty.of_documents(Rows.of(documents), 99)
    batch["advantage"] = torch.tensor(ADVANTAGES)[numbers]
    batch["old"] = torch.full((batch["trained"],), OLD)
    return batch


def loss_of(model: Any, task: Task, batches: list[Batch]) -> tuple[float, dict[str, float]]:
    totals = {kind: sum(batch[kind] for batch in batches) for kind in task.divisors.values()}
    with torch.no_grad():
        sums = [task.loss(model, batch) for batch in batches]
    summed = {name: sum(float(each[name]) for each in sums) for name in sums[0]}
    return float(task.step_loss(summed, totals)), task.metrics(summed)


@pytest.mark.parametrize("loss_type", OF_TRL)
def test_the_loss_is_that_of_trl_for_any_cut(models: Any, loss_type: str) -> None:
    policy, _, tokenizer = models
    clip = {"epsilon_high": 5.0} if loss_type == "cispo" else {"epsilon": 0.2}
    task = task_of(loss_type=loss_type, num_iterations=2, **clip)
    for cut in ([[0, 1, 2, 3]], [[0], [1, 2], [3]]):
        loss, metrics = loss_of(policy, task, [batch_of(tokenizer, numbers) for numbers in cut])
        assert loss == pytest.approx(OF_TRL[loss_type], abs=1e-5)
        assert metrics["loss"] == pytest.approx(loss, rel=1e-4)


@pytest.mark.extras
@pytest.mark.slow
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "cispo"])
def test_the_numbers_of_trl_are_those_of_the_installed_trl(models: Any, tmp_path: Path, loss_type: str) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    policy, _, tokenizer = models
    prompt, answers, lengths = given_answers(tokenizer)
    config = trl.GRPOConfig(
        output_dir=str(tmp_path), loss_type=loss_type, num_generations=4, max_completion_length=16, beta=0.0,
        per_device_train_batch_size=4, use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False,
        **({"epsilon_high": 5.0} if loss_type == "cispo" else {}),
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": question} for question, _, _ in QUESTIONS])
    trainer = trl.GRPOTrainer(
        model=two_models.load_one(policy), reward_funcs=lambda completions, **_: [0.0] * len(completions), args=config,
        train_dataset=rows, processing_class=tokenizer,
    )  # fmt: skip
    trainer.model.eval()
    trainer.current_gradient_accumulation_steps = 1
    mask = (torch.arange(9) < torch.tensor(lengths)[:, None]).long()
    given = {
        "prompt_ids": torch.tensor([prompt] * 4), "prompt_mask": torch.ones(4, len(prompt), dtype=torch.long),
        "completion_ids": answers, "completion_mask": mask, "advantages": torch.tensor(ADVANTAGES),
        "old_per_token_logps": torch.full((4, 9), OLD), "num_items_in_batch": mask.sum().float(),
    }  # fmt: skip
    with torch.no_grad():
        assert float(trainer._compute_loss(trainer.model, given)) == pytest.approx(OF_TRL[loss_type], abs=2e-6)


def log_probabilities(model: Any, tokenizer: Any, number: int, temperature: float = 1.0) -> torch.Tensor:
    prompt, answers, lengths = given_answers(tokenizer)
    answer = answers[number, : lengths[number]]
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *answer.tolist()]])).logits[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(-1, answer[:, None])[:, 0]


def test_whole_answers_and_the_divergence_from_the_start(models: Any) -> None:
    """GSPO, RLOO and the KL term against their formulas, on log-probabilities from whole logits."""
    policy, original, tokenizer = models
    new, start = ([log_probabilities(each, tokenizer, n) for n in range(4)] for each in (policy, original))
    batch = batch_of(tokenizer, [0, 1, 2, 3])
    batch["start"] = torch.cat(start)
    kl = [(r - n).exp() - (r - n) - 1 for r, n in zip(start, new, strict=True)]
    ratios = [(n - OLD).mean().exp() for n in new]
    clipped = [-min(r * a, r.clamp(0.8, 1.3) * a) for r, a in zip(ratios, ADVANTAGES, strict=True)]
    tokens = sum(map(len, new))
    expected = sum((c + 0.1 * k * r).sum() for c, k, r in zip(clipped, kl, ratios, strict=True)) / tokens
    keys = {"num_iterations": 2, "epsilon": 0.2, "beta": 0.1}
    gspo = task_of(**keys, epsilon_high=0.3, importance_sampling_level="sequence")
    loss, metrics = loss_of(policy, gspo, [batch])
    assert loss == pytest.approx(float(expected), rel=1e-5)
    assert metrics["kl"] == pytest.approx(float(torch.cat(kl).mean()), rel=1e-4)
    whole = [(n - OLD).sum().exp() for n in new]
    rloo = [-min(r * a, r.clamp(0.8, 1.2) * a) for r, a in zip(whole, ADVANTAGES, strict=True)]
    loss, _ = loss_of(policy, task_of(**keys, loss_type="rloo"), [batch])
    assert loss == pytest.approx(float(sum(rloo)) / 4, rel=1e-5)


def test_log_probabilities_are_those_of_the_temperature(models: Any) -> None:
    policy, _, tokenizer = models
    _, metrics = loss_of(policy, task_of(temperature=0.7), [batch_of(tokenizer, [1, 2])])
    expected = torch.cat([log_probabilities(policy, tokenizer, number, 0.7) for number in (1, 2)])
    assert metrics["entropy"] == pytest.approx(-float(expected.mean()), rel=1e-5)


def test_a_rank_without_answers_takes_part(models: Any) -> None:
    """The last step of an epoch may leave a rank without prompts; its share of the loss is 0."""
    policy, _, tokenizer = models
    sums = task_of().loss(policy, batch_of(tokenizer, []))
    assert [float(sums[name].detach()) for name in ("loss", "tokens")] == [0.0, 0.0]
    how = sampling.Sampling(4, 1.0, [tokenizer.eos_token_id], tokenizer.pad_token_id)
    assert sampling.answers(policy, [], None, how) == []
    rewards = Rewards(["runner.tasks.example_rewards:lowercase_share"], (), [1.0], 1.0)
    assert rollout.Answers.of([], [], [], rewards, tokenizer, how).statistics(rewards, 4)["groups"] == 0


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (["task.epsilon=0.2"], "no effect with task.num_iterations=1"),
        (["task.importance_sampling_level=sequence"], "no effect with task.num_iterations=1"),
        (["task.num_iterations=2"], "needs a value with task.num_iterations > 1"),
        (["task.reward_weights=[1,2]"], "has 2 weights"),
        (["task.num_generations=1"], "must be"),
        (["task.rewards=[runner.tasks.example_rewards:nothing]"], "defines no function 'nothing'"),
        (["task.rewards=[nowhere.py:f]"], "no such file or module"),
        (["data.packing=true"], "cannot share a row"),
        (["data=chitchat"], "cannot share a row"),
        (["task.beta=0.1", "lora.lora_dropout=0.1"], "dropout makes both differ at random"),
    ],
)
def test_what_cannot_be_trained_is_refused(changes: list[str], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        composed("experiment=grpo", *changes)


RUN = ("experiment=grpo", "tracking=offline", "train.sample_prompts=0", "data.train_rows=40", "data.eval_rows=3",
       "data.max_length=64", "task.num_generations=4", "task.max_completion_length=8", "train.max_steps=3",
       "train.per_device_batch_size=4")  # fmt: skip


def losses(folder: Any, name: str = "train/loss") -> list[float]:
    return [record[name] for record in metrics_log.read(folder) if name in record]


def test_any_cut_gives_the_same_run_and_the_reward_rises(tmp_path: Path, cache: Path) -> None:
    whole, cut = (
        prepared(tmp_path / f"{rows}", *RUN, f"train.micro_batch_size={rows}", "train.max_steps=4") for rows in (4, 1)
    )
    for rundir in (whole, cut):
        assert worker.work(rundir) == 0
    assert losses(whole) == pytest.approx(losses(cut), abs=1e-5)
    assert losses(whole, "train/rewards/lowercase_share") == pytest.approx(
        losses(cut, "train/rewards/lowercase_share"), abs=1e-6
    )
    assert all(0 < share < 1 for share in losses(whole, "train/prepare_fraction"))
    first, last = losses(whole, "eval/reward")
    for split in ("train", "eval"):
        shortest, mean, longest = (losses(whole, f"{split}/completions/{of}_length") for of in ("min", "mean", "max"))
        assert all(1 <= a <= b <= c <= 8 for a, b, c in zip(shortest, mean, longest, strict=True))
        assert shortest == losses(cut, f"{split}/completions/min_length")
        assert longest == losses(cut, f"{split}/completions/max_length")
    assert not losses(whole, "eval/reward_std"), "the answers of an evaluation are in no groups"
    assert losses(whole, "eval/loss") == [0.0 - first, -last]
    shown = json.loads((whole.rollouts / "step-000004.json").read_text())
    assert len(shown) == 3
    assert set(shown[0]) == {"prompt", "answer", "reward", "lowercase_share"}


def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path: Path, cache: Path) -> None:
    """With a copy of the start, two updates per step, and the KL divergence to the start."""
    keys = ("task.beta=0.1", "task.num_iterations=2", "task.epsilon=0.2", "train.save_steps=1", "lora=none")
    whole, cut = (prepared(tmp_path / name, *RUN, *keys) for name in ("whole", "cut"))
    assert worker.work(whole) == 0
    assert 0 < losses(whole, "train/kl")[0] < losses(whole, "train/kl")[-1], "the second update sees the first"
    assert losses(whole, "train/clip_ratio")[-1] >= 0
    searchable_is_logged(whole)
    stops = iter([False] * 13 + [True])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stop, "check", lambda _: (_ for _ in ()).throw(Preempted("stop")) if next(stops, False) else None)
        assert worker.work(cut) == 75
    assert 0 < cut.read_state().step < 3
    assert worker.work(cut) == 0
    assert losses(whole) == losses(cut)
    assert len({run.read_manifest()["weights_sha256"] for run in (whole, cut)}) == 1


@pytest.mark.slow
def test_kill_9_and_two_processes_give_the_same_rollouts(tmp_path: Path, cache: Path) -> None:
    keys = ("train.save_steps=1", "train.max_steps=6", "train.eval_steps=2")
    whole, killed = (prepared(tmp_path / name, *RUN, *keys) for name in ("whole", "killed"))
    two = prepared(tmp_path / "two", *RUN, *keys, "train.per_device_batch_size=2", *several("ddp"))
    assert killed_runs.work(whole) == 0
    killed_runs.kill_and_finish(killed, "train/loss", [4])
    killed_runs.assert_same_end(whole, killed)
    code, printed = worked(two)
    assert code == 0, printed
    lengths = (f"train/completions/{which}_length" for which in ("min", "mean", "max"))
    names = ("train/loss", "train/reward", *lengths, "train/entropy", "eval/reward")
    for name in names:
        assert losses(whole, name) == losses(killed, name), name
        assert losses(two, name) == pytest.approx(losses(whole, name), rel=1e-5, abs=1e-6), name
    shown = [(run.rollouts / "step-000004.json").read_text() for run in (whole, killed)]
    assert shown[0] == shown[1]


def test_plan_calls_the_functions_and_names_what_is_wrong(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"How much is {n} + {n}?", "answer": str(2 * n)} for n in range(12)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("scores.py").write_text(
        "def right(completions, answer, **_):\n    return [float(a in c) for c, a in zip(completions, answer)]\n"
        "def broken(completions, solution, **_):\n    return [0.0] * len(completions)\n"
        "def one(completions, **_):\n    return [0.0]\n"
    )
    local = ("experiment=grpo", "data=local", "data.path=rows.jsonl", "data/format=prompts", "data.packing=false",
             "data.eval_fraction=0.3", "tracking=offline")  # fmt: skip
    assert main.run(["plan", *local, "task.rewards=[scores.py:right]"]) == 0
    out = capsys.readouterr().out
    assert "right 1 for the reference answer to the first prompt" in out
    assert "8 answers to each prompt, of at most 24 tokens" in out
    assert main.run(["plan", *local, "task.rewards=[scores.py:broken]"]) == 2
    assert "scores.py:broken failed: TypeError" in capsys.readouterr().err
    assert main.run(["plan", *local, "task.rewards=[scores.py:one]"]) == 2
    assert "scores.py:one returned 1 numbers for 2 answers" in capsys.readouterr().err


def test_texts_are_kept_beside_the_rows(tmp_path: Path) -> None:
    rows = Rows(np.arange(3, dtype=np.int32), np.arange(3, dtype=np.int32), np.array([0, 1, 3]), one_by_one(2),
                records=Texts.of(["é€", ""]))  # fmt: skip
    rows.save(tmp_path, "train")
    kept = Rows.load(tmp_path, "train").records
    assert kept is not None
    assert [kept[0], kept[1], len(kept)] == ["é€", "", 2]


def test_equal_rewards_are_reported(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("same.py").write_text("def same(completions, **_):\n    return [0.5] * len(completions)\n")
    rundir = prepared(tmp_path / "run", *RUN, "task.rewards=[same.py:same]", "train.max_steps=1")
    Path("same.py").unlink()  # the run has a copy
    assert worker.work(rundir) == 0
    assert "all answers to each prompt of a step have the same reward" in rundir.log.read_text()
    assert losses(rundir, "train/frac_reward_zero_std") == [1.0]
    assert losses(rundir, "train/grad_norm") == [0.0]
