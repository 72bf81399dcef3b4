"""KTO against the numbers of TRL 1.16; the KL estimate of a step and its cut into micro-batches and ranks."""

from __future__ import annotations

import contextlib
import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, composed, prepared
from fixtures import two_models
from fixtures.searches import searchable_is_logged
from fixtures.two_models import QUESTIONS

from runner.cli import main
from runner.data import judged
from runner.data.batches import Batches
from runner.errors import DataError, Preempted
from runner.signals import Stop
from runner.tasks import kto, kto_kl
from runner.tasks.step_context import StepContext
from runner.tracking import metrics_log
from runner.train import worker

OF_TRL = {"kto": 0.527515, "apo_zero_unpaired": 0.527467}
"""The loss of KTOTrainer of TRL 1.16 on these four rows, with beta=0.1."""
Z = 0.386891


def example(number: int) -> dict[str, Any]:
    question, good, bad = QUESTIONS[number]
    is_good = number % 2 == 0
    answer = {"role": "assistant", "content": good if is_good else bad}
    return {"prompt": [{"role": "user", "content": question}], "completion": answer, "label": is_good}


def task_of(loss_type: str = "kto", **changes: Any) -> Any:
    return kto.kto(loss_type=loss_type, **{"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0, **changes})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, torch.nn.Module, Any]:
    return two_models.load(two_models.write(tmp_path_factory.mktemp("model")))


def batches(tokenizer: Any, at_once: int = 4, **layout: Any) -> Batches:
    features = [each for number in range(4) for each in kto.encode(example(number), tokenizer, 256)]
    for each in features:  # TRL also trains the line break after the end of the turn, which is never generated
        each["labels"][-1] = each["input_ids"][-1]
    return two_models.batches(features, at_once=at_once, values=["label"], **layout)


def context(model: Any, original: Any, given: Batches, others: float = 0.0) -> StepContext:
    """``others``: what the other ranks add to the sum of this one."""
    return StepContext(
        model=model, tokenizer=None, batches=given, packs=given.order.packs_of_step(0), micro_batches=given.step(0),
        seed=0, trains=True, start=lambda: contextlib.nullcontext(original), on_device=lambda batch: batch, show=print,
        agree=lambda *numbers: [number + others for number in numbers],
    )  # fmt: skip


def step(model: Any, original: Any, task: Any, given: Batches) -> tuple[dict[str, float], float, torch.Tensor]:
    """(metrics, loss, gradient of all parameters) of one step over all rows."""
    with torch.no_grad():
        micro_batches = task.prepare(context(model, original, given)) if task.prepare else given.step(0)
    return two_models.step(model, task, two_models.with_reference(original, micro_batches))


@pytest.mark.parametrize("loss_type", OF_TRL)
def test_the_loss_is_that_of_trl(models: Any, loss_type: str) -> None:
    policy, original, tokenizer = models
    metrics, loss, _ = step(policy, original, task_of(loss_type), batches(tokenizer))
    assert loss == pytest.approx(OF_TRL[loss_type], abs=1e-5)
    assert metrics["loss"] == pytest.approx(loss, rel=1e-6)
    assert metrics.get("kl", Z) == pytest.approx(Z, abs=1e-5)
    assert ("kl" in metrics) == (loss_type == "kto")
    assert metrics["rewards/margins"] == pytest.approx(metrics["rewards/chosen"] - metrics["rewards/rejected"])


@pytest.mark.extras
@pytest.mark.slow
@pytest.mark.parametrize("loss_type", OF_TRL)
def test_the_numbers_of_trl_are_those_of_the_installed_trl(models: Any, tmp_path: Path, loss_type: str) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    policy, original, tokenizer = models
    config = trl.KTOConfig(
        output_dir=str(tmp_path), loss_type=loss_type, per_device_train_batch_size=4, use_cpu=True, bf16=False,
        report_to="none", gradient_checkpointing=False,
    )  # fmt: skip
    rows = [{**example(n), "completion": [example(n)["completion"]]} for n in range(4)]
    trainer = trl.KTOTrainer(
        model=copy.deepcopy(policy), ref_model=copy.deepcopy(original), args=config,
        train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
    )  # fmt: skip
    trainer.model.eval()
    with torch.no_grad():
        batch = trainer.data_collator([trainer.train_dataset[n] for n in range(4)])
        assert float(trainer.compute_loss(trainer.model, batch)) == pytest.approx(OF_TRL[loss_type], abs=1e-5)


@pytest.mark.parametrize(
    "cut", [{"at_once": 1}, {"at_once": 2, "end_to_end": True}, {"at_once": 1, "packing": True}], ids=str
)
def test_any_cut_gives_the_same_step(models: Any, cut: dict[str, Any]) -> None:
    policy, original, tokenizer = models
    task = task_of(desirable_weight=0.7)
    expected = step(policy, original, task, batches(tokenizer))
    metrics, loss, gradient = step(policy, original, task, batches(tokenizer, **cut))
    assert loss == pytest.approx(expected[1], rel=1e-5)
    torch.testing.assert_close(gradient, expected[2], rtol=1e-4, atol=1e-6)
    assert metrics == pytest.approx(expected[0], rel=1e-4)


def test_two_ranks_compute_the_same_estimate(models: Any) -> None:
    policy, original, tokenizer = models
    shares = []
    with torch.no_grad():
        for rank in (0, 1):
            sums: list[float] = []
            given = context(policy, original, batches(tokenizer, 1, rank=rank, world=2), others=100.0)
            (batch, _) = kto_kl.prepare(given)
            sums.append(float(batch[kto_kl.MEAN]) * 4 - 100.0)
            shares += sums
    assert sum(shares) / 4 == pytest.approx(Z, abs=1e-4)
    assert min(abs(share) for share in shares) > 0.1


def test_labels_are_read_and_anything_else_is_refused() -> None:
    keys = {"prompt": "prompt", "completion": "completion", "label": "label"}
    row = {"prompt": "Hi", "completion": "Hello", "label": "False"}
    assert judged.kto(row, **keys) == {
        "prompt": [{"role": "user", "content": "Hi"}],
        "completion": {"role": "assistant", "content": "Hello"},
        "label": False,
    }
    assert [judged.kto({**row, "label": label}, **keys)["label"] for label in (1.0, 0.0, "1.0")] == [True, False, True]
    for label in (2, "good"):
        with pytest.raises(DataError, match="the label is"):
            judged.kto({**row, "label": label}, **keys)
    with pytest.raises(DataError, match="must be one answer of the assistant, it is: user"):
        judged.kto({**row, "completion": [{"role": "user", "content": "Hi"}]}, **keys)


def test_the_balance_of_the_labels() -> None:
    assert kto.balance(np.array([1.0, 1, 0, 0]), 1.0, 1.0) == "2 desirable, 2 undesirable; weighted 1.00 : 1"
    assert "task.desirable_weight=0.333" in kto.balance(np.array([1.0, 1, 1, 0]), 1.0, 1.0)
    with pytest.raises(DataError, match="all 2 training rows are undesirable"):
        kto.balance(np.zeros(2), 1.0, 1.0)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    texts = [{"prompt": f"Say {n}", "completion": f"{n}" if n % 2 else "no", "label": bool(n % 2)} for n in range(12)]
    path.write_text("".join(json.dumps(text) + "\n" for text in texts))
    return path


def run_of(rows: Path, *changes: str) -> tuple[str, ...]:
    return (*TINY, "task=kto", "data=local", f"data.path={rows}", "data/format=kto", "data.eval_fraction=0.3",
            "train.max_steps=4", "train.per_device_batch_size=4", "model.dtype=float32", "data.packing=false",
            "train.micro_batch_size=2", *changes)  # fmt: skip


def test_a_run_starts_at_its_reference_and_goes_on_to_the_same_weights(rows: Path, tmp_path: Path, cache: Path) -> None:
    whole, cut = (prepared(tmp_path / name, *run_of(rows, "train.save_steps=2")) for name in ("whole", "cut"))
    assert worker.work(whole) == 0
    searchable_is_logged(whole)
    records = metrics_log.read(whole)
    first = next(record for record in records if "eval/loss" in record)
    assert first["eval/loss"] == pytest.approx(0.5, abs=1e-6)
    assert first["eval/kl"] == pytest.approx(0.0, abs=1e-5)
    assert all(0 < record["train/prepare_fraction"] < 1 for record in records if "train/prepare_fraction" in record)
    assert any("train/prepare_fraction" in record for record in records)
    stops = iter([False] * 16 + [True])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stop, "check", lambda _: (_ for _ in ()).throw(Preempted("stop")) if next(stops, False) else None)
        assert worker.work(cut) == 75
    assert 0 < cut.read_state().step < 4
    assert worker.work(cut) == 0
    losses = [[r["train/loss"] for r in metrics_log.read(run) if "train/loss" in r] for run in (whole, cut)]
    assert losses[0] == losses[1]
    assert len({run.read_manifest()["weights_sha256"] for run in (whole, cut)}) == 1


def test_evaluate_gives_the_numbers_of_training(
    rows: Path, tmp_path: Path, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rundir = prepared(tmp_path / "run", *run_of(rows, "optim.learning_rate=1e-2", "task.undesirable_weight=0.01"))
    assert worker.work(rundir) == 0
    last = [record for record in metrics_log.read(rundir) if "eval/loss" in record][-1]
    assert last["eval/kl"] > 1e-3
    assert main.run(["evaluate", str(rundir.path)]) == 0
    (evaluated,) = metrics_log.read_evaluations(rundir)
    for name in ("loss", "kl"):
        assert evaluated["metrics"][f"eval_held_out/{name}"] == pytest.approx(last[f"eval/{name}"], abs=1e-5)


def test_plan_shows_the_balance_and_a_step_of_one_row_is_refused(
    rows: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(["plan", *run_of(rows)]) == 0
    assert "undesirable; weighted" in capsys.readouterr().out
    alone = ("train.per_device_batch_size=1", "train.micro_batch_size=1")
    assert main.run(["plan", *run_of(rows, *alone)]) == 2
    assert "step 1 has a single row" in capsys.readouterr().err
    assert main.run(["plan", *run_of(rows, *alone, "task.loss_type=apo_zero_unpaired")]) == 0
    assert composed(*run_of(rows))["task"]["beta"] == 0.1
