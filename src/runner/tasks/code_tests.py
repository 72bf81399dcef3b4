"""Answers that are Python code, run against the tests of their rows: ``pass_at_K`` in ``train.metrics``, or a reward.

**This runs what a model has written.** Each answer gets a process of its own with limits, in an empty folder that is
removed afterwards, without the environment of the run, and on most Linux machines without a network. That stops
accidents and endless loops; it is no wall against code that was written to break out.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

CPU_SECONDS, WALL_SECONDS, MEMORY_BYTES = 5, 10.0, 2**30
"""The limits of each answer with its tests."""
POLL_S = 0.005
COLUMNS = ("test", "tests", "test_list")
_FENCED = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)
_SCRIPT = Path(__file__).with_name("code_process.py")


def passed(completions: Sequence[Any], **columns: Any) -> list[float | None]:
    """1 where the code of the answer passes the tests of its row, 0 where not; None without tests.

    The code is the first fenced block, or the whole answer. Tests are in the column ``test`` or ``tests`` (a text; with
    ``entry_point`` it defines ``check(candidate)``, as in HumanEval) or ``test_list`` (statements, as in MBPP).

    Raises:
        ValueError: no row has tests.
    """
    used = {name: column for name, column in columns.items() if name in (*COLUMNS, "entry_point")}
    of_rows = ({name: column[row] for name, column in used.items()} for row in range(len(completions)))
    programs = [_program(*each) for each in zip(completions, of_rows, strict=True)]
    if not any(programs):
        raise ValueError(f"no row has tests: a column {', '.join(COLUMNS)} (data/format=prompts keeps it)")
    results = iter(run([program for program in programs if program is not None]))
    return [None if program is None else float(next(results)) for program in programs]


def pass_at_k(scores: np.ndarray, k: int) -> np.ndarray:
    """The chance that one of ``k`` answers passes, without bias, (prompts,); NaN without tests.

    ``scores``: (prompts, answers) 1 or 0. Chen et al. 2021, "Evaluating Large Language Models Trained on Code",
    https://arxiv.org/abs/2107.03374: 1 - C(n - c, k) / C(n, k).
    """
    count = scores.shape[1]
    assert 1 <= k <= count, "checked in config.eval_metrics"
    failed = count - scores.sum(axis=1, keepdims=True)  # (prompts, 1)
    factors = np.clip(failed - np.arange(k), 0, None) / (count - np.arange(k))  # (prompts, k)
    return 1.0 - factors.prod(axis=1)


def run(programs: Sequence[str]) -> list[bool]:
    """Whether each program ends without an error, each in a process of its own, as many at a time as there are CPUs."""
    at_a_time = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    results, waiting = dict[int, bool](), iter(enumerate(programs))
    running: dict[int, tuple[contextlib.ExitStack, _Running]] = {}
    with contextlib.ExitStack() as all_of_them:
        while len(results) < len(programs):
            while len(running) < at_a_time and (upcoming := next(waiting, None)) is not None:
                number, program = upcoming
                files = all_of_them.enter_context(contextlib.ExitStack())
                running[number] = files, files.enter_context(_started(program))
            for number in [number for number, (_, each) in running.items() if each.is_done()]:
                files, each = running.pop(number)
                results[number] = each.result()
                files.close()
            time.sleep(POLL_S if running else 0)
    return [results[number] for number in range(len(programs))]


@dataclass(frozen=True)
class _Running:
    process: subprocess.Popen[bytes]
    token: bytes
    ends_at: float

    def is_done(self) -> bool:
        """Whether it has ended, or its time has; it is not waited for, so that no other process gets its number."""
        ended = os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        return ended is not None or time.monotonic() > self.ends_at

    def result(self) -> bool:
        """End it; returns whether it has written its token. What others have written later is not waited for."""
        self.end()
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), False)
        return self.process.stdout.read(len(self.token)) == self.token

    def end(self) -> None:
        """End it with the processes that it has started."""
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@contextlib.contextmanager
def _started(program: str) -> Iterator[_Running]:
    token = secrets.token_hex(16).encode()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        environment = {"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "OMP_NUM_THREADS": "1",
                       "OPENBLAS_NUM_THREADS": "1"}  # fmt: skip
        process = subprocess.Popen(
            [sys.executable, "-I", str(_SCRIPT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, cwd=folder, env=environment, start_new_session=True,
        )  # fmt: skip
        with process:
            running = _Running(process, token, time.monotonic() + WALL_SECONDS)
            try:
                assert process.stdin is not None
                with contextlib.suppress(BrokenPipeError), process.stdin:
                    limits = b"%d %d %s\n" % (CPU_SECONDS, MEMORY_BYTES, token)
                    process.stdin.write(limits + program.encode("utf-8", "surrogatepass"))
                yield running
            finally:
                running.end()


def _program(answer: Any, columns: dict[str, Any]) -> str | None:
    """The code of the answer with the tests of its row; None if it has no tests."""
    tests = next((columns[name] for name in COLUMNS if columns.get(name)), None)
    if tests is None:
        return None
    text = answer if isinstance(answer, str) else str(answer[-1]["content"])
    fenced = _FENCED.search(text)
    lines = [fenced[1] if fenced else text, tests if isinstance(tests, str) else "\n".join(map(str, tests))]
    if entry_point := columns.get("entry_point"):
        lines.append(f"check({entry_point})")
    return "\n\n".join(lines) + "\n"
