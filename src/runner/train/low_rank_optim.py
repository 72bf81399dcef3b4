"""GaLore and APOLLO of the packages galore-torch and apollo-torch: AdamW with a state of low rank for matrices.

The gradient of a matrix (m, n) is projected on ``rank`` of its smaller dimension; the state has that size. Embeddings,
vectors and matrices that are not larger than the rank have the state of AdamW.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from runner.config.schema import Betas, Count, NotNegative, Positive, Ratio
from runner.errors import ConfigError, Fault
from runner.train.optim import missing_package

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from runner.train.optim import Groups

STANDARD = "std"
"""The projection on the smaller dimension."""


def galore(
    groups: Groups,
    *,
    learning_rate: Positive,
    weight_decay: NotNegative,
    betas: Betas,
    eps: Positive,
    rank: Count,
    update_proj_gap: Count,
    scale: Positive,
    loraplus_lr_ratio: Ratio = 1.0,
) -> Optimizer:
    """GaLore (https://arxiv.org/abs/2403.03507): the projection is an SVD of the gradient, computed again at times."""
    from galore_torch import GaLoreAdamW
    from galore_torch.galore_projector import GaLoreProjector

    keys = {"rank": rank, "update_proj_gap": update_proj_gap, "scale": scale, "proj_type": STANDARD}
    adam = {"lr": learning_rate, "weight_decay": weight_decay, "betas": tuple(map(float, betas)), "eps": eps}
    return _storable(GaLoreAdamW(_projected(groups, keys), **adam, no_deprecation_warning=True), GaLoreProjector)


def apollo(
    groups: Groups,
    *,
    learning_rate: Positive,
    weight_decay: NotNegative,
    betas: Betas,
    eps: Positive,
    rank: Count,
    update_proj_gap: Count,
    scale: Positive,
    scale_type: Literal["channel", "tensor"],
    loraplus_lr_ratio: Ratio = 1.0,
) -> Optimizer:
    """APOLLO (https://arxiv.org/abs/2412.05270): the projection is random, and only scales the gradient."""
    from apollo_torch import APOLLOAdamW
    from apollo_torch.random_projector import GradientProjector

    keys = {"rank": rank, "update_proj_gap": update_proj_gap, "scale": scale, "proj_type": STANDARD}
    keys |= {"proj": "random", "scale_type": scale_type}
    adam = {"lr": learning_rate, "weight_decay": weight_decay, "betas": tuple(map(float, betas)), "eps": eps}
    return _storable(APOLLOAdamW(_projected(groups, keys), **adam), GradientProjector)


def check_galore(**_: object) -> Iterator[Fault]:
    yield from missing_package("galore-torch", "galore_torch")


def check_apollo(**_: object) -> Iterator[Fault]:
    yield from missing_package("apollo-torch", "apollo_torch")


def state_values_galore(shape: Sequence[int], kind: str, *, rank: int, **_: object) -> int:
    """How many numbers the state of a parameter of this shape has."""
    if not _is_projected(shape, kind, rank):
        return 2 * math.prod(shape)
    small, large = sorted(shape)
    return 2 * rank * large + rank * small


state_values_apollo = state_values_galore


def _is_projected(shape: Sequence[int], kind: str, rank: int) -> bool:
    return kind == "matrix" and len(shape) == 2 and min(shape) > rank


def _projected(groups: Groups, keys: dict[str, Any]) -> Groups:
    """The groups, with ``keys`` for the matrices that are larger than the rank.

    Raises:
        ConfigError: there is no such matrix.
    """
    parts, count = [], 0
    for group in groups:
        large: list[Tensor] = []
        others: list[Tensor] = []
        for parameter in group["params"]:
            is_large = _is_projected(parameter.shape, group["kind"], keys["rank"])
            (large if is_large else others).append(parameter)
        count += len(large)
        parts += [{**group, **more, "params": part} for part, more in ((large, keys), (others, {})) if part]
    if not count:
        problem = "no trained matrix has more rows and columns than that, so nothing would be projected"
        raise ConfigError(Fault("optim.rank", problem, "lower it, use lora=none, or use optim=adamw", keys["rank"]))
    return parts


def _storable(optimizer: Optimizer, projector: type) -> Optimizer:
    """Let ``state_dict`` have the projections as numbers and tensors.

    torch loads neither objects of other classes nor, inside of the state of a parameter, texts.
    """

    def fields(value: Any) -> Any:
        if not isinstance(value, projector):
            return value
        return {name: field for name, field in vars(value).items() if not isinstance(field, str)}

    def stored(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        states = state_dict["state"].items()
        state = {number: {name: fields(value) for name, value in each.items()} for number, each in states}
        return {**state_dict, "state": state}

    def restored(optimizer: Optimizer) -> None:
        for each in optimizer.state.values():
            if isinstance(each.get("projector"), dict):
                made = projector(1, proj_type=STANDARD)
                vars(made).update(each["projector"])
                each["projector"] = made

    optimizer.register_state_dict_post_hook(stored)
    optimizer.register_load_state_dict_post_hook(restored)
    return optimizer
