"""A sweep whose folder cannot be made, or filled: refused in one message, and nothing half written is left."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import TINY, fill, jobs_of, mounted
from test_slurm import runner

from runner import files
from runner.errors import LaunchError
from runner.sweep import folder
from runner.tracking.rundir import RunDir
from runner.tracking.sweepdir import SweepDir

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


@pytest.mark.parametrize(
    ("number", "name", "is_told"),
    [
        (errno.ENOSPC, None, True),
        (errno.EACCES, "mine/000/run.json", True),
        (errno.ENOTDIR, "", True),
        (errno.ENAMETOOLONG, "mine/000", True),
        (errno.EACCES, None, False),
        (errno.EACCES, "rows.py", False),
        (errno.ENOSPC, "elsewhere", False),
        (errno.EAGAIN, None, False),
        (errno.EPIPE, None, False),
        (errno.EIO, None, False),
        (errno.ENOENT, "mine/run.json", False),
        (None, None, False),
    ],
)
def test_only_what_is_wrong_with_the_folder_is_called_so(
    tmp_path: Path, number: int | None, name: str | None, is_told: bool
):
    error = OSError("odd") if number is None else OSError(number, os.strerror(number))
    error.filename = None if name is None else str(tmp_path / name)
    with pytest.raises((OSError, LaunchError)) as caught, files.writing(tmp_path / "mine", LaunchError):
        raise error
    if is_told:
        remedies = {errno.ENOSPC: "free disk space there", errno.ENAMETOOLONG: "use a shorter name"}
        remedy = remedies.get(error.errno or 0, "set outputs_dir to a folder that can be written")
        expected = f"outputs_dir={tmp_path}/mine: cannot be written: {error.strerror}\n    → {remedy}"
        assert str(caught.value).startswith(expected)
    else:
        assert caught.value is error


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
    before = tree(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        begin(folder.SweepJob({"seed": 2}, "seed=2", ""))
    assert tree(tmp_path) == before
