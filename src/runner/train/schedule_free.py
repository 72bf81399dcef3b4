"""Schedule-free AdamW (https://arxiv.org/abs/2405.15682) of the package schedulefree.

The model is trained at one point and evaluated at another: the average of the steps, which takes the place of a
falling learning rate. ``ema`` switches between them, at evaluations and where weights are saved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from runner.config.bind import bind_target
from runner.config.schema import Betas, NotNegative, Positive, Ratio
from runner.errors import Fault
from runner.train import schedules
from runner.train.optim import missing_package

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from runner.train.optim import Groups


def schedule_free(
    groups: Groups,
    *,
    learning_rate: Positive,
    weight_decay: NotNegative,
    betas: Betas,
    eps: Positive,
    r: NotNegative,
    weight_lr_power: NotNegative,
    loraplus_lr_ratio: Ratio = 1.0,
) -> Optimizer:
    """AdamW without momentum of the gradient, but with an average of the weights.

    The weight of step k in the average is k ** r * (largest learning rate so far) ** weight_lr_power.
    """
    from schedulefree import AdamWScheduleFree

    settings = {"weight_decay": weight_decay, "betas": tuple(map(float, betas)), "eps": eps}
    optimizer = AdamWScheduleFree(groups, lr=learning_rate, r=r, weight_lr_power=weight_lr_power, **settings)
    optimizer.train()
    return optimizer


def is_used(cfg: Mapping[str, Any]) -> bool:
    return bind_target(cfg["optim"]) is schedule_free


def check_schedule_free(*, betas: list[float], **_: object) -> Iterator[Fault]:
    yield from missing_package("schedulefree")
    if betas[0] == 0:
        problem = "the first must be above 0: it is where between the average and the last step gradients are computed"
        yield Fault("betas", problem, "use 0.9", betas)


def check_combination(cfg: Mapping[str, Any]) -> Iterator[Fault]:
    """Refuse a second schedule, and a second average."""
    if bind_target(cfg["schedule"]) is not schedules.constant:
        problem = "optim=schedule_free replaces the schedule by an average of the weights"
        name = str(cfg["schedule"]["_target_"]).rpartition(".")[2]
        yield Fault("schedule", problem, "use schedule=constant; its warm-up has an effect", name)
    for key in ("ema", "swa_start"):
        if cfg["train"].get(key) is None:
            continue
        problem = "optim=schedule_free averages the weights already"
        yield Fault(f"train.{key}", problem, "set it to null", cfg["train"][key])
