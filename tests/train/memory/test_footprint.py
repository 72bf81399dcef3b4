"""The peak memory of training by part."""

from __future__ import annotations

from runner.train.memory import footprint


def test_shards_hold_a_share_and_two_layers() -> None:
    whole = footprint.MemoryEstimate(weights=1000, gradients=100, optimizer=200, activations=50, libraries=7)
    assert whole.total == 1357
    assert whole.in_shards(4, layers=10) == footprint.MemoryEstimate(450, 35, 50, 50, 7)
    assert whole.in_shards(4, layers=10, gathered=0.5).weights == 350, "gathered in 16 bits"
