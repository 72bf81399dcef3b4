"""Isolate packed documents in attention: model inputs for a batch, and checks that the model respects them.

transformers (4.53 or later, with torch 2.6) detects documents by ``position_ids`` that restart at 0 and builds the
mask, including sliding windows. This works only if the model passes ``position_ids`` on; some families do not (OPT,
Falcon, MPT, Mamba in 5.23). And ``AutoModelForCausalLM`` loads encoders (BERT, XLNet), whose tokens depend on later
ones. Therefore ``check_causal`` and ``check_isolation`` test each model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from runner.errors import ConfigError, Fault
from runner.models.kernels import base_model, compat, grid_positions, isolation, long_rope, score_head, varlen_attention


def inputs(batch: Mapping[str, Any], packed: bool, model: Any) -> dict[str, Any]:
    """Keyword arguments of the model's forward such that documents do not attend to each other.

    ``input_ids`` and ``position_ids`` are (B, T). They are (1, B * T) for attention by document, and for
    FlashAttention, which detects documents in a single row only (transformers#39121). Padding is at the end of a row,
    so causal attention never includes it. Unpacked rows have the model's own positions, which need not begin at 0
    (RoBERTa), except that longrope needs to know where the padding begins. Images are computed in the order of their
    tokens, whatever row they are in.
    """
    ids, positions = batch["input_ids"], batch["position_ids"]
    if score_head.is_encoder(model):
        return {"input_ids": ids, "attention_mask": _own_tokens(batch)}
    pictures = {name: batch[name] for name in base_model.IMAGE_ARGUMENTS if name in batch}
    if not packed:
        own = {"position_ids": positions} if long_rope.uses(model) else {}
        return {"input_ids": ids, "use_cache": False, **own, **pictures}
    if varlen_attention.uses(model):
        return varlen_attention.inputs(batch)
    if "flash" in str(model.config._attn_implementation):
        return {"input_ids": ids.reshape(1, -1), "position_ids": positions.reshape(1, -1), "use_cache": False}
    if grid_positions.uses(model):
        positions, _ = grid_positions.packed(batch, model), pictures.pop("mm_token_type_ids", None)
    arguments = {"input_ids": ids, "position_ids": positions, "use_cache": False, **pictures}
    return arguments if compat.masks_by_position() else {**arguments, "attention_mask": _mask(positions, model)}


def check_causal(model: Any, autocast: torch.dtype | None, longest: int | None = None) -> None:
    """Check that no token depends on later tokens or on padding. Call before compiling; costs a small step.

    ``autocast``: as in training. ``longest``: the maximum length of a document, see ``isolation.problem``.

    Raises:
        ConfigError: it does: the model is an encoder, or its weights are damaged.
    """
    problem = isolation.problem(
        model, lambda batch: model(**inputs(batch, False, model)).logits, longest, autocast, packed=False
    )
    if problem:
        remedy = "use a model for text generation: an encoder cannot learn to predict the next token"
        if problem == isolation.NOT_FINITE:
            remedy = "use intact weights; if they are, set model.dtype=float32"
        problem = f"{base_model.name(model)} cannot be trained as a causal language model: {problem}"
        raise ConfigError(Fault("model.path", problem, remedy, getattr(model, "name_or_path", "")))


def check_isolation(model: Any, autocast: torch.dtype | None, longest: int | None = None) -> None:
    """Check that packed documents are computed as they are alone. Arguments as of ``check_causal``."""
    problem = isolation.problem(
        model, lambda batch: model(**inputs(batch, True, model)).logits, longest, autocast, packed=True
    )
    if problem:
        raise ConfigError(
            Fault("data.packing", f"in {base_model.name(model)}, {problem}", "set data.packing=false", True)
        )


def check_padding(model: Any, autocast: torch.dtype | None) -> None:
    """Check that an encoder scores a document with padding behind it as it scores the document alone."""
    problem = isolation.padding_problem(model, lambda batch: model(**inputs(batch, False, model)).logits, autocast)
    if problem:
        raise ConfigError(
            Fault(
                "model.path",
                f"in {base_model.name(model)}, {problem}",
                "use another model",
                model.name_or_path,
            )
        )


def _own_tokens(batch: Mapping[str, Any]) -> Tensor:
    """The attention mask (B, T) of unpacked rows: 1 for tokens, 0 for padding; a row without tokens keeps one."""
    rows, length = batch["input_ids"].shape
    last = batch["last_at"] % length
    last = torch.cat([last, last.new_zeros(rows - len(last))])
    return (torch.arange(length, device=last.device) <= last[:, None]).long()


def _mask(positions: Tensor, model: Any) -> Tensor:
    """Additive attention mask (B, 1, T, T): 0 for earlier positions of the same document, else the lowest number.

    Raises:
        ConfigError: the model has a sliding window shorter than the row, which an explicit mask would disable.
    """
    length = positions.shape[1]
    window = getattr(model.config, "sliding_window", None)
    if window and window < length and getattr(model.config, "use_sliding_window", True):
        problem = f"this transformers cannot combine rows of {length} tokens with a sliding window of {window}"
        raise ConfigError(
            Fault(
                "data.packing", problem, "use transformers >= 4.53 with torch >= 2.6, or set data.packing=false", True
            )
        )
    document = (positions == 0).cumsum(1)  # (B, T)
    same = document[:, :, None] == document[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool, device=positions.device).tril()
    dtype: torch.dtype = model.dtype
    lowest = torch.finfo(dtype).min
    return torch.zeros_like(same, dtype=dtype).masked_fill_(~(same & causal), lowest)[:, None]
