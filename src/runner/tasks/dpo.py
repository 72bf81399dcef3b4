"""Direct preference optimization and its relatives: learn from pairs of a chosen and a rejected answer.

All of them are functions of the summed log-probabilities of the two answers, s_w (chosen) and s_l (rejected), their
numbers of tokens n_w and n_l, and the same sums r_w, r_l under the reference: the model as it is before the first step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from runner.config.schema import Fraction, NotNegative, Positive
from runner.errors import Fault
from runner.tasks import logprobs
from runner.tasks.pairs import MEASURES, Pairs, encode, prompt
from runner.tasks.task import Task, unit_sums_of_sources

LossType = Literal[
    "sigmoid", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "apo_zero", "apo_down", "sppo_hard", "dpo_norm",
    "cpo", "simpo", "orpo",
]  # fmt: skip
WITHOUT_REFERENCE = ("cpo", "simpo", "orpo")
SMOOTHED = {"sigmoid": 0.5, "robust": 0.5, "exo_pair": 1.0, "cpo": 0.5}
"""Loss types that use ``label_smoothing``, and what it must be below."""


def dpo(
    *, loss_type: LossType, beta: Positive, label_smoothing: Fraction, gamma: NotNegative, sft_weight: NotNegative
) -> Task:
    """Preference optimization on pairs; ``loss_type`` chooses the loss, averaged over the pairs of a step.

    ``beta`` scales the log-probabilities (for orpo: the weight of the odds ratio). ``label_smoothing``: the assumed
    share of swapped pairs. ``gamma``: the margin of simpo. ``sft_weight``: the weight of the cross entropy of the
    chosen answers, averaged over their tokens.
    """

    def loss(model: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
        sums, tokens = logprobs.of_documents(model, batch)
        reference = batch["reference"] if loss_type not in WITHOUT_REFERENCE else torch.zeros_like(sums)
        pairs = Pairs.of(sums, tokens, reference)
        of_pairs = pair_loss(pairs, loss_type, beta, label_smoothing, gamma)
        chosen, rejected = (beta * reward.detach() for reward in rewards(pairs, loss_type))
        return {
            "pair_loss": of_pairs.sum(),
            "sft_loss": sft_weight * -pairs.s_w.sum(),
            "pairs": torch.full((), len(of_pairs), device=sums.device),
            "chosen_tokens": pairs.n_w.sum(),
            "rewards/chosen": chosen.sum(),
            "rewards/rejected": rejected.sum(),
            "rewards/accuracies": (chosen > rejected).sum(),
            "logps/chosen": pairs.s_w.detach().sum(),
            "logps/rejected": pairs.s_l.detach().sum(),
            **unit_sums_of_sources(batch, of_pairs, (sft_weight * -pairs.s_w, pairs.n_w)),
        }

    return Task(
        name=loss_type if loss_type in WITHOUT_REFERENCE else "dpo",
        packable=True,
        encode=encode,
        prompt=prompt,
        loss=loss,
        metrics=metrics,
        divisors={"pair_loss": "units", "sft_loss": "trained_first"},
        unit=2,
        reference=None if loss_type in WITHOUT_REFERENCE else logprobs.sums,
        train_metrics=("loss", "rewards/margins", "rewards/accuracies"),
        summary=("rewards/accuracies", "rewards/margins"),
        measures=MEASURES,
    )


def check_dpo(*, loss_type: str, label_smoothing: float, gamma: float, **_: object) -> Iterator[Fault]:
    """Each loss type uses some of the keys; a key without effect must have its neutral value."""
    if loss_type not in SMOOTHED and label_smoothing:
        remedy = f"set task.label_smoothing=0; used by: {', '.join(SMOOTHED)}"
        yield Fault("label_smoothing", f"has no effect with loss_type={loss_type}", remedy, label_smoothing)
    elif loss_type in SMOOTHED and not 0 <= label_smoothing < SMOOTHED[loss_type]:
        remedy = f"set task.label_smoothing to a number from 0 to below {SMOOTHED[loss_type]}"
        yield Fault("label_smoothing", "is out of range", remedy, label_smoothing)
    elif loss_type == "exo_pair" and not label_smoothing:
        remedy = "set task.label_smoothing=0.001"
        yield Fault("label_smoothing", "exo_pair needs a positive value", remedy, label_smoothing)
    if loss_type != "simpo" and gamma:
        yield Fault("gamma", f"has no effect with loss_type={loss_type}", "set task.gamma=0, or task=simpo", gamma)


def pair_loss(p: Pairs, loss_type: LossType, beta: float, label_smoothing: float, gamma: float) -> Tensor:
    """The loss of each pair (pairs,), without the cross entropy of the chosen answer."""
    w, l = p.s_w - p.r_w, p.s_l - p.r_l  # noqa: E741
    match loss_type:
        case "sigmoid":  # https://arxiv.org/abs/2305.18290; smoothing: https://ericmitchell.ai/cdpo.pdf
            return smoothed(beta * (w - l), label_smoothing)
        case "hinge":  # https://arxiv.org/abs/2305.10425
            return relu(1 - beta * (w - l))
        case "ipo":  # https://arxiv.org/abs/2310.12036, equation 17, on means per token
            return (w / p.n_w - l / p.n_l - 1 / (2 * beta)) ** 2
        case "robust":  # https://arxiv.org/abs/2403.00409
            x = beta * (w - l)
            flipped = -(1 - label_smoothing) * logsigmoid(x) + label_smoothing * logsigmoid(-x)
            return flipped / (1 - 2 * label_smoothing)
        case "exo_pair":  # https://arxiv.org/abs/2402.00856, equation 16
            log_q, log_not_q = logsigmoid(beta * (w - l)), logsigmoid(-beta * (w - l))
            odds = torch.tensor([1 - label_smoothing, label_smoothing], dtype=w.dtype, device=w.device).log()
            return log_q.exp() * (log_q - odds[0]) + log_not_q.exp() * (log_not_q - odds[1])
        case "nca_pair":  # https://arxiv.org/abs/2402.05369
            return -logsigmoid(beta * w) - 0.5 * logsigmoid(-beta * w) - 0.5 * logsigmoid(-beta * l)
        case "apo_zero":  # https://arxiv.org/abs/2408.06266
            return 1 - torch.sigmoid(beta * w) + torch.sigmoid(beta * l)
        case "apo_down":
            return torch.sigmoid(beta * w) + 1 - torch.sigmoid(beta * (w - l))
        case "sppo_hard":  # https://arxiv.org/abs/2405.00675
            return (w - 0.5 / beta) ** 2 + (l + 0.5 / beta) ** 2
        case "dpo_norm":  # https://arxiv.org/abs/2411.15124, section 5.1
            return -logsigmoid(beta * (w / p.n_w - l / p.n_l))
        case "cpo":  # https://arxiv.org/abs/2401.08417
            return smoothed(beta * (p.s_w - p.s_l), label_smoothing)
        case "simpo":  # https://arxiv.org/abs/2405.14734
            return -logsigmoid(beta * (p.s_w / p.n_w - p.s_l / p.n_l) - gamma)
        case "orpo":  # https://arxiv.org/abs/2403.07691
            a_w, a_l = p.s_w / p.n_w, p.s_l / p.n_l
            log_odds = (a_w - a_l) - (torch.log1p(-a_w.exp()) - torch.log1p(-a_l.exp()))
            return -beta * logsigmoid(log_odds)


def rewards(p: Pairs, loss_type: LossType) -> tuple[Tensor, Tensor]:
    """s - r of both answers (pairs,), up to beta; simpo and orpo compare means per token."""
    w, l = p.s_w - p.r_w, p.s_l - p.r_l  # noqa: E741
    return (w / p.n_w, l / p.n_l) if loss_type in ("simpo", "orpo") else (w, l)


def smoothed(x: Tensor, label_smoothing: float) -> Tensor:
    return -(1 - label_smoothing) * logsigmoid(x) - label_smoothing * logsigmoid(-x)


def metrics(sums: dict[str, float]) -> dict[str, float]:
    """Loss, and per pair: implicit rewards beta * (s - r) (see ``rewards``), log-probabilities, the share of pairs
    whose chosen answer has the higher reward (``rewards/accuracies``); ``nll``: cross entropy of the chosen answers,
    nats per token."""
    pairs, tokens = max(sums["pairs"], 1.0), max(sums["chosen_tokens"], 1.0)
    of_pairs = {name: sums[name] / pairs for name in sums if name.startswith(("rewards/", "logps/"))}
    return {
        "loss": sums["pair_loss"] / pairs + sums["sft_loss"] / tokens,
        **of_pairs,
        "rewards/margins": of_pairs["rewards/chosen"] - of_pairs["rewards/rejected"],
        "nll": -sums["logps/chosen"] / tokens,
    }
