"""Documents are padded, shifted and marked; no label crosses a document."""

# ruff: noqa: F401 - fixtures are imported, then asked for by name

from __future__ import annotations

import itertools

import numpy as np
import pytest
from fixtures.documents import batches, documents, own_cache

from runner.data.packing import IGNORED


@pytest.mark.parametrize("layout", ["packed", "padded", "end to end"])
def test_a_batch_has_the_ends_of_its_documents_and_the_trained_positions(layout):
    made = batches(documents(), packing=layout == "packed", max_length=40)
    made = made.laid_end_to_end() if layout == "end to end" else made
    for batch in made.one_pass():
        ids, labels, positions = (batch[key].flatten() for key in ("input_ids", "labels", "position_ids"))
        ends = batch["document_ends"].tolist()
        assert (ends[0], ends[-1]) == (0, len(ids))
        for start, end in itertools.pairwise(ends):
            inside = ids[start:end]
            assert len(set((inside[inside > 0] // 100).tolist())) <= 1, "one document, or padding"
            length = int((inside > 0).sum())
            assert positions[start:end].tolist() == [*range(length), *[0] * (end - start - length)]
        assert batch["trained_at"].equal((labels != IGNORED).nonzero()[:, 0])
        lengths, start = [end - start for start, end in itertools.pairwise(ends)], 0
        for part in batch["attention_parts"]:
            inside = lengths[start : start + part.documents]
            assert (len(inside), sum(inside)) == (part.documents, part.tokens)
            assert max(inside) <= part.longest <= 40
            start += part.documents
        assert start == len(lengths)


def test_the_labels_of_a_document_are_its_own_shifted_by_one():
    rows = documents()
    batch = batches(rows, packing=False, shuffle=False, rows_per_batch=1, max_length=40).step(0)[0]
    ids, labels = rows[0]
    assert batch["labels"][0, : len(ids) - 1].tolist() == labels[1:].tolist()
    assert batch["labels"][0, len(ids) - 1 :].eq(IGNORED).all()


def test_the_padding_at_the_end_is_a_document_of_its_own():
    batch = batches(documents(), max_length=50, rows_per_batch=40, packing=True).step(0)[0]
    starts = (batch["position_ids"] == 0).sum(axis=1)
    padding = batch["input_ids"] == 0
    assert padding.any(axis=1).all()
    for row in range(len(padding)):
        first = int(padding[row].nonzero()[0])
        assert not batch["position_ids"][row, first:].any()
        assert starts[row] >= 2 or first == 0
