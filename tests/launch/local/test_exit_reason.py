"""How a process ended."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from runner.launch.local import exit_reason


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"proc/self/cgroup": "0::/job\n", "sys/fs/cgroup/job/memory.events": "oom 5\noom_kill 2\n"}, 2),
        ({"proc/self/cgroup": "0::/of/the/host\n", "sys/fs/cgroup/memory.events": "oom_kill 3\n"}, 3),
        ({"proc/self/cgroup": "4:cpu,memory:/a\n0::/\n", "sys/fs/cgroup/memory/a/memory.oom_control": "oom_kill 4"}, 4),
        ({"proc/self/cgroup": "0::/\n", "proc/vmstat": "pgfault 9\noom_kill 6\n"}, 6),
        ({}, 0),
    ],
)
def test_the_kernels_count_of_kills_is_found(tmp_path: Path, files: dict[str, str], expected: int):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert exit_reason.oom_kills(tmp_path) == expected
    assert exit_reason.oom_kills() >= 0


def test_deaths_have_names():
    assert exit_reason.by_signal(signal.SIGKILL, out_of_memory=True).reason.endswith("the kernel's OOM killer)")
    assert exit_reason.by_signal(signal.SIGABRT, out_of_memory=False)[:2] == ("failed", "crashed (SIGABRT)")
    assert exit_reason.by_signal(signal.SIGTERM, out_of_memory=False)[::2] == ("preempted", 75)
