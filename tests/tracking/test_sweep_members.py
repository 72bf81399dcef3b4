"""Which sweep a run belongs to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from runner.errors import ResumeError
from runner.tracking import lookup
from runner.tracking.rundir import RunDir
from runner.tracking.sweepdir import SweepDir, home_of, refuse_inside, sweep_of


def sweep_with(path: Path, *folders: str) -> SweepDir:
    path.mkdir(parents=True)
    jobs = {folder: {"folder": folder, "label": folder} for folder in folders}
    (path / "sweep.json").write_text(json.dumps({"name": path.name, "jobs": jobs}))
    for folder in folders:
        (path / folder).mkdir(parents=True)
        (path / folder / "state.json").write_text("{}")
    return SweepDir(path)


@pytest.mark.parametrize("folder", ["000", "part/000", "a/b/c"])
def test_a_run_belongs_to_the_sweep_that_lists_it(folder: str, tmp_path: Path):
    sweep = sweep_with(tmp_path / "sweep", folder)
    (rundir,) = sweep.rundirs()
    assert sweep_of(rundir) == sweep
    assert home_of(rundir) == sweep.path
    assert list(lookup.scan(tmp_path)) == [sweep]


def test_a_deeper_folder_that_a_sweep_does_not_list_is_not_its_run(tmp_path: Path):
    sweep = sweep_with(tmp_path / "sweep", "000")
    other = RunDir(sweep.path / "outputs" / "mine")
    assert sweep_of(other) is None
    assert home_of(other) == other.path
    sweep.manifest.write_text("{")
    assert sweep_of(other) is None


def test_nothing_new_is_created_inside_a_sweep(tmp_path: Path):
    sweep = sweep_with(tmp_path / "sweep", "000")
    for folder in (sweep.path / "mine", sweep.path / "a" / "b"):
        with pytest.raises(ResumeError, match="is inside the folder of the sweep"):
            refuse_inside(folder, "hydra.run.dir")
    refuse_inside(sweep.path, "sweep")
    refuse_inside(tmp_path / "sweep-2", "sweep")
