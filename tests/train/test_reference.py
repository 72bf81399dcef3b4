"""The reference of preference optimization: computed once, checked, and refused with dropout."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, composed, prepared
from fixtures import two_models

from runner.errors import ConfigError
from runner.tracking import metrics_log
from runner.train import reference, worker


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return two_models.write(tmp_path_factory.mktemp("model"))


RUN = (*TINY, "task=dpo", "data=chitchat_pairs", "data.train_rows=24", "data.eval_rows=4", "data.max_length=512",
       "data.packing=false", "train.max_steps=4",
       "train.per_device_batch_size=4", "model.dtype=float32")  # fmt: skip


def test_a_run_starts_at_its_reference_and_the_reference_is_computed_once(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUNNER_CACHE", str(tmp_path / "cache"))
    passes: list[int] = []
    original = reference._of
    monkeypatch.setattr(reference, "_of", lambda *given: passes.append(len(given[2])) or original(*given))
    losses = {}
    for name, changes in {"a": (), "b": ("task.beta=0.5", "task.loss_type=ipo", "optim.learning_rate=1e-3")}.items():
        rundir = prepared(tmp_path / name, *RUN, *changes)
        assert worker.work(rundir) == 0
        losses[name] = [record for record in metrics_log.read(rundir) if "eval/loss" in record]
        if name == "a":
            assert sum(passes) == 16 + 4 + 1, (
                "each pair that is visited, once, and one to prove that training begins there"
            )
            passes.clear()
    assert sum(passes) == 2 + 1, "the second run compares one pair of each split with the cache"
    first = losses["a"][0]
    assert first["eval/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["eval/rewards/margins"] == pytest.approx(0.0, abs=1e-5)
    assert losses["b"][0]["eval/loss"] == pytest.approx((1 / (2 * 0.5)) ** 2, rel=1e-4)


def test_a_cache_that_does_not_match_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNNER_CACHE", str(tmp_path / "cache"))
    assert worker.work(prepared(tmp_path / "a", *RUN)) == 0
    for path in (tmp_path / "cache/reference").glob("*.npy"):
        np.save(path, np.load(path) + 5.0)
    rundir = prepared(tmp_path / "b", *RUN)
    assert worker.work(rundir) == 0
    assert "does not match the model" in rundir.log.read_text()
    first, again = ([r["eval/loss"] for r in metrics_log.read(prepared_run) if "eval/loss" in r]
                    for prepared_run in (rundir, type(rundir)(tmp_path / "a")))  # fmt: skip
    assert first == again


def test_dropout_with_a_reference_is_refused(tmp_path: Path, folder: Path, cache: Path) -> None:
    with pytest.raises(ConfigError, match=r"lora.lora_dropout=0.1: task=dpo compares the model with its own start"):
        composed("task=dpo", "data=chitchat_pairs", "lora.lora_dropout=0.1")
    composed("task=simpo", "data=chitchat_pairs", "lora.lora_dropout=0.1")
    model = shutil.copytree(folder, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.3}))
    words = [word for word in RUN if not word.startswith("model=")]
    rundir = prepared(tmp_path / "run", *words, "model=local", f"model.path={model}", "model.attention=eager")
    assert worker.work(rundir) == 2
    assert not rundir.manifest.exists()
