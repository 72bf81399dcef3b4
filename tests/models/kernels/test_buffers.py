"""Buffers for temporary tensors: the same memory for the same name, in one thread."""

from __future__ import annotations

import threading

import torch
from torch._subclasses import FakeTensorMode

from runner.models.kernels import buffers


def test_a_buffer_is_reused_and_grows() -> None:
    like = torch.zeros(1)
    first = buffers.take("test", (2, 3), like)
    second = buffers.take("test", (3, 2), like)
    assert (first.shape, second.shape) == ((2, 3), (3, 2))
    assert first.data_ptr() == second.data_ptr() != buffers.take("another", (2, 3), like).data_ptr()
    half = buffers.take("test", (12,), like, torch.bfloat16)
    assert (half.dtype, half.data_ptr()) == (torch.bfloat16, first.data_ptr())
    larger = buffers.take("test", (100,), like)
    assert buffers.take("test", (2, 3), like).data_ptr() == larger.data_ptr()


def test_each_thread_has_its_own() -> None:
    like, addresses = torch.zeros(1), list[int]()
    mine = buffers.take("test", (4,), like)
    thread = threading.Thread(target=lambda: addresses.append(buffers.take("test", (4,), like).data_ptr()))
    thread.start()
    thread.join()
    assert addresses != [mine.data_ptr()]


def test_a_tensor_without_memory_gets_one_of_its_kind() -> None:
    assert buffers.take("test", (4,), torch.zeros(1, device="meta")).is_meta
    with FakeTensorMode():
        fake = torch.zeros(1)
        assert type(buffers.take("test", (4,), fake)) is type(fake)
