"""Train a part of the model: parameters chosen by name or decoder layer, or of LoRA only the matrices B.

A score head is always trained, because it may be new.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from runner.errors import ConfigError, Fault, refuse
from runner.models import vision
from runner.models.kernels import base_model, compilation, score_head

if TYPE_CHECKING:
    from torch import nn

NAMES, LAYERS, VISION = "lora.trainable", "lora.trainable_layers", "lora.train_vision"
SHOWN = 6
"""Names that a message lists."""


def train_named(model: nn.Module, patterns: Sequence[str]) -> None:
    """Train only the parameters whose name contains a match of one of the regular expressions.

    Raises:
        ConfigError: a pattern that matches no name, or one of two names of tied weights only.
    """
    parameters = list(model.named_parameters(remove_duplicate=False))  # tied weights under both of their names
    names = [name for name, _ in parameters]
    refuse(_no_match(pattern, names) for pattern in patterns if not _matching(names, [pattern]))
    chosen = set(_matching(names, patterns))
    trained = {id(parameter) for name, parameter in parameters if name in chosen}
    if tied := [name for name, parameter in parameters if id(parameter) in trained and name not in chosen]:
        problem = f"also trains {', '.join(tied)}: it is the same tensor (tied weights)"
        remedy = "match its other name too, or neither of them"
        raise ConfigError(Fault(NAMES, problem, remedy, list(patterns)))
    for _, parameter in parameters:
        parameter.requires_grad_(id(parameter) in trained)
    _train_head(model)


def train_layers(model: nn.Module, count: int) -> None:
    """Train only the last ``count`` decoder layers, or the first ones if it is negative.

    Raises:
        ConfigError: the model has no more layers than that.
    """
    layers = compilation.layers_of(model)
    if abs(count) >= len(layers):
        problem = f"must be less than the number of decoder layers: the model has {len(layers) or 'no list of them'}"
        raise ConfigError(Fault(LAYERS, problem, f"lower it, or set {NAMES} to a regular expression", count))
    model.requires_grad_(False)
    for layer in layers[-count:] if count > 0 else layers[:-count]:
        layer.requires_grad_(True)
    _train_head(model)


def freeze_a(model: nn.Module) -> None:
    """LoRA-FA: train the matrices B of LoRA, and A no more, as PEFT's ``create_lorafa_optimizer``.

    Its optimizer also multiplies the gradient of B by (A Aᵀ)⁻¹. For A as it begins, with independent entries and far
    more columns than rows, that is nearly a multiple of the identity, which Adam's updates do not depend on.

    Raises:
        ConfigError: there is no A: the adapters are those of embeddings, whose A begins as zero.
    """
    matrices = [parameter for name, parameter in model.named_parameters() if ".lora_A." in name]
    if not matrices:
        problem = "has no effect: no parameter is called lora_A"
        raise ConfigError(Fault("lora.freeze_a", problem, "set it to false, or choose other target_modules", True))
    for parameter in matrices:
        parameter.requires_grad_(False)


def check_vision(model: nn.Module, train_vision: bool) -> None:
    """Check that a model whose reading of images is to be trained reads any.

    Raises:
        ConfigError: it reads text alone.
    """
    if train_vision and not vision.others(model):
        raise ConfigError(Fault(VISION, "has no effect: the model reads text alone", "set it to false", "true"))


def freeze_vision(model: nn.Module, train_vision: bool) -> None:
    """Freeze what reads images (vision tower and projector), unless it is to be trained."""
    names = [] if train_vision else vision.others(model)
    for name, parameter in base_model.of(model).named_parameters() if names else ():
        if vision.is_below(name, names):
            parameter.requires_grad_(False)


def without_vision(model: nn.Module, method: str, fields: Collection[str], options: dict[str, Any]) -> dict[str, Any]:
    """Options of PEFT that leave out what reads images; as they are if they leave out modules themselves.

    ``fields``: those of the method's configuration.

    Raises:
        ConfigError: its virtual tokens are embeddings, and such a model finds images by the ids of tokens.
    """
    names = [] if options.get("exclude_modules") else vision.others(model)
    if names and "num_virtual_tokens" in fields:
        raise ConfigError(Fault("lora.method", "does not work on models that read images", "use lora=lora", method))
    return {**options, "exclude_modules": vision.pattern(names)} if names and "exclude_modules" in fields else options


def faults(
    trainable: str | list[str] | None = None, trainable_layers: int | None = None, train_vision: bool = False
) -> Iterator[Fault]:
    """Values that are wrong for every model; the keys are those of ``lora=none``."""
    if train_vision and (trainable is not None or trainable_layers is not None):
        problem = "has no effect with lora.trainable or lora.trainable_layers, which choose all that is trained"
        yield Fault("train_vision", problem, "set it to false, and name its parameters in lora.trainable", "true")
    if trainable is not None and trainable_layers is not None:
        remedy = "set one of them to null; layers have names too, such as '\\.layers\\.29\\.'"
        yield Fault("trainable_layers", "cannot be combined with lora.trainable", remedy, trainable_layers)
    for pattern in listed(trainable):
        try:
            re.compile(pattern)
        except re.error as error:
            yield Fault("trainable", f"is not a valid regular expression: {error}", "correct it", pattern)


def listed(trainable: str | list[str] | None) -> list[str]:
    return [trainable] if isinstance(trainable, str) else list(trainable or [])


def _train_head(model: nn.Module) -> None:
    for module in score_head.modules(model):
        module.requires_grad_(True)


def _matching(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    return [name for name in names if any(re.search(pattern, name) for pattern in patterns)]


def _no_match(pattern: str, names: Sequence[str]) -> Fault:
    shortest = sorted(names, key=len)[:SHOWN]
    return Fault(NAMES, "matches no parameter of this model", f"names here: {', '.join(shortest)} …", pattern)
