"""Distillation: the divergence against the numbers of TRL 1.16 and a plain computation; any cut gives the same step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import composed
from fixtures import two_models
from fixtures.two_models import QUESTIONS
from torch.nn.functional import cross_entropy, kl_div

from runner.config import bind
from runner.data import chat_template
from runner.data.batches import Batches
from runner.data.collator import Batch
from runner.data.packing import Rows, one_by_one, pack
from runner.errors import ConfigError
from runner.models.kernels import lm_head
from runner.tasks import distill, soft_targets, teacher_logits
from runner.tasks.task import Task

OF_TRL = {0.0: 0.040975, 0.5: 0.010163, 0.9: 0.003684, 1.0: 0.041079}
"""beta → GKDTrainer.generalized_jsd_loss of TRL 1.16 on the first question with its good answer."""


def task_of(**changes: Any) -> Task:
    node = {**bind.option("task", "distill"), "top_k": None, **changes}
    return distill.distill(**{key: value for key, value in node.items() if key != bind.TARGET})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    """(student, teacher, tokenizer); the student knows its teacher."""
    student, original, tokenizer = two_models.load(two_models.write(tmp_path_factory.mktemp("model") / "model"))
    teacher = two_models.add_noise(original, 2).eval()
    teacher_logits.attach(student, teacher)
    return student, teacher, tokenizer


def rows_of(tokenizer: Any, count: int = 4) -> Rows:
    documents = []
    for question, good, _ in QUESTIONS[:count]:
        talk = [{"role": "user", "content": question}, {"role": "assistant", "content": good}]
        features = chat_template.encode(talk, tokenizer, "last")
        features["labels"][-1] = features["input_ids"][-1]  # TRL trains the line break after the end of the turn, too
        documents.append((np.array(features["input_ids"]), np.array(features["labels"])))
    return Rows.of(documents)


def batches_of(
    rows: Rows, *, at_once: int = 4, packing: bool = False, by_document: bool = False, **ranks: int
) -> Batches:
    packs = pack(rows.lengths, 256) if packing else one_by_one(len(rows))
    rows = Rows(rows.ids, rows.labels, rows.offsets, packs, of_labels=rows.of_labels)
    built = Batches(
        rows, packing=packing, max_length=256, rows_per_batch=at_once, accumulation=-(-len(packs) // at_once), seed=0,
        shuffle=False, pad_id=0, **ranks,
    )  # fmt: skip
    return built.laid_end_to_end() if by_document else built


def step(model: Any, task: Task, micro_batches: list[Batch]) -> tuple[dict[str, float], torch.Tensor]:
    """(metrics, gradient of all parameters) of one step over these micro-batches."""
    model.zero_grad()
    totals = {kind: sum(batch[kind] for batch in micro_batches) for kind in task.divisors.values()}
    sums: dict[str, float] = {}
    for batch in micro_batches:
        parts = task.loss(model, batch)
        task.step_loss(parts, totals).backward()
        sums = {name: sums.get(name, 0.0) + float(value.detach()) for name, value in parts.items()}
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    metrics = task.metrics(sums)
    assert metrics["loss"] == pytest.approx(float(task.step_loss(sums, totals)), rel=1e-6)
    return metrics, gradient


def whole_logits(model: Any, rows: Rows, row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits, labels) of the trained positions of one row."""
    ids, labels = (torch.from_numpy(each.astype(np.int64)) for each in rows[row])
    return model(ids[None]).logits[0, :-1][labels[1:] != -100], labels[1:][labels[1:] != -100]


def divergence_of(s: torch.Tensor, t: torch.Tensor, beta: float) -> torch.Tensor:
    """From log-probabilities; tokens that the teacher never says have -inf."""

    def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return kl_div(q, p, reduction="none", log_target=True).nan_to_num(0.0).sum(-1)

    if beta in (0.0, 1.0):
        return kl(s, t) if beta else kl(t, s)
    m = ((1 - beta) * s.exp() + beta * t.exp()).log()
    return beta * kl(t, m) + (1 - beta) * kl(s, m)


def plain(models: Any, rows: Rows, task: dict[str, Any], top_k: int | None = None) -> tuple[float, torch.Tensor]:
    """(loss, gradient) from whole logits, by torch's own functions and autograd."""
    student, teacher, _ = models
    student.zero_grad()
    beta, alpha, temperature = task["beta"], task["alpha"], task["temperature"]
    losses = []
    for row in range(len(rows)):
        logits, labels = whole_logits(student, rows, row)
        with torch.no_grad():
            taught = whole_logits(teacher, rows, row)[0]
        if top_k is not None:
            least = taught.topk(top_k, -1).values[:, -1:]
            taught = taught.masked_fill(taught < least, -torch.inf)
        s, t = (logits / temperature).log_softmax(-1), (taught / temperature).log_softmax(-1)
        divergence = divergence_of(s, t, beta)
        losses.append(
            alpha * temperature**2 * divergence + (1 - alpha) * cross_entropy(logits, labels, reduction="none")
        )
    loss = torch.cat(losses).mean()
    loss.backward()
    return float(loss), torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])


@pytest.mark.parametrize("beta", OF_TRL)
def test_the_divergence_is_that_of_trl(models: Any, beta: float) -> None:
    student, _, tokenizer = models
    rows = rows_of(tokenizer, 1)
    metrics, _ = step(student, task_of(beta=beta), batches_of(rows).step(0))
    assert metrics["divergence"] == metrics["loss"] == pytest.approx(OF_TRL[beta], abs=1e-6)


@pytest.mark.extras
@pytest.mark.slow
@pytest.mark.parametrize("beta", OF_TRL)
def test_the_numbers_of_trl_are_those_of_the_installed_trl(models: Any, beta: float) -> None:
    gkd = pytest.importorskip("trl.experimental.gkd")
    student, teacher, tokenizer = models
    rows = rows_of(tokenizer, 1)
    with torch.no_grad():
        (ours, labels), (theirs, _) = (whole_logits(model, rows, 0) for model in (student, teacher))
    loss = gkd.GKDTrainer.generalized_jsd_loss(ours[None], theirs[None], labels[None], beta=beta, temperature=1.0)
    assert float(loss) == pytest.approx(OF_TRL[beta], abs=1e-6)


@pytest.mark.parametrize("head", ["in the loss", "trained"])
@pytest.mark.parametrize(
    "keys",
    [
        {"beta": 0.0, "alpha": 1.0, "temperature": 1.0},
        {"beta": 0.0, "alpha": 0.7, "temperature": 2.0},
        {"beta": 0.5, "alpha": 0.5, "temperature": 1.0},
        {"beta": 0.9, "alpha": 1.0, "temperature": 0.8},
        {"beta": 1.0, "alpha": 0.3, "temperature": 1.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("top_k", [None, 5])
def test_loss_and_gradient_are_those_of_whole_logits(
    models: Any, keys: dict[str, Any], top_k: int | None, head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if top_k is not None and keys["beta"] == 1:
        return
    monkeypatch.setattr(soft_targets, "AT_ONCE", {"cpu": (7, 3 * 259)})  # chunks of 7 and 3 positions
    student, teacher, tokenizer = models
    rows = rows_of(tokenizer)
    task = task_of(**keys, top_k=top_k)
    if top_k is not None:
        ids, values = teacher_logits.top(teacher, batches_of(rows).step(0)[0], top_k, 259)
        of_labels = {teacher_logits.IDS: ids.numpy(), teacher_logits.LOG_PROBABILITIES: values.numpy()}
        rows = Rows(rows.ids, rows.labels, rows.offsets, rows.packs, of_labels=of_labels)
    if head == "in the loss":
        student.lm_head.weight.requires_grad_(False)
        assert lm_head.install(student) == lm_head.install(teacher) == ""
    try:
        metrics, gradient = step(student, task, batches_of(rows).step(0))
        expected, slope = plain(models, rows, keys, top_k)
    finally:
        student.lm_head.weight.requires_grad_(True)
        student.lm_head.is_in_loss = teacher.lm_head.is_in_loss = False
    assert metrics["loss"] == pytest.approx(expected, rel=2e-5)
    torch.testing.assert_close(gradient, slope, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "cut", [{"at_once": 1}, {"at_once": 2, "by_document": True}, {"at_once": 1, "packing": True}], ids=str
)
@pytest.mark.parametrize("top_k", [None, 8])
def test_any_cut_gives_the_same_step(models: Any, cut: dict[str, Any], top_k: int | None) -> None:
    student, teacher, tokenizer = models
    rows, task = rows_of(tokenizer), task_of(beta=0.3, alpha=0.6, temperature=2.0, top_k=top_k)
    if top_k is not None:
        ids, values = teacher_logits.top(teacher, batches_of(rows).step(0)[0], top_k, 259)
        of_labels = {teacher_logits.IDS: ids.numpy(), teacher_logits.LOG_PROBABILITIES: values.numpy()}
        rows = Rows(rows.ids, rows.labels, rows.offsets, rows.packs, of_labels=of_labels)
    expected = step(student, task, batches_of(rows).step(0))
    metrics, gradient = step(student, task, batches_of(rows, **cut).step(0))
    assert metrics == pytest.approx(expected[0], rel=1e-5)
    torch.testing.assert_close(gradient, expected[1], rtol=1e-4, atol=1e-7)


def test_an_evaluation_in_several_passes_keeps_the_order_of_the_tokens(
    models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from runner.tasks import cross_entropy as kernels

    student, _, tokenizer = models
    task, (batch,) = task_of(), batches_of(rows_of(tokenizer)).step(0)
    with torch.no_grad():
        expected = task.loss(student, batch)
        monkeypatch.setattr(kernels, "EVAL_POSITIONS", 1)
        for name, value in task.loss(student, batch).items():
            assert float(value) == pytest.approx(float(expected[name]), rel=1e-5), name


OWN = ["task.lmbda=0.5", "task.max_completion_length=8", "task.sampling_temperature=1", "task.top_k=null"]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (["task.beta=1"], "needs the teacher's probability of every token"),
        (["task.alpha=0"], "must be"),
        (["task.beta=1.5"], "must be"),
        (["quant=none"], "the model learns from itself in full precision"),
        (["task.teacher_quant=4bit"], "the model learns from itself in full precision"),
        (["task.max_completion_length=9"], "no effect with task.lmbda=0"),
        (["task.lmbda=0.5"], "needs a value with task.lmbda > 0"),
        ([*OWN, "task.top_k=8"], "scored by a teacher in memory"),
        ([*OWN, "task.alpha=0.5"], "have no right tokens"),
        ([*OWN, "task.train_on=all"], "leaves no prompt to answer"),
        ([*OWN, "data.packing=true"], "cannot share a row between examples"),
        (["task.teacher=nobody"], "there is no run or sweep 'nobody'"),
    ],
)
def test_what_cannot_be_trained_is_refused(changes: list[str], problem: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=problem):
        composed("task=distill", "model=tiny", "quant=4bit", f"outputs_dir={tmp_path}", *changes)
