"""KTO: learn from single answers that are known to be desirable or undesirable (https://arxiv.org/abs/2402.01306).

s is the summed log-probability of an answer, r the same under the reference: the model before the first step. z is the
mean of s - r over the whole step, of answers with the prompt of another row: see ``mismatched``.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from runner.config.schema import Positive
from runner.data.batches import Batches
from runner.data.examples import Example, Features, misfit, options
from runner.data.packing import answer_start
from runner.errors import DataError, Fault
from runner.tasks import kto_kl, logprobs
from runner.tasks.pairs import refuse_margin
from runner.tasks.task import Measures, Task, unit_sums_of_sources

LossType = Literal["kto", "apo_zero_unpaired"]
MEASURES: Measures = {
    "loss": "minimize", "rewards/margins": "maximize", "rewards/chosen": "maximize", "rewards/rejected": "minimize",
    "logps/chosen": None, "logps/rejected": None,
}  # fmt: skip


def kto(*, loss_type: LossType, beta: Positive, desirable_weight: Positive, undesirable_weight: Positive) -> Task:
    """Preference optimization on single answers with a label, averaged over the rows of a step.

    ``beta`` scales the log-probabilities; ``desirable_weight`` and ``undesirable_weight`` make up for labels that are
    not equally frequent.
    """
    has_z = loss_type == "kto"

    def loss(model: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
        sums, _ = logprobs.of_documents(model, batch)
        z = batch.get(kto_kl.MEAN, sums.new_zeros(()))
        good, reward = batch["label"] > 0, beta * (sums - batch["reference"])
        weights = torch.where(good, desirable_weight, undesirable_weight)
        of_rows = weights * row_loss(reward, beta * z, good, loss_type)
        detached, logps = reward.detach(), sums.detach()
        return {
            "loss": of_rows.sum(),
            "rows": torch.full((), len(sums), device=sums.device),
            "desirable": good.sum(),
            **({"kl": z * len(sums)} if has_z else {}),
            "rewards/chosen": detached[good].sum(),
            "rewards/rejected": detached[~good].sum(),
            "logps/chosen": logps[good].sum(),
            "logps/rejected": logps[~good].sum(),
            **unit_sums_of_sources(batch, of_rows),
        }

    def inspect(training: Batches, evaluation: Batches, steps: int) -> list[tuple[str, str]]:
        if has_z:
            kto_kl.refuse_lonely_rows(training, evaluation, steps)
        return [("labels", balance(training.rows.values["label"], desirable_weight, undesirable_weight))]

    return Task(
        name="kto",
        packable=True,
        encode=encode,
        prompt=prompt,
        loss=loss,
        metrics=metrics,
        divisors={"loss": "documents"},
        values=("label",),
        reference=logprobs.sums,
        prepare=kto_kl.prepare if has_z else None,
        needs_start=has_z,
        passes_without_gradient=2 if has_z else 0,
        inspect=inspect,
        train_metrics=("loss", "rewards/margins", *(["kl"] if has_z else [])),
        summary=("rewards/margins", "rewards/chosen", "rewards/rejected"),
        measures={**MEASURES, **({"kl": None} if has_z else {})},
    )


def row_loss(reward: Tensor, z: Tensor, good: Tensor, loss_type: LossType) -> Tensor:
    """The loss of each row (rows,): equation 7, or without z (https://arxiv.org/abs/2408.06266)."""
    if loss_type == "kto":
        return torch.where(good, 1 - torch.sigmoid(reward - z), 1 - torch.sigmoid(z - reward))
    return torch.where(good, 1 - torch.sigmoid(reward), torch.sigmoid(reward))


def metrics(sums: dict[str, float]) -> dict[str, float]:
    """Loss; means of the implicit rewards beta * (s - r) and of the log-probabilities of the desirable (``chosen``) and
    the undesirable (``rejected``) answers; ``kl``: z. A mean over no rows is left out."""
    counts = {"chosen": sums["desirable"], "rejected": sums["rows"] - sums["desirable"]}
    means = {
        f"{kind}/{side}": sums[f"{kind}/{side}"] / count
        for kind in ("rewards", "logps")
        for side, count in counts.items()
        if count
    }
    if all(counts.values()):
        means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
    rows = max(sums["rows"], 1.0)
    return {name: sums[name] / rows for name in ("loss", "kl") if name in sums} | means


def balance(labels: np.ndarray, desirable_weight: float, undesirable_weight: float) -> str:
    """How many rows are desirable, and whether the weights balance them as equation 8 of the paper recommends.

    Raises:
        DataError: all rows have the same label.
    """
    good = int((labels > 0).sum())
    bad = len(labels) - good
    if not good or not bad:
        problem = f"all {len(labels)} training rows are {'desirable' if good else 'undesirable'}"
        raise DataError(Fault("data", problem, "add rows with the other label, or use task=sft on good answers"))
    ratio = desirable_weight * good / (undesirable_weight * bad)
    text = f"{good} desirable, {bad} undesirable; weighted {ratio:.2f} : 1"
    if 1 <= ratio <= 4 / 3:
        return text
    return f"{text}\nrecommended: 1 to 1.33, for example task.desirable_weight={undesirable_weight * bad / good:.3g}"


def encode(example: Example, tokenizer: Any, max_length: int) -> list[Features]:
    """The conversation; only the last answer has labels. A pair gives two: one desirable, one undesirable."""
    from runner.data import chat_template

    if isinstance(example, dict) and {"chosen", "rejected"} <= example.keys():
        refuse_margin(example)
        sides = (("chosen", True), ("rejected", False))
        shared = {key: value for key, value in example.items() if key not in ("chosen", "rejected")}
        both = ({**shared, "completion": example[side], "label": label} for side, label in sides)
        return [feature for each in both for feature in encode(each, tokenizer, max_length)]
    if not isinstance(example, dict) or not {"completion", "label"} <= example.keys():
        raise misfit(example, "answers with a verdict (data/format=kto: {prompt, completion, label}), or pairs")
    talk = [*example["prompt"], example["completion"]]
    features = chat_template.encode(talk, tokenizer, "last", options=options(example))
    features["label"] = float(example["label"])
    return [features] if answer_start(features["labels"]) < max_length else []


def prompt(example: Example, tokenizer: Any) -> tuple[str, str] | None:
    """The rendered prompt, and the answer if it is a desirable one."""
    from runner.data import chat_template

    assert isinstance(example, dict)
    answer = example.get("completion", example.get("chosen"))
    if answer is None or not example.get("label", True):
        return None
    return chat_template.prompt(list(example["prompt"]), tokenizer, options(example)), str(answer["content"])
