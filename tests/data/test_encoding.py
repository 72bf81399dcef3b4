"""Large data: several processes encode what one would, and rows are packed in blocks."""

# ruff: noqa: F401, F811 - fixtures are imported, then asked for by name

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from fixtures.documents import load, own_cache, talk, texts

from runner.data import encoding, packing
from runner.errors import DataError

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")


def in_processes(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(encoding, "_processes", lambda _: count)
    monkeypatch.setattr(encoding, "CHUNK", 40)


@pytest.mark.unmeasured
@pytest.mark.parametrize("processes", [2, 5])
def test_several_processes_encode_what_one_does(
    processes: int, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{**talk(number, words=number % 40 + 1), "weight": 1 + (number % 9 == 0)} for number in range(1, 150)]
    alone = load(rows, train_on="all")
    monkeypatch.setenv("RUNNER_CACHE", str(own_cache / "other"))
    in_processes(monkeypatch, processes)
    together = load(rows, train_on="all")
    assert texts(together.train) == texts(alone.train)
    assert vars(together.report) == vars(alone.report)
    for one, other in ((alone.train, together.train), (alone.eval, together.eval)):
        for column, values in one._columns().items():
            assert np.array_equal(values, other._columns()[column]), column
    folder = next((own_cache / "other" / "data").glob("*/report.json")).parent
    assert not list(folder.glob("shard*"))


@pytest.mark.unmeasured
def test_the_first_row_that_cannot_be_encoded_is_named(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    from runner.tasks import pretrain

    in_processes(monkeypatch, 3)
    with pytest.raises(DataError, match=r"rows\.jsonl:\d+: gives conversations, but this task needs plain text"):
        load(map(talk, range(150)), task=pretrain.pretrain(append_eos=True))
    assert not list(own_cache.glob("data/.*"))


def test_blocks_of_rows_are_packed_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = np.random.default_rng(0).integers(1, 50, 90)
    whole = packing.pack_units(lengths, 2, 100)
    assert np.array_equal(whole.rows, packing.pack_units(lengths, 2, 100).rows)
    monkeypatch.setattr(packing, "PACKED_TOGETHER", 10)
    blocks = packing.pack_units(lengths, 2, 100)
    assert sorted(blocks.rows.tolist()) == list(range(90))
    sizes = np.add.reduceat(lengths[blocks.rows], blocks.offsets[:-1])
    assert sizes.max() <= 100
    assert len(whole) <= len(blocks) <= len(whole) + 5
