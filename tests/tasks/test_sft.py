"""Weights of messages and rows in the loss, for any cut of a step into micro-batches."""

from __future__ import annotations

import copy
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import composed
from fixtures import two_models, versions
from fixtures.chat_tokenizer import build
from fixtures.documents import batches, source
from torch import Tensor

from runner.config import schema
from runner.data import splits, tokenization
from runner.data.encoding import Recipe
from runner.data.packing import IGNORED, Rows
from runner.errors import DataError
from runner.models import tiny
from runner.models.kernels import lm_head
from runner.tasks import dpo, sft
from runner.tasks.task import token_loss
from runner.train.options import Options

SETTINGS = schema.DataSettings(
    max_length=96, packing=True, overlong="truncate", deduplicate=False, eval_fraction=0.0, eval_rows=None,
    train_rows=None,
)  # fmt: skip
WAYS = [
    {"packing": True, "rows_per_batch": 1}, {"packing": True, "rows_per_batch": 3},
    {"packing": False, "rows_per_batch": 1}, {"packing": False, "rows_per_batch": 4},
]  # fmt: skip


def talk(answer: str, weight: object = None, **row: object) -> dict:
    turns = [{"role": "user", "content": f"Say {answer}"}, {"role": "assistant", "content": answer, "weight": weight}]
    return {"messages": turns, **row}


def rows_of(*rows: dict, task: Any = None, **changes: object) -> Rows:
    read = Options(composed()).sources[""].format
    settings = schema.DataSettings(**{**vars(SETTINGS), **changes})
    recipe = Recipe(read, task or sft.sft(train_on="assistant"), build("qwen"), settings)
    return tokenization.every_row(source(rows), recipe).eval


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    folder: Path = tmp_path_factory.mktemp("model")
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    tiny.write(folder, seed=0, **shape, num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_pretrained(folder, **versions.FLOAT32, attn_implementation="eager")
    model.resize_token_embeddings(len(build("qwen")), mean_resizing=False)
    return model.eval()


def step(model: Any, rows: Rows, task: Any = None, **way: Any) -> tuple[float, dict[str, float], torch.Tensor]:
    """(loss, metrics, gradient) of one step over all rows."""
    task = task or sft.sft(train_on="assistant")
    micro_batches = batches(rows, accumulation=99, epochs=1.0, shuffle=False, **way).step(0)
    metrics, loss, gradient = two_models.step(model, task, micro_batches)
    return loss, metrics, gradient


OTHERS = [talk("no"), talk("maybe, who knows"), talk("a longer answer, with words in it")]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_weight_of_2_is_the_row_twice(model: Any, way: dict[str, Any]) -> None:
    expected = step(model, rows_of(*OTHERS, talk("yes"), talk("yes")), packing=False, rows_per_batch=5)
    for twice in (talk("yes", weight=2), {**talk("yes"), "weight": 2}, {**talk("yes", weight=4), "weight": 0.5}):
        loss, metrics, gradient = step(model, rows_of(*OTHERS, twice), **way)
        assert loss == pytest.approx(expected[0], rel=1e-5)
        assert metrics == pytest.approx(expected[1], rel=1e-5)
        torch.testing.assert_close(gradient, expected[2], rtol=1e-4, atol=1e-6)


def test_equal_weights_change_nothing_however_small(model: Any) -> None:
    plain = step(model, rows_of(*OTHERS), packing=False, rows_per_batch=3)
    light = step(model, rows_of(*({**row, "weight": 1e-3} for row in OTHERS)), packing=False, rows_per_batch=2)
    assert light[0] == pytest.approx(plain[0], rel=1e-5)
    assert light[1] == pytest.approx(plain[1], rel=1e-5)
    torch.testing.assert_close(light[2], plain[2], rtol=1e-4, atol=1e-6)


def test_a_weight_of_0_is_not_trained(model: Any) -> None:
    rows = rows_of(*OTHERS, talk("yes", weight=0), {**talk("yes"), "weight": 0})
    assert len(rows) == len(OTHERS)
    assert rows.weights is None
    assert step(model, rows, packing=True)[0] == step(model, rows_of(*OTHERS), packing=True)[0]


def test_weights_are_stored_with_their_labels(tmp_path: Path) -> None:
    rows = rows_of(*OTHERS, talk("yes", weight=0.25))
    rows.save(tmp_path, "train")
    loaded = Rows.load(tmp_path, "train")
    for number, weight in enumerate([1.0, 1.0, 1.0, 0.25]):
        labels = loaded[number][1]
        assert set(loaded.weights_of(number)[labels != IGNORED]) == {weight}
    (tmp_path / "train.weights.npy").write_bytes((tmp_path / "train.ids.npy").read_bytes()[:-4])
    with pytest.raises(ValueError):
        Rows.load(tmp_path, "train")


def test_deduplication_sees_weights_and_tools() -> None:
    read = Options(composed()).sources[""].format
    tool = {"name": "add", "parameters": {"type": "object", "properties": {}}}
    rows = [talk("yes"), talk("yes", weight=2), talk("yes", tools=[tool]), talk("yes"), {**talk("yes"), "weight": 2}]
    counts = Counter[str]()
    assert len(splits.index(source(rows).train, read, True, counts)) == 4
    assert counts["duplicates"] == 1


def test_a_task_without_weights_refuses_them() -> None:
    task = dpo.dpo(loss_type="sigmoid", beta=0.1, label_smoothing=0.0, gamma=0.0, sft_weight=0.0)
    chosen, rejected = ({"role": "assistant", "content": text} for text in "AB")
    pair = {"prompt": [{"role": "user", "content": "Hi"}], "chosen": {**chosen, "weight": 2.0}, "rejected": rejected}
    with pytest.raises(DataError, match=r"rows\.jsonl:1: has a weight, which task=dpo does not use"):
        tokenization.every_row(source([{}]), Recipe(lambda _: pair, task, build("qwen"), SETTINGS))


EXAMPLES = {
    "sft": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}],
    "pretrain": "A text.",
    "dpo": {"prompt": [{"role": "user", "content": "Hi"}], "chosen": {"role": "assistant", "content": "Ho"},
            "rejected": {"role": "assistant", "content": "Hu"}},
    "kto": {"prompt": [{"role": "user", "content": "Hi"}], "completion": {"role": "assistant", "content": "Ho"},
            "label": True},
}  # fmt: skip


@pytest.mark.parametrize("task", EXAMPLES)
@pytest.mark.parametrize("other", EXAMPLES)
def test_rows_of_another_task_are_refused_with_the_task_that_they_fit(task: str, other: str) -> None:
    encode = Options(composed(f"task={task}")).task.encode
    if task == other or (task, other) == ("kto", "dpo"):
        assert len(encode(EXAMPLES[other], build("qwen"), 96)) == (2 if other == "dpo" else 1)
        return
    with pytest.raises(DataError, match="but this task needs") as caught:
        encode(EXAMPLES[other], build("qwen"), 96)
    assert f"use task={other}, or " in str(caught.value)
    assert f"task={task} " not in str(caught.value), "the task may be one that is derived from it"


def test_a_pair_gives_a_desirable_and_an_undesirable_answer() -> None:
    task = Options(composed("task=kto")).task
    good, bad = task.encode(EXAMPLES["dpo"], build("qwen"), 96)
    assert (good["label"], bad["label"]) == (1.0, 0.0)
    texts = [build("qwen").decode([token for token in each["labels"] if token != IGNORED]) for each in (good, bad)]
    assert texts == ["Ho<|im_end|>", "Hu<|im_end|>"]
    assert task.prompt(EXAMPLES["dpo"], build("qwen"))[1] == "Ho"


LOSSES = [
    {"loss_type": "dft"}, {"loss_type": "eaft"}, {"loss_type": "eaft", "eaft_alpha": 0.5},
    {"label_smoothing": 0.1}, {"z_loss": 1e-2}, {"label_smoothing": 0.2, "z_loss": 1e-3},
]  # fmt: skip


def formula(
    logits: Tensor,
    targets: Tensor,
    loss_type: str = "nll",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    eaft_alpha: float = 1.0,
) -> Tensor:
    """The loss of each token, as the papers write it, from whole logits."""
    from torch.nn.functional import cross_entropy, one_hot

    log_p = logits.log_softmax(-1)
    nll = -log_p.gather(-1, targets[:, None])[:, 0]
    if loss_type == "dft":
        return nll * (-nll).exp().detach()
    if loss_type == "eaft":
        likely = torch.distributions.Categorical(logits=logits.detach().topk(20, -1).values)
        return nll * (likely.entropy() / 3) ** eaft_alpha
    size = logits.shape[-1]
    target = (1 - label_smoothing) * one_hot(targets, size) + label_smoothing / size
    smoothed = -(target * log_p).sum(-1)
    own = cross_entropy(logits, targets, label_smoothing=label_smoothing, reduction="none")
    torch.testing.assert_close(smoothed, own)
    return smoothed + z_loss * logits.logsumexp(-1) ** 2


@pytest.mark.parametrize("changes", LOSSES, ids=str)
@pytest.mark.parametrize("fused", [True, False])
def test_the_loss_and_its_gradient_are_those_of_the_formula(model: Any, changes: dict, fused: bool) -> None:
    rows = rows_of(*OTHERS, talk("yes", weight=2), {**talk("perhaps"), "weight": 0.5})
    task = sft.sft(train_on="assistant", **changes)
    ours = copy.deepcopy(model)
    if fused:
        ours.lm_head.requires_grad_(False)
        assert lm_head.install(ours, None) == ""
    loss, metrics, gradient = step(ours, rows, task, packing=True, rows_per_batch=2)
    exact = copy.deepcopy(model).double()
    exact.lm_head.requires_grad_(not fused)
    total, nll, count = torch.zeros((), dtype=torch.float64), 0.0, 0.0
    for number in range(len(rows)):
        ids, labels = (torch.from_numpy(each.astype(np.int64)) for each in rows[number])
        trained = labels[1:] != IGNORED
        logits, targets = exact(input_ids=ids[None], use_cache=False).logits[0, :-1][trained], labels[1:][trained]
        weights = torch.from_numpy(rows.weights_of(number)[1:].copy()).double()[trained]
        total = total + (formula(logits, targets, **changes) * weights).sum()
        nll += float((formula(logits, targets) * weights).sum())
        count += float(weights.sum())
    (total / count).backward()
    assert loss == pytest.approx(float(total / count), rel=1e-5)
    assert metrics["objective"] == pytest.approx(loss)
    assert metrics["loss"] == pytest.approx(nll / count, rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(math.exp(nll / count), rel=1e-4)
    expected = torch.cat([p.grad.flatten() for p in exact.parameters() if p.grad is not None])
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("changes", [{"loss_type": "dft"}, {"label_smoothing": 0.1}], ids=str)
def test_a_shaped_loss_is_the_same_for_any_cut(model: Any, changes: dict) -> None:
    rows, task = rows_of(*OTHERS, talk("yes", weight=2)), sft.sft(train_on="assistant", **changes)
    expected = step(model, rows, task, packing=False, rows_per_batch=4)
    for way in WAYS:
        assert step(model, rows, task, **way)[0] == pytest.approx(expected[0], rel=1e-5)


def test_plain_sft_is_computed_as_ever() -> None:
    assert Options(composed()).task.loss is token_loss
