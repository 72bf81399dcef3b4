"""Models that read images: which families are supported, and which part of such a model is its language model.

A family is supported when tests have shown that the loss of a batch equals that of the plain transformers model on what
its processor gives, and its gradients reach the language model alone: ``tests/models/test_models_vision.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from runner.errors import ConfigError, Fault
from runner.models.kernels import base_model
from runner.models.kernels.base_model import IMAGE_FAMILIES

if TYPE_CHECKING:
    from torch import nn


def check_family(config: Any, path: str) -> None:
    """Refuse a model that could read images, and that neither this module nor a text model of transformers covers.

    Raises:
        ConfigError: with the families that are supported.
    """
    if not hasattr(config, "vision_config"):
        return
    from transformers.models.auto import modeling_auto

    kind = getattr(config, "model_type", "")
    pictured = getattr(modeling_auto, "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", {})
    if kind in pictured and kind not in (*IMAGE_FAMILIES, *modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        problem = f"models of the type {kind}, which read images, are not supported"
        remedy = f"use a model of one of the types {', '.join(IMAGE_FAMILIES)}"
        raise ConfigError(Fault("model.path", problem, remedy, path))


def others(model: nn.Module) -> list[str]:
    """The names of the largest modules outside the language model, its embeddings and its head: the vision tower …

    A parameter that is in none of them, such as that of LLaVA-NeXT between lines of patches, is named itself.

    Empty for a model that reads text alone. Names are those below PEFT's wrapper.
    """
    base = base_model.of(model)
    if not base_model.reads_images(base.config):
        return []
    inside = [base.get_decoder(), base.get_input_embeddings(), base.get_output_embeddings()]
    return list(_outside(base, "", [part for part in inside if part is not None]))


def is_below(name: str, modules: list[str]) -> bool:
    """Whether a module or parameter of this name is in one of the modules."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def pattern(modules: list[str]) -> str:
    """A regular expression for the full names of everything in these modules."""
    return rf"(?:{'|'.join(map(re.escape, modules))})\..*"


def _outside(module: Any, name: str, inside: list[Any]) -> Iterator[str]:
    parts = {id(part) for top in inside for part in top.modules()}
    for own, _ in module.named_parameters(recurse=False):
        yield f"{name}.{own}".lstrip(".")
    for child_name, child in module.named_children():
        full = f"{name}.{child_name}".lstrip(".")
        held = [id(part) for part in child.modules()]
        if id(child) in parts:
            continue
        if any(part in parts for part in held):
            yield from _outside(child, full, inside)
        elif any(True for _ in child.parameters()):
            yield full
