"""The model below PEFT's wrapper."""

from __future__ import annotations

from typing import Any


def of(model: Any) -> Any:
    """The model without PEFT's wrapper, if it has one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def has_virtual_tokens(model: Any) -> bool:
    """Whether PEFT puts trained vectors before each row (prompt tuning, p-tuning, prefix tuning)."""
    return bool(getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False))


def name(model: Any) -> str:
    """The name of the model's class."""
    return type(of(model)).__name__
