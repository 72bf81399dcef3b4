"""Which runs compute a prompt once for both of its answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, composed
from fixtures import two_models, versions

from runner.data.examples import Answers
from runner.data.packing import IGNORED, Rows
from runner.models import pretrained
from runner.tasks import task
from runner.train import build, estimate, inputs, layout
from runner.train.options import Options

PAIRS = (*TINY, "task=reward", "data=chitchat_pairs", "data.train_rows=24", "data.eval_rows=4", "data.max_length=1024")


@pytest.fixture(scope="module")
def pairs(cache: Path) -> inputs.Inputs:
    return inputs.inputs(Options(composed(*PAIRS)))


def test_prompts_are_shared_where_nothing_needs_whole_sequences(pairs: inputs.Inputs) -> None:
    model = pretrained.empty(pairs.source, pairs.options.quant)
    shared = layout.laid(pairs.batches, model, "cpu", whole=False)
    whole = layout.laid(pairs.batches, model, "cpu", whole=True)
    assert 0.3 < shared.computed_share < 1 == whole.computed_share
    assert shared.largest.tokens < whole.largest.tokens
    for step in range(3):
        (one,), (other,) = shared.step(step), whole.step(step)
        assert [one[name] for name in ("tokens", "trained", "units")] == [
            other[name] for name in ("tokens", "trained", "units")
        ]
        assert one["input_ids"].numel() <= shared.largest.tokens
    assert shared.heaviest()["input_ids"].numel() == shared.largest.tokens
    assert layout.laid(pairs.batches, model, "cuda", whole=False).computed_share == 1
    model.config.rope_parameters = {"rope_type": "longrope"}
    assert layout.laid(pairs.batches, model, "cpu", whole=False).computed_share == 1


def test_the_device_that_trains_decides_not_the_one_that_loads(pairs: inputs.Inputs) -> None:
    """A model that is to be sharded waits on the CPU, but no GPU kernel takes prompts that are shared."""
    model = build.load_model(pairs)
    versions.needs_by_document(model)
    for device, least in ((torch.device("cuda"), 1.0), (torch.device("cpu"), 0.3), (None, 0.3)):
        (laid,) = build.resolve_attention(pairs.source, model, None, pairs.batches, device=device)
        model.set_attn_implementation("sdpa")
        assert laid.by_document
        assert least <= laid.computed_share <= (1 if least == 1 else 0.99), device


def test_answers_to_one_prompt_compute_it_once(tmp_path: Path) -> None:
    model = two_models.by_document(two_models.load(two_models.write(tmp_path / "model"))[0])
    prompts = two_models.batches(
        [{"input_ids": [*range(5, 5 + n)], "labels": [IGNORED] * n} for n in (20, 9)], at_once=2
    )
    prompts.answers = Answers(3, 6)
    answers = ([7, 8, 9, 3, 4, 2], [7], [8, 2, 9])
    documents = [
        (np.array([*prompt, *answer]), np.array([*[IGNORED] * len(prompt), *answer]))
        for prompt in (prompts.rows[0][0], prompts.rows[1][0])
        for answer in answers
    ]
    rows = replace(Rows.of(documents), unit=3)
    shared = layout.laid(prompts, model, "cpu", whole=False)
    one, other = (each.of_documents(rows, 26) for each in (shared, prompts.laid_end_to_end()))
    assert one["input_ids"].numel() == 8 * -(-(29 + 20 + 2 * 2) // 8) < other["input_ids"].numel()
    nll = [task.token_losses(model, batch).nll for batch in (one, other)]
    torch.testing.assert_close(*nll)
    weights = [each for each in model.parameters() if each.requires_grad]
    advantages = torch.randn_like(nll[0])
    gradients = [torch.autograd.grad((each * advantages).sum(), weights) for each in nll]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    heaviest = shared.heaviest()["input_ids"].numel()
    assert heaviest == shared.largest.tokens < prompts.laid_end_to_end().largest.tokens
    assert shared.computed_share == pytest.approx((29 + 2 * 6 + 2 * 2 * 7) / (3 * (29 + 2 * 6)))


@pytest.mark.parametrize(
    ("settings", "is_eager", "whole"),
    [({}, True, False), ({}, False, True), ({"neftune_noise_alpha": 5.0}, True, True),
     ({"router_aux_loss_coef": 0.001}, True, True)],
)  # fmt: skip
def test_what_needs_whole_sequences(settings: dict[str, float], is_eager: bool, whole: bool) -> None:
    given: Any = SimpleNamespace(**{"neftune_noise_alpha": None, "router_aux_loss_coef": None, **settings})
    assert layout.needs_whole(given, is_eager=is_eager) == whole


@versions.by_document
def test_time_and_memory_are_those_of_the_tokens_that_are_computed(pairs: inputs.Inputs) -> None:
    noisy = inputs.inputs(Options(composed(*PAIRS, "train.neftune_noise_alpha=5")))
    less, more = estimate.expect(pairs), estimate.expect(noisy)
    assert less.share < 1 == more.share
    assert less.memory.activations < more.memory.activations
    both = (estimate.training_seconds(*each) for each in ((pairs, less), (noisy, more)))
    operations = [seconds * peak for seconds, peak in both]
    assert operations[0] == pytest.approx(less.share * operations[1])
