"""Linear cross entropy: the head inside the loss, so that logits exist a chunk at a time, and never all of them.

Only where they are a product with the head's weight and nothing else (a model may cap or scale them): ``install`` asks
the model itself. The gradients come with the loss, as they need what would have to be computed again later.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def install(model: Any, autocast: torch.dtype | None = None) -> str:
    """Let ``loss`` compute the logits of ``model`` if that gives the same; else it does not, and this says why.

    The proof is a small forward pass with the head and one without it. ``autocast`` as in training.
    """
    if found_before := obstacle(model):
        return found_before
    device, training = model.get_input_embeddings().weight.device, model.training
    ids = torch.tensor([[1, 2, 3]], device=device)
    head = _head(model)
    computing = torch.autocast(device.type, autocast, enabled=autocast is not None)
    try:
        with torch.no_grad(), torch.random.fork_rng(), computing:
            expected = model.eval()(input_ids=ids, use_cache=False).logits.float()
            with bypassed(head):
                hidden = model(input_ids=ids, use_cache=False).logits
            found = head(hidden.to(head.weight.dtype)).float() if autocast is None else head(hidden).float()
    except Exception as error:  # a model's own code may fail of anything where logits are not what it expects
        return str(error).partition("\n")[0] or type(error).__name__
    finally:
        model.train(training)
    tolerance = 1e-5 if expected.dtype == head.weight.dtype and autocast is None else 2e-2
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=tolerance, atol=tolerance):
        return f"{type(model).__name__} makes more of its logits than a product"
    head.is_in_loss = True
    return ""


def adopt(model: Any) -> None:
    """The same without the proof, for a model without weights that has no ``obstacle``."""
    if not obstacle(model):
        _head(model).is_in_loss = True


def obstacle(model: Any) -> str:
    """Why the loss cannot compute the logits, as far as it is known without computing; empty where nothing is."""
    head = _head(model)
    if type(head) is not nn.Linear or head._forward_hooks or head._forward_pre_hooks or "forward" in vars(head):
        return "its head is not a plain product"
    capped = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return "it caps its logits" if capped else ""


def in_loss(model: Any) -> nn.Linear | None:
    """The head that the loss computes with; None where the model does so."""
    head = _head(model)
    return head if getattr(head, "is_in_loss", False) else None


@contextlib.contextmanager
def bypassed(head: nn.Module) -> Iterator[None]:
    """While the block runs, the head passes on what it is given."""
    head.forward = lambda hidden: hidden
    try:
        yield
    finally:
        del head.forward


def _head(model: Any) -> Any:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
