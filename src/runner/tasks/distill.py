"""Distillation: learn the distribution of a teacher at each token, on answers of the data (or of the model's own).

The loss of a token is alpha D temperature² + (1 - alpha) cross entropy; D compares the two distributions, see
``soft_targets``. See https://arxiv.org/abs/1503.02531 and 2306.13649 (GKD).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from runner.config.bind import bind
from runner.config.schema import Count, Positive, Text
from runner.data.examples import Answers
from runner.errors import Fault
from runner.tasks import teacher_logits
from runner.tasks.logit_losses import Shaping
from runner.tasks.own_answers import OwnAnswers
from runner.tasks.sft import sft
from runner.tasks.soft_targets import Soft
from runner.tasks.task import OF_TOKENS, Task, Teacher, sums_of_sources, token_losses, token_metrics


def distill(
    *,
    teacher: Text | None,
    teacher_quant: Literal["none", "8bit", "4bit", "fp4"],
    top_k: Count | None,
    beta: Annotated[float, Ge(0), Le(1)],
    alpha: Annotated[float, Gt(0), Le(1)],
    temperature: Positive,
    lmbda: Annotated[float, Ge(0), Le(1)],
    max_completion_length: Count | None,
    sampling_temperature: Positive | None,
    train_on: Literal["assistant", "last", "all"],
    reasoning: bool,
) -> Task:
    """Learn from a teacher with the same tokens; see conf/task/distill.yaml."""
    own = OwnAnswers(lmbda, max_completion_length or 0, sampling_temperature or 1.0) if lmbda else None
    talks = sft(train_on=train_on, reasoning=reasoning)

    def loss(model: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
        soft = Soft(teacher_logits.logits(model, batch), beta, alpha, temperature)
        tokens = token_losses(model, batch, Shaping(soft=soft))
        weights = batch["weights"] if "weights" in batch else torch.ones_like(tokens.nll)
        return {
            "loss": (tokens.loss * weights).sum(),
            "divergence": (tokens.extra * weights).sum(),
            "nll": (tokens.nll * weights).sum(),
            "count": weights.sum(),
            "correct": (tokens.correct * weights).sum(),
            **sums_of_sources(batch, tokens.loss, weights),
        }

    return Task(
        name="distill",
        packable=own is None,
        encode=talks.encode,
        prompt=talks.prompt,
        loss=loss,
        metrics=metrics,
        weights=True,
        train_metrics=("loss", "divergence"),
        summary=("divergence", "perplexity"),
        measures={**OF_TOKENS, "divergence": "minimize", "nll": "minimize"},
        teacher=Teacher(teacher, teacher_quant, top_k),
        answers=Answers(1, own.most_tokens, of_prompts=False) if own else None,
        prepare=own.prepare if own else None,
        passes_without_gradient=1 if own else 0,
        inspect=own.inspect if own else None,
    )


def check_distill(
    *, top_k: int | None, beta: float, alpha: float, lmbda: float, max_completion_length: int | None,
    sampling_temperature: float | None, train_on: str, **_: object,
) -> Iterator[Fault]:  # fmt: skip
    """The reverse divergence needs the probability of every token; answers of the model's own, that and more."""
    if top_k is not None and beta == 1:
        problem = (
            "KL(model || teacher) needs the teacher's probability of every token, not of the most likely ones alone"
        )
        yield Fault("beta", problem, "set task.top_k=null: the teacher stays in memory, or a beta below 1", beta)
    keys = {"max_completion_length": max_completion_length, "sampling_temperature": sampling_temperature}
    if not lmbda:
        problem = "has no effect with task.lmbda=0: the model writes no answers"
        yield from (
            Fault(key, problem, f"set task.{key}=null", value) for key, value in keys.items() if value is not None
        )
        return
    for (key, value), usual in zip(keys.items(), (256, 1.0), strict=True):
        if value is None:
            yield Fault(key, "needs a value with task.lmbda > 0", f"set task.{key}={usual}")
    if top_k is not None:
        problem = "answers that the model writes are scored by a teacher in memory"
        yield Fault("top_k", problem, "set task.top_k=null, or task.lmbda=0", top_k)
    if alpha != 1:
        yield Fault("alpha", "answers that the model writes have no right tokens", "set task.alpha=1", alpha)
    if train_on == "all":
        yield Fault("train_on", "leaves no prompt to answer", "set task.train_on=last, or task.lmbda=0", train_on)


def check_combination(cfg: Mapping[str, Any]) -> Iterator[Fault]:
    """The model can learn from itself only where the teacher has more precise weights."""
    task, quant = cfg["task"], bind(cfg["quant"], "quant")()
    if task["teacher"] is None and (quant.plain or task["teacher_quant"] != "none"):
        problem = "without one, the model learns from itself in full precision: for quant=4bit or 8bit"
        remedy = "name a run, a model folder or a Hub id (OWNER/NAME), or quantize the model alone (quant=4bit)"
        yield Fault("task.teacher", problem, remedy, None)


def metrics(sums: dict[str, float]) -> dict[str, float]:
    """What is trained (``loss``), the divergence from the teacher in nats per token (``divergence``), and the cross
    entropy of the labels (``nll``) with its perplexity and accuracy."""
    count = sums["count"] or 1.0
    of_labels = token_metrics({**sums, "loss": sums["nll"]})
    return {
        **of_labels,
        "loss": sums["loss"] / count,
        "divergence": sums["divergence"] / count,
        "nll": of_labels["loss"],
    }
