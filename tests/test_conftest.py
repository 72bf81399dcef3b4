"""What a test leaves behind is tidied away."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import cancel_jobs, jobs_of
from fixtures.slurm_runs import slurm_says

# No job is left behind by a test


@pytest.mark.slurm
def test_what_a_test_leaves_in_the_queue_is_cancelled_noted_or_not(slurm: None):
    Path("below").mkdir()
    for words in (["--array=0-1"], ["--chdir=below"]):
        slurm_says("sbatch", "--hold", "--output=/dev/null", *words, "--wrap=true")
    assert len(jobs_of(Path.cwd())) == 3
    assert len(jobs_of(Path("below").absolute())) == 1
    cancel_jobs(Path("below").absolute())
    assert len(jobs_of(Path.cwd())) == 2
    cancel_jobs(Path.cwd())
    assert jobs_of(Path.cwd()) == []
