"""Supervised fine-tuning (SFT) on conversations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from runner.config.schema import Fraction, NotNegative
from runner.data.examples import Example, Features, chat, misfit
from runner.errors import Fault
from runner.tasks.task import OF_TOKENS, Measures, Task, sums_of_sources, token_loss, token_losses, token_metrics

if TYPE_CHECKING:
    from torch import Tensor

    from runner.tasks.cross_entropy import TokenLosses

LossType = Literal["nll", "dft", "eaft"]


def sft(
    *,
    train_on: Literal["assistant", "last", "all"],
    reasoning: bool = True,
    loss_type: LossType = "nll",
    label_smoothing: Fraction = 0.0,
    z_loss: NotNegative = 0.0,
    eaft_alpha: NotNegative = 1.0,
) -> Task:
    """Supervised fine-tuning on the assistant turns of a conversation; ``train_on`` selects the trained turns.

    ``reasoning``: whether the reasoning of an answer is trained, too. ``loss_type``: the loss of a token, see
    ``of_tokens``; ``label_smoothing`` and ``z_loss`` are added to nll, see ``logit_losses.Shaping``.
    """

    def encode(example: Example, tokenizer: Any, max_length: int) -> list[Features]:
        from runner.data import chat_template

        if (talk := chat(example)) is None:
            raise misfit(example, "conversations (messages, sharegpt, alpaca, prompt_completion)")
        return [
            chat_template.encode(
                talk.messages, tokenizer, train_on, options=talk.options, reasoning=reasoning, weight=talk.weight
            )
        ]

    def prompt(example: Example, tokenizer: Any) -> tuple[str, str] | None:
        from runner.data import chat_template

        talk = chat(example)
        assert talk is not None
        if any(turn.get("images") for turn in talk.messages):
            return None  # samples are generated from texts
        turns = enumerate(talk.messages)
        answers = (i for i, turn in turns if turn["role"] == "assistant" and turn.get("weight", 1) and turn["content"])
        if not (answer := next(answers, 0)):
            return None
        prompt = chat_template.prompt(talk.messages[:answer], tokenizer, talk.options)
        return prompt, str(talk.messages[answer]["content"])

    def loss(model: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
        from runner.tasks.logit_losses import Shaping

        shaping = Shaping(label_smoothing, z_loss, entropy_of=EAFT_TOKENS if loss_type == "eaft" else 0)
        tokens = token_losses(model, batch, shaping)
        weights = batch["weights"] if "weights" in batch else tokens.nll.new_ones(len(tokens.nll))
        return {
            "loss": (of_tokens(tokens, loss_type, eaft_alpha) * weights).sum(),
            "nll": (tokens.nll.detach() * weights).sum(),
            "count": weights.sum(),
            "correct": (tokens.correct * weights).sum(),
            **sums_of_sources(batch, tokens.nll, weights),
        }

    if loss_type == "nll" and not label_smoothing and not z_loss:
        return Task(
            "sft", True, encode, prompt, token_loss, token_metrics, weights=True, measures=OF_TOKENS, images=True
        )
    measures: Measures = {**OF_TOKENS, "objective": "minimize"}
    trained = ("loss", "objective")
    return Task(
        "sft", True, encode, prompt, loss, metrics, weights=True, train_metrics=trained, measures=measures, images=True
    )


def check_sft(
    *,
    loss_type: str = "nll",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    eaft_alpha: float = 1.0,
    **_: object,
) -> Iterator[Fault]:
    """Each loss type uses some of the keys; a key without effect must have its neutral value."""
    for key, value in (("label_smoothing", label_smoothing), ("z_loss", z_loss)):
        if value and loss_type != "nll":
            yield Fault(
                key, f"has no effect with loss_type={loss_type}", f"set task.{key}=0, or task.loss_type=nll", value
            )
    if eaft_alpha != 1 and loss_type != "eaft":
        remedy = "set task.eaft_alpha=1, or task.loss_type=eaft"
        yield Fault("eaft_alpha", f"has no effect with loss_type={loss_type}", remedy, eaft_alpha)


EAFT_TOKENS = 20
"""EAFT estimates the entropy from this many most likely tokens, and calls it 1 at 3 nats, about log(20)."""


def of_tokens(tokens: TokenLosses, loss_type: LossType, eaft_alpha: float) -> Tensor:
    """The loss of each trained token (trained,).

    dft: the cross entropy times the probability of the token, which has no gradient (https://arxiv.org/abs/2508.05629).
    eaft: times (entropy / 3) ** ``eaft_alpha``, likewise: tokens of which the model is sure count little (as in
    LLaMA-Factory).
    """
    match loss_type:
        case "nll":
            return tokens.loss
        case "dft":
            return tokens.nll * (-tokens.nll.detach()).exp()
        case "eaft":
            return tokens.loss * (tokens.extra / 3.0) ** eaft_alpha


def metrics(sums: dict[str, float]) -> dict[str, float]:
    """Cross entropy (``loss``), perplexity and accuracy, comparable whatever is trained; ``objective``: what is."""
    return {**token_metrics({**sums, "loss": sums["nll"]}), "objective": sums["loss"] / (sums["count"] or 1.0)}
