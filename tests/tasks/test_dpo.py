"""Preference losses against the numbers of TRL 1.16 and against autograd on whole logits."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, composed, prepared
from fixtures import two_models, versions
from fixtures.two_models import QUESTIONS
from torch.nn.functional import log_softmax

from runner.cli import main
from runner.data.batches import Batches
from runner.errors import ConfigError, Preempted
from runner.signals import Stop
from runner.tasks import dpo, logprobs
from runner.tracking import metrics_log
from runner.train import worker

OF_TRL = {
    "sigmoid": 0.764988, "hinge": 1.137563, "ipo": 25.732336, "robust": 0.782184, "exo_pair": 3.001068,
    "nca_pair": 1.423398, "sppo_hard": 66.970535, "apo_zero": 1.034214, "apo_down": 1.025263, "dpo_norm": 0.696783,
}  # fmt: skip
"""The loss of DPOTrainer of TRL 1.16 on these four pairs, with beta=0.1; ``dpo_norm`` is its ``sigmoid_norm``."""
SMOOTHING = {"robust": 0.1, "exo_pair": 1e-3}


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def example(question: str, chosen: str, rejected: str) -> dict[str, Any]:
    pair = {"chosen": message("assistant", chosen), "rejected": message("assistant", rejected)}
    return {"prompt": [message("user", question)], **pair}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return two_models.write(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def models(folder: Path) -> tuple[torch.nn.Module, torch.nn.Module, Any]:
    return two_models.load(folder)


def task_of(loss_type: str = "sigmoid", **changes: Any) -> Any:
    values = {"beta": 0.1, "label_smoothing": SMOOTHING.get(loss_type, 0.0), "gamma": 0.0, "sft_weight": 0.0}
    return dpo.dpo(loss_type=loss_type, **{**values, **changes})


def features_of_trl(row: tuple[str, str, str], tokenizer: Any) -> list[dict[str, Any]]:
    """TRL also trains the line break after the end of the turn, which is never generated."""
    return [
        {**each, "labels": each["labels"][:-1] + each["input_ids"][-1:]}
        for each in dpo.encode(example(*row), tokenizer, 256)
    ]


def batches(tokenizer: Any, *, features: Any = None, **layout: Any) -> Batches:
    features = features or [each for row in QUESTIONS for each in features_of_trl(row, tokenizer)]
    return two_models.batches(features, unit=2, **layout)


def step(model: Any, original: Any, task: Any, given: Batches) -> tuple[dict[str, float], float, torch.Tensor]:
    """(metrics, loss, gradient of all parameters) of one step over all pairs."""
    return two_models.step(model, task, two_models.with_reference(original, given.step(0)))


@pytest.mark.parametrize("loss_type", OF_TRL)
def test_the_loss_is_that_of_trl(models: Any, loss_type: str) -> None:
    policy, original, tokenizer = models
    metrics, loss, _ = step(policy, original, task_of(loss_type), batches(tokenizer, packing=False, at_once=4))
    assert loss == pytest.approx(OF_TRL[loss_type], rel=2e-6)
    assert metrics["loss"] == pytest.approx(loss, rel=1e-6)
    assert metrics["rewards/margins"] == pytest.approx(metrics["rewards/chosen"] - metrics["rewards/rejected"])


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "orpo"])
def test_any_cut_gives_the_same_step(models: Any, loss_type: str) -> None:
    """Micro-batches, packing and padding change neither the loss nor the gradient, also with two denominators."""
    policy, original, tokenizer = models
    task = task_of(loss_type, sft_weight=0.7)
    expected = step(policy, original, task, batches(tokenizer, packing=False, at_once=4))
    ways = ({"packing": False, "at_once": 1}, {"packing": True, "at_once": 1}, {"packing": False, "at_once": 2})
    for way in (*ways, {"packing": False, "at_once": 2, "end_to_end": True}):
        metrics, loss, gradient = step(policy, original, task, batches(tokenizer, **way))
        assert loss == pytest.approx(expected[1], rel=1e-5), way
        torch.testing.assert_close(gradient, expected[2], rtol=1e-4, atol=1e-5)
        for name, value in metrics.items():
            assert value == pytest.approx(expected[0][name], rel=1e-4, abs=1e-6), (name, way)


@pytest.mark.parametrize("loss_type", ["ipo", "orpo"])
def test_a_prompt_is_computed_once_for_both_answers(models: Any, loss_type: str) -> None:
    policy, original, tokenizer = models
    task = task_of(loss_type, sft_weight=0.7)
    expected = step(policy, original, task, batches(tokenizer, packing=False, at_once=2))
    both = two_models.by_document(policy), two_models.by_document(original)
    metrics, loss, gradient = step(*both, task, batches(tokenizer, packing=False, at_once=2, sharing=True))
    assert loss == pytest.approx(expected[1], rel=1e-5)
    torch.testing.assert_close(gradient, expected[2], rtol=1e-4, atol=1e-5)
    for name, value in metrics.items():
        assert value == pytest.approx(expected[0][name], rel=1e-4, abs=1e-6), name


def test_the_losses_without_a_reference(models: Any) -> None:
    """Against the formulas of the papers, on log-probabilities from whole logits."""
    policy, original, tokenizer = models
    sums, counts = [], []
    for row in QUESTIONS:
        for features in features_of_trl(row, tokenizer):
            ids, labels = torch.tensor([features["input_ids"]]), torch.tensor(features["labels"])
            with torch.no_grad():
                logits = log_softmax(policy(ids).logits[0, :-1], -1).gather(-1, ids[0, 1:, None])[:, 0]
            answer = labels[1:] != -100
            sums.append(float(logits[answer].sum())), counts.append(int(answer.sum()))
    s_w, s_l, n_w, n_l = (
        torch.tensor(each, dtype=torch.float64) for each in (sums[::2], sums[1::2], counts[::2], counts[1::2])
    )
    a_w, a_l = s_w / n_w, s_l / n_l
    nll = -float(s_w.sum() / n_w.sum())
    odds = (a_w.exp() / (1 - a_w.exp())).log() - (a_l.exp() / (1 - a_l.exp())).log()
    softplus = torch.nn.functional.softplus
    expected = {
        "cpo": float(softplus(-0.1 * (s_w - s_l)).mean()) + nll,
        "simpo": float(softplus(-(2 * (a_w - a_l) - 0.5)).mean()),
        "orpo": 0.1 * float(softplus(-odds).mean()) + nll,
    }
    keys = {"cpo": {"sft_weight": 1.0}, "simpo": {"beta": 2.0, "gamma": 0.5}, "orpo": {"sft_weight": 1.0}}
    for loss_type, changes in keys.items():
        task = task_of(loss_type, **changes)
        assert task.reference is None
        _, loss, _ = step(policy, original, task, batches(tokenizer, packing=False, at_once=4))
        assert loss == pytest.approx(expected[loss_type], rel=1e-5), loss_type


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("task.label_smoothing=0.6", "out of range"),
        ("task.beta=0", "must be a finite number > 0"),
        ("task.gamma=0.5", "no effect with loss_type=sigmoid"),
        ("task.loss_type=ipo task.label_smoothing=0.1", "no effect with loss_type=ipo"),
        ("task.loss_type=exo_pair", "needs a positive value"),
    ],
)
def test_keys_without_effect_are_refused(override: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        composed("task=dpo", "data=chitchat_pairs", *override.split())


RUN = (*TINY, "task=dpo", "data=chitchat_pairs", "data.train_rows=24", "data.eval_rows=4", "data.max_length=512",
       "data.packing=false", "train.max_steps=4",
       "train.per_device_batch_size=4", "model.dtype=float32")  # fmt: skip


def test_evaluate_gives_the_numbers_of_training(tmp_path: Path, cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rundir = prepared(tmp_path / "run", *RUN)
    assert worker.work(rundir) == 0
    last = [record for record in metrics_log.read(rundir) if "eval/loss" in record][-1]
    assert main.run(["evaluate", str(rundir.path)]) == 0
    (evaluated,) = metrics_log.read_evaluations(rundir)
    for name in ("loss", "rewards/margins", "nll"):
        assert evaluated["metrics"][f"eval_held_out/{name}"] == pytest.approx(last[f"eval/{name}"], abs=1e-5)


def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path: Path, cache: Path) -> None:
    whole, cut = (prepared(tmp_path / name, *RUN, "train.save_steps=2") for name in ("whole", "cut"))
    assert worker.work(whole) == 0
    stops = iter([False, False, True])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stop, "check", lambda _: (_ for _ in ()).throw(Preempted("stop")) if next(stops, False) else None)
        assert worker.work(cut) == 75
    assert cut.read_state().step < 4
    assert worker.work(cut) == 0
    losses = [[r["train/loss"] for r in metrics_log.read(run) if "train/loss" in r] for run in (whole, cut)]
    assert losses[0] == losses[1]
    hashes = [run.read_manifest()["weights_sha256"] for run in (whole, cut)]
    assert hashes[0] == hashes[1]


def test_label_smoothing_and_the_cross_entropy_of_the_chosen_answers(models: Any) -> None:
    """cDPO by its formula, which TRL no longer has, and TRL's loss ``sft``, which is added with its weight."""
    policy, original, tokenizer = models
    given = batches(tokenizer, packing=False, at_once=4)
    assert step(policy, original, task_of(label_smoothing=0.1), given)[1] == pytest.approx(0.751232, rel=2e-6)
    _, loss, _ = step(policy, original, task_of(sft_weight=0.5), given)
    assert loss == pytest.approx(0.764988 + 0.5 * 5.584975, rel=2e-6)


def test_the_losses_without_a_reference_are_those_of_trl(models: Any) -> None:
    """CPOTrainer and ORPOTrainer of TRL 1.16 append another end token; ORPO's NLL runs over the prompt, too."""
    policy, original, tokenizer = models
    end = tokenizer.eos_token_id
    features = [
        {"input_ids": [*each["input_ids"], end], "labels": [*each["labels"], end]}
        for row in QUESTIONS
        for each in features_of_trl(row, tokenizer)
    ]
    given = batches(tokenizer, packing=False, at_once=4, features=features)

    def loss_of(loss_type: str, **changes: Any) -> float:
        return step(policy, original, task_of(loss_type, **changes), given)[1]

    assert loss_of("cpo", sft_weight=1.0) == pytest.approx(8.986400, rel=2e-6)
    assert loss_of("simpo", beta=2.0, gamma=0.5) == pytest.approx(1.023472, rel=2e-6)
    everything = [{**each, "labels": each["input_ids"]} for each in features]
    nll = step(policy, original, task_of("cpo", sft_weight=1.0), batches(tokenizer, packing=False, at_once=4,
                                                                         features=everything))  # fmt: skip
    assert loss_of("orpo") + nll[0]["nll"] == pytest.approx(5.667700, rel=2e-5)


def test_sides_emptied_by_max_length_are_dropped_and_counted(tmp_path: Path, cache: Path) -> None:
    long = "word " * 60
    rows = [{"prompt": f"{n}?", "chosen": f"{n}!", "rejected": "no"} for n in range(12)]
    rows += [{"prompt": f"{long}{n}", "chosen": "a", "rejected": "b"} for n in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ("data=local", f"data.path={tmp_path / 'rows.jsonl'}", "data/format=preference", "data.eval_fraction=0.2")
    words = [word for word in RUN if not word.startswith("data")]
    rundir = prepared(tmp_path / "run", *words, *data, "data.max_length=64", "train.max_steps=1")
    assert worker.work(rundir) == 0
    report = rundir.read_manifest()["data"]["report"]
    assert report["masked_out"] == 3
    assert report["train_rows"] + report["eval_rows"] == 2 * 12
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "b"}) + "\n")
    assert worker.work(prepared(tmp_path / "equal", *words, *data)) == 2


def test_in_4_bits_any_cut_gives_the_same_losses(tmp_path: Path, cache: Path) -> None:
    losses = []
    for rows in (1, 4):
        rundir = prepared(tmp_path / str(rows), *RUN, "quant=4bit", "train.max_steps=2",
                          f"train.micro_batch_size={rows}")  # fmt: skip
        assert worker.work(rundir) == 0
        records = metrics_log.read(rundir)
        losses.append([r.get("train/loss", r.get("eval/loss")) for r in records])
    assert losses[0][0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_plain_peft_measures_the_loss_that_the_run_reports(tmp_path: Path, cache: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from runner.train import inputs
    from runner.train.options import Options

    rundir = prepared(tmp_path / "run", *RUN, "optim.learning_rate=1e-2")
    assert worker.work(rundir) == 0
    reported = [r["eval/loss"] for r in metrics_log.read(rundir) if "eval/loss" in r][-1]
    held_out = inputs.inputs(Options.of(rundir)).splits.eval
    base = AutoModelForCausalLM.from_pretrained(rundir.read_manifest()["model"]["path"], **versions.FLOAT32)
    model = PeftModel.from_pretrained(base, str(rundir.model)).eval()

    def sums() -> torch.Tensor:
        found = []
        for number in range(len(held_out)):
            ids, labels = (torch.from_numpy(np.array(column)).long() for column in held_out[number][:2])
            with torch.no_grad():
                steps = log_softmax(model(ids[None]).logits[0, :-1], -1).gather(-1, ids[1:, None])[:, 0]
            found.append(steps[labels[1:] != -100].sum())
        return torch.stack(found)

    policy = sums()
    with model.disable_adapter():
        ratios = (policy - sums()).reshape(-1, 2)
    loss = -torch.nn.functional.logsigmoid(0.1 * (ratios[:, 0] - ratios[:, 1])).mean()
    assert abs(reported - math.log(2)) > 1e-3
    assert float(loss) == pytest.approx(reported, abs=1e-5)


def test_rewards_compare_what_the_loss_compares(models: Any) -> None:
    """The accuracy of simpo and orpo is that of means per token: a long answer is not worse because it is long."""
    policy, original, tokenizer = models
    given = batches(tokenizer, packing=False, at_once=4)
    by_sum, by_mean = (step(policy, original, task_of(name, beta=1.0), given)[0] for name in ("cpo", "simpo"))
    (batch,) = given.step(0)
    with torch.no_grad():
        sums, counts = logprobs.of_documents(policy, batch)
    for metrics, values in ((by_sum, sums), (by_mean, sums / counts)):
        assert metrics["rewards/chosen"] == pytest.approx(float(values[0::2].mean()), rel=1e-5)
        assert metrics["rewards/accuracies"] == float((values[0::2] > values[1::2]).float().mean())
