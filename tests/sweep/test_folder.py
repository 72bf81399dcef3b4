"""The folder of a sweep, and the folders of runs, without training: who gets which, and what is refused in time."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import TINY, composed, fill, jobs_of, mounted
from fixtures.slurm_runs import runner

from runner.errors import ResumeError
from runner.files import is_held
from runner.sweep import folder
from runner.sweep.folder import SweepJob
from runner.tracking.rundir import RunDir
from runner.tracking.sweepdir import SweepDir


def wanted(seed: int, folder: str = "") -> SweepJob:
    return SweepJob(composed(*TINY, f"seed={seed}"), f"seed={seed}", folder)


def join(sweep: SweepDir, *jobs: SweepJob, command: tuple[str, ...] = ("runner", "-m")) -> list[str]:
    with folder.adding(sweep, "mine", list(command), list(jobs)) as rundirs:
        return [rundir.path.name for rundir in rundirs]


def test_jobs_are_identified_by_what_they_compute(tmp_path: Path):
    sweep = SweepDir(tmp_path / "sweep")
    first = join(sweep, wanted(1), wanted(2))
    assert join(sweep, wanted(2), wanted(3), wanted(1))[::2] == [first[1], first[0]]
    assert len(sweep.read()["jobs"]) == 3


def test_a_password_does_not_reach_sweep_json(tmp_path: Path):
    sweep = SweepDir(tmp_path / "sweep")
    join(sweep, wanted(1), command=("runner", "-m", "tracking.uri=https://me:hunter2hunter2@host"))
    assert "hunter2" not in sweep.manifest.read_text()
    assert sweep.read()["commands"][0][:2] == ["runner", "-m"]


@pytest.mark.parametrize("damage", ["cut", "lost"])
def test_a_sweep_that_lost_its_sweep_json_finds_its_runs(tmp_path: Path, damage: str):
    sweep = SweepDir(tmp_path / "sweep")
    first = join(sweep, wanted(1), wanted(2))
    before = sweep.manifest.read_text()
    sweep.manifest.write_text("{") if damage == "cut" else sweep.manifest.unlink()
    assert join(sweep, wanted(1), wanted(2)) == first
    assert sweep.manifest.read_text() == before


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
        other[0].result()
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


LAUNCHERS = [
    pytest.param((), id="local"),
    pytest.param(
        ("launcher=slurm", "launcher.timeout_min=60", "+launcher.additional_parameters.hold=true"),
        id="slurm", marks=pytest.mark.slurm,
    ),
]  # fmt: skip
EIGHT = ("-m", *TINY, "train.max_steps=1", "seed=range(8)", "sweep=eight")


@pytest.fixture(params=LAUNCHERS)
def launcher(
    request: pytest.FixtureRequest, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[str, ...]:
    """The words that choose it, in a folder to work in; what was refused has submitted nothing."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    words: tuple[str, ...] = request.param
    if words:
        request.getfixturevalue("slurm")
    return words


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A file system that nothing can be written to, not even by root."""
    with mounted(tmp_path / "read-only", "ro") as folder:
        yield folder


def below_a_file(folder: Path) -> Path:
    (folder / "file").write_text("mine")
    return folder / "file"


def tree(folder: Path) -> dict[str, bytes]:
    """All that lies below it: name → content, of a folder none."""
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


def refusal(*words: str) -> str:
    """The message with which a command line is refused."""
    done = runner(*words)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: outputs_dir=")
    assert done.stderr.count("    → ") == 1
    assert len(done.stderr.splitlines()) == 2
    assert done.stdout == ""
    return done.stderr


def test_a_sweep_below_a_file_is_refused(launcher: tuple[str, ...], tmp_path: Path):
    outputs = below_a_file(tmp_path) / "outputs"
    said = refusal(*EIGHT, *launcher, f"outputs_dir={outputs}")
    assert said.startswith(f"error: outputs_dir={outputs}/sweeps/eight: cannot be written: Not a directory\n")
    assert "set outputs_dir to a folder that can be written" in said
    assert tree(tmp_path) == {str(tmp_path / "file"): b"mine"}


def test_a_sweep_of_another_sweeper_and_a_search_below_a_file_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    outputs = f"outputs_dir={below_a_file(tmp_path)}/outputs"
    assert "eight: cannot be written: Not a directory\n" in refusal(*EIGHT, outputs, "hydra/sweeper=basic")
    searched = ("search=random", "search.trials=2", "optim.learning_rate=interval(1e-4,1e-2)", "sweep=found")
    assert "found: cannot be written: Not a directory\n" in refusal("-m", *TINY, *searched, outputs)
    assert tree(tmp_path) == {str(tmp_path / "file"): b"mine"}


def test_a_sweep_on_a_read_only_disk_is_refused(launcher: tuple[str, ...], read_only: Path):
    said = refusal(*EIGHT, *launcher, f"outputs_dir={read_only}/outputs")
    assert said.startswith(f"error: outputs_dir={read_only}/outputs/sweeps/eight: cannot be written: Read-only file ")
    assert tree(read_only) == {}


@pytest.mark.parametrize("leaving", [0, 96 * 1024], ids=["nothing", "room for some of the runs"])
def test_a_sweep_on_a_full_disk_is_refused_and_leaves_nothing(
    launcher: tuple[str, ...], small_disk: Path, leaving: int
):
    fill(small_disk, leaving)
    before = tree(small_disk)
    said = refusal(*EIGHT, *launcher, f"outputs_dir={small_disk}/outputs")
    assert "/sweeps/eight: cannot be written: No space left on device\n    → free disk space there" in said
    assert tree(small_disk) == before
    if launcher:
        assert jobs_of(Path.cwd()) == []


@pytest.mark.slow
def test_what_cannot_be_added_to_a_sweep_leaves_it_as_it_was(
    small_disk: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    there = ("-m", *TINY, "train.max_steps=1", "train.save_steps=null", "sweep=eight", f"outputs_dir={small_disk}")
    first = runner(*there, "seed=0,1", OMP_NUM_THREADS="1")
    assert first.returncode == 0, first.stderr
    filler = fill(small_disk, 96 * 1024)
    before = tree(small_disk)
    refusal(*there, "seed=range(8)")
    assert tree(small_disk) == before
    filler.unlink()
    more = runner(*there, "seed=0,1,2", OMP_NUM_THREADS="1")
    assert more.returncode == 0, more.stderr
    assert "2 of 3 jobs are already completed: skipped" in more.stderr
    rundirs = SweepDir(small_disk / "sweeps" / "eight").rundirs()
    assert [rundir.read_state().attempt for rundir in rundirs] == [1, 1, 1]


@pytest.mark.slurm
def test_code_that_finds_no_room_is_not_half_there_and_nothing_is_submitted(slurm: None, small_disk: Path):
    held = ("launcher=slurm", "+launcher.additional_parameters.hold=true")
    words = ("-m", *TINY, "train.max_steps=1", "seed=1,2", "sweep=two", *held, f"outputs_dir={small_disk}")
    filler = fill(small_disk, 1024 * 1024)  # the runs find room there, and the code does not
    said = refusal(*words)
    assert "/sweeps/two: cannot be written: No space left on device\n" in said
    sweep = SweepDir(small_disk / "sweeps" / "two")
    assert [rundir.read_state().status for rundir in sweep.rundirs()] == ["pending"] * 2
    assert list((sweep.path / "code").iterdir()) == []
    assert jobs_of(Path.cwd()) == []
    filler.unlink()
    done = runner(*words)
    assert done.returncode == 0, done.stderr
    assert len(jobs_of(Path.cwd())) == 2


def test_a_sweep_is_as_it_was_whatever_stops_its_making(tmp_path: Path):
    """Also the folders above it, which others may use meanwhile."""
    sweep = SweepDir(tmp_path / "outputs" / "sweeps" / "mine")
    wanted = folder.SweepJob({"seed": 1}, "seed=1", "")

    def begin(*others: folder.SweepJob) -> None:
        with folder.adding(sweep, "mine", ["runner"], [wanted, *others]) as rundirs:
            rundirs[-1].update_manifest(made_folders=[str(rundirs[-1].path)])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        begin()
    assert list(tmp_path.iterdir()) == []
    with folder.adding(sweep, "mine", ["runner"], [wanted]) as (first,):
        RunDir(first.path).update_manifest(signature=wanted.signature)
        RunDir(first.path).write_state()
    before = tree(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        begin(folder.SweepJob({"seed": 2}, "seed=2", ""))
    assert tree(tmp_path) == before
