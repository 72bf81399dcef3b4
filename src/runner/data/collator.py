"""Collate rows of tokens into one batch: pad, shift the labels, and mark the documents.

A batch is a dict:

- ``input_ids``, ``labels``, ``position_ids``: (B, T) int64. Labels are shifted: ``labels[b, t]`` is the token to
  predict at position ``t``, or -100; the last token of a document has no label. Position ids restart at 0 in each
  document. They are 0 in the padding: no position of it may exceed those of the documents (longrope, RoPE scaling).
- ``document_ends``: (documents + 1,) int32, the document boundaries in the flattened batch, from 0 to B * T; the
  padding of a row counts as documents, and some have length zero.
- ``attention_prefixes``, if documents share their first tokens (``shared_prompts``): (documents, 2) int64, where in the
  flattened batch the tokens before each document of ``document_ends`` begin that it attends to, too, and how many they
  are. A document then consists of its own tokens alone, in ``spans`` and ``position_ids`` as well.
- ``longest``: int, an upper bound of the document length in all batches.
- ``attention_parts``: the ``boundaries.AttentionPart`` that attention by document computes one after the other.
- ``trained_at``: (trained,) int64, the flattened positions that have a label.
- ``last_at``: (documents,) int64, the flattened positions of the last token of each document.
- ``spans``: (documents, 3) int64 of numpy, for each document its number in the data, and the flattened positions of its
  first token and after its last.
- ``labels_per_document``: (documents,) int64, without padding. Documents of a unit, such as the two answers of a
  preference pair, are neighbours.
- ``packed``: bool, whether a row contains several documents. ``step``: int, the optimizer step that trains the batch.
- ``tokens``, ``trained``, ``trained_first``, ``documents``, ``units``: ints, the number of tokens without padding, of
  labels, of labels in the first document of each unit, and so on. ``weighted``: the sum of the labels' weights.
- ``weights``: (trained,) float32, the weight of each label in the order of ``trained_at``; only if the data have any.
- ``sources``, ``source_at`` and ``source_of``, if the rows are those of a mixture: the names of its sources, and int64,
  which of them each label is of, (trained,) in the order of ``trained_at``, and each document, (documents,).
- ``pixel_values`` and what else the processor makes of the images (``vision.TENSORS``), if there are any.
- The numbers of each document, by name (``Rows.values``): (documents,) float32. Those of each label
  (``Rows.of_labels``): (trained, …) in the order of ``trained_at``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from runner.data import boundaries
from runner.data.packing import IGNORED, Rows

Batch = dict[str, Any]


def collate(
    rows: Rows,
    members: Sequence[np.ndarray],
    *,
    shape: tuple[int, int],
    longest: int,
    pad_id: int,
    end_to_end: bool,
    shared: np.ndarray | None = None,
) -> Batch:
    """A batch of ``shape`` (B, T): row ``b`` holds the documents ``rows[i]`` for ``members[b]``.

    Rows of the batch without members contain only padding. ``longest``: upper bound of a document's length.
    ``end_to_end``: all documents are in the one row of the batch. ``shared``: of each row of the data, how many of its
    first tokens are those of the first document of its unit (with ``end_to_end``). ``Batches`` adds ``packed`` and
    ``step``.
    """
    import torch

    count, length = shape
    ids = np.full(shape, pad_id, dtype=np.int64)
    labels = np.full(shape, IGNORED, dtype=np.int64)
    positions = np.zeros(shape, dtype=np.int64)
    weights = None if rows.weights is None else np.zeros(shape, dtype=np.float32)
    sources = np.zeros(shape, dtype=np.int64) if rows.parts else None
    lengths: list[list[int]] = [[] for _ in range(count)]
    spans: list[tuple[int, int, int]] = []
    for b, of_row in enumerate(members):
        start = 0
        for row in of_row:
            (row_ids, row_labels), before = rows[row], 0 if shared is None else int(shared[row])
            end = start + len(row_ids) - before
            ids[b, start:end] = row_ids[before:]
            labels[b, start : end - 1] = row_labels[before + 1 :]
            if weights is not None:
                weights[b, start : end - 1] = rows.weights_of(row)[before + 1 :]
            if sources is not None:
                sources[b, start:end] = rows.owners(row)
            positions[b, start:end] = np.arange(before, len(row_ids))
            lengths[b].append(end - start)
            spans.append((int(row), b * length + start, b * length + end))
            start = end
    trained_at = np.flatnonzero(labels != IGNORED)
    if end_to_end:
        ends, parts = boundaries.of_row(lengths[0], length, longest)
    else:
        ends, parts = boundaries.of_packs(lengths, length, longest)
    return {
        "input_ids": torch.from_numpy(ids),
        "labels": torch.from_numpy(labels),
        "position_ids": torch.from_numpy(positions),
        "document_ends": torch.from_numpy(ends),
        "attention_parts": parts,
        "longest": longest,
        "trained_at": torch.from_numpy(trained_at),
        "last_at": torch.tensor([end - 1 for *_, end in spans], dtype=torch.int64),
        "spans": np.array(spans, dtype=np.int64).reshape(-1, 3),
        "trained": len(trained_at),
        **_prefixed(rows, shared, spans, len(ends) - 1),
        **_weighed(weights, trained_at),
        **_named(rows, sources, trained_at, [row for row, *_ in spans]),
        **_counts(rows, np.concatenate([np.array([], dtype=np.int64), *members])),
    }


def _prefixed(rows: Rows, shared: np.ndarray | None, spans: list[tuple[int, int, int]], documents: int) -> Batch:
    """``attention_prefixes``, if documents share their first tokens."""
    import torch

    if shared is None:
        return {}
    prefixes, first = np.zeros((documents, 2), dtype=np.int64), 0
    for number, (row, start, _) in enumerate(spans):
        first = first if row % rows.unit else start
        prefixes[number] = first, shared[row]
    return {"attention_prefixes": torch.from_numpy(prefixes)}


def _weighed(weights: np.ndarray | None, trained_at: np.ndarray) -> Batch:
    """``weighted`` and, if the data have weights, ``weights`` of a batch."""
    import torch

    if weights is None:
        return {"weighted": len(trained_at)}
    weights = weights.reshape(-1)[trained_at]
    return {"weighted": float(weights.sum(dtype=np.float64)), "weights": torch.from_numpy(weights)}


def _named(rows: Rows, sources: np.ndarray | None, trained_at: np.ndarray, documents: Sequence[int]) -> Batch:
    """The names of the sources, and the source of each label and of each document."""
    import torch

    if sources is None:
        return {}
    return {
        "sources": tuple(part.name for part in rows.parts),
        "source_at": torch.from_numpy(sources.reshape(-1)[trained_at]),
        "source_of": torch.from_numpy(rows.owners(np.array(documents, dtype=np.int64)).astype(np.int64)),
    }


def _counts(rows: Rows, documents: np.ndarray) -> Batch:
    """The entries of a batch that are numbers of its documents, or counts of them."""
    import torch

    labels = rows.labels_per_row
    return {
        "labels_per_document": torch.from_numpy(labels[documents].astype(np.int64)),
        "tokens": int(rows.lengths_of(documents).sum()),
        "documents": len(documents),
        "units": len(documents) // rows.unit,
        "trained_first": int(labels[documents[:: rows.unit]].sum()),
        **{name: torch.from_numpy(numbers[documents]) for name, numbers in rows.values.items()},
        **{name: torch.from_numpy(rows.labels_of(documents, column)) for name, column in rows.of_labels.items()},
    }
