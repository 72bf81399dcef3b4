"""Which folder a run gets: a new one, or the one of the run that it continues."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import TINY, prepared

from runner.errors import ConfigError, ResumeError
from runner.tracking import resume


def test_a_stopped_run_is_continued_without_another_end(tmp_path: Path, cache: Path):
    rundir = prepared(tmp_path / "run", *TINY)
    words = [f"resume={rundir.path}", "train.num_train_epochs=2"]
    with pytest.raises(ResumeError, match=r"first let it end: .* then train on: .*train\.num_train_epochs=2"):
        resume.configuration({"resume": str(rundir.path), "outputs_dir": str(tmp_path), "retry": False}, words)


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
