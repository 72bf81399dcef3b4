"""Generate text from prompts, to show samples of a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from runner.data import vision
from runner.data.images import Reference
from runner.models.kernels import compilation
from runner.tasks import sampling


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: list[str],
    max_new_tokens: int,
    *,
    in_step: bool = False,
    temperature: float = 0.0,
    stop: int | None = None,
    streamer: Any = None,
    progress: Callable[[int, int], None] | None = None,
    pictures: Sequence[Reference] = (),
) -> list[str]:
    """Continuations of ``prompts`` of at most ``max_new_tokens`` tokens each, without special tokens.

    Greedy at ``temperature`` 0, else sampled from the full distribution with torch's random state. ``stop`` is an end
    token in addition to the model's own. ``streamer`` (of transformers) receives each token; only for a single prompt.
    ``progress`` is called after each token of all prompts with (tokens done, ``max_new_tokens``).
    ``pictures``: the images of a single prompt, see ``data.images``; the model must read images.
    ``in_step``: for FSDP; all ranks call this function and run until the last one is done (``synced_gpus``).
    """
    if not prompts:
        return []
    was_training, side = model.training, tokenizer.padding_side
    model.eval()
    tokenizer.padding_side = "left"
    try:
        given = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        inputs = {name: given[name] for name in ("input_ids", "attention_mask")}
        if pictures:
            inputs = _with_images(tokenizer, inputs["input_ids"][0].tolist(), pictures)
        inputs = {name: value.to(_device(model)) for name, value in inputs.items()}
        length = inputs["input_ids"].shape[1]
        how = {"temperature": temperature, "top_p": 1.0, "top_k": 0} if temperature else _GREEDY
        ends = {} if stop is None else {"eos_token_id": sampling.end_tokens(model, stop)}
        watching = {"stopping_criteria": [_watch(progress, length, max_new_tokens)]} if progress else {}
        with compilation.left_out():
            out = model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=bool(temperature),
                use_cache=True,
                synced_gpus=in_step,
                streamer=streamer,
                pad_token_id=tokenizer.pad_token_id,
                **how,
                **ends,
                **watching,
            )
        return [text.strip() for text in tokenizer.batch_decode(out[:, length:], skip_special_tokens=True)]
    finally:
        tokenizer.padding_side = side
        model.train(was_training)


def _with_images(tokenizer: Any, ids: list[int], pictures: Sequence[Reference]) -> dict[str, torch.Tensor]:
    """The arguments of the model for one prompt, whose images have one token each in ``ids``."""
    reader = vision.of(tokenizer)
    assert reader is not None, "the model reads images"
    ids = reader.expanded({"input_ids": ids, "labels": ids}, pictures)["input_ids"]
    whole = torch.tensor([ids])
    return {"input_ids": whole, "attention_mask": torch.ones_like(whole), **reader.tensors([pictures], whole)}


def _watch(progress: Callable[[int, int], None], start: int, count: int) -> Callable[..., torch.Tensor]:
    """A stopping criterion of transformers that never stops, and reports the tokens after ``start``."""

    def criterion(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        progress(input_ids.shape[1] - start, count)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    return criterion


_GREEDY = {"temperature": None, "top_p": None, "top_k": None}
"""Resets the sampling settings of a published model, which would cause warnings."""


def _device(model: Any) -> torch.device:
    return next(model.parameters()).device
