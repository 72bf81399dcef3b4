"""A few held-out prompts, answered before and after training: what the loss means in words."""

from __future__ import annotations

from typing import Any

import torch


@torch.no_grad()
def generate(
    model: Any, tokenizer: Any, prompts: list[str], max_new_tokens: int, *, in_step: bool = False
) -> list[str]:
    """Greedy continuations of ``prompts``, at most ``max_new_tokens`` tokens each, special tokens left out.

    ``in_step``: all ranks call this, and none stops before the last has: they gather each other's shards.
    """
    if not prompts:
        return []
    was_training, side = model.training, tokenizer.padding_side
    model.eval()
    tokenizer.padding_side = "left"
    try:
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        inputs = {name: inputs[name].to(_device(model)) for name in ("input_ids", "attention_mask")}
        length = inputs["input_ids"].shape[1]
        out = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            synced_gpus=in_step,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=tokenizer.pad_token_id,
        )
        return [text.strip() for text in tokenizer.batch_decode(out[:, length:], skip_special_tokens=True)]
    finally:
        tokenizer.padding_side = side
        model.train(was_training)


def _device(model: Any) -> torch.device:
    return next(model.parameters()).device
