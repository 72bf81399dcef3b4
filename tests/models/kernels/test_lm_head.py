"""The head of the model in the loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from fixtures import versions
from fixtures.language_models import FAMILIES, GQA, PACKS, adapted, batch_of, build, gradients
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from runner.models.kernels import lm_head
from runner.tasks import cross_entropy


@pytest.mark.parametrize("family", [*FAMILIES, "cohere"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "autocast"])
def test_the_head_in_the_loss_computes_the_same(
    family: str, autocast: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cohere scales its logits, which a product may; Gemma 2 caps them."""
    config = {**FAMILIES, "cohere": transformers.CohereConfig(**GQA, logit_scale=0.5)}[family]
    batch, reference, model = batch_of(PACKS), adapted(config), adapted(config)
    monkeypatch.setattr(cross_entropy, "CPU_HEAD_POSITIONS", 3)
    assert (lm_head.install(model, autocast) == "") == (family != "gemma2")
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        found, expected = cross_entropy.sums(model, batch), cross_entropy.sums(reference, batch)
    found["loss"].backward(), expected["loss"].backward()
    tolerance = {"atol": 1e-6, "rtol": 1e-5} if autocast is None else {"atol": 5e-2, "rtol": 5e-2}
    torch.testing.assert_close(found, expected, **tolerance)
    torch.testing.assert_close(gradients(model), gradients(reference), **tolerance)
    with torch.no_grad():
        torch.testing.assert_close(
            cross_entropy.sums(model, batch), cross_entropy.sums(reference, batch), atol=1e-5, rtol=1e-5
        )
    assert model.generate(batch["input_ids"][:, :4], max_new_tokens=2).shape == (2, 6), "it still has its head"


@versions.logits_by_mask
def test_with_the_head_in_the_loss_all_logits_are_never_there(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, model = batch_of(PACKS), adapted(FAMILIES["llama"])
    monkeypatch.setattr(cross_entropy, "CPU_HEAD_POSITIONS", 3)

    def rows_of_logits() -> int:
        seen = [0]

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                made = function(*args, **(kwargs or {}))
                is_view = function._schema.name == "aten::t"  # of the weight
                if isinstance(made, Tensor) and made.shape[-1:] == (64,) and not is_view:
                    seen.append(made.numel() // 64)
                return made

        with Watch():
            cross_entropy.sums(model, batch)["loss"].backward()
        return max(seen)

    assert rows_of_logits() == (batch["labels"] != cross_entropy.IGNORED).sum()
    assert lm_head.install(model) == ""
    assert rows_of_logits() == 3


def test_a_head_that_is_trained_or_wrapped_stays_with_the_model() -> None:
    batch, reference, model = batch_of(PACKS), build(FAMILIES["llama"]), build(FAMILIES["llama"])
    assert lm_head.install(model) == ""
    cross_entropy.sums(model, batch)["loss"].backward(), cross_entropy.sums(reference, batch)["loss"].backward()
    torch.testing.assert_close(gradients(model), gradients(reference), atol=1e-6, rtol=1e-5)
    assert "lm_head.weight" in gradients(model) or "model.embed_tokens.weight" in gradients(model)
    saved = LoraConfig(target_modules="all-linear", modules_to_save=["lm_head"])
    assert lm_head.install(get_peft_model(build(FAMILIES["llama"]), saved)) == "the LM head is not a plain nn.Linear"


def test_a_model_that_makes_more_of_its_logits_keeps_its_head(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(FAMILIES["llama"])
    forward = model.forward

    def squared(*args: Any, **kwargs: Any) -> Any:
        made = forward(*args, **kwargs)
        made.logits = made.logits**2
        return made

    monkeypatch.setattr(model, "forward", squared)
    assert lm_head.install(model) == "the logits of LlamaForCausalLM are not the plain output of its head"
    assert lm_head.in_loss(model) is None
