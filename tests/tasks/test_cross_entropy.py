"""Loss and packing, against transformers' own loss and against every document alone. Covers attention.py as well."""

from __future__ import annotations

import pytest
import torch
from fixtures import versions
from fixtures.language_models import FAMILIES, PACKS, adapted, batch_of, build, gradients, with_virtual_tokens
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from runner.models.kernels import lm_head
from runner.tasks import cross_entropy, logit_losses


def unshifted(labels: Tensor) -> Tensor:
    return torch.cat([torch.full_like(labels[:, :1], cross_entropy.IGNORED), labels[:, :-1]], 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradient_are_transformers_own(family: str) -> None:
    batch = batch_of([[20], [20]])
    reference, ours = build(FAMILIES[family]), build(FAMILIES[family])
    expected = reference(input_ids=batch["input_ids"], labels=unshifted(batch["labels"]), use_cache=False)
    expected.loss.backward()
    result = cross_entropy.sums(ours, batch)
    (result["loss"] / result["count"]).backward()
    assert result["count"] == (batch["labels"] != cross_entropy.IGNORED).sum()
    assert result["correct"] == (expected.logits.argmax(-1) == batch["labels"]).sum()
    torch.testing.assert_close(result["loss"] / result["count"], expected.loss, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(gradients(ours), gradients(reference), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("offered", ["mask", "positions", "all"])
@versions.logits_by_mask
def test_every_way_to_choose_positions_is_the_same(offered: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, model = batch_of(PACKS), build(FAMILIES["gemma2"])
    assert cross_entropy._choice_offered(model) == "mask"
    expected = cross_entropy.sums(model, batch)
    monkeypatch.setattr(cross_entropy, "_choice_offered", lambda _: offered)
    torch.testing.assert_close(cross_entropy.sums(model, batch), expected, atol=1e-5, rtol=1e-6)


@versions.logits_by_mask
def test_chunks_and_eval_slices_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, model, again = batch_of(PACKS), build(FAMILIES["llama"]), build(FAMILIES["llama"])
    cross_entropy.sums(model, batch)["loss"].backward()
    with torch.no_grad():
        expected = cross_entropy.sums(model, batch)
    monkeypatch.setattr(logit_losses, "CPU_CHUNK_VALUES", 64 * 3)
    monkeypatch.setattr(cross_entropy, "EVAL_POSITIONS", 20)
    cross_entropy.sums(again, batch)["loss"].backward()
    torch.testing.assert_close(gradients(again), gradients(model), atol=1e-6, rtol=1e-5)
    seen = []
    model.lm_head.register_forward_hook(lambda _module, _args, output: seen.append(output.shape))
    with torch.no_grad():
        torch.testing.assert_close(cross_entropy.sums(model, batch), expected, atol=1e-5, rtol=1e-6)
    assert [shape[0] for shape in seen] == (batch["labels"] != cross_entropy.IGNORED).sum(1).tolist(), (
        "one row at a time"
    )


@versions.logits_by_mask
def test_only_trained_positions_reach_the_head_and_logits_exist_once() -> None:
    batch, model = batch_of(PACKS, trained=0.3), build(FAMILIES["llama"])
    logits = []
    model.lm_head.register_forward_hook(lambda _module, _args, output: logits.append(output))
    result = cross_entropy.sums(model, batch)
    assert logits[0].shape == (int(result["count"]), 64)
    probabilities = logits[0].detach().clone()  # by now softmax - one-hot
    torch.testing.assert_close(probabilities.sum(-1), torch.zeros(len(probabilities)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("rows", [1, 3])
@versions.logits_by_mask
def test_no_shape_depends_on_values_on_the_device(rows: int) -> None:
    """Or each micro-batch would wait for it. Fake tensors hold nothing that could be asked for."""
    model, batch = adapted(FAMILIES["llama"]), batch_of([[20]] * rows)
    assert lm_head.install(model) == ""
    del batch["position_ids"]  # of which transformers asks whether a row holds several documents
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        known = {name: fake.from_tensor(value) if isinstance(value, Tensor) else value for name, value in batch.items()}
        assert cross_entropy.sums(model, known)["loss"].requires_grad
        del known["trained_at"]
        with pytest.raises(DynamicOutputShapeException):
            cross_entropy.sums(model, known)


def test_bfloat16_is_summed_in_float32() -> None:
    batch, model = batch_of(PACKS), build(FAMILIES["llama"]).to(torch.bfloat16)
    result = cross_entropy.sums(model, batch)
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    logits, labels = logits.float().flatten(0, 1), batch["labels"].flatten()
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    assert result["loss"].dtype == torch.float32
    torch.testing.assert_close(result["loss"], expected, atol=1e-3, rtol=1e-4)


def test_a_batch_that_trains_nothing_gives_zero_and_a_gradient_of_zero() -> None:
    batch, model = batch_of(PACKS, trained=0.0), build(FAMILIES["llama"])
    result = cross_entropy.sums(model, batch)
    result["loss"].backward()
    assert result["loss"] == result["count"] == result["correct"] == 0
    assert not any(gradient.any() for gradient in gradients(model).values())


def test_prompt_tuning_is_scored_behind_its_virtual_tokens() -> None:
    tuned = with_virtual_tokens(build(FAMILIES["llama"]))
    batch = batch_of([[20]])
    expected = tuned(input_ids=batch["input_ids"], labels=unshifted(batch["labels"]))
    result = cross_entropy.sums(tuned, {"input_ids": batch["input_ids"], "labels": batch["labels"]})
    torch.testing.assert_close(result["loss"] / result["count"], expected.loss, atol=1e-5, rtol=1e-5)
