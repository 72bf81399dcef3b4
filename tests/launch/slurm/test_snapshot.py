"""Jobs of Slurm run the code that was there when they were submitted."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY, prepared, until
from fixtures.slurm_runs import SHORT, SLURM, has_left_the_queue, job_of, runner, slurm_says, weights
from fixtures.users_functions import HELD, OWN_FUNCTION, write_rows

from runner.data import formats
from runner.launch.slurm import snapshot
from runner.tracking import manifest
from runner.tracking.rundir import RunDir


@pytest.mark.slurm
@pytest.mark.slow
def test_a_function_of_the_users_is_frozen_with_the_code(slurm: None):
    write_rows()
    write_functions("mine.py", ' + " "')
    words = (*SHORT, *OWN_FUNCTION, "tracking=offline")
    here = runner(
        *words, "hydra.run.dir=here", RUNNER_CACHE=str(Path("cache").absolute())
    )  # its rows are not the job's
    assert here.returncode == 0, here.stderr
    done = runner(*words, *SLURM, HELD, "hydra.run.dir=queued")
    assert done.returncode == 0, done.stderr
    rundir = RunDir(Path("queued").absolute())
    Path("mine.py").write_text('def text(row):\n    raise SystemExit("edited")\n')
    Path("joining_of_mine.py").write_text('raise SystemExit("edited as well")\n')
    slurm_says("scontrol", "release", job_of(rundir))
    until(lambda: has_left_the_queue(rundir))
    assert rundir.read_state().status == "completed", rundir.read_state().reason
    assert weights(rundir) == weights(RunDir(Path("here")))


def write_functions(file: str, between: str) -> None:
    """A function of the user's in a file, and what it imports from another one beside it."""
    Path(file).parent.mkdir(exist_ok=True)
    Path(file).write_text("import joining_of_mine\n\ndef text(row):\n    return joining_of_mine.join(row)\n")
    text = f'def join(row):\n    return row["a"]{between} + row["b"]\n'
    Path(file).with_name("joining_of_mine.py").write_text(text)


def test_what_a_function_imports_from_beside_it_is_frozen_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    write_rows()
    write_functions("own/mine.py", "")
    Path("own/unrelated.py").write_text("")
    function = ("data.format.function=own/mine.py:text",)
    words = (*TINY, *(word for word in OWN_FUNCTION if "function" not in word), *function)
    rundir = prepared(tmp_path / "run", *words)
    assert sorted(path.name for path in rundir.code.iterdir()) == ["joining_of_mine.py", "mine.py"]
    write_functions("own/mine.py", ' + " and "')
    row = {"a": "1", "b": "2"}
    assert formats.of(manifest.read_config(rundir)["data"]["format"])(row) == "12"
    again = prepared(tmp_path / "again", *words)
    assert formats.of(manifest.read_config(again)["data"]["format"])(row) == "1 and 2"


def test_a_snapshot_is_a_package_of_its_own_and_changes_with_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    checkout = tmp_path / "checkout"
    shutil.copytree(snapshot.PACKAGE, checkout / "src" / "runner", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(snapshot.bind.config_dir(), checkout / "conf")
    subprocess.run(["git", "init", "-q", str(checkout)], check=True)
    (checkout / ".gitignore").write_text("*.secret\n")
    (checkout / "src/runner/key.secret").write_text("not code")
    monkeypatch.setattr(snapshot, "PACKAGE", checkout / "src" / "runner")
    monkeypatch.setattr(snapshot.bind, "config_dir", lambda: checkout / "conf")
    first = snapshot.take(tmp_path)
    assert snapshot.take(tmp_path) == first
    assert not list(first.rglob("*.secret"))
    (checkout / "src/runner/train/loop.py").open("a").write("# an uncommitted change\n")
    second = snapshot.take(tmp_path)
    assert second != first
    code = "from runner.config import bind; from runner.train import loop; print(loop.__file__, bind.config_dir())"
    environment = {**os.environ, "PYTHONPATH": str(second), "PYTHONSAFEPATH": "1"}
    said = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True).split()
    assert said == [f"{second}/runner/train/loop.py", f"{second}/runner/conf"]
    assert (second / "runner/train/loop.py").read_text().endswith("# an uncommitted change\n")
    assert not (first / "runner/train/loop.py").read_text().endswith("# an uncommitted change\n")
