"""NEFTune: against the hook of transformers and the formula of the paper; the same for any way of computing a step."""

# ruff: noqa: F401 - a fixture is imported, then asked for by name

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, composed
from fixtures import versions
from fixtures.documents import batches, own_cache
from test_loop import trained
from torch import Tensor, nn

from runner.data.packing import Rows, pack
from runner.errors import ConfigError
from runner.train import neftune

ALPHA, WIDTH = 5.0, 16


def rows(count: int = 40) -> Rows:
    lengths = np.random.default_rng(0).integers(2, 30, count)
    ids = np.arange(lengths.sum(), dtype=np.int32)
    return Rows(ids, ids.copy(), np.concatenate([[0], np.cumsum(lengths)]), pack(lengths, 64))


def noise_on(batch: dict[str, Any], seed: int = 0) -> Tensor:
    """The noise on a batch, flattened: (B * T, d)."""
    noise = neftune._Noise(ALPHA, seed)
    shape = (*batch["input_ids"].shape, WIDTH)
    with noise.on(batch):
        return noise(nn.Identity(), (), torch.zeros(shape)).view(-1, WIDTH)


def by_row(step: list[dict[str, Any]]) -> dict[int, Tensor]:
    """Number of each document of a step in the data → the noise on it."""
    found = ((row, noise_on(batch)[first:end]) for batch in step for row, first, end in batch["spans"].tolist())
    return dict(found)


@versions.transformers_5
def test_one_document_has_the_noise_of_transformers():
    from transformers.integrations.neftune import neftune_post_forward_hook

    ours = by_row(batches(rows(), packing=True).step(3))
    for row, noise in ours.items():
        torch.manual_seed(neftune._seed(0, 3, row))
        module = SimpleNamespace(training=True, neftune_noise_alpha=ALPHA)
        theirs = neftune_post_forward_hook(module, (), torch.zeros(1, *noise.shape))
        torch.testing.assert_close(noise, theirs[0], rtol=1e-6, atol=0)


def test_the_noise_is_uniform_and_as_large_as_the_paper_says():
    """The variance of U(-b, b) is b² / 3; padding has no noise."""
    step = batches(rows(), packing=True, max_length=80).step(0)
    for row, noise in by_row(step).items():
        bound = ALPHA / math.sqrt(len(noise) * WIDTH)
        assert noise.abs().max() <= bound, row
    scaled = torch.cat([noise.flatten() * math.sqrt(noise.numel()) / ALPHA for noise in by_row(step).values()])
    assert scaled.mean() == pytest.approx(0, abs=0.03)
    assert scaled.var() == pytest.approx(1 / 3, abs=0.02)
    for batch in step:
        inside = np.zeros(batch["input_ids"].numel(), dtype=bool)
        for _, first, end in batch["spans"]:
            inside[first:end] = True
        assert not inside.all()
        assert not noise_on(batch)[~inside].any()


def test_a_document_has_the_same_noise_however_the_step_is_computed():
    whole = batches(rows(), packing=False, rows_per_batch=8, accumulation=1)
    expected = by_row(whole.step(2))
    ranks = [batches(rows(), packing=False, rows_per_batch=4, accumulation=1, rank=rank, world=2) for rank in (0, 1)]
    ways = [whole.cut_into(2).step(2), whole.laid_end_to_end().step(2), [b for rank in ranks for b in rank.step(2)]]
    for way in ways:
        found = by_row(way)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[row], expected[row]) for row in expected)
    packed = by_row([{**batches(rows(), packing=True, rows_per_batch=99).of([*range(9)]), "step": 2}])
    assert all(torch.equal(packed[row], expected[row]) for row in packed.keys() & expected.keys())
    other = by_row(whole.step(3))
    assert not any(torch.equal(other[row], expected[row]) for row in other.keys() & expected.keys())


def test_a_batch_of_an_evaluation_has_no_noise():
    assert not noise_on(next(batches(rows(), packing=True).one_pass())).any()


@pytest.mark.parametrize("lora", ["lora=lora", "lora=none"])
def test_training_has_noise_and_evaluations_have_none(lora: str, tmp_path: Path, cache: Path):
    common = (*TINY, lora, "train.max_steps=2", "data.packing=false", "optim.learning_rate=1e-2")
    noisy = (*common, "train.neftune_noise_alpha=50")
    _, plain = trained(tmp_path, *common, "train.per_device_batch_size=4")
    _, four = trained(tmp_path, *noisy, "train.per_device_batch_size=4")
    _, one = trained(tmp_path, *noisy, "train.per_device_batch_size=1", "train.gradient_accumulation_steps=4")
    assert four.of("eval/loss")[0] == plain.of("eval/loss")[0]
    assert abs(four.of("train/loss")[0] - plain.of("train/loss")[0]) > 1e-3
    for name in ("train/loss", "train/grad_norm", "eval/loss"):
        assert one.of(name) == pytest.approx(four.of(name), abs=1e-5), name


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("task=dpo data=chitchat_pairs", "compares the model with its own start"),
        ("experiment=grpo", "makes the batches of a step itself"),
        ("compile=default", "use compile=regional"),
    ],
)
def test_where_noise_would_be_wrong_it_is_refused(words: str, problem: str):
    with pytest.raises(ConfigError, match=problem):
        composed(*TINY, "train.neftune_noise_alpha=5", *words.split())
