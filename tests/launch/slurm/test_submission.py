"""A submission is noted before it is made, so that none is made twice."""

from __future__ import annotations

import os
import re
import shutil
import signal
from pathlib import Path

import pytest
from conftest import until
from fixtures.slurm_runs import SHORT, SLURM, runner

from runner.launch.slurm import submission
from runner.tracking.rundir import RunDir


@pytest.mark.slurm
@pytest.mark.slow
def test_whoever_is_killed_after_sbatch_need_not_come_back(slurm: None):
    """The job finds what it is to do in its run's folder; submitit alone would wait for its pickle and fail."""
    Path("bin").mkdir()
    real = shutil.which("sbatch")
    Path("bin/sbatch").write_text(
        f'#!/bin/bash\n[[ "$*" == *--test-only* ]] || trap "kill -9 $PPID" EXIT\n{real} "$@"\n'
    )
    Path("bin/sbatch").chmod(0o755)
    words = (*SHORT, *SLURM, "hydra.run.dir=alone", "tracking=offline")
    killed = runner(*words, PATH=f"{Path('bin').absolute()}:{os.environ['PATH']}")
    assert killed.returncode == -signal.SIGKILL
    rundir = RunDir(Path("alone").absolute())
    until(lambda: rundir.read_state().status == "completed")
    assert "slurm" not in rundir.read_manifest(), "it was killed too late"


def test_squeue_shows_the_name_of_the_run_or_sweep(tmp_path: Path):
    sweep, run = tmp_path / "lora.r+quant", RunDir(tmp_path / "10-15-00")
    run.update_manifest(name="my first run, with a name that is too long for anybody")
    first, second = (submission.job_name(sweep, [RunDir(sweep / "000-ab")]) for _ in range(2))
    assert re.fullmatch(r"runner-lora\.r\+quant-[0-9a-f]{8}", first)
    assert first != second
    assert re.fullmatch(
        r"runner-my-first-run-with-a-name-that-is-too-lon-[0-9a-f]{8}", submission.job_name(run.path, [run])
    )
    assert re.fullmatch(
        r"runner-other-[0-9a-f]{8}", submission.job_name(tmp_path / "other", [RunDir(tmp_path / "other")])
    )
