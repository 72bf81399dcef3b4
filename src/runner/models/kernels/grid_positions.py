"""Positions of packed rows in models that count them in time, height and width (M-RoPE): Qwen2.5-VL, Qwen3-VL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from runner.models.kernels import base_model


def uses(model: Any) -> bool:
    """Whether the positions of a model have three dimensions."""
    base = base_model.of(model)
    return base_model.reads_images(base.config) and hasattr(base.model, "get_rope_index")


def packed(batch: Mapping[str, Any], model: Any) -> Tensor:
    """(4, B, T) int64: the positions in each document, by which documents are told apart; then time, height, width.

    Outside of images the last three are counted on from the largest before them. ``batch``: see ``data.collator``.
    transformers computes them of whole rows alone, so each document is such a row; the images are in their order.
    """
    positions: Tensor = batch["position_ids"].expand(4, -1, -1).clone()
    if "image_grid_thw" not in batch:
        return positions
    ids, kinds = batch["input_ids"].reshape(-1), batch["mm_token_type_ids"].reshape(-1)
    spans = [slice(start, end) for _, start, end in batch["spans"].tolist()]
    rows = [pad_sequence([each[span] for span in spans], batch_first=True) for each in (ids, kinds)]  # (documents, t)
    mask = pad_sequence([torch.ones_like(ids[span]) for span in spans], batch_first=True)
    of_documents, _ = base_model.of(model).model.get_rope_index(
        rows[0], mm_token_type_ids=rows[1], image_grid_thw=batch["image_grid_thw"], attention_mask=mask
    )  # (3, documents, t)
    flat = positions.view(4, -1)
    for number, span in enumerate(spans):
        flat[1:, span] = of_documents[:, number, : span.stop - span.start]
    return positions
