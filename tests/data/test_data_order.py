"""The order of the data: each pack once an epoch, as a function of seed and step."""

# ruff: noqa: F401 - fixtures are imported, then asked for by name

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from fixtures.documents import batches, documents, own_cache, same, seen_in

from runner.errors import ConfigError


def test_every_epoch_has_every_document_once_in_an_order_of_its_own():
    rows = documents(count=30)
    made = batches(rows, packing=False, rows_per_batch=5, accumulation=2, max_length=40)
    epochs = [[made.step(3 * epoch + step) for step in range(3)] for epoch in range(2)]
    assert seen_in(epochs[0]) == seen_in(epochs[1]) == Counter(rows.ids.tolist())
    assert not same(epochs[0][0], epochs[1][0])


def test_steps_run_on_across_epochs():
    rows = documents(count=7)
    made = batches(rows, packing=False, rows_per_batch=5, accumulation=1, max_length=40)
    assert seen_in(made.step(step) for step in range(7)) == Counter(rows.ids.tolist() * 5)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("epochs", [1, 2, 0.5])
def test_a_limit_of_epochs_shortens_the_last_step(packing, epochs):
    rows = documents()
    made = batches(rows, packing=packing, epochs=epochs, max_length=40)
    steps = [made.step(number) for number in range(made.order.steps(None, epochs, None))]
    assert made.order.epoch(len(steps)) == pytest.approx(epochs, abs=0.02)
    assert made.tokens_at(len(steps)) == sum(batch["tokens"] for step in steps for batch in step)
    assert all(step for step in steps)
    if isinstance(epochs, int):
        assert seen_in(steps) == Counter(rows.ids.tolist() * epochs)


def test_tokens_and_steps_agree():
    made = batches(documents(), packing=True, max_length=40)
    counted = np.cumsum([0, *(sum(batch["tokens"] for batch in made.step(step)) for step in range(30))])
    assert [made.tokens_at(step) for step in range(31)] == counted.tolist()
    for wanted in (1, 500, int(counted[7]), int(counted[7]) + 1, 4000):
        assert made.order.steps(max_tokens=wanted) == np.searchsorted(counted, wanted)
    assert made.order.steps(12, None, None) == 12
    assert made.order.steps(12, None, int(counted[7])) == 7
    with pytest.raises(ConfigError, match="no stopping criterion"):
        made.order.steps(None, None, None)
