"""Linear cross entropy: compute the LM head inside the loss, so that only one chunk of the logits exists at a time.

Correct only if the logits are the plain product with the head's weight (some models cap or scale them); ``install``
tests the model. The loss computes its gradients in the forward pass: the backward pass would have to recompute the
logits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from runner.models.kernels import base_model


def install(model: Any, autocast: torch.dtype | None = None) -> str:
    """Move the LM head into the loss if the logits stay the same. Returns "", or the reason why it was not moved.

    Compares a small forward pass with the head to one without it. ``autocast``: as in training.
    """
    if reason := obstacle(model):
        return reason
    device, training = model.get_input_embeddings().weight.device, model.training
    ids = torch.tensor([[1, 2, 3]], device=device)
    head = of(model)
    computing = torch.autocast(device.type, autocast, enabled=autocast is not None)
    try:
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []), computing:
            expected = model.eval()(input_ids=ids, use_cache=False).logits.float()
            with bypassed(head):
                hidden = model(input_ids=ids, use_cache=False).logits
            logits = head(hidden.to(head.weight.dtype)).float() if autocast is None else head(hidden).float()
    except Exception as error:  # custom model code may raise anything if its logits have an unexpected shape
        return str(error).partition("\n")[0] or type(error).__name__
    finally:
        model.train(training)
    tolerance = 1e-5 if expected.dtype == head.weight.dtype and autocast is None else 2e-2
    if logits.shape != expected.shape or not torch.allclose(logits, expected, rtol=tolerance, atol=tolerance):
        return f"the logits of {type(model).__name__} are not the plain output of its head"
    head.is_in_loss = True
    return ""


def adopt(model: Any) -> None:
    """Like ``install`` but without the comparison, for a model without weights (meta device)."""
    if not obstacle(model):
        of(model).is_in_loss = True


def obstacle(model: Any) -> str:
    """The reason why the loss cannot compute the logits, or "". Checks the model's structure; no forward pass."""
    head = of(model)
    if type(head) is not nn.Linear or head._forward_hooks or head._forward_pre_hooks or "forward" in vars(head):
        return "the LM head is not a plain nn.Linear"
    capped = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return "the model caps its logits" if capped else ""


def in_loss(model: Any) -> nn.Linear | None:
    """The LM head that the loss has to apply; None if the model applies it."""
    head = of(model)
    return head if getattr(head, "is_in_loss", False) else None


@contextlib.contextmanager
def bypassed(head: nn.Module) -> Iterator[None]:
    """Replace the LM head by the identity inside the block, so that the model returns hidden states."""
    head.forward = lambda hidden: hidden
    try:
        yield
    finally:
        del head.forward


def of(model: Any) -> Any:
    """The LM head of the model; None if it has none."""
    base = base_model.of(model)
    return base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
