"""PEFT's methods and the fields of their configurations: which are supported, and errors for the others."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from runner.config.bind import unknown_key
from runner.config.bounds import mismatch
from runner.errors import Fault, first_line, suggest
from runner.models.kernels import compilation

WRONG = (ValueError, TypeError, ArithmeticError, RuntimeError, AttributeError, KeyError, ImportError)
"""What PEFT raises for options that it cannot use."""

SET_HERE = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
}  # fmt: skip
"""Fields of PEFT's configurations that the runner sets."""

UNSUITED = {
    "adalora": "it needs a call after every step to reallocate ranks, which this train loop does not make",
    "xlora": "it combines adapters that are already trained",
    "poly": "it needs a task id in every row",
    "shadow": "its auxiliary loss needs the labels inside PEFT, which this train loop does not pass",
}
"""PEFT methods that would run here but not work as intended, with the reason."""

UNSUITED_FIELDS = {
    "alora_invocation_tokens", "use_asa", "megatron_core", "prompt_tuning_init_text", "tokenizer_name_or_path",
}  # fmt: skip
"""Fields that need calls, objects or files which this train loop does not provide; so do all named ``…_config``."""

PROMPTS = ("p_tuning", "prefix_tuning", "prompt_tuning")
"""Methods that put virtual tokens before each row: embeddings, or keys and values of all layers."""

OF_DATA = "it needs passes over the data before training"
UNSUITED_INITS = {
    "eva": OF_DATA, "corda": OF_DATA, "lora_ga": OF_DATA,
    "loftq": "PEFT computes it on GPUs alone, and without the scale of the adapter",
}  # fmt: skip
"""Initialisations that would not work as intended, with the reason."""


def faults(method: str, options: Mapping[str, Any]) -> Iterator[Fault]:
    """Check a method and its options against PEFT's configuration class (imports PEFT)."""
    known = methods()
    name = method.lower()
    if name in UNSUITED or (name in _all_methods() and name not in known):
        reason = UNSUITED.get(name, "it needs more than rows of tokens")
        yield Fault("method", f"is not supported: {reason}", f"use one of {', '.join(known)}", method)
        return
    if name not in known:
        remedy = f"{suggest(name, known)} methods: {', '.join(known)}".strip()
        yield Fault("method", "PEFT has no such method", remedy, method)
        return
    faults = list(_option_faults(name, options))
    yield from faults
    if not faults:
        yield from _construction_faults(name, options)


def methods() -> list[str]:
    """The names of the supported PEFT methods."""
    known = _all_methods().items()
    return sorted(name for name, cls in known if name not in UNSUITED and (name in PROMPTS or not _is_prompt(cls)))


def _all_methods() -> dict[str, Any]:
    with compilation.deferred():
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return {str(getattr(kind, "value", kind)).lower(): cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}


def config_class(method: str) -> Any:
    return _all_methods()[method.lower()]


def _is_prompt(cls: Any) -> bool:
    from peft import PromptLearningConfig

    return issubclass(cls, PromptLearningConfig)


def _option_faults(method: str, options: Mapping[str, Any]) -> Iterator[Fault]:
    cls = config_class(method)
    types = typing.get_type_hints(cls)
    known = {field.name for field in dataclasses.fields(cls)} - SET_HERE
    for name, value in options.items():
        if name in SET_HERE:
            yield Fault(name, "is set by the runner", "remove this option", value)
        elif name in UNSUITED_FIELDS or name.endswith("_config"):
            yield Fault(name, "is not supported by this train loop", "remove this option", value)
        elif name not in known:
            yield unknown_key(name, known, value, is_ours=False)
        elif name == "init_lora_weights" and value in UNSUITED_INITS:
            problem = f"is not supported: {UNSUITED_INITS[str(value)]}"
            remedy = "use true, gaussian, orthogonal, pissa, pissa_niter_16 or olora"
            yield Fault(name, problem, f"{remedy}, or eva and loftq with lora=lora", value)
        elif name != "init_lora_weights" and (problem := mismatch(value, types[name])):
            yield Fault(name, problem, f"see PEFT's {cls.__name__}.{name}", value)


def _construction_faults(method: str, options: Mapping[str, Any]) -> Iterator[Fault]:
    """Errors raised by the configuration class: missing fields and impossible combinations."""
    try:
        config_class(method)(task_type="CAUSAL_LM", **options)
    except WRONG as error:
        yield Fault("", f"{method}: {first_line(error)}", "set the options that PEFT requires: '+lora.name=value'")


def refusal(method: str, error: Exception) -> Fault:
    """The fault of an error that PEFT raises when it adapts a model."""
    text = first_line(error)
    if "target_modules" in text and "specify" in text:
        problem = f"PEFT has no default target modules of {method} for this model"
        return Fault("lora.target_modules", problem, "set '+lora.target_modules=all-linear'")
    return Fault("lora", f"PEFT cannot apply {method} to this model: {text}", "use other options, or lora=lora", method)
