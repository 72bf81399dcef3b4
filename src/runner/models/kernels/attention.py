"""Attention that stays inside a document when several share a row.

transformers (from 4.53 on) sees in ``position_ids`` that start again at 0 where a document begins, and builds the mask
by itself, for sliding windows too: but only where a model passes them on, and there are families that do not (OPT,
Falcon, MPT, Mamba in 5.23). So ``check_isolation`` asks the model itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from runner.errors import ConfigError, Fault
from runner.models.kernels import varlen_attention


def inputs(batch: Mapping[str, Any], packed: bool, model: Any) -> dict[str, Any]:
    """What to call the model with so that documents do not see each other.

    ``input_ids`` and ``position_ids`` are (B, T), or (1, B * T) for attention by document and FlashAttention, which
    tells documents apart in a single row only (transformers#39121). Padding follows the text of a row, so causal
    attention never sees it.
    """
    ids, positions = batch["input_ids"], batch["position_ids"]
    asked = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    if not packed:
        return asked
    if varlen_attention.uses(model):
        row = {**asked, "input_ids": ids.reshape(1, -1), "position_ids": positions.reshape(1, -1)}
        return {**row, **varlen_attention.arguments(batch["document_ends"], batch["longest"])}
    if "flash" in str(model.config._attn_implementation):
        return {**asked, "input_ids": ids.reshape(1, -1), "position_ids": positions.reshape(1, -1)}
    return asked if _masks_by_position() else {**asked, "attention_mask": _mask(positions, model)}


def check_isolation(model: Any, autocast: torch.dtype | None) -> None:
    """Refuse to pack for a model whose documents see each other. Call it before compiling; it costs one small step.

    The gradient of the second document's logits with respect to the first one's embeddings is exactly zero where
    nothing passes between them; rounding and quantization do not blur that. ``autocast`` as in training.

    Raises:
        ConfigError: with ``data.packing=false`` as the remedy.
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
            asked = inputs(batch, True, model)
            logits = model(**asked).logits[0, -4:]  # (4, V): the second document
            (gradient,) = torch.autograd.grad(logits.float().square().sum(), embedded[:1])
    finally:
        hook.remove()
    if gradient[0, :4].any():
        name = type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__
        problem = f"{name} lets the documents that share a row see each other"
        raise ConfigError(Fault("data.packing", problem, "set data.packing=false", True))


def _masks_by_position() -> bool:
    """Whether transformers builds the mask from the positions; not before 4.53."""
    try:
        from transformers.masking_utils import find_packed_sequence_indices  # noqa: F401
    except ImportError:
        return False
    return True


def _mask(positions: Tensor, model: Any) -> Tensor:
    """The mask to add to attention scores, (B, 1, T, T): 0 where a position sees an earlier one of its document.

    Raises:
        ConfigError: the model has a sliding window shorter than the row, which a ready mask would switch off.
    """
    length = positions.shape[1]
    window = getattr(model.config, "sliding_window", None)
    if window and window < length and getattr(model.config, "use_sliding_window", True):
        problem = f"rows of {length} tokens do not go with a sliding window of {window} in this transformers"
        raise ConfigError(Fault("data.packing", problem, "use transformers >= 4.53, or set data.packing=false", True))
    document = (positions == 0).cumsum(1)  # (B, T)
    same = document[:, :, None] == document[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool, device=positions.device).tril()
    dtype: torch.dtype = model.dtype
    lowest = torch.finfo(dtype).min
    return torch.zeros_like(same, dtype=dtype).masked_fill_(~(same & causal), lowest)[:, None]
