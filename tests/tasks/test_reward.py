"""Reward models against the numbers of TRL 1.16, and a run from training to the exported model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, prepared
from fixtures import two_models, versions
from fixtures.searches import searchable_is_logged
from fixtures.two_models import QUESTIONS

from runner.cli import main
from runner.data import preference
from runner.data.batches import Batches
from runner.errors import DataError, Preempted
from runner.models.kernels import score_head
from runner.signals import Stop
from runner.tasks import reward, scores
from runner.tracking import metrics_log, origin
from runner.tracking.rundir import RunDir
from runner.train import worker

OF_TRL = {(0.0, 0.0): 0.701261, (0.01, 0.0): 0.702359, (0.0, 0.5): 1.182539}
"""(center_rewards_coefficient, step of the margins) → the loss of RewardTrainer of TRL 1.16 on these four pairs."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return two_models.write(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def loaded(folder: Path) -> tuple[Any, Any]:
    """(model with transformers' own new head, tokenizer)"""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, **versions.FLOAT32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model.config.pad_token_id = tokenizer.pad_token_id
    score_head.install(model, reward.reward(center_rewards_coefficient=0.0).head)
    return model.eval(), tokenizer


def rows(margin: float = 0.0) -> list[dict[str, Any]]:
    return [{"prompt": q, "chosen": c, "rejected": r, "margin": margin * i} for i, (q, c, r) in enumerate(QUESTIONS)]


def batches(tokenizer: Any, *, margin: float = 0.0, **layout: Any) -> Batches:
    keys = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected", "margin": "margin"}
    examples = [preference.preference(row, **keys) for row in rows(margin)]
    features = [each for example in examples for each in reward.encode(example, tokenizer, 256)]
    return two_models.batches(features, unit=2, values=["margin"], pad_id=tokenizer.pad_token_id, **layout)


def step(model: Any, task: Any, given: Batches) -> tuple[dict[str, float], float, torch.Tensor]:
    """(metrics, loss, gradient of all parameters) of one step over all pairs."""
    return two_models.step(model, task, given.step(0))


@pytest.mark.parametrize(("center", "margin"), OF_TRL)
def test_the_loss_is_that_of_trl(loaded: Any, center: float, margin: float) -> None:
    model, tokenizer = loaded
    task = reward.reward(center_rewards_coefficient=center)
    metrics, loss, _ = step(model, task, batches(tokenizer, packing=False, at_once=4, margin=margin))
    assert loss == pytest.approx(OF_TRL[center, margin], abs=1e-5)
    assert metrics["loss"] == pytest.approx(loss, rel=1e-6)
    assert metrics["min_reward"] <= metrics["mean_reward"] <= metrics["max_reward"]


@pytest.mark.extras
@pytest.mark.slow
def test_the_numbers_are_those_of_the_installed_trl(loaded: Any, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification

    model, tokenizer = loaded
    plain = AutoModelForSequenceClassification.from_pretrained(model.name_or_path, num_labels=1, **versions.FLOAT32)
    plain.load_state_dict(model.state_dict())
    plain.config.pad_token_id = tokenizer.pad_token_id
    for (center, margin), expected in OF_TRL.items():
        args = trl.RewardConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none",
                                gradient_checkpointing=False, center_rewards_coefficient=center or None)  # fmt: skip
        given = [
            {key: [{"role": role, "content": row[key]}] for key, role in
             (("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant"))}
            | ({"margin": row["margin"]} if margin else {})
            for row in rows(margin)
        ]  # fmt: skip
        trainer = trl.RewardTrainer(
            plain, args=args, train_dataset=Dataset.from_list(given), processing_class=tokenizer
        )
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
        with torch.no_grad():
            assert float(trainer.compute_loss(trainer.model.eval(), batch)) == pytest.approx(expected, abs=1e-5)


def test_any_cut_gives_the_same_step(loaded: Any) -> None:
    """Micro-batches, packing and padding change neither the loss nor the gradient, nor smallest and largest reward."""
    model, tokenizer = loaded
    task = reward.reward(center_rewards_coefficient=0.01)
    expected = step(model, task, batches(tokenizer, packing=False, at_once=4, margin=0.5))
    ways = ({"packing": False, "at_once": 1}, {"packing": True, "at_once": 1}, {"packing": False, "at_once": 2})
    for way in (*ways, {"packing": False, "at_once": 2, "end_to_end": True}):
        metrics, loss, gradient = step(model, task, batches(tokenizer, margin=0.5, **way))
        assert loss == pytest.approx(expected[1], rel=1e-5), way
        torch.testing.assert_close(gradient, expected[2], rtol=1e-4, atol=1e-6)
        assert metrics == pytest.approx(expected[0], rel=1e-4, abs=1e-6), way


@pytest.mark.parametrize("packing", [False, True])
def test_a_prompt_is_computed_once_for_both_answers(loaded: Any, packing: bool) -> None:
    model, tokenizer = loaded
    task = reward.reward(center_rewards_coefficient=0.01)
    expected = step(model, task, batches(tokenizer, packing=packing, at_once=2, margin=0.5))
    given = batches(tokenizer, packing=packing, at_once=2, margin=0.5, sharing=True)
    metrics, loss, gradient = step(two_models.by_document(model), task, given)
    assert loss == pytest.approx(expected[1], rel=1e-5)
    torch.testing.assert_close(gradient, expected[2], rtol=1e-4, atol=1e-6)
    assert metrics == pytest.approx(expected[0], rel=1e-4, abs=1e-6)
    computed = sum(batch["input_ids"].numel() for batch in given.step(0))
    assert computed < sum(batch["tokens"] for batch in given.step(0))


def test_a_batch_without_pairs_adds_nothing(loaded: Any) -> None:
    """A rank that has no rows left at the end of an epoch."""
    model, tokenizer = loaded
    task = reward.reward(center_rewards_coefficient=0.01)
    laid = batches(tokenizer, packing=False, at_once=4)
    for own, given in ((model, laid), (two_models.by_document(model), laid.sharing_prompts())):
        sums = task.loss(own, given.of([]))
        assert float(sums["loss"].detach()) == float(sums["pairs"]) == 0
        assert float(sums["largest"]) == float(sums["largest_negative"]) == -torch.inf


def test_pairs_that_cannot_be_compared_are_refused(loaded: Any) -> None:
    tokenizer = loaded[1]
    with pytest.raises(DataError, match="needs pairs"):
        reward.encode([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], tokenizer, 256)
    keys = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected", "margin": "margin"}
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    for margin in ("one", float("nan"), True):
        with pytest.raises(DataError, match="margin"):
            preference.preference({**row, "margin": margin}, **keys)
    assert "margin" not in preference.preference({**row, "margin": None}, **keys)


RUN = (*TINY, "task=reward", "data=chitchat_pairs", "data.train_rows=24", "data.eval_rows=4", "data.max_length=512",
       "train.max_steps=4", "train.per_device_batch_size=2", "model.dtype=float32")  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> RunDir:
    rundir = prepared(tmp_path_factory.mktemp("reward") / "run", *RUN)
    assert worker.work(rundir) == 0
    return rundir


def evaluations(rundir: RunDir) -> list[dict[str, float]]:
    return [record for record in metrics_log.read(rundir) if "eval/loss" in record]


def test_a_run_has_the_metrics_of_its_task(run: RunDir) -> None:
    first, last = evaluations(run)
    assert {"eval/accuracy", "eval/margin", "eval/mean_reward", "eval/min_reward", "eval/max_reward"} <= last.keys()
    searchable_is_logged(run)
    assert last["eval/loss"] != first["eval/loss"]
    assert json.loads((run.model / "config.json").read_text())["id2label"] == {"0": "reward"}


def loss_of_plain_peft(run: RunDir, model: Any) -> float:
    """The held-out loss as a script of plain transformers measures it, one answer at a time."""
    from runner.tracking import manifest
    from runner.train import inputs
    from runner.train.trained_model import Trained

    of = Trained(run, manifest.pinned(manifest.read_config(run), run))
    rows = inputs.load_data(of.options, of.result, of.tokenizer)[0].eval
    with torch.no_grad():
        rewards = [
            float(model(input_ids=torch.tensor(rows[i][0][None].astype(int))).logits[0, 0]) for i in range(len(rows))
        ]
    differences = torch.tensor(rewards[0::2]) - torch.tensor(rewards[1::2])
    return float(torch.nn.functional.softplus(-differences).mean())


def test_plain_peft_measures_the_loss_of_the_run(run: RunDir) -> None:
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForSequenceClassification

    adapter = json.loads((run.model / "adapter_config.json").read_text())
    config = AutoConfig.from_pretrained(run.model)
    path = adapter["base_model_name_or_path"]
    base = AutoModelForSequenceClassification.from_pretrained(path, config=config, **versions.FLOAT32)
    model = PeftModel.from_pretrained(base, run.model).eval()
    assert loss_of_plain_peft(run, model) == pytest.approx(evaluations(run)[-1]["eval/loss"], abs=1e-5)


@versions.transformers_5
def test_a_merged_export_keeps_its_head(run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForSequenceClassification

    assert main.run(["export", str(run.path), str(tmp_path / "merged"), "--merged", "--dtype", "float32"]) == 0
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", **versions.FLOAT32).eval()
    assert model.config.id2label == {0: "reward"}
    assert model.config.pad_token_id is not None
    assert loss_of_plain_peft(run, model) == pytest.approx(evaluations(run)[-1]["eval/loss"], abs=1e-5)
    card = (tmp_path / "merged/README.md").read_text()
    assert "AutoModelForSequenceClassification.from_pretrained(folder" in card
    assert "text-classification" in card
    (run_of_the_model,) = origin.came_from({"model": {"path": str(tmp_path / "merged")}})
    assert run_of_the_model["weights_sha256"] == run.read_manifest()["weights_sha256"]
    assert (run_of_the_model["how"], run_of_the_model["where"]) == ("model.path", str(run.path))
    assert main.run(["export", str(run.path), str(tmp_path / "gguf"), "--gguf"]) == 2
    assert "no score heads" in capsys.readouterr().err
    namespace: dict[str, Any] = {}
    code = (
        card.split("```python\n")[1].split("```")[0].replace('folder = "."', f"folder = {str(tmp_path / 'merged')!r}")
    )
    exec(code, namespace)
    assert float(namespace["scores"][0]) == pytest.approx(float(namespace["scores"][0]))


@versions.transformers_5
def test_the_code_of_an_adapters_card_runs(run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["export", str(run.path), str(tmp_path / "adapter")]) == 0
    card = (tmp_path / "adapter/README.md").read_text()
    path = json.loads((run.model / "adapter_config.json").read_text())["base_model_name_or_path"]
    code = (
        card.split("```python\n")[1].split("```")[0].replace('folder = "."', f"folder = {str(tmp_path / 'adapter')!r}")
    )
    name = next(line for line in code.splitlines() if line.startswith("base = ")).split("'")[1]
    capsys.readouterr()
    exec(code.replace(repr(name), repr(path)), {})
    assert capsys.readouterr().out.startswith("{'reward': ")


def test_evaluate_gives_the_numbers_of_training(run: RunDir, capfd: pytest.CaptureFixture[str]) -> None:
    assert main.run(["evaluate", str(run.path)]) == 0
    assert main.run(["evaluate", str(run.path), "--base"]) == 0
    tuned, base = metrics_log.read_evaluations(run)
    first, last = evaluations(run)
    for name in ("loss", "accuracy", "margin", "min_reward", "max_reward"):
        assert tuned["metrics"][f"eval_held_out/{name}"] == pytest.approx(last[f"eval/{name}"], abs=1e-5)
        assert base["metrics"][f"eval_held_out/base_{name}"] == pytest.approx(first[f"eval/{name}"], abs=1e-5)


def test_verbs_that_need_text_are_refused(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["generate", str(run.path), "Hello"]) == 2
    err = capsys.readouterr().err
    assert "gives scores, not text" in err
    assert "runner evaluate" in err
    assert main.run(["evaluate", str(run.path), "--tasks", "arc_easy"]) == 2
    assert "generates text" in capsys.readouterr().err


def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path: Path, run: RunDir) -> None:
    cut = prepared(tmp_path / "cut", *RUN, "train.save_steps=2")
    stops = iter([False, False, True])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stop, "check", lambda _: (_ for _ in ()).throw(Preempted("stop")) if next(stops, False) else None)
        assert worker.work(cut) == 75
    assert cut.read_state().step < 4
    assert worker.work(cut) == 0
    losses = [[r["train/loss"] for r in metrics_log.read(each) if "train/loss" in r] for each in (run, cut)]
    assert losses[0] == losses[1]
    hashes = [each.read_manifest()["weights_sha256"] for each in (run, cut)]
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize(
    "changes",
    [
        ("lora=none",),
        ("quant=4bit",),
        ("quant=8bit",),
        ("lora=dora", "data.packing=false"),
        ("optim=muon", "lora=none"),
    ],
)
def test_other_weights_and_their_saved_model(tmp_path: Path, cache: Path, changes: tuple[str, ...]) -> None:
    """Full fine-tuning, quantized bases and other optimizers: the head trains, and the saved model evaluates alike."""
    rundir = prepared(tmp_path / "run", *RUN, *changes, "train.max_steps=2")
    assert worker.work(rundir) == 0
    first, last = evaluations(rundir)
    assert first["eval/loss"] != last["eval/loss"]
    assert main.run(["evaluate", str(rundir.path)]) == 0
    (evaluated,) = metrics_log.read_evaluations(rundir)
    assert evaluated["metrics"]["eval_held_out/loss"] == pytest.approx(last["eval/loss"], abs=1e-5)
    from safetensors import safe_open

    file = rundir.model / ("model.safetensors" if "lora=none" in changes else "adapter_model.safetensors")
    with safe_open(file, "pt") as weights:
        names = [name for name in weights.keys() if "score" in name]  # noqa: SIM118
    assert len(names) == 1


def test_scores_are_those_of_transformers_pooling(loaded: Any, folder: Path) -> None:
    """With a padding token that is not at the end of documents, transformers finds the same last token."""
    from transformers import AutoModelForSequenceClassification

    model, tokenizer = loaded
    plain = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, **versions.FLOAT32).eval()
    plain.load_state_dict(model.state_dict())
    plain.config.pad_token_id = tokenizer.pad_token_id
    (batch,) = batches(tokenizer, packing=False, at_once=4).step(0)
    with torch.no_grad():
        ids = batch["input_ids"]
        expected = plain(input_ids=ids, attention_mask=(ids != tokenizer.pad_token_id).long()).logits
        torch.testing.assert_close(scores.of_documents(model, batch), expected, rtol=0, atol=1e-6)
