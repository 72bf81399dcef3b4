"""Attention by document is that of a mask."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from fixtures import versions
from fixtures.language_models import FAMILIES, PACKS, batch_of, build, gradients
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from runner.models.kernels import varlen_attention
from runner.tasks import task


def task_loss(model: torch.nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
    """As the train loop asks for it."""
    return task.token_loss(model, {**batch, "packed": True})


@contextlib.contextmanager
def operations() -> Iterator[set[str]]:
    """The names of the operations that are called."""
    called: set[str] = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.add(function._schema.name.partition("::")[2])
            return function(*args, **(kwargs or {}))

    with Watch():
        yield called


@pytest.mark.parametrize("family", FAMILIES)
@versions.by_document
def test_attention_by_document_is_that_of_a_mask(family: str) -> None:
    """Where a model slides a window or caps its scores, it stays with the mask."""
    reference, model, batch = build(FAMILIES[family]), build(FAMILIES[family]), batch_of(PACKS)
    before = model.config._attn_implementation
    suits = family in ("llama", "qwen2", "gpt-neox")
    assert (varlen_attention.install(model, batch["longest"]) == "") == varlen_attention.uses(model) == suits
    assert suits or model.config._attn_implementation == before
    with operations() as called:
        found = task_loss(model, batch)
    assert ("attention_by_document" in called) == suits
    expected = task_loss(reference, batch)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-6)
    found["loss"].backward(), expected["loss"].backward()
    torch.testing.assert_close(gradients(model), gradients(reference), atol=1e-6, rtol=1e-4)


def test_the_loss_gives_attention_everything_that_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' models pass the parts on, and the loss does not drop them."""
    model, batch = build(FAMILIES["llama"]), batch_of(PACKS)
    assert not varlen_attention.install(model, 20)
    seen: list[dict[str, Any]] = []

    def attend(*args: Any, **options: Any) -> Any:
        seen.append(options)
        return varlen_attention.attend(*args, **options)

    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, varlen_attention.NAME, attend)
    parts = ((4, 20, 9), (4, 20, 12))
    prefixes = torch.zeros(len(batch["document_ends"]) - 1, 2, dtype=torch.int64)
    task_loss(model, {**batch, "attention_parts": parts, "attention_prefixes": prefixes})
    assert [each["attention_parts"] for each in seen] == [parts] * model.config.num_hidden_layers
    assert all(each.keys() >= {*varlen_attention.ARGUMENTS} for each in seen)


def test_a_window_longer_than_every_document_does_not_matter() -> None:
    assert not varlen_attention.install(build(FAMILIES["mistral"]), longest=4)
    assert "sliding_window" in varlen_attention.install(build(FAMILIES["mistral"]), longest=5)


@versions.by_document
def test_attention_by_document_answers_prompts_as_before() -> None:
    model = build(FAMILIES["llama"]).eval()
    prompts = {
        "input_ids": torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]),
    }
    expected = model.generate(**prompts, max_new_tokens=6, do_sample=False)
    assert not varlen_attention.install(model, 20)
    assert torch.equal(model.generate(**prompts, max_new_tokens=6, do_sample=False), expected)


def test_parts_are_computed_as_the_whole() -> None:
    """A GPU kernel is called once for each part, with boundaries that begin at 0; here with the CPU kernel."""
    lengths = [3, 2, 0, 7, 1, 5, 6]
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    query, key, value = (torch.randn(24, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    calls: list[list[int]] = []

    def kernel(q: Tensor, k: Tensor, v: Tensor, own: Tensor, same: Tensor, longest: int, again: int) -> Tensor:
        assert own is same, "cuDNN asks for it"
        calls.append(own.tolist())
        assert max(own.diff()) <= longest == again
        out, _ = torch.ops.runner.attention_by_document(*(each.transpose(0, 1)[None] for each in (q, k, v)), own, 0.3)
        return out[0]

    together = varlen_attention.by_parts(kernel, query, key, value, ends, [(7, 24, 8)])
    apart = varlen_attention.by_parts(kernel, query, key, value, ends, [(3, 5, 4), (2, 8, 8), (2, 11, 8)])
    assert calls[1:] == [[0, 3, 5, 5], [0, 7, 8], [0, 5, 11]]
    torch.testing.assert_close(apart, together, atol=0, rtol=0)
    weights = torch.randn_like(together)
    expected = torch.autograd.grad((together * weights).sum(), (query, key, value))
    torch.testing.assert_close(torch.autograd.grad((apart * weights).sum(), (query, key, value)), expected)


@pytest.mark.parametrize(("window", "given"), [(None, -1), (16, 15), (64, -1)])
def test_on_a_gpu_a_sliding_window_is_given_to_the_kernel(
    window: int | None, given: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    calls: list[dict[str, Any]] = []

    def kernel(query: Tensor, *_: Any, **options: Any) -> Tensor:
        calls.append(options)
        return query

    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    with FakeTensorMode():  # a GPU without content
        query, key = (torch.empty(1, heads, 64, 8, device="cuda") for heads in (4, 2))
        ends = torch.empty(3, dtype=torch.int32, device="cuda")
        options: dict[str, Any] = {"sliding_window": window, "cu_seq_lens_q": ends, "max_length_q": 64}
        varlen_attention.attend(torch.nn.Module(), query, key, key, None, **options)
    assert [call["window_size"] for call in calls] == [(given, 0)]
