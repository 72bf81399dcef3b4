"""DPO in whole runs: several processes, kill -9, a sweep with one reference, and an installed TRL."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import TINY, prepared
from fixtures import killed_runs, two_models
from fixtures.two_models import QUESTIONS

from runner.tasks.dpo import pair_loss
from runner.tasks.pairs import Pairs
from runner.tracking import metrics_log
from runner.tracking.rundir import RunDir

RUN = (*TINY, "task=dpo", "data=chitchat_pairs", "data.train_rows=32", "data.max_length=256", "data.packing=false",
       "train.max_steps=3", "train.per_device_batch_size=4", "model.dtype=float32", "train.save_steps=1")  # fmt: skip


def runner(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """The program in a process of its own, with a cache of its own."""
    environment = {**os.environ, "RUNNER_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "runner", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def losses(rundir: RunDir) -> list[float]:
    return [record.get("train/loss", record.get("eval/loss")) for record in metrics_log.read(rundir)]


@pytest.mark.slow
def test_a_sweep_computes_the_reference_once_and_is_ranked_by_its_accuracy(tmp_path: Path) -> None:
    words = ("-m", *RUN, "task.beta=0.05,0.5", "task.loss_type=sigmoid,ipo", "sweep=losses", "launcher.parallel=2")
    done = runner(*words, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    logs = [path.read_text() for path in (tmp_path / "outputs/sweeps/losses").glob("*/train.log")]
    assert len(logs) == 4
    computed = [line for log in logs for line in log.splitlines() if "from the cache" in line and ", 0 to" not in line]
    assert len(computed) == 2, "one pass over the rows of training, and one over those held out"
    key = "eval/rewards/accuracies"
    table = runner("compare", "losses", "--sort", key, "--json", folder=tmp_path)
    assert table.returncode == 0, table.stderr
    board = json.loads(table.stdout)
    values = [run[key] for run in board["runs"]]
    assert board["larger_is_better"]
    assert values == sorted(values, reverse=True)
    assert len(values) == 4


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(tmp_path: Path, cache: Path) -> None:
    done = runner(*RUN, "hydra.run.dir=one", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    two = ("launcher=accelerate", "launcher.processes=2", "parallel=ddp", "train.per_device_batch_size=2")
    done = runner(*(word for word in RUN if "batch_size" not in word), *two, "hydra.run.dir=two", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    one, two_ranks = (RunDir(tmp_path / name) for name in ("one", "two"))
    assert losses(one) == pytest.approx(losses(two_ranks), abs=1e-5)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_weights(tmp_path: Path, cache: Path) -> None:
    words = (*(word for word in RUN if "max_steps" not in word), "train.max_steps=6", "optim.learning_rate=1e-2")
    whole, killed = (prepared(tmp_path / name, *words) for name in ("whole", "killed"))
    assert killed_runs.work(whole) == 0
    killed_runs.kill_and_finish(killed, "train/loss", [2, 4])
    killed_runs.assert_same_end(whole, killed)


@pytest.mark.extras
@pytest.mark.slow
def test_the_loss_is_that_of_an_installed_trl(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from test_dpo import OF_TRL, SMOOTHING, batches, message, step, task_of

    policy, original, tokenizer = two_models.load(two_models.write(tmp_path / "model"))
    rows = [
        {"prompt": [message("user", question)], "chosen": [message("assistant", chosen)],
         "rejected": [message("assistant", rejected)]}
        for question, chosen, rejected in QUESTIONS
    ]  # fmt: skip
    arguments: dict[str, Any] = {"use_cpu": True, "bf16": False, "report_to": "none", "gradient_checkpointing": False,
                                 "per_device_train_batch_size": 4, "output_dir": str(tmp_path / "trl")}  # fmt: skip
    for loss_type in OF_TRL:
        config = trl.DPOConfig(
            loss_type=["sigmoid_norm" if loss_type == "dpo_norm" else loss_type],
            **arguments, label_smoothing=SMOOTHING.get(loss_type, 0.0),
        )  # fmt: skip
        trainer = trl.DPOTrainer(
            model=policy, ref_model=original, args=config, train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )  # fmt: skip
        batch = trainer.data_collator([trainer.train_dataset[number] for number in range(4)])
        trainer.model.eval()
        with torch.no_grad():
            theirs = float(trainer.compute_loss(trainer.model, batch))
        _, ours, _ = step(policy, original, task_of(loss_type), batches(tokenizer, packing=False, at_once=4))
        assert ours == pytest.approx(theirs, rel=1e-5), loss_type


@pytest.mark.extras
@pytest.mark.slow
@pytest.mark.parametrize("loss_type", ["cpo", "simpo", "orpo"])
def test_the_losses_without_a_reference_are_those_of_an_installed_trl(loss_type: str) -> None:
    """On log-probabilities of answers; TRL adds simpo's margin and orpo's cross entropy likewise."""
    pytest.importorskip("trl")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    generator = torch.Generator().manual_seed(0)
    s_w, s_l = (-20 * torch.rand(6, generator=generator) - 0.5 for _ in "wl")
    n_w, n_l = (torch.randint(2, 9, (6,), generator=generator).float() for _ in "wl")
    pairs = Pairs(s_w, s_l, torch.zeros(6), torch.zeros(6), n_w, n_l)
    trainer = SimpleNamespace(beta=0.7, alpha=0.0, label_smoothing=0.1, simpo_gamma=0.5, loss_type="sigmoid",
                              accelerator=SimpleNamespace(device="cpu"))  # fmt: skip
    if loss_type == "cpo":
        theirs, *_ = CPOTrainer.cpo_loss(trainer, s_w, s_l)
    elif loss_type == "simpo":
        trainer.loss_type, trainer.label_smoothing = "simpo", 0.0
        theirs, *_ = CPOTrainer.cpo_loss(trainer, s_w / n_w, s_l / n_l)
    else:
        theirs = -ORPOTrainer.odds_ratio_loss(trainer, s_w / n_w, s_l / n_l)[0]  # its loss subtracts this
    ours = pair_loss(pairs, loss_type, 0.7, 0.1, 0.5)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
