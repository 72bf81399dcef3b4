"""Sample answers from a model, the same for any batch that a prompt is in.

The next token is chosen by one uniform number of the answer's own, from the cumulative distribution. So an answer
depends on the weights, its prompt and its seed alone (but for rounding of the logits), not on its neighbours.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from runner.models import shards
from runner.models.kernels import compat, compilation

KEYS_AND_VALUES = ("DynamicLayer", "DynamicSlidingWindowLayer")
"""Layers of transformers' cache that hold keys and values of tokens, and nothing else."""


@dataclass(frozen=True)
class Sampling:
    """How answers are written."""

    most_tokens: int
    temperature: float
    ends: list[int]
    """Tokens that end an answer; they belong to it."""
    pad: int


def end_tokens(model: Any, *more: int | None) -> list[int]:
    """The end-of-sequence tokens of the model, and those of ``more`` that are no None."""
    own = model.generation_config.eos_token_id
    listed = own if isinstance(own, list) else [own]
    return list(dict.fromkeys(token for token in [*listed, *more] if token is not None))


def uniforms(seed: int, rows: list[int], per_row: int, most_tokens: int) -> np.ndarray:
    """Numbers in [0, 1) for each token of each answer, (rows * per_row, most_tokens); PCG64's never change."""
    raw = [np.random.PCG64([seed, row, number]).random_raw(most_tokens) for row in rows for number in range(per_row)]
    return (np.array(raw, dtype=np.uint64).reshape(-1, most_tokens) >> np.uint64(11)) * 2.0**-53


def answers(
    model: Any, prompts: list[list[int]], chances: np.ndarray | None, sampling: Sampling, per_prompt: int = 1
) -> list[list[int]]:
    """The tokens of ``per_prompt`` answers to each prompt in turn, with the token that ends it.

    ``chances``: the ``uniforms`` of each answer; None: the most likely tokens. All ranks of a sharded model must call
    this; they run until the last one is done.
    """
    from transformers import GenerationConfig

    is_sharded = any(map(shards.is_sharded, model.parameters()))
    device = next(model.parameters()).device
    given = prompts or [[sampling.pad]] * is_sharded
    if not given:
        return []
    length = max(map(len, given))
    ids = torch.tensor([[sampling.pad] * (length - len(each)) + each for each in given], device=device)
    mask = torch.tensor([[0] * (length - len(each)) + [1] * len(each) for each in given], device=device)
    config = GenerationConfig(
        max_new_tokens=sampling.most_tokens, do_sample=False, use_cache=True, eos_token_id=sampling.ends,
        pad_token_id=sampling.pad, repetition_penalty=1.0, no_repeat_ngram_size=0,
    )  # fmt: skip
    chosen = (
        [_choose(torch.from_numpy(chances).to(device), length, sampling.temperature)] if chances is not None else []
    )
    with compilation.left_out():
        cache = _read(model, ids, mask, config, per_prompt) if not is_sharded else {}
        ids, mask = ids.repeat_interleave(per_prompt, 0), mask.repeat_interleave(per_prompt, 0)
        out = model.generate(
            input_ids=ids, attention_mask=mask, generation_config=config, logits_processor=chosen,
            synced_gpus=is_sharded, **cache,
        )  # fmt: skip
    return [_cut(row, sampling.ends) for row in out[: len(prompts) * per_prompt, length:].tolist()]


def _read(model: Any, ids: Tensor, mask: Tensor, config: Any, copies: int) -> dict[str, Any]:
    """The cache of the prompts (without their last tokens), computed once for all answers to each."""
    from transformers import DynamicCache

    if copies == 1 or ids.shape[1] == 1:
        return {}
    config = copy.copy(config)
    config.max_new_tokens, config.return_dict_in_generate = 1, True
    out = model.generate(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], generation_config=config)
    cache = out.past_key_values
    layers = getattr(cache, "layers", [])  # linear attention has states that would not be copied
    if not isinstance(cache, DynamicCache) or any(type(layer).__name__ not in KEYS_AND_VALUES for layer in layers):
        return {}
    cache.batch_repeat_interleave(copies)
    return {"past_key_values": cache}


@contextlib.contextmanager
def merged(model: Any) -> Iterator[None]:
    """Compute with merged weights in the block where that is exact: LoRA on float32 weights. Others stay as they are.

    The weights are copies: afterwards the layers have their own ones again, bit for bit.
    """
    kept = [(each, each.base_layer.weight.data) for each in _exact_layers(model)]
    try:
        for layer, weight in kept:
            name = layer.active_adapters[0]
            layer.base_layer.weight.data = weight + layer.get_delta_weight(name)
            layer.merged_adapters.append(name)
        yield
    finally:
        for layer, weight in kept:
            layer.base_layer.weight.data = weight
            layer.merged_adapters.clear()


def merge(model: Any) -> None:
    """Merge the adapter into the weights for good where ``merged`` does it for a while; needs no memory for copies."""
    for layer in _exact_layers(model):
        layer.merge()


def _exact_layers(model: Any) -> list[Any]:
    embeddings = model.get_input_embeddings().weight  # a tied head is merged into them, too
    layers: list[Any] = [module for module in model.modules() if _is_exact(module)]
    return [each for each in layers if each.base_layer.weight is not embeddings]


def _is_exact(module: nn.Module) -> bool:
    from peft.tuners.lora.layer import LoraLayer

    base: Any = getattr(module, "base_layer", None)
    if not isinstance(module, LoraLayer) or not isinstance(base, nn.Linear):
        return False
    names = module.active_adapters
    plain = len(names) == 1 and names[0] in module.lora_A and names[0] not in compat.lora_variants(module)
    if not plain or module.disable_adapters or module.merged or module.lora_B[names[0]].bias is not None:
        return False
    return (
        type(base.weight) is nn.Parameter and base.weight.dtype == torch.float32 and not shards.is_sharded(base.weight)
    )


def _choose(chances: Tensor, start: int, temperature: float) -> Callable[[Tensor, Tensor], Tensor]:
    """A logits processor that leaves only the token that the answer's uniform number chooses."""

    def processor(input_ids: Tensor, scores: Tensor) -> Tensor:
        cumulative = torch.softmax(scores.float() / temperature, -1).double().cumsum(-1)  # (answers, V)
        aim = chances[:, input_ids.shape[1] - start, None] * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, aim, right=True).clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)

    return processor


def _cut(tokens: list[int], ends: list[int]) -> list[int]:
    """The tokens up to the first one that ends an answer."""
    at = next((number for number, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: at + 1]
