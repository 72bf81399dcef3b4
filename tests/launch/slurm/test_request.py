"""What nobody heeds without Slurm is refused."""

from __future__ import annotations

import pytest
from conftest import node

from runner.config import bind


@pytest.mark.parametrize(
    ("cluster", "asked", "remedy"),
    [
        ("local", {"gpus_per_node": 2}, "launcher=accelerate"),
        ("local", {"array_parallelism": 2}, "launcher=local"),
        ("local", {"max_requeues": 3}, "remove it, or set cluster=slurm"),
        ("debug", {"container": "apptainer exec x"}, "remove it, or set cluster=slurm"),
        ("debug", {"python": "/usr/bin/python3"}, "remove it, or set cluster=slurm"),
        ("debug", {"array_parallelism": 2}, "launcher=local"),
        ("debug", {"gpus_per_node": 1}, "launcher=local"),
        ("debug", {"snapshot": "new"}, "remove it, or set cluster=slurm"),
        ("debug", {"timeout_min": 5}, "remove it, or set cluster=slurm"),
        ("debug", {"signal_delay_s": 5}, "remove it, or set cluster=slurm"),
    ],
)
def test_what_nobody_heeds_without_slurm_is_refused(cluster: str, asked: dict[str, object], remedy: str):
    assert not list(bind.find_faults(node("launcher", "slurm", **asked), "launcher"))
    assert not list(bind.find_faults(node("launcher", "slurm", cluster=cluster), "launcher"))
    (fault,) = bind.find_faults(node("launcher", "slurm", cluster=cluster, **asked), "launcher")
    assert (fault.key, fault.problem) == (f"launcher.{next(iter(asked))}", f"has no effect with cluster={cluster}")
    assert remedy in fault.remedy
