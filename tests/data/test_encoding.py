"""Large data: several processes encode what one would, and rows are packed in blocks."""

# ruff: noqa: F401, F811 - fixtures are imported, then asked for by name

from __future__ import annotations

import functools
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from fixtures.chat_tokenizer import build
from fixtures.documents import SETTINGS, load, own_cache, talk, texts

from runner.config.schema import DataSettings
from runner.data import column_files, dataset, encoding, formats, packing
from runner.data.batches import Batches
from runner.data.readers import Place
from runner.data.sources import Records, Source
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


def test_packs_in_files_are_those_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "PACKED_TOGETHER", 10)
    monkeypatch.setattr(packing, "PACKS_AT_ONCE", 4)
    lengths = np.random.default_rng(1).integers(1, 50, 90).astype(np.int32)
    for name, make in {"packed": lambda *into: packing.pack_units(lengths, 2, 100, *into),
                       "alone": lambda *into: packing.one_by_one(90, 3, *into)}.items():  # fmt: skip
        packs, stored = make(), make(tmp_path, name)
        assert (packs.rows.tolist(), packs.offsets.tolist()) == (stored.rows.tolist(), stored.offsets.tolist())
        assert isinstance(stored.rows, np.memmap)
        assert np.load(tmp_path / f"{name}.pack_offsets.npy").tolist() == packs.offsets.tolist()
        for together in (np.add, np.maximum):
            expected = together.reduceat(lengths[packs.rows], packs.offsets[:-1])
            assert packs.numbers(lengths.__getitem__, together).tolist() == expected.tolist()


def test_memory_does_not_grow_by_python_objects_of_each_row(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of any number are split, encoded, packed and ordered in files: few bytes of each are in memory."""
    from runner.tasks import pretrain

    for module, name in ((column_files, "AT_ONCE"), (column_files, "BLOCK"), (packing, "PACKED_TOGETHER"),
                         (packing, "PACKS_AT_ONCE")):  # fmt: skip
        monkeypatch.setattr(module, name, 32)
    tokenizer, task = build(None), pretrain.pretrain(append_eos=True)
    read, settings = functools.partial(formats.text, key="text"), DataSettings(**SETTINGS)

    def peak(count: int) -> int:
        rows = Records(lambda: ((Place("rows.jsonl", number), {"text": f"{number}"}) for number in range(count)))
        source = Source("rows", rows, None, str(count), "")
        tracemalloc.start()
        splits = dataset.load(lambda: source, read, task, tokenizer, settings, {"format": {}, "task": {}})
        shape = {"packing": True, "max_length": 96, "rows_per_batch": 2, "accumulation": 2}
        Batches(splits.train, **shape, seed=1, shuffle=True, pad_id=0).step(0)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(100)  # what is computed once
    few, many = peak(500), peak(2500)
    assert (many - few) / 2000 < 24, "bytes of memory a row; with Python's numbers of each row it was 200"
