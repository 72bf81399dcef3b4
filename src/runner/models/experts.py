"""Mixtures of experts: the weights of a layer's experts may be one tensor, which ``target_modules`` cannot name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from runner.errors import ConfigError, Fault, suggest
from runner.models.kernels import compat

if TYPE_CHECKING:
    from torch import nn

ALL, KEY = "experts", "target_parameters"
_LAYER = re.compile(r".*\.\d+\.")
"""What comes before the name of a parameter within its layer."""


def names(model: nn.Module) -> list[str]:
    """The parameters with the weights of all experts of a layer, by the end of their names.

    Raises:
        ConfigError: there are none.
    """
    found = [name for name, parameter in model.named_parameters() if ".experts." in name and parameter.ndim == 3]
    if not found:
        problem = "this model has no experts whose weights are in one tensor"
        remedy = "set it to null: lora.target_modules=all-linear includes experts that are linear layers"
        raise ConfigError(Fault(f"lora.{KEY}", problem, remedy, ALL))
    return sorted({_LAYER.sub("", name) for name in found})


def faults(
    init_lora_weights: Any, target_parameters: Any, lora_dropout: float, use_dora: bool, **_: Any
) -> Iterator[Fault]:
    """Options of LoRA that do not work on single parameters."""
    if not compat.at_least("peft", "0.17"):
        yield Fault(KEY, "needs PEFT 0.17", "install peft >= 0.17, or set it to null", target_parameters)
    problem = f"does not work on single parameters (lora.{KEY})"
    if lora_dropout:
        yield Fault("lora_dropout", problem, "set it to 0", lora_dropout)
    if use_dora:
        yield Fault("use_dora", problem, "set it to false", True)
    if init_lora_weights not in (True, "gaussian"):
        yield Fault("init_lora_weights", problem, "set it to true or gaussian", init_lora_weights)


def faults_on(model: nn.Module, patterns: Sequence[str]) -> Iterator[Fault]:
    """Names that match no parameter of the model; PEFT compares their ends."""
    known = [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]
    ends = sorted({_LAYER.sub("", name) for name in known})
    for pattern in patterns:
        if not any(name == pattern or name.endswith(f".{pattern}") for name in known):
            remedy = f"{suggest(pattern, ends)} parameters: {', '.join(ends)}".strip()
            yield Fault(KEY, "matches no parameter of this model", remedy, pattern)


def routers(model: nn.Module) -> dict[str, list[str]]:
    """``exclude_modules`` for all-linear: linear layers that return several tensors, as the router of Llama 4.

    PEFT would take its scores and logits for one tensor.
    """
    from torch import nn

    own = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    found = [name for name, module in own if "transformers" in type(module).__module__ and _returns_several(module)]
    return {"exclude_modules": found} if found else {}


def _returns_several(linear: nn.Linear) -> bool:
    import torch

    with torch.no_grad():
        return isinstance(linear(linear.weight.new_zeros(2, linear.in_features)), tuple)
