"""Mixtures: several sources that are tokenised one by one and trained together, each with its share of the tokens."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

import numpy as np
from annotated_types import Gt, Le

from runner.data import column_files, joined
from runner.data.dataset import Splits
from runner.data.packing import Rows
from runner.data.tokenization import DataReport
from runner.errors import DataError, Fault


@dataclass(frozen=True)
class Mixture:
    """How the sources of a run are mixed."""

    weights: Mapping[str, float | None]
    """Name of each source → its share of the trained tokens; None: by size."""
    max_repeats: float


ALONE = Mixture({"": None}, float("inf"))
"""One source without a name."""


def mix(*, sources: dict[str, Any], max_repeats: Annotated[float, Gt(0), Le(1000)]) -> Mixture:
    """Several sources, each with its weight."""
    return Mixture({name: node.get("weight") for name, node in sources.items()}, max_repeats)


def check_mix(*, sources: dict[str, Any], **_: object) -> Iterator[Fault]:
    """Check the weights of all sources together."""
    if not sources:
        yield Fault("sources", "a mixture needs sources", "name them: data.sources.NAME.path=FILE")
        return
    weights = [node.get("weight") for node in sources.values() if isinstance(node, Mapping)]
    given = [weight for weight in weights if isinstance(weight, int | float)]
    if len(given) == len(sources) and not any(given):
        yield Fault("sources", "all weights are 0", "give one of them a weight above 0, or null: by size")
    elif None in weights and sum(given) >= 1:
        problem = f"the weights sum up to {sum(given):g}, and nothing is left for the sources without a weight"
        yield Fault("sources", problem, "lower the weights to a sum below 1, or give every source a weight")


def shares(weights: Mapping[str, float | None], sizes: Mapping[str, int]) -> dict[str, float]:
    """The share of each source, which sum up to 1; sources without a weight share the rest by their ``sizes``.

    Raises:
        DataError: a source without a weight has the size 0.
    """
    given = {name: weight for name, weight in weights.items() if weight is not None}
    others = {name: sizes[name] for name in weights if name not in given}
    if not others:
        return {name: weight / sum(given.values()) for name, weight in given.items()}
    if not sum(others.values()):
        names = ", ".join(others)
        raise DataError(Fault("data.sources", f"{names}: no token is trained", "give the sources weights"))
    rest = 1 - sum(given.values())
    return {name: given.get(name, rest * others.get(name, 0) / sum(others.values())) for name in weights}


def join(mixture: Mixture, sources: Mapping[str, Splits], evals: Mapping[str, Splits]) -> Splits:
    """The splits of all sources as one, and the rows of ``evals`` held out beside theirs.

    Training rows with a prompt that is held out anywhere are left out. Everything is in the cache of each source: other
    weights tokenise nothing.

    Raises:
        DataError: no training rows are left, or the sources decide different keys of the task.
    """
    held_out = np.unique(np.concatenate([_prompts(each.eval) for each in (*sources.values(), *evals.values())]))
    kept = {name: _without(name, each, held_out) for name, each in sources.items()}
    sizes = {name: each.report.train_trained_tokens for name, each in kept.items()}
    if not any(sizes.values()):  # prompts, which the model answers itself
        sizes = {name: each.report.train_tokens for name, each in kept.items()}
    weights = shares(mixture.weights, sizes)
    kept = {name: each if weights[name] else _untrained(each) for name, each in kept.items()}
    trained = {name: (each.train, weights[name]) for name, each in kept.items() if weights[name]}
    evaluated = {name: (each.eval, 1.0) for name, each in kept.items()}
    evaluated |= {name: (each.eval, 0.0) for name, each in evals.items()}
    first = next(iter(kept.values()))
    is_alone = list(sources) == [""]
    return Splits(
        train=joined.join(trained),
        eval=joined.join(evaluated),
        report=_total([each.report for each in kept.values()]),
        name=first.name if is_alone else f"mix of {', '.join(sources)}",
        digest=first.digest if is_alone else _digest({name: each.digest for name, each in sources.items()}),
        uri=first.uri if is_alone else ", ".join(each.uri for each in sources.values()),
        samples=_in_turn([each.samples for each in sources.values()]),
        settled=_settled(sources),
        revision=first.revision if is_alone else None,
        sources={} if is_alone else kept,
        evals=evals,
        weights=weights,
        is_streamed=any(each.is_streamed for each in sources.values()),
    )


def _prompts(rows: Rows) -> np.ndarray:
    assert rows.prompts is not None, "rows of the cache have them"
    return rows.prompts


def _without(name: str, splits: Splits, held_out: np.ndarray) -> Splits:
    """The splits without the training rows whose prompt is in ``held_out``, which ascends."""
    leaked = column_files.is_among(_prompts(splits.train), held_out)
    if not leaked.any():
        return splits
    rows, report = replace(splits.train, packs=splits.train.packs.without(leaked)), splits.report
    if not len(rows.packs):
        key = f"data.sources.{name}" if name else "data"
        problem = f"all {len(rows)} training rows have prompts that are held out elsewhere"
        raise DataError(Fault(key, problem, "leave the source out, or evaluate on other rows"))
    return replace(splits, train=rows, report=_counted(rows, replace(report, leaked=report.leaked + int(leaked.sum()))))


def _untrained(splits: Splits) -> Splits:
    report = replace(splits.report, train_rows=0, train_tokens=0, train_trained_tokens=0)
    return replace(splits, report=report)


def _counted(rows: Rows, report: DataReport) -> DataReport:
    """The report with the counts of the rows that are in packs."""
    counts = (rows.lengths_of, rows.labels_per_row.__getitem__)
    tokens, trained = (int(rows.packs.numbers(count).sum()) for count in counts)
    return replace(report, train_rows=len(rows.packs.rows), train_tokens=tokens, train_trained_tokens=trained)


def _total(reports: Sequence[DataReport]) -> DataReport:
    largest = ("longest", "longest_of_95_percent")
    counts = [asdict(report) for report in reports]
    return DataReport(**{name: (max if name in largest else sum)(each[name] for each in counts) for name in counts[0]})


def _digest(digests: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:32]


def _in_turn(samples: Sequence[list[dict[str, str]]]) -> list[dict[str, str]]:
    """One sample of each source after the other."""
    turns = itertools.zip_longest(*samples)
    return [sample for turn in turns for sample in turn if sample is not None]


def _settled(sources: Mapping[str, Splits]) -> Mapping[str, Any]:
    """The keys of the task that the sources have decided, all with the same values."""
    first, *others = (each.settled for each in sources.values())
    for key, value in first.items():
        if any(each.get(key) != value for each in others):
            problem = "the sources of the mixture decide different values of this key"
            raise DataError(Fault(f"task.{key}", problem, f"set task.{key} to the value for all of them"))
    return first
