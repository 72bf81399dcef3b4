"""LoRA+ (https://arxiv.org/abs/2402.12354): the matrices B of LoRA have a higher learning rate than the matrices A."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from runner.config.combinations import WITHOUT_LORA_B
from runner.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

Groups = list[dict[str, Any]]
EMBEDDING_RATE = 1e-6
"""Learning rate of adapters on embeddings, as in PEFT's ``create_loraplus_optimizer``."""


def split(groups: Groups, model: nn.Module, learning_rate: float, ratio: float) -> Groups:
    """Split parameter groups by the learning rates of PEFT's ``create_loraplus_optimizer``.

    It is ``learning_rate * ratio`` for B and for vectors (biases, magnitudes of DoRA), ``EMBEDDING_RATE`` for adapters
    on embeddings, and ``learning_rate`` for all others.

    Raises:
        ConfigError: the adapter has no B.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not any("lora_B" in name for name in names.values()):
        raise ConfigError(WITHOUT_LORA_B)

    def rate(parameter: Tensor) -> float:
        if "lora_embedding_" in names[id(parameter)]:
            return EMBEDDING_RATE
        is_fast = "lora_B" in names[id(parameter)] or parameter.ndim == 1
        return learning_rate * ratio if is_fast else learning_rate

    parts = []
    for group in groups:
        of_rate: dict[float, list[Tensor]] = {learning_rate: []}  # first: it is the one that is logged
        for parameter in group["params"]:
            of_rate.setdefault(rate(parameter), []).append(parameter)
        parts += [{**group, "params": params, "lr": each} for each, params in of_rate.items() if params]
    return parts
