"""Metrics are read some steps late, by count and in order."""

from __future__ import annotations

import torch

from runner.train.async_metrics import LAG, AsyncMetrics


def test_entries_are_due_once_enough_others_follow():
    metrics: AsyncMetrics[int] = AsyncMetrics(LAG)
    seen: list[tuple[int, list[float]]] = []
    for step in range(5):
        metrics.put(step, torch.tensor([step, 0.5]))
        seen += metrics.due()
    assert seen == [(step, [step, 0.5]) for step in range(5 - LAG)]
    assert [step for step, _ in metrics.due(everything=True)] == list(range(5 - LAG, 5))
    assert list(metrics.due(everything=True)) == []


def test_a_cpu_is_not_waited_for():
    metrics: AsyncMetrics[str] = AsyncMetrics.of(torch.device("cpu"))
    metrics.put("now", torch.tensor([1.0]))
    assert list(metrics.due()) == [("now", [1.0])]
    assert AsyncMetrics.of(torch.device("cuda")).lag == LAG
