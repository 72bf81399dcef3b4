"""New tokens (``model.new_tokens``): ids behind those of the vocabulary, with rows of the embeddings and the LM head.

A new row begins as the mean of the rows of the tokens that the text consisted of before. With LoRA, PEFT trains the new
rows alone (``trainable_token_indices``), and saves them in the adapter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from runner.errors import Fault, refuse
from runner.models import tokenizer_files

if TYPE_CHECKING:
    from torch import nn

    from runner.models.sources import ModelSource

KEY = "model.new_tokens"
ROWS = "trainable_token_indices"
"""PEFT's name for them (0.15)."""


def ids(source: ModelSource) -> dict[int, list[int]]:
    """{id of a new token: ids of the tokens that its text consists of without it}."""
    if not source.new_tokens:
        return {}
    before = tokenizer_files.load(replace(source, new_tokens=()))
    after = tokenizer_files.load(source)
    return {
        after.convert_tokens_to_ids(token): before(token, add_special_tokens=False)["input_ids"]
        for token in source.new_tokens
    }


def resize(model: Any, added: Mapping[int, list[int]]) -> None:
    """Give the model rows for the tokens ``added``; on the meta device, rows without values."""
    import torch

    if not added:
        return
    model.new_token_ids = sorted(added)
    needed, text = max(added) + 1, model.config.get_text_config()
    if needed > len(model.get_input_embeddings().weight):
        model.vocab_size_of_files = text.vocab_size
        model.resize_token_embeddings(needed, mean_resizing=False)
    with torch.no_grad():
        for weight in {id(part.weight): part.weight for part in _ends(model).values()}.values():
            for row, pieces in added.items():
                weight[row] = weight[pieces or slice(row)].float().mean(0).to(weight.dtype)


def options(model: Any, fields: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The option of PEFT that trains the new rows of ``model``; none if it has no new tokens.

    ``fields``: those of the method's configuration. ``given``: the user's options.

    Raises:
        ConfigError: the method cannot train single rows.
    """
    added = getattr(model, "new_token_ids", None)
    if not added:
        return {}
    refuse(_faults(model, fields, given))
    whole = given.get("modules_to_save") or []
    ends = {
        name: part for name, part in _ends(model).items() if name.rpartition(".")[2] not in whole and name not in whole
    }
    distinct = {id(part.weight): name for name, part in reversed(ends.items())}  # of tied ones the embeddings
    return {ROWS: {name: list(added) for name in distinct.values()}} if distinct else {}


def in_float32(model: nn.Module) -> None:
    """Train the new rows in float32, as adapters are: small updates are lost in bfloat16."""
    for name, parameter in model.named_parameters():
        if is_row(name):
            parameter.data = parameter.data.float()


def is_row(name: str) -> bool:
    """Whether a parameter of this name holds rows of new tokens."""
    return "trainable_tokens_delta" in name


def _faults(model: Any, fields: Mapping[str, Any], given: Mapping[str, Any]) -> Iterator[Fault]:
    if ROWS not in fields:
        remedy = "use lora=lora (install peft >= 0.15), or lora=none"
        yield Fault("lora", f"does not train the embeddings of new tokens ({KEY})", remedy)
    if ROWS in given:
        yield Fault(f"lora.{ROWS}", f"is set by {KEY}", "leave it out", given[ROWS])
    head = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        problem = "the LM head of this model has a bias, and PEFT's rows for single tokens leave it out"
        yield Fault(KEY, problem, "use lora=none, or add the embeddings and the head to lora.modules_to_save")


def _ends(model: Any) -> dict[str, Any]:
    """The embeddings, and the LM head if there is one, by name."""
    parts = [model.get_input_embeddings(), model.get_output_embeddings()]
    return {name: module for name, module in model.named_modules() if any(module is part for part in parts)}
