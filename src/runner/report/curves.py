"""The losses of runs over steps, tokens and time, thinned to what a chart can show."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runner.report.results import Result, read_records
from runner.tracking.metrics_log import LOSS, TOKENS

TRAIN_LOSS = "train/loss"
KINDS = {"eval": LOSS, "train": TRAIN_LOSS}
MOST_RUNS, MOST_ASKED, MOST_POINTS = 200, 100, 160
"""Runs that are drawn; of those the ones whose curves are asked of MLflow, which may take a call for each; points."""


@dataclass(frozen=True)
class Curve:
    """One metric over the course of a run."""

    steps: list[int]
    tokens: list[float]
    """Seen by then."""
    seconds: list[float]
    """Since the first record, pauses included."""
    values: list[float]

    def thinned(self, most: int = MOST_POINTS) -> Curve:
        """At most about so many points: of each stretch its smallest and its largest, so that no peak is lost."""
        if len(self.values) <= most:
            return self
        length = math.ceil(len(self.values) / (most / 2))
        kept = {0, len(self.values) - 1}
        for start in range(0, len(self.values), length):
            stretch = range(start, min(start + length, len(self.values)))
            kept |= {min(stretch, key=self.values.__getitem__), max(stretch, key=self.values.__getitem__)}
        chosen = sorted(kept)
        columns = (self.steps, self.tokens, self.seconds, self.values)
        return Curve(*([column[place] for place in chosen] for column in columns))  # type: ignore[arg-type]


Curves = dict[str, Curve]
"""eval, train → the curve."""


def gather(results: Sequence[Result], uri: str = "") -> list[Curves]:
    """The curves of each of these runs, in their order; empty ones beyond the first MOST_RUNS.

    They are read from the folders; from the MLflow store at ``uri`` where a run has no folder here.
    """
    drawn = results[:MOST_RUNS]
    missing = [result.mlflow_id for result in drawn if uri and not result.folder][:MOST_ASKED]
    asked: dict[str, list[dict[str, Any]]] = {}
    if missing:
        from runner.report import mlflow_results

        asked = mlflow_results.records(uri, missing, (*KINDS.values(), TOKENS))
    records = [read_records(result.folder) or asked.get(result.mlflow_id, []) for result in drawn]
    return [_curves(found) for found in records] + [{} for _ in results[MOST_RUNS:]]


def of(records: Iterable[Mapping[str, Any]], name: str) -> Curve:
    """The finite values of one metric, with where they were measured."""
    found, tokens, began = Curve([], [], [], []), 0.0, None
    for record in records:
        began = record["time"] if began is None else began
        tokens = record.get(TOKENS, tokens)
        if math.isfinite(record.get(name, math.nan)):
            found.steps.append(record["step"])
            found.tokens.append(tokens)
            found.seconds.append(round(record["time"] - began, 3))
            found.values.append(record[name])
    return found


def _curves(records: Sequence[Mapping[str, Any]]) -> Curves:
    found = {kind: of(records, name).thinned() for kind, name in KINDS.items()}
    return {kind: curve for kind, curve in found.items() if curve.values}
