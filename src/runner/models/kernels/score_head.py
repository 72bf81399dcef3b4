"""Models that give documents numbers instead of text: rewards, classes, measures.

transformers' classes for sequence classification find the end of a document by its padding tokens. This is wrong for
packed rows, and where padding and end of text are the same token (transformers#35352). So a decoder loaded here gives
the outputs of its head at every position, and the task takes those at the ends of documents.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from runner.errors import ConfigError, Fault
from runner.models.kernels import base_model

if TYPE_CHECKING:
    from torch import Tensor, nn

Problem = Literal["single_label_classification", "multi_label_classification", "regression"]
OF_PEFT = ("score", "classifier")
"""The names of heads that PEFT trains in full by itself."""


@dataclass(frozen=True)
class ScoreHead:
    """The head of a model that scores documents."""

    outputs: tuple[str, ...]
    """A name for each number that the head gives."""
    problem: Problem
    """What the numbers are, as transformers' ``problem_type``."""
    allows_encoders: bool = False
    """Whether models that attend in both directions (BERT) can be trained."""
    lr_ratio: float = 1.0
    """How many times as fast as all other weights the head learns."""
    seed: int = 0
    """Seed of a new head."""


def configure(config: Any, head: ScoreHead, path: str) -> None:
    """Write the outputs of the head into the configuration of a model.

    Raises:
        ConfigError: the model has a head for other classes, or is neither a decoder nor an encoder.
    """
    if getattr(config, "is_encoder_decoder", False):
        problem, remedy = "is an encoder-decoder model, which cannot score documents here", "use a decoder"
        raise ConfigError(Fault("model.path", problem, remedy, path))
    labels = [str(name) for name in (getattr(config, "id2label", None) or {}).values()]
    is_named = any(not label.startswith("LABEL_") for label in labels)
    if is_scored(config) and head.problem != "regression" and is_named and labels != list(head.outputs):
        problem = (
            f"has a head for other classes ({', '.join(labels[:8])}) than the data ({', '.join(head.outputs[:8])})"
        )
        remedy = f"set task.labels=[{','.join(labels)}], or use a model without such a head"
        raise ConfigError(Fault("model.path", problem, remedy, path))
    config.id2label = dict(enumerate(head.outputs))
    config.label2id = {name: number for number, name in enumerate(head.outputs)}
    config.problem_type = head.problem


def is_scored(config: Any) -> bool:
    """Whether the weights of this configuration have a score head already."""
    return any("ForSequenceClassification" in name for name in getattr(config, "architectures", None) or [])


def install(model: Any, head: ScoreHead) -> None:
    """Let a decoder with a score head return ``logits`` (B, T, outputs), in place; an encoder stays (B, outputs).

    Raises:
        ConfigError: the model is an encoder, and the task does not allow one.
    """
    model.head_names = _names(model)
    if is_encoder(model) and not head.allows_encoders:
        problem = f"{type(model).__name__} gives a whole row one score, and this task needs a decoder"
        raise ConfigError(Fault("model.path", problem, "use a model for text generation", model.config._name_or_path))
    if "score" in model.head_names:
        cls: Any = type(model)
        model.__class__ = _scoring_everywhere(cls)


def initialise(model: Any, names: Iterable[str], head: ScoreHead) -> None:
    """Give the parameters ``names`` of a new head their first values, from the seed alone."""
    import torch

    generator = torch.Generator().manual_seed(head.seed)
    std = getattr(model.config.get_text_config(), "initializer_range", None) or 0.02
    for name, parameter in model.named_parameters():
        if name in names:
            values = torch.zeros(parameter.shape)
            values = values.normal_(std=std, generator=generator) if values.dim() > 1 else values + ("norm" in name)
            parameter.data.copy_(values if name.endswith("weight") else torch.zeros(parameter.shape))


def in_float32(model: Any) -> None:
    """Compute the head in float32, as adapters are: small updates are lost in bfloat16."""
    for module in modules(model):
        if any(parameter.element_size() < 4 for parameter in module.parameters()):
            module.float()
            module.register_forward_pre_hook(_cast)


def modules(model: Any) -> list[nn.Module]:
    """The modules of the score head; empty for a language model."""
    base = base_model.of(model)
    return [base.get_submodule(name) for name in getattr(base, "head_names", [])]


def of(model: Any) -> Any:
    """The score head of a decoder; None for an encoder or a language model."""
    base = base_model.of(model)
    return base.score if "score" in getattr(base, "head_names", []) else None


def is_encoder(model: Any) -> bool:
    """Whether the model scores whole rows, having seen each token with both of its sides."""
    names = getattr(base_model.of(model), "head_names", [])
    return bool(names) and "score" not in names


def configuration(model: Any) -> Any:
    """The configuration with which transformers loads the files of the base model, and a head of this shape."""
    base = base_model.of(model)
    config = copy.deepcopy(base.config)
    config.architectures, config.use_cache = [type(base).__name__], True
    text = config.get_text_config()
    text.vocab_size = getattr(base, "vocab_size_of_files", text.vocab_size)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _names(model: Any) -> list[str]:
    """The modules outside the base model, and the pooler of an encoder, which is new in many published models."""
    base = model.base_model
    names = [
        name for name, child in model.named_children() if child is not base and any(True for _ in child.parameters())
    ]
    if "score" not in names and getattr(base, "pooler", None) is not None:
        names.append(f"{model.base_model_prefix}.pooler")
    return names


@functools.cache
def _scoring_everywhere(cls: Any) -> type[nn.Module]:
    return type(cls.__name__, (_ScoringEverywhere, cls), {"__module__": cls.__module__})


class _ScoringEverywhere:
    """Mixin placed before transformers' class in the method resolution order."""

    def forward(self, input_ids: Tensor | None = None, **inputs: Any) -> Any:
        from transformers.modeling_outputs import SequenceClassifierOutputWithPast

        model: Any = self
        given = {name: value for name, value in inputs.items() if value is not None and name != "return_dict"}
        hidden = model.base_model(input_ids, **given).last_hidden_state
        return SequenceClassifierOutputWithPast(logits=model.score(hidden))


def _cast(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    dtype = next(module.parameters()).dtype
    return tuple(
        each.to(dtype) if hasattr(each, "is_floating_point") and each.is_floating_point() else each for each in inputs
    )
