"""Every tracker besides MLflow is what ``Tracker`` says."""

from __future__ import annotations

import inspect

import pytest

from runner.tracking.also import sending
from runner.tracking.also.tracker import Tracker


def shape(function: object) -> list[inspect._ParameterKind]:
    """The kinds of the parameters, those that may be given by position alone being one with those that may."""
    kinds = [each.kind for each in inspect.signature(function).parameters.values()]  # type: ignore[arg-type]
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [inspect.Parameter.POSITIONAL_ONLY if kind in by_position else kind for kind in kinds]


@pytest.mark.parametrize("name", sending.TRACKERS)
def test_a_tracker_has_the_functions_of_the_protocol(name: str) -> None:
    for function in ("log", "flush", "close"):
        assert shape(getattr(sending.TRACKERS[name], function)) == shape(getattr(Tracker, function))
    assert len(inspect.signature(sending.TRACKERS[name]).parameters) == 1, "it is made from ``About`` alone"
