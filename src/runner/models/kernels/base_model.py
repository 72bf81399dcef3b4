"""The model below PEFT's wrapper, and what it takes beside text."""

from __future__ import annotations

from typing import Any

IMAGE_FAMILIES = ("idefics3", "smolvlm", "llava", "llava_next", "qwen2_5_vl", "qwen3_vl")
"""Models that read images here: their types in config.json, see ``models.vision``."""
IMAGE_ARGUMENTS = ("pixel_values", "pixel_attention_mask", "image_sizes", "image_grid_thw", "mm_token_type_ids")
"""Their arguments for the images of a batch, see ``data.vision``."""


def of(model: Any) -> Any:
    """The model without PEFT's wrapper, if it has one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def reads_images(config: Any) -> bool:
    """Whether a model with this configuration reads images here."""
    return getattr(config, "model_type", "") in IMAGE_FAMILIES


def has_virtual_tokens(model: Any) -> bool:
    """Whether PEFT puts trained vectors before each row (prompt tuning, p-tuning, prefix tuning)."""
    return bool(getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False))


def name(model: Any) -> str:
    """The name of the model's class."""
    return type(of(model)).__name__
