"""A process that trains is started with its heap set. What that is good for: test_peak.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from runner import ONEDNN_CACHES, __main__
from runner.cli import main
from runner.launch.slurm import script
from runner.train.memory import heap

SAY = (
    "import os; from runner.train.memory import heap; heap.restart(); print(os.getpid(), os.environ.get(heap.VARIABLE))"
)


def started(code: str, **environment: str) -> tuple[int, str]:
    """(process id, what it printed)"""
    env = {name: value for name, value in os.environ.items() if name != heap.VARIABLE} | environment
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=env) as process:
        said, _ = process.communicate()
        assert process.returncode == 0
    return process.pid, said


@pytest.mark.skipif(not heap.is_glibc(), reason="another heap than glibc's")
@pytest.mark.parametrize(
    ("chosen", "found"),
    [
        ({}, "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"),
        (
            {heap.VARIABLE: "glibc.malloc.tcache_count=3:glibc.malloc.arena_max=1"},
            "glibc.malloc.tcache_count=3:glibc.malloc.arena_max=1:glibc.malloc.mxfast=0",
        ),
    ],
    ids=["by itself", "beside what somebody has set"],
)
def test_a_program_begins_anew_once_as_the_same_process(chosen: dict[str, str], found: str) -> None:
    pid, said = started(SAY, **chosen)
    assert said.split() == [str(pid), found]


def test_a_program_that_has_loaded_torch_goes_on() -> None:
    assert started("import sys; sys.modules['torch'] = sys; " + SAY)[1].split()[1] == "None"


@pytest.mark.parametrize(
    ("words", "trains"),
    [
        ("", True),
        ("model=tiny", True),
        ("-m lora.r=2,4", True),
        ("rerun outputs/a", True),
        ("resume=outputs/a", True),
        ("status", False),
        ("plan model=tiny", False),
        ("--cfg job", False),
        ("model=tiny --help", False),
        ("--shell-completion query=bash", False),
    ],
)
def test_only_what_may_train_begins_anew(words: str, trains: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    began: list[str] = []
    monkeypatch.setattr(sys, "argv", ["runner", *words.split()])
    monkeypatch.setattr(heap, "restart", lambda: began.append("anew"))
    monkeypatch.setattr(main, "run", lambda argv: began.append(" ".join(argv)) or 0)
    with pytest.raises(SystemExit, match="0"):
        __main__.main()
    assert began == ["anew"] * trains + [words]


def test_a_job_of_slurm_is_started_with_the_heap_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(heap.VARIABLE, raising=False)
    lines = script.setup_lines(tmp_path, "job", None)
    assert "export GLIBC_TUNABLES=glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0" in lines


def test_the_package_asks_for_huge_pages_before_torch_is_imported() -> None:
    code = "import os; import runner; print(os.environ['THP_MEM_ALLOC_ENABLE'])"
    env = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    assert subprocess.check_output([sys.executable, "-c", code], text=True, env=env) == "1\n"


@pytest.mark.parametrize(("before", "limits"), [("", "64 64"), ("sys.modules['torch'] = sys; ", "None None")])
def test_the_package_limits_the_caches_of_onednn_unless_torch_has_read_the_limits(before: str, limits: str) -> None:
    code = f"import os, sys; {before}import runner; print(*map(os.environ.get, runner.ONEDNN_CACHES))"
    env = {name: value for name, value in os.environ.items() if name not in ONEDNN_CACHES}
    assert subprocess.check_output([sys.executable, "-c", code], text=True, env=env) == f"{limits}\n"
