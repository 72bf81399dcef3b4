"""The auxiliary loss of the routers of a mixture of experts (https://arxiv.org/abs/2101.03961, equation 4).

It rises when few experts get most tokens. A micro-batch has the loss that transformers computes for it, and counts as
much as it has tokens: the loss of a step is the mean over its tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from runner.data.collator import Batch
from runner.errors import ConfigError, Fault
from runner.models.kernels import base_model
from runner.tasks.task import Task

KEY, NAME, TOKENS = "train.router_aux_loss_coef", "router_loss", "router_tokens"


def balanced(task: Task, model: Any, coefficient: float | None) -> Task:
    """The task with ``coefficient`` times this loss in the loss of training, and the metric ``train/router_loss``.

    Raises:
        ConfigError: the model has no routers that transformers knows.
    """
    if coefficient is None:
        return task
    inner, config = base_model.of(model), model.config.get_text_config()
    inner = getattr(inner, inner.base_model_prefix)
    if not hasattr(config, "router_aux_loss_coef") or not hasattr(config, "num_experts_per_tok"):
        problem = f"{base_model.name(model)} has no routers with an auxiliary loss"
        raise ConfigError(Fault(KEY, problem, "set it to null", coefficient))
    routers = _Routers(config.num_experts_per_tok)
    inner.register_forward_pre_hook(routers.ask, with_kwargs=True)
    inner.register_forward_hook(routers.keep)

    def loss(model: Any, batch: Batch) -> dict[str, Tensor]:
        if not torch.is_grad_enabled():
            return task.loss(model, batch)
        with routers.kept() as logits:
            sums = task.loss(model, batch)
        count = batch["tokens"]
        value = imbalance([without_padding(each, batch) for each in logits], routers.top_k) * count
        return {**sums, NAME: value * coefficient, TOKENS: value.new_tensor(count, dtype=torch.float64)}

    def metrics(sums: dict[str, float]) -> dict[str, float]:
        own = {NAME: sums[NAME] / coefficient / sums[TOKENS]} if sums.get(TOKENS) else {}
        return {**task.metrics(sums), **own}

    return replace(
        task,
        loss=loss,
        metrics=metrics,
        divisors={**task.divisors, NAME: "tokens"},
        train_metrics=(*task.train_metrics, NAME),
    )


def imbalance(logits: list[Tensor], top_k: int) -> Tensor:
    """The loss of all layers together, of the router logits (tokens, experts) of each; 1 * top_k: equal shares."""
    probabilities = torch.cat(logits).float().softmax(-1)
    chosen = torch.zeros_like(probabilities).scatter_(1, probabilities.topk(top_k, -1).indices, 1.0)
    return (chosen.mean(0) * probabilities.mean(0)).sum() * probabilities.shape[-1]


def without_padding(logits: Tensor, batch: Batch) -> Tensor:
    """The rows of the tokens (tokens, experts), of all positions (positions, experts)."""
    if len(logits) == batch["tokens"]:
        return logits
    is_token = torch.zeros(len(logits), dtype=torch.bool)
    for _, first, end in batch["spans"].tolist():
        is_token[first:end] = True
    return logits[is_token.to(logits.device)]


class _Routers:
    """Hooks of the decoder: it returns the logits of its routers while they are kept."""

    def __init__(self, top_k: int) -> None:
        self.top_k = top_k
        self._logits: list[Tensor] | None = None

    @contextmanager
    def kept(self) -> Iterator[list[Tensor]]:
        """Inside the block, the list is filled."""
        logits: list[Tensor] = []
        self._logits = logits
        try:
            yield logits
        finally:
            self._logits = None

    def ask(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs if self._logits is None else {**kwargs, "output_router_logits": True}

    def keep(self, _: nn.Module, __: Any, output: Any) -> None:
        if self._logits is not None:
            self._logits += [each.reshape(-1, each.shape[-1]) for each in output.router_logits]
