"""Isolate packed documents in attention: model inputs for packed rows, and a check that the model respects them.

transformers (4.53 or later) detects documents by ``position_ids`` that restart at 0 and builds the mask, including
sliding windows. This works only if the model passes ``position_ids`` on; some families do not (OPT, Falcon, MPT, Mamba
in 5.23). Therefore ``check_isolation`` tests each model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from runner.errors import ConfigError, Fault
from runner.models.kernels import varlen_attention


def inputs(batch: Mapping[str, Any], packed: bool, model: Any) -> dict[str, Any]:
    """Keyword arguments of the model's forward such that documents do not attend to each other.

    ``input_ids`` and ``position_ids`` are (B, T). They are (1, B * T) for attention by document, and for
    FlashAttention, which detects documents in a single row only (transformers#39121). Padding is at the end of a row,
    so causal attention never includes it.
    """
    ids, positions = batch["input_ids"], batch["position_ids"]
    arguments = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    if not packed:
        return arguments
    flat = {**arguments, "input_ids": ids.reshape(1, -1), "position_ids": positions.reshape(1, -1)}
    if varlen_attention.uses(model):
        return {**flat, **varlen_attention.arguments(batch["document_ends"], batch["longest"])}
    if "flash" in str(model.config._attn_implementation):
        return flat
    return arguments if _masks_by_position() else {**arguments, "attention_mask": _mask(positions, model)}


def check_isolation(model: Any, autocast: torch.dtype | None) -> None:
    """Check that packed documents do not attend to each other. Call before compiling; costs one small step.

    The gradient of the second document's logits with respect to the first document's embeddings must be exactly zero,
    also with quantized weights and low precision. ``autocast``: as in training.

    Raises:
        ConfigError: documents attend to each other; the remedy is ``data.packing=false``.
    """
    embedded: list[Tensor] = []

    def keep(module: object, args: object, output: Tensor) -> Tensor:
        embedded.append(output if output.requires_grad else output.detach().requires_grad_())
        return embedded[-1]

    hook = model.get_input_embeddings().register_forward_hook(keep)
    device = model.get_input_embeddings().weight.device
    ids = torch.tensor([[1, 2, 3, 4, 1, 2, 3, 4]], device=device)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]], device=device)
    try:
        computing = torch.autocast(device.type, autocast, enabled=autocast is not None)
        with torch.random.fork_rng(), torch.enable_grad(), computing:
            ends = torch.tensor([0, 4, 8], dtype=torch.int32, device=device)
            batch = {"input_ids": ids, "position_ids": positions, "document_ends": ends, "longest": 4}
            logits = model(**inputs(batch, True, model)).logits[0, -4:]  # (4, V): the second document
            (gradient,) = torch.autograd.grad(logits.float().square().sum(), embedded[:1])
    finally:
        hook.remove()
    if gradient[0, :4].any():
        name = type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__
        problem = f"in {name}, documents packed into one row attend to each other"
        raise ConfigError(Fault("data.packing", problem, "set data.packing=false", True))


def _masks_by_position() -> bool:
    """Whether transformers builds the mask from ``position_ids`` (4.53 or later)."""
    try:
        from transformers.masking_utils import find_packed_sequence_indices  # noqa: F401
    except ImportError:
        return False
    return True


def _mask(positions: Tensor, model: Any) -> Tensor:
    """Additive attention mask (B, 1, T, T): 0 for earlier positions of the same document, else the lowest number.

    Raises:
        ConfigError: the model has a sliding window shorter than the row, which an explicit mask would disable.
    """
    length = positions.shape[1]
    window = getattr(model.config, "sliding_window", None)
    if window and window < length and getattr(model.config, "use_sliding_window", True):
        problem = f"this transformers cannot combine rows of {length} tokens with a sliding window of {window}"
        raise ConfigError(Fault("data.packing", problem, "use transformers >= 4.53, or set data.packing=false", True))
    document = (positions == 0).cumsum(1)  # (B, T)
    same = document[:, :, None] == document[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool, device=positions.device).tril()
    dtype: torch.dtype = model.dtype
    lowest = torch.finfo(dtype).min
    return torch.zeros_like(same, dtype=dtype).masked_fill_(~(same & causal), lowest)[:, None]
