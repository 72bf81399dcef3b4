"""Attention by document on a CPU."""

from __future__ import annotations

import pytest
import torch

from runner.models.kernels import varlen_cpu


def test_the_operation_of_attention_by_document_is_sound() -> None:
    """torch's own check of custom operations: shapes, strides, gradients, tracing."""
    query, key, value = (torch.randn(1, heads, 12, 8, requires_grad=True) for heads in (4, 2, 2))
    ends = torch.tensor([0, 5, 5, 12, 12], dtype=torch.int32)
    operation = torch.ops.runner.attention_by_document.default
    torch.library.opcheck(operation, (query, key, value, ends, 0.3))
    prefixes = torch.tensor([[0, 0], [0, 0], [0, 3], [0, 0]])
    torch.library.opcheck(operation, (query, key, value, ends, 0.3, prefixes))


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_documents_that_share_their_first_tokens_attend_to_them(kv_heads: int) -> None:
    """Two answers of 4 and 5 tokens to a prompt of 3, then a document alone, against all three whole."""
    query, key, value = (torch.randn(1, heads, 14, 8, requires_grad=True) for heads in (4, kv_heads, kv_heads))
    ends, prefixes = torch.tensor([0, 7, 12, 14], dtype=torch.int32), torch.tensor([[0, 0], [0, 3], [12, 0]])
    whole = torch.tensor([*range(7), *range(3), *range(7, 14)])  # the prompt twice
    own = torch.tensor([*range(7), *range(10, 17)])
    operation = varlen_cpu.attend
    shared, _ = operation(query, key, value, ends, 0.3, prefixes)
    each = (tensor[:, :, whole] for tensor in (query, key, value))
    apart, _ = operation(*each, torch.tensor([0, 7, 15, 17], dtype=torch.int32), 0.3)
    torch.testing.assert_close(shared, apart[:, own])
    weights = torch.randn_like(shared)
    expected = torch.autograd.grad((apart[:, own] * weights).sum(), (query, key, value))
    torch.testing.assert_close(torch.autograd.grad((shared * weights).sum(), (query, key, value)), expected)
