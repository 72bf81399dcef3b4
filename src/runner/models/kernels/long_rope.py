"""longrope for batches: choose the factors of each document by its own length.

Models with longrope (Phi-3, https://arxiv.org/abs/2402.13753) have two sets of rotary frequencies: one for texts up to
the original length of pretraining and one for longer texts. transformers (5.23) chooses by the largest position of the
whole batch, so one long document, or padding, would change the frequencies of the short documents beside it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor


def install(model: Any) -> None:
    """Let the rotary embeddings of ``model`` choose by document; changes nothing in other models."""
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        if kind == "longrope" or (isinstance(kind, dict) and "longrope" in kind.values()):
            module.forward = functools.partial(_by_document, module)
            model.has_long_rope = True


def uses(model: Any) -> bool:
    """Whether ``install`` found longrope. Then unpacked rows need ``position_ids`` too, which mark their padding."""
    return bool(getattr(model, "has_long_rope", False))


def _by_document(module: Any, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """(cos, sin) of ``position_ids`` (B, T), in which documents begin where positions do not increase by one."""
    original = _original_length(module, *args, **kwargs)
    forward = functools.partial(type(module).forward, module)
    if original is None:
        return forward(x, position_ids, *args, **kwargs)  # type: ignore[no-any-return]
    before = torch.cat([position_ids[:, :1] - 1, position_ids[:, :-1]], 1)
    document = (position_ids - before != 1).cumsum(1)  # (B, T)
    last = torch.zeros_like(position_ids).scatter_reduce(1, document, position_ids, "amax").gather(1, document)
    is_long = (last >= original)[:, :, None]
    short = forward(x, position_ids.clamp(max=original - 1), *args, **kwargs)
    long = forward(x, position_ids, *args, **kwargs)  # also short if no document is long
    cos, sin = (torch.where(is_long, *pair) for pair in zip(long, short, strict=True))
    return cos, sin


def _original_length(module: Any, layer_type: str | None = None) -> int | None:
    """The length up to which the short factors apply; None if these layers have no longrope."""
    kind, settings = module.rope_type, getattr(module.config, "rope_parameters", None) or {}
    if isinstance(kind, dict):
        if kind.get(layer_type) != "longrope":
            return None
        settings = settings[layer_type]
    length = settings.get("original_max_position_embeddings")
    return int(
        length or getattr(module.config, "original_max_position_embeddings", None) or module.original_max_seq_len
    )
