"""The folder of a sweep, and the folders of runs, without training: who gets which, and what is refused in time."""

from __future__ import annotations

import json
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import TINY, composed

from runner.errors import ConfigError, ResumeError
from runner.files import is_held
from runner.sweep import folder
from runner.sweep.folder import SweepJob
from runner.tracking import resume
from runner.tracking.sweepdir import SweepDir


def wanted(seed: int, folder: str = "") -> SweepJob:
    return SweepJob(composed(*TINY, f"seed={seed}"), f"seed={seed}", folder)


def join(sweep: SweepDir, *jobs: SweepJob, command: tuple[str, ...] = ("runner", "-m")) -> list[str]:
    with folder.adding(sweep, "mine", list(command), list(jobs)) as rundirs:
        return [rundir.path.name for rundir in rundirs]


def test_jobs_are_told_apart_by_what_they_compute(tmp_path: Path):
    sweep = SweepDir(tmp_path / "sweep")
    first = join(sweep, wanted(1), wanted(2))
    assert join(sweep, wanted(2), wanted(3), wanted(1))[::2] == [first[1], first[0]]
    assert len(sweep.read()["jobs"]) == 3


def test_a_password_does_not_reach_sweep_json(tmp_path: Path):
    sweep = SweepDir(tmp_path / "sweep")
    join(sweep, wanted(1), command=("runner", "-m", "tracking.uri=https://me:hunter2hunter2@host"))
    assert "hunter2" not in sweep.manifest.read_text()
    assert sweep.read()["commands"][0][:2] == ["runner", "-m"]


def test_two_jobs_in_one_folder_are_refused_and_the_sweep_stays_as_it_was(tmp_path: Path):
    sweep = SweepDir(tmp_path / "sweep")
    with pytest.raises(ResumeError, match=r"hydra\.sweep\.subdir=fixed: is the folder of more than one run"):
        join(sweep, wanted(1, "fixed"), wanted(2, "fixed"))
    assert not sweep.manifest.exists()
    join(sweep, wanted(1, "0"))
    before = sweep.manifest.read_text()
    with pytest.raises(ResumeError):
        join(sweep, wanted(2, "0"))
    assert sweep.manifest.read_text() == before


@pytest.mark.parametrize(
    ("folders", "problem"),
    [
        (("../x",), "is outside of the sweep's folder"),
        (("a/../../x",), "is outside of the sweep's folder"),
        (("/elsewhere",), "is outside of the sweep's folder"),
        ((".",), "is outside of the sweep's folder"),
        (("a", "a/b"), "is inside another run's folder"),
        (("a/./b", "a/b"), "is the folder of more than one run"),
    ],
)
def test_folders_outside_of_the_sweep_or_inside_each_other_are_refused(
    folders: tuple[str, ...], problem: str, tmp_path: Path
):
    with pytest.raises(ResumeError, match=rf"hydra\.sweep\.subdir=.*: {problem}"):
        join(SweepDir(tmp_path / "sweep"), *(wanted(seed, folder) for seed, folder in enumerate(folders)))
    assert not list(tmp_path.iterdir())


def test_a_sweep_inside_another_is_refused_and_an_existing_one_continues(tmp_path: Path):
    outer, inner = SweepDir(tmp_path / "a"), SweepDir(tmp_path / "a" / "b" / "c")
    join(outer, wanted(1))
    with pytest.raises(ResumeError, match=r"sweep=.*: is inside the folder of the sweep "):
        join(inner, wanted(2))
    assert not (outer.path / "b").exists()
    inner.path.mkdir(parents=True)
    inner.manifest.write_text('{"id": "1", "name": "b", "created": 1.0, "jobs": {}}')
    assert join(inner, wanted(2))


def test_who_waits_for_a_sweep_that_another_gives_up_makes_it_alone(tmp_path: Path):
    """The lock that it waited for is removed: who comes later would hold another one beside it."""
    sweep, first, waiting, inside = SweepDir(tmp_path / "sweep"), wanted(1), wanted(2), []

    def make() -> None:
        with folder.adding(sweep, "mine", ["runner"], [waiting]):
            inside.append(is_held(sweep.lock))

    def give_up(pool: ThreadPoolExecutor) -> None:
        with folder.adding(sweep, "mine", ["runner"], [first]):
            other.append(pool.submit(make))
            time.sleep(0.2)  # until it waits
            raise KeyboardInterrupt

    other: list[Future[None]] = []
    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(KeyboardInterrupt):
            give_up(pool)
        other[0].result(timeout=20)
    assert inside == [True]
    assert list(sweep.read()["jobs"]) == [waiting.signature]


def test_a_folder_that_holds_something_else_is_refused_before_anything_is_written(tmp_path: Path):
    sweep = SweepDir(tmp_path / "sweep")
    join(sweep, wanted(1))
    (sweep.path / "notes").mkdir()
    (sweep.path / "notes" / "mine.txt").write_text("text")
    before = json.loads(sweep.manifest.read_text())
    with pytest.raises(ResumeError, match="contains files but no run"):
        join(sweep, wanted(2, "notes"))
    assert sweep.read() == before


def test_commands_of_the_same_second_get_a_folder_each(tmp_path: Path):
    """``for s in 1 2; do python -m runner seed=$s & done``: the second would have overwritten the first."""
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: resume.make(tmp_path / "day" / "10-15-00", is_new=True)[0], range(8)))
    assert len(set(made)) == 8
    assert tmp_path / "day" / "10-15-00" in made


def test_a_file_in_the_way_is_named(tmp_path: Path):
    (tmp_path / "mine").write_text("text")
    with pytest.raises(ConfigError, match="is a file"):
        resume.make(tmp_path / "mine")
