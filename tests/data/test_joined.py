"""Rows of several sources as one."""

# ruff: noqa: F401 - fixtures are imported, then asked for by name

from __future__ import annotations

import numpy as np
from fixtures.documents import batches, load, own_cache, talk, texts
from fixtures.mixtures import mixed

from runner.data import joined
from runner.data.packing import IGNORED, SourcePart


def test_rows_of_several_sources_are_their_rows() -> None:
    sources = {"a": load(map(talk, range(30))), "b": load(map(talk, range(100, 190)))}
    splits = mixed(sources, a=0.5)
    assert texts(splits.train) == texts(sources["a"].train) + texts(sources["b"].train)
    assert splits.train.parts == (
        SourcePart("a", len(sources["a"].train), 0.5),
        SourcePart("b", len(sources["b"].train), 0.5),
    )
    counts = np.concatenate([each.train.labels_per_row for each in sources.values()])
    assert splits.train.labels_per_row.tolist() == counts.tolist()
    assert splits.report.train_tokens == sum(each.report.train_tokens for each in sources.values())
    made = batches(splits.train, packing=True, max_length=96)
    names = {name for batch in made.one_pass() for name in batch["sources"]}
    assert names == {"a", "b"}
    for batch in made.one_pass():
        ids = batch["labels"].flatten()[batch["trained_at"]]
        assert len(batch["source_at"]) == len(ids) == batch["trained"]


def test_rows_with_weights_and_rows_without_are_joined() -> None:
    heavy = [{**talk(number), "weight": 2.0} for number in range(30)]
    splits = mixed({"a": load(map(talk, range(100, 130))), "b": load(heavy)})
    assert splits.train.weights is not None
    first, last = splits.train.weights_of(0), splits.train.weights_of(len(splits.train) - 1)
    assert (set(first.tolist()), 2.0 in last.tolist()) == ({1.0}, True)


def test_a_chain_is_read_slice_by_slice() -> None:
    chain = joined.Chain([np.arange(4), np.arange(4, 9)])
    assert [chain[slice(a, b)].tolist() for a, b in ((0, 4), (1, 3), (4, 9), (8, 9))] == [
        [0, 1, 2, 3], [1, 2], [4, 5, 6, 7, 8], [8],
    ]  # fmt: skip
    assert np.asarray(chain).tolist() == list(range(9))
    assert len(chain) == 9
    assert IGNORED not in np.asarray(chain)
