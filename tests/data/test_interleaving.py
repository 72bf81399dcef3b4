"""The order of several sources: each has its share of the trained tokens, at any position, from any start."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from runner.data import interleaving
from runner.data.data_order import DataOrder
from runner.data.packing import SourcePart
from runner.errors import ConfigError

SIZES = [np.random.default_rng(seed).integers(1, 300, count) for seed, count in enumerate((40, 500, 230))]
"""What counts for the share, of the packs of three sources."""
OWNERS = np.repeat([0, 1, 2], [len(sizes) for sizes in SIZES])


def order(*weights: float, max_repeats: float = 100.0, **changes: object) -> DataOrder:
    parts = [SourcePart(name, 0, weight) for name, weight in zip("abc", weights, strict=True)]
    sizes = np.concatenate(SIZES)
    settings = {"per_step": 4, "seed": 3, "shuffle": True, "max_repeats": max_repeats, **changes}
    return DataOrder(sizes + 7, parts=parts, owners=OWNERS, counted=sizes, **settings)


def counted(made: DataOrder, steps: int) -> np.ndarray:
    """The trained tokens of each source in the first steps."""
    packs = np.array([pack for i in range(steps) for pack in made.packs_of_step(i)])
    return np.bincount(OWNERS[packs], weights=np.concatenate(SIZES)[packs], minlength=3)


@pytest.mark.parametrize("weights", [(0.2, 0.3, 0.5), (0.05, 0.9, 0.05), (0.6, 0.2, 0.2)])
def test_each_source_has_its_share_of_the_trained_tokens(weights: tuple[float, ...]) -> None:
    made = order(*weights)
    for steps in (50, 1000):
        tokens = counted(made, steps)
        assert abs(tokens - np.array(weights) * tokens.sum()).max() <= 600, "a pack of each other source"
    assert counted(made, 1000) / counted(made, 1000).sum() == pytest.approx(weights, abs=0.01)


def test_a_step_is_a_function_of_its_number() -> None:
    made, far = order(0.2, 0.3, 0.5), [order(0.2, 0.3, 0.5).packs_of_step(i) for i in (700, 3, 400)]
    steps = [made.packs_of_step(i) for i in range(701)]
    assert far == [steps[700], steps[3], steps[400]]
    assert steps[:50] != [order(0.2, 0.3, 0.5, seed=4).packs_of_step(i) for i in range(50)]


def test_the_order_is_the_same_in_blocks_of_any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = order(0.2, 0.3, 0.5)
    monkeypatch.setattr(interleaving, "MOST_PER_BLOCK", 17)
    made = order(0.2, 0.3, 0.5)
    assert made._packs.block(3).shape == (17,) != whole._packs.block(0).shape
    assert [made.packs_of_step(i) for i in range(400)] == [whole.packs_of_step(i) for i in range(400)]
    assert [made.tokens_before(i) for i in (0, 5, 90, 399)] == [whole.tokens_before(i) for i in (0, 5, 90, 399)]
    assert made.steps(max_tokens=123_456) == whole.steps(max_tokens=123_456)
    assert made.repeats(300) == whole.repeats(300)


def test_each_source_is_seen_whole_before_it_is_repeated() -> None:
    made = order(0.2, 0.3, 0.5)
    packs = [pack for i in range(600) for pack in made.packs_of_step(i)]
    for number, sizes in enumerate(SIZES):
        own = [pack for pack in packs if OWNERS[pack] == number]
        epochs = [own[start : start + len(sizes)] for start in range(0, len(own) - len(sizes), len(sizes))]
        assert all(len(set(epoch)) == len(sizes) for epoch in epochs)
        assert len(epochs) < 2 or epochs[0] != epochs[1], "another order"


def test_weights_in_proportion_to_the_sizes_give_epochs_of_every_pack_once() -> None:
    total = sum(int(sizes.sum()) for sizes in SIZES)
    made = order(*(int(sizes.sum()) / total for sizes in SIZES), per_step=10)
    first = [pack for i in range(77) for pack in made.packs_of_step(i)]
    assert Counter(first) == Counter(range(770))


def test_a_source_alone_has_the_order_of_data_that_are_no_mixture() -> None:
    sizes = SIZES[1]
    plain = DataOrder(sizes, per_step=4, seed=3, shuffle=True)
    numbers = np.random.PCG64([3, 1]).random_raw(len(sizes))
    assert plain.packs_of_step(125) == np.argsort(numbers, kind="stable")[:4].tolist(), "the second epoch"
    alone = DataOrder(sizes, per_step=4, seed=3, shuffle=True, parts=[SourcePart("a", 500, 1.0)], counted=sizes)
    assert [alone.packs_of_step(i) for i in range(400)] == [plain.packs_of_step(i) for i in range(400)]


def test_tokens_and_steps_are_those_of_the_packs_that_come() -> None:
    made, sizes = order(0.6, 0.2, 0.2), np.concatenate(SIZES) + 7
    total = 0
    for i in range(300):
        assert made.tokens_before(i) == total
        total += int(sizes[made.packs_of_step(i)].sum())
    assert made.steps(max_tokens=total) == 300
    assert made.steps(max_tokens=total + 1) == 301
    assert made.steps(epochs=2) == 385


def test_too_many_repeats_of_a_small_source_are_refused() -> None:
    made = order(0.6, 0.2, 0.2, max_repeats=4)
    assert made.repeats(20)["a"] < 4
    with pytest.raises(ConfigError, match=r"data\.sources\.a: .* repeats its rows more than 4 times") as caught:
        made.repeats(100_000)
    assert "raise data.max_repeats" in str(caught.value)
    with pytest.raises(ConfigError, match="more than 4 times"):
        made.steps(max_tokens=10**15)
