"""Batches that are made while the step before computes."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from runner.train.prefetch import Prefetcher

CPU = torch.device("cpu")


class Counted:
    """Stands for ``Batches``: a pure function of the step."""

    def __init__(self) -> None:
        self.made: list[int] = []
        self.one_more = threading.Semaphore(0)

    def step(self, i: int) -> list[dict[str, Any]]:
        if i == 13:
            raise OSError("the disk is gone")
        self.made.append(i)
        self.one_more.release()
        return [{"input_ids": torch.full((1, 2), i), "tokens": i}]


def ahead(total_steps: int) -> tuple[Prefetcher, Counted]:
    batches = Counted()
    return Prefetcher(batches, CPU, total_steps), batches  # type: ignore[arg-type]


def test_the_next_step_is_made_before_it_is_asked_for_and_none_beyond_the_last() -> None:
    made, batches = ahead(3)
    for step in range(3):
        [batch] = made.step(step)
        assert batch["tokens"] == int(batch["input_ids"][0, 0]) == step
        for _ in range(2 if step == 0 else 1 if step == 1 else 0):
            assert batches.one_more.acquire()
    assert batches.made == [0, 1, 2]


def test_any_step_may_be_asked_for() -> None:
    made, _ = ahead(100)
    assert [made.step(step)[0]["tokens"] for step in (7, 8, 3, 3, 4, 99)] == [7, 8, 3, 3, 4, 99]


def test_an_error_is_raised_for_the_step_that_needs_the_batches() -> None:
    made, _ = ahead(100)
    assert made.step(12)[0]["tokens"] == 12
    with pytest.raises(OSError, match="the disk is gone"):
        made.step(13)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_they_are_there_when_it_computes() -> None:
    made, device = ahead(50)[0], torch.device("cuda", 0)
    made = Prefetcher(made.batches, device, 50)
    for step in range(50):
        [batch] = made.step(step)
        assert batch["input_ids"].device == device
        assert int((batch["input_ids"] * 2).sum()) == 4 * step


def test_the_thread_enters_the_gpu_of_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread begins on GPU 0; leaving the stream there would make a context on GPU 0 for every rank."""
    entered: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: object())
    monkeypatch.setattr(torch.cuda, "set_device", entered.append)
    device = torch.device("cuda", 3)
    made = Prefetcher(Counted(), device, 2)  # type: ignore[arg-type]
    made._pool.submit(int).result()
    assert entered == [device]
