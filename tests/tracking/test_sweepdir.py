"""The folder of a sweep: sweep.json, and which sweep a run belongs to."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from runner.tracking.rundir import RunDir
from runner.tracking.sweepdir import SweepDir, home_of, sweep_of


def test_concurrent_updates_lose_nothing(tmp_path: Path):
    sweep = SweepDir(tmp_path / "mine")
    assert sweep.read() == {}
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda n: sweep.update(**{f"key{n}": n}), range(40)))
    assert sweep.read() == {f"key{n}": n for n in range(40)}


def test_runs_keep_their_order_and_know_their_sweep(tmp_path: Path):
    sweep = SweepDir(tmp_path / "mine")
    sweep.update(jobs={"b": {"folder": "001", "label": ""}, "a": {"folder": "000", "label": ""}})
    assert [run.path.name for run in sweep.rundirs()] == ["001", "000"]
    assert sweep_of(sweep.rundirs()[0]) == sweep
    assert home_of(sweep.rundirs()[0]) == sweep.path
    single = RunDir(tmp_path / "single")
    assert (sweep_of(single), home_of(single)) == (None, single.path)


def test_a_sweep_without_a_queue_is_not_worked_on(tmp_path: Path):
    assert not SweepDir(tmp_path).is_worked_on()
