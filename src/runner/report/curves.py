"""Loss curves of runs over steps, tokens and time, reduced to the number of points that a chart can show."""

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
"""Limits: runs drawn, runs whose curves are read from MLflow (maybe one request for each), points of a curve."""


@dataclass(frozen=True)
class Curve:
    """The values of one metric during a run; four lists of the same length."""

    steps: list[int]
    tokens: list[float]
    """Training tokens seen until this step."""
    seconds: list[float]
    """Since the first record, pauses included."""
    values: list[float]

    def thinned(self, most: int = MOST_POINTS) -> Curve:
        """Keep about ``most`` points: the smallest and the largest value of each interval, so that peaks remain."""
        if len(self.values) <= most:
            return self
        length = math.ceil(len(self.values) / (most / 2))
        kept = {0, len(self.values) - 1}
        for start in range(0, len(self.values), length):
            interval = range(start, min(start + length, len(self.values)))
            kept |= {min(interval, key=self.values.__getitem__), max(interval, key=self.values.__getitem__)}
        indices = sorted(kept)
        columns = (self.steps, self.tokens, self.seconds, self.values)
        return Curve(*([column[index] for index in indices] for column in columns))  # type: ignore[arg-type]


Curves = dict[str, Curve]
"""``eval`` and ``train`` → curve."""


def gather(results: Sequence[Result], uri: str = "") -> list[Curves]:
    """The curves of each run, in the order of ``results``; no curves after the first MOST_RUNS.

    Read from the run folders, or from the MLflow store at ``uri`` for runs without a folder on this machine.
    """
    first = results[:MOST_RUNS]
    missing = [result.mlflow_id for result in first if uri and not result.folder][:MOST_ASKED]
    downloaded: dict[str, list[dict[str, Any]]] = {}
    if missing:
        from runner.report import mlflow_results

        downloaded = mlflow_results.records(uri, missing, (*KINDS.values(), TOKENS))
    records = [read_records(result.folder) or downloaded.get(result.mlflow_id, []) for result in first]
    return [_curves(each) for each in records] + [{} for _ in results[MOST_RUNS:]]


def of(records: Iterable[Mapping[str, Any]], name: str) -> Curve:
    """The curve of the finite values of one metric."""
    curve, tokens, start = Curve([], [], [], []), 0.0, None
    for record in records:
        start = record["time"] if start is None else start
        tokens = record.get(TOKENS, tokens)
        if math.isfinite(record.get(name, math.nan)):
            curve.steps.append(record["step"])
            curve.tokens.append(tokens)
            curve.seconds.append(round(record["time"] - start, 3))
            curve.values.append(record[name])
    return curve


def _curves(records: Sequence[Mapping[str, Any]]) -> Curves:
    curves = {kind: of(records, name).thinned() for kind, name in KINDS.items()}
    return {kind: curve for kind, curve in curves.items() if curve.values}
