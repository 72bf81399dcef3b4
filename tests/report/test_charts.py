"""The pictures."""

# ruff: noqa: F401, F811 - fixtures are imported, then asked for by name

from __future__ import annotations

from pathlib import Path

import pytest
from fixtures.compared_runs import a_sweep, here, played, said

from runner.report import charts


def test_the_axis_of_what_is_ranked_by_is_one_of_numbers():
    heights, ticks = charts._scaled([5.531812345678, None, 5.6])
    assert (heights, [text for _, text in ticks]) == ([0.0, None, 1.0], ["5.532", "5.566", "5.6"])
    assert charts._scaled([1.0, 1.0]) == ([0.5, 0.5], [(0.5, "1")])
    assert charts._positions("lr", ["0.0013981961408994052", "0.0012"])[1] == [(0.0, "0.0012"), (1.0, "0.001398")]


def test_pictures_are_written(here: Path, capsys: pytest.CaptureFixture[str]):
    sweep = a_sweep()
    for n in range(6):
        played(sweep, 4 * (1 + n % 2), 1.0 + n, seed=n, label="$x_n")
    code, _, err = said(capsys, "--png", "pictures")
    assert (code, err) == (0, "")
    written = sorted(path.name for path in Path("pictures").iterdir())
    assert written == ["importance.png", "loss.png", "parallel.png", "tradeoff.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in Path("pictures").iterdir())
