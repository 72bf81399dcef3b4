"""The training objective (task): how examples are encoded, which loss is computed, which metrics are reported.

``Task.loss`` returns sums, not means, and ``Task.divisors`` names what each is divided by. The train loop counts these
over all micro-batches and ranks before the first forward pass, so that the loss of a step is exact for any cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from runner.data.batches import Batches
    from runner.data.collator import Batch
    from runner.tasks.cross_entropy import TokenLosses
    from runner.tasks.logit_losses import Shaping
    from runner.tasks.step_context import StepContext

from runner.data.examples import Answers, Example, Features
from runner.models.kernels.score_head import ScoreHead

Divisor = Literal["tokens", "trained", "weighted", "trained_first", "documents", "units"]
"""The divisor of a term of the loss, counted over the whole step: tokens, trained tokens, the sum of their weights,
trained tokens of the first sequence of each unit, token sequences, or units."""
Measures = Mapping[str, Literal["minimize", "maximize"] | None]
"""Name of a metric → in which direction it improves; None: neither is better by itself."""
OF_TOKENS: Measures = {"loss": "minimize", "perplexity": "minimize", "token_accuracy": "maximize"}
"""What ``token_metrics`` gives."""


@dataclass(frozen=True)
class Teacher:
    """A second model that a task compares the trained one with; both must have the same tokens."""

    where: str | None
    """A run or another model, see ``config.pinned_weights``; None: the model itself before training, not quantized."""
    quant: str
    """The option of the group ``quant`` with which its weights are loaded."""
    top_k: int | None
    """Of how many of its most likely tokens the probabilities are computed, once before training and cached: in a batch
    ``teacher_logits.IDS`` and ``LOG_PROBABILITIES``. None: it stays in memory, see ``teacher_logits.attach``."""


@dataclass(frozen=True)
class Task:
    """The interface between the train loop and a training objective."""

    name: str
    packable: bool
    """Whether several examples may share a row of a batch."""
    encode: Callable[[Example, Any, int], list[Features]]
    """(example, tokenizer, max_length) → features; ``labels`` are -100 at untrained positions."""
    prompt: Callable[[Example, Any], tuple[str, str] | None]
    """(example, tokenizer) → (prompt, reference continuation) for generated samples; None if the example has none."""
    loss: Callable[[Any, dict[str, Any]], dict[str, Tensor]]
    """(model, batch) → sums; at least those that ``divisors`` names, which are differentiable."""
    metrics: Callable[[dict[str, float]], dict[str, float]]
    """Sums of a whole evaluation or of some training steps → metrics by name, without the prefix ``eval/``."""
    divisors: Mapping[str, Divisor] = field(default_factory=lambda: {"loss": "weighted"})
    """The terms of the loss: name of a sum → what it is divided by; the loss of a step is the sum of the quotients."""
    unit: int = 1
    """How many consecutive sequences of ``encode`` stay together in one micro-batch: 2 for preference pairs."""
    values: tuple[str, ...] = ()
    """Names of numbers of each sequence, which ``encode`` adds to its features; in a batch: (documents,) float32."""
    reference: Callable[[Any, dict[str, Any]], Tensor] | None = None
    """(model, batch) → a number of each document (documents,) under the weights before the first step. It is computed
    once without gradients, cached, and given to ``loss`` as ``batch["reference"]``."""
    answers: Answers | None = None
    """If ``prepare`` generates answers: how many for each row, and how long they are at most."""
    updates: int = 1
    """How many optimizer updates each step makes with the batches of ``prepare``."""
    prepare: Callable[[StepContext], list[Batch]] | None = None
    """Called without gradients before each step and evaluation: gives the micro-batches that are computed instead."""
    needs_start: bool = False
    """Whether ``prepare`` computes with the weights before the first step, too: a copy of them is kept."""
    passes_without_gradient: int = 0
    """How many times ``prepare`` passes as many tokens through the model as the step has: counted in FLOPs and time."""
    inspect: Callable[[Batches, Batches, int], list[tuple[str, str]]] | None = None
    """(training, evaluation, steps) → (label, text) of the lines that ``plan`` adds. Raises a ConfigError or DataError
    if the data cannot be used; called before the model is loaded."""
    weights: bool = False
    """Whether ``loss`` uses ``batch["weights"]``, the weights of messages and rows; without it they are refused."""
    head: ScoreHead | None = None
    """The head that the model is loaded with; None: its LM head."""
    truncates: bool = True
    """Whether a sequence may be cut to ``data.max_length``; if not, its unit is dropped."""
    settle: Callable[[Sequence[Any]], Task] | None = None
    """(training examples) → the task with what the data decide, such as the names of classes."""
    settled: Mapping[str, Any] = field(default_factory=dict)
    """The YAML keys that the data have decided: they are fixed for the run."""
    maxima: tuple[str, ...] = ()
    """Names of sums that are not added up over batches and ranks: the largest counts."""
    chats: bool = True
    """Whether the model learns to answer in conversations; False: it continues plain text."""
    train_metrics: tuple[str, ...] = ("loss",)
    """The metrics that are logged for training steps too, as ``train/…``."""
    measures: Measures = field(default_factory=dict)
    """What ``metrics`` gives for an evaluation, beside baselines, which never change, and metrics that exist only with
    certain rows; empty: not known."""
    summary: tuple[str, ...] = ("perplexity",)
    """The metrics that the summary at the end shows beside the loss, before and after training."""
    teacher: Teacher | None = None
    """The model that this one learns from."""
    images: bool = False
    """Whether the task trains models that read images: ``loss`` gives the model all that ``batch`` has for it."""

    @property
    def needs_labels(self) -> bool:
        """Whether a sequence without a label is left out: a score head has targets, and prompts are answered."""
        return self.head is None and (self.answers is None or not self.answers.of_prompts)

    @property
    def is_scored(self) -> bool:
        """Whether a head gives each sequence numbers at its last token."""
        return self.head is not None

    @property
    def compares(self) -> bool:
        """Whether the model is compared with its own start or an earlier step; what is random makes both differ."""
        return self.reference is not None or self.needs_start or self.updates > 1

    @property
    def has_references(self) -> bool:
        """Whether the first sequence of a held-out unit is a prompt with a right answer, or a prompt to answer."""
        return self.chats and self.head is None and not self.values

    def combined(self, name: str, one: Any, other: Any) -> Any:
        """The sum ``name`` of two parts of the data, from their sums."""
        if name not in self.maxima:
            return one + other
        return one.maximum(other) if hasattr(one, "maximum") else max(one, other)

    def step_loss(self, sums: Mapping[str, Any], totals: Mapping[str, float]) -> Any:
        """The loss of a step, from its sums and totals; from the sums of one micro-batch: its share of the loss."""
        return sum(sums[name] / (totals[divisor] or 1.0) for name, divisor in self.divisors.items())


def token_metrics(sums: dict[str, float]) -> dict[str, float]:
    """Loss (nats per trained token), perplexity and next-token accuracy; each token counts as much as it weighs."""
    count = sums["count"] or 1.0
    loss = sums["loss"] / count
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "token_accuracy": sums["correct"] / count}


def token_loss(model: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
    """Summed next-token cross entropy of a batch, each token times its weight, see ``cross_entropy.sums``."""
    import torch

    from runner.tasks import cross_entropy

    if "weights" not in batch and "sources" not in batch:
        return cross_entropy.sums(model, _arguments(model, batch))
    tokens = token_losses(model, batch)
    weights = batch["weights"] if "weights" in batch else torch.ones_like(tokens.nll)
    sums = {"loss": (tokens.nll * weights).sum(), "count": weights.sum(), "correct": (tokens.correct * weights).sum()}
    return {**sums, **sums_of_sources(batch, tokens.nll, weights)}


TERMS = ("loss/", "count/"), ("sft_loss/", "sft_count/")
"""Names of sums: a term of the loss, and what it is divided by, of the source whose name follows."""


def sums_of_sources(batch: dict[str, Any], nll: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """The summed loss and weights of the trained tokens (trained,) of each source, if the batch is of a mixture."""
    return _of_sources(batch, batch["source_at"], nll * weights, weights, TERMS[0]) if "sources" in batch else {}


def unit_sums_of_sources(
    batch: dict[str, Any], losses: Tensor, tokens_of_sft: tuple[Tensor, Tensor] | None = None
) -> dict[str, Tensor]:
    """The summed loss and the number of the units (units,) of each source, or of documents, likewise.

    ``tokens_of_sft``: of each unit, the cross entropy that is added to the loss, and its tokens.
    """
    if "sources" not in batch:
        return {}
    owners = batch["source_of"][:: max(len(batch["source_of"]) // max(len(losses), 1), 1)]
    sums = _of_sources(batch, owners, losses, losses.new_ones(len(losses)), TERMS[0])
    return sums if tokens_of_sft is None else {**sums, **_of_sources(batch, owners, *tokens_of_sft, TERMS[1])}


def _of_sources(
    batch: dict[str, Any], owners: Tensor, losses: Tensor, counts: Tensor, names: tuple[str, str]
) -> dict[str, Tensor]:
    import torch

    zeros = losses.new_zeros(len(batch["sources"]), dtype=torch.float64)
    both = (zeros.index_add(0, owners, each.detach().double()) for each in (losses, counts))
    return {
        f"{name}{source}": value
        for name, values in zip(names, both, strict=True)
        for source, value in zip(batch["sources"], values, strict=True)
    }


def losses_of_sources(sums: Mapping[str, float]) -> dict[str, float]:
    """``loss/NAME`` of each source that has trained anything: nats per trained token, or the mean over its units."""
    losses: dict[str, float] = {}
    for loss, count in TERMS:
        for name, number in sums.items():
            if name.startswith(count) and number:
                source = name.removeprefix(count)
                losses[f"loss/{source}"] = losses.get(f"loss/{source}", 0.0) + sums[loss + source] / number
    return losses


def token_losses(model: Any, batch: dict[str, Any], shaping: Shaping | None = None) -> TokenLosses:
    """The cross entropy of each trained position of a batch, in the order of ``batch["trained_at"]``.

    A loss of your own may be any function of it; logits are never held whole. ``shaping``: what is computed from the
    logits beside it.
    """
    from runner.tasks import cross_entropy, logit_losses

    return cross_entropy.token_losses(model, _arguments(model, batch), shaping or logit_losses.PLAIN)


def token_states(model: Any, batch: dict[str, Any]) -> tuple[Tensor, Any]:
    """(hidden states (trained, h), LM head) at the trained positions of a batch, or (logits, None)."""
    from runner.tasks import cross_entropy

    return cross_entropy.states(model, _arguments(model, batch))


def _arguments(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    from runner.models.kernels import attention

    inputs = attention.inputs(batch, batch["packed"], model)
    labels = batch["labels"].reshape(inputs["input_ids"].shape)
    return {**inputs, "labels": labels, "trained_at": batch.get("trained_at")}


def predictions(model: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Logits (n, V) and targets (n,) of the trained positions, for a loss of your own.

    ``token_loss`` needs less memory: it never holds all logits at once.
    """
    from runner.data.packing import IGNORED
    from runner.models.kernels import attention
    from runner.tasks import cross_entropy

    arguments = attention.inputs(batch, batch["packed"], model)
    inputs = {name: arguments[name] for name in cross_entropy.MODEL_INPUTS if arguments.get(name) is not None}
    labels = batch["labels"].reshape(inputs["input_ids"].shape)
    logits, targets = cross_entropy.trained_logits(model, inputs, labels)
    logits, targets = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    trained = targets != IGNORED
    return logits[trained], targets[trained]
