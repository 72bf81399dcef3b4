"""Distillation in whole runs: a run as teacher, its cached tokens, cuts, ranks, stops, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, composed, prepared
from fixtures import killed_runs, versions
from fixtures.ranks_of_a_run import several, worked
from fixtures.searches import searchable_is_logged

from runner.cli import main
from runner.errors import ConfigError, Preempted
from runner.files import cache_dir
from runner.report import model_card
from runner.signals import Stop
from runner.tasks import teacher_logits
from runner.tracking import manifest, metrics_log
from runner.tracking.mlflow import tags
from runner.tracking.rundir import RunDir
from runner.train import teacher_cache, worker
from runner.train.inputs import inputs
from runner.train.memory import peak
from runner.train.options import Options

BASE = (*TINY, "data.train_rows=24", "train.max_steps=3", "train.per_device_batch_size=4", "model.dtype=float32",
        "optim.learning_rate=3e-3")  # fmt: skip


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A run that has trained an adapter."""
    rundir = prepared(
        tmp_path_factory.mktemp("teacher") / "wise", *BASE, "seed=5", "optim.learning_rate=3e-2", "name=wise"
    )
    assert worker.work(rundir) == 0
    return rundir.path


def run_of(teacher: Path, *changes: str) -> tuple[str, ...]:
    return (*BASE, "task=distill", f"task.teacher={teacher}", "task.top_k=8", *changes)


def trained(folder: Path, *overrides: str) -> RunDir:
    rundir = prepared(folder, *overrides)
    assert worker.work(rundir) == 0
    return rundir


def numbers(rundir: RunDir, name: str) -> list[float]:
    return [record[name] for record in metrics_log.read(rundir) if name in record]


def test_tokens_are_computed_once_for_all_runs_that_need_them(teacher: Path, tmp_path: Path) -> None:
    first = trained(tmp_path / "first", *run_of(teacher, "data.packing=false"))
    before, after = numbers(first, "eval/divergence")
    assert after < before
    searchable_is_logged(first)
    assert re.search(r"teacher: 0 of (\d+) from the cache, \1 to compute", first.log.read_text())
    other = trained(tmp_path / "other", *run_of(teacher, "data.packing=false", "task.beta=0.5", "task.alpha=0.5"))
    assert re.search(r"teacher: (\d+) of \1 from the cache, 0 to compute", other.log.read_text())
    known = first.read_manifest()
    assert known["teacher"]["name"] == "wise"
    assert known["teacher"]["top_k"] == 8
    assert tags.of_run(first, known, first.read_state())["runner.teacher"].startswith("wise (")
    assert "distilled from: wise (" in model_card.text(first, ("adapter",), "", {}, is_chat=True)
    assert main.run(["evaluate", str(first.path)]) == 0
    (evaluated,) = metrics_log.read_evaluations(first)
    for name in ("loss", "divergence", "nll"):
        assert evaluated["metrics"][f"eval_held_out/{name}"] == pytest.approx(
            numbers(first, f"eval/{name}")[-1], abs=1e-5
        )


@pytest.mark.slow
def test_plain_peft_measures_what_the_run_reports(teacher: Path, tmp_path: Path) -> None:
    """The divergence of the saved adapter from the teacher's, with transformers and PEFT alone."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    rundir = trained(tmp_path / "run", *run_of(teacher, "task.top_k=null", "data.eval_rows=6"))
    path, held_out = rundir.read_manifest()["model"]["path"], inputs(Options.of(rundir)).splits.eval

    @torch.no_grad()
    def log_probabilities(adapter: Path) -> torch.Tensor:
        """(trained tokens, V)"""
        base = AutoModelForCausalLM.from_pretrained(path, **versions.FLOAT32)
        model, found = PeftModel.from_pretrained(base, str(adapter)).eval(), []
        for row in range(len(held_out)):
            ids, labels = (torch.tensor(column.tolist()) for column in held_out[row])
            found.append(torch.log_softmax(model(ids[None]).logits[0, :-1][labels[1:] != -100], -1))
        return torch.cat(found)

    own, other = log_probabilities(rundir.model), log_probabilities(RunDir(teacher).model)
    divergence = float((other.exp() * (other - own)).sum(1).mean())
    assert divergence == pytest.approx(numbers(rundir, "eval/divergence")[-1], abs=1e-5)


def test_a_copy_of_the_teacher_makes_the_same_run(teacher: Path, tmp_path: Path) -> None:
    shutil.copytree(teacher, tmp_path / "copy")
    one, two = (composed(*run_of(place)) for place in (teacher, tmp_path / "copy"))
    assert one["task"]["teacher"] != two["task"]["teacher"]
    assert manifest.signature(one) == manifest.signature(two)


@pytest.mark.parametrize(
    "keys",
    [
        ("task.top_k=null", "task.beta=1", "lora=none"),
        pytest.param(("task.temperature=2", "task.alpha=0.5"), marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_any_cut_and_packing_give_the_same_losses(teacher: Path, tmp_path: Path, keys: tuple[str, ...]) -> None:
    """Packing changes which rows a step has, but not the evaluation before it."""
    cuts = {"whole": ["data.packing=false"], "cut": ["data.packing=false", "train.micro_batch_size=1"], "packed": []}
    runs = {name: trained(tmp_path / name, *run_of(teacher, *keys, *cut)) for name, cut in cuts.items()}
    assert numbers(runs["whole"], "train/loss") == pytest.approx(numbers(runs["cut"], "train/loss"), abs=1e-5)
    for name in ("cut", "packed"):
        assert numbers(runs[name], "eval/loss")[0] == pytest.approx(numbers(runs["whole"], "eval/loss")[0], abs=1e-5)


@pytest.mark.parametrize("top_k", ["8", pytest.param("null", marks=pytest.mark.slow)])
def test_a_stopped_run_goes_on_to_the_same_weights(teacher: Path, tmp_path: Path, top_k: str) -> None:
    words = run_of(teacher, f"task.top_k={top_k}", "train.save_steps=1")
    whole, cut = trained(tmp_path / "whole", *words), prepared(tmp_path / "cut", *words)
    stops = iter([False] * 6 + [True])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stop, "check", lambda _: (_ for _ in ()).throw(Preempted("stop")) if next(stops, False) else None)
        assert worker.work(cut) == 75
    assert 0 < cut.read_state().step < 3
    assert worker.work(cut) == 0
    assert numbers(whole, "train/loss") == numbers(cut, "train/loss")
    assert len({run.read_manifest()["weights_sha256"] for run in (whole, cut)}) == 1


OWN = ("task.top_k=null", "data.packing=false", "task.beta=1", "task.max_completion_length=6",
       "task.sampling_temperature=1.0", "train.max_steps=4")  # fmt: skip


@pytest.mark.slow
def test_steps_on_answers_of_its_own_are_the_same_for_any_cut_and_after_a_stop(teacher: Path, tmp_path: Path) -> None:
    words = run_of(teacher, *OWN, "task.lmbda=0.5", "train.save_steps=1")
    whole, cut = trained(tmp_path / "whole", *words), trained(tmp_path / "cut", *words, "train.micro_batch_size=1")
    assert numbers(whole, "train/loss") == pytest.approx(numbers(cut, "train/loss"), abs=1e-5)
    tokens = np.diff([0, *numbers(whole, "train/tokens")])
    given = trained(tmp_path / "given", *run_of(teacher, *OWN[:3], "train.max_steps=4"))
    differs = tokens != np.diff([0, *numbers(given, "train/tokens")])
    assert differs.any()
    assert not differs.all(), "about half of the steps have answers of the data"
    assert all(0 < share < 1 for share in numbers(whole, "train/prepare_fraction"))
    stopped = prepared(tmp_path / "stopped", *words)
    stops = iter([False] * 7 + [True])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stop, "check", lambda _: (_ for _ in ()).throw(Preempted("stop")) if next(stops, False) else None)
        assert worker.work(stopped) == 75
    assert 0 < stopped.read_state().step < 4
    assert worker.work(stopped) == 0
    assert numbers(whole, "train/loss") == numbers(stopped, "train/loss")
    assert len({run.read_manifest()["weights_sha256"] for run in (whole, stopped)}) == 1


def test_a_quantized_model_learns_from_itself_and_from_a_quantized_teacher(teacher: Path, tmp_path: Path) -> None:
    itself = trained(tmp_path / "itself", *BASE, "task=distill", "quant=4bit", "task.top_k=null")
    assert 0 < numbers(itself, "eval/divergence")[-1] < numbers(itself, "eval/divergence")[0] < 0.1
    assert itself.read_manifest()["teacher"]["path"]
    coarse = trained(tmp_path / "coarse", *run_of(teacher, "task.teacher_quant=4bit", "quant=8bit"))
    assert numbers(coarse, "eval/divergence")[-1] < numbers(coarse, "eval/divergence")[0]


def test_plan_counts_the_teacher_and_refuses_what_does_not_fit(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = run_of(teacher, "data.train_rows=20")
    assert main.run(["plan", *words]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "wise, its 8 most likely tokens" in shown
    assert "to compute, about" in shown
    assert main.run(["plan", *words, "task.top_k=null"]) == 0
    assert "wise, in memory" in " ".join(capsys.readouterr().out.split())
    assert main.run(["plan", *words, "task.top_k=1000"]) == 2
    assert "the vocabulary has 259 tokens" in capsys.readouterr().err
    base = json.loads((teacher / "model" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert main.run(["plan", *words, f"task.teacher={base}"]) == 0
    other = shutil.copytree(base, tmp_path / "other") / "tokenizer.json"
    tokens = json.loads(other.read_text())
    tokens["model"]["vocab"] |= {"a": tokens["model"]["vocab"]["b"], "b": tokens["model"]["vocab"]["a"]}
    other.write_text(json.dumps(tokens))
    assert main.run(["plan", *words, f"task.teacher={other.parent}"]) == 2
    refusal = " ".join(capsys.readouterr().err.split())
    assert "has other tokens than the model: 2 of 259 differ" in refusal
    assert "is 'a' here and 'b' there" in refusal


def test_a_teacher_in_memory_needs_memory_and_time(teacher: Path) -> None:
    from runner.train import estimate

    runs = ((*BASE,), run_of(teacher), run_of(teacher, "task.top_k=null"))
    alone, apart, beside = (estimate.expect(inputs(Options(composed(*words)))) for words in runs)
    assert beside.teacher is not None
    assert beside.memory.weights == alone.memory.weights + beside.teacher.weights
    assert beside.flops_per_token == pytest.approx(alone.flops_per_token + beside.teacher.flops_per_token)
    assert apart.flops_per_token == alone.flops_per_token
    assert apart.memory.total < beside.memory.total


def test_the_memory_of_a_teachers_pass_is_what_it_allocates(teacher: Path) -> None:
    """The teacher is a base model: the estimate leaves out the small products of an adapter."""
    from runner.train import estimate

    base = json.loads((teacher / "model" / "adapter_config.json").read_text())["base_model_name_or_path"]
    run = inputs(Options(composed(*BASE, "task=distill", f"task.teacher={base}", "task.top_k=null", "quant=4bit")))
    expected, student = estimate.expect(run).teacher, torch.nn.Linear(1, 1)
    assert run.teacher is not None
    assert expected is not None
    (batches,) = teacher_cache.attach(student, run.teacher, [run.batches], None)
    with peak.Ledger() as ledger:
        for weight in student.attached.teacher.parameters():
            ledger.enter(weight)
        weights = ledger.live
        teacher_logits.logits(student, batches.heaviest())
    assert ledger.peak - weights == pytest.approx(expected.forward, rel=0.1)


def test_a_teacher_that_changed_or_is_gone_is_refused(teacher: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(teacher, tmp_path / "copy")
    rundir = prepared(tmp_path / "run", *run_of(copy))
    (copy / "model" / "adapter_model.safetensors").unlink()
    with pytest.raises(ConfigError, match="the teacher is missing, or has other weights"):
        inputs(Options.of(rundir))
    with pytest.raises(ConfigError, match="is an adapter, whose base model"):
        composed(*run_of(shutil.copytree(teacher / "model", tmp_path / "alone")))


def test_a_damaged_cache_is_computed_again(teacher: Path, tmp_path: Path) -> None:
    run = inputs(Options(composed(*run_of(teacher, "data.train_rows=16"))))
    compute: Any = lambda: teacher_cache.compute(run, alone(), lambda *_: None)  # noqa: E731
    compute()
    kept = {name: np.array(column) for name, column in run.batches.rows.of_labels.items()}
    assert teacher_cache.missing(run)[0] == 0
    for file in cache_dir("teachers").glob("*.teacher_ids.npy"):
        file.unlink()  # the columns of the run are mapped
        file.write_bytes(b"damaged")
    assert teacher_cache.missing(run)[0] == teacher_cache.missing(run)[2]
    compute()
    for name, column in run.batches.rows.of_labels.items():
        np.testing.assert_allclose(column, kept[name], atol=1e-5)


def alone() -> Any:
    from runner.train.distributed.ranks import ALONE

    return ALONE


@pytest.mark.slow
@pytest.mark.parametrize("top_k", ["8", "null"])
def test_two_processes_give_the_losses_of_one(teacher: Path, tmp_path: Path, top_k: str) -> None:
    words = run_of(teacher, f"task.top_k={top_k}", "data.packing=false", "data.train_rows=12")
    one = trained(tmp_path / "one", *words)
    shutil.rmtree(cache_dir("teachers"), ignore_errors=True)
    two = prepared(tmp_path / "two", *words, *several("ddp"), "train.per_device_batch_size=2")
    code, printed = worked(two)
    assert code == 0, printed
    for name in ("train/loss", "eval/loss"):
        assert numbers(two, name) == pytest.approx(numbers(one, name), abs=1e-5)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_weights(teacher: Path, tmp_path: Path) -> None:
    words = run_of(teacher, "train.max_steps=6", "train.save_steps=1", "optim.learning_rate=1e-2")
    whole, killed = (prepared(tmp_path / name, *words) for name in ("whole", "killed"))
    assert killed_runs.work(whole) == 0
    killed_runs.kill_and_finish(killed, "train/loss", [2, 4])
    killed_runs.assert_same_end(whole, killed)
