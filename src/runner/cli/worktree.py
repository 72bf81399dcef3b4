"""Check out the code of an earlier run into the user's cache, for ``rerun --exact``."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

from runner.errors import ConfigError, Fault
from runner.files import cache_dir, is_held, locked, write_atomic
from runner.report.record import Recorded
from runner.signals import signals_to
from runner.tracking import checkout, provenance
from runner.tracking.rundir import RunDir

STALE_S = 3600.0


def provide(run: Recorded) -> Path:
    """A folder with the exact code of a run, from the cache or newly checked out.

    Raises:
        ConfigError: git is missing, the commit is not here, or commit and recorded changes do not give the code.
    """
    git, code = run.manifest.get("git") or {}, run.code
    checkout.refuse_unknown(code.sha if code else None)
    assert code
    if git.get("dirty") and not code.patch:
        problem = "its uncommitted changes were not recorded (dirty.diff is missing)"
        raise ConfigError(Fault("--exact", problem, "leave --exact out to run with the current code"))
    patch = hashlib.sha256(code.patch.encode("utf-8", "surrogateescape")).hexdigest()
    _remove_leftovers(cache_dir("worktrees"))
    folder = cache_dir("worktrees") / (code.sha[:16] + (f"-{patch[:8]}" if code.patch else ""))
    digest_file = folder.with_name(f".{folder.name}.sha256")
    with locked(folder.with_name(f".{folder.name}.lock")):
        if not _is_intact(folder, digest_file):
            _remove(folder)
            checkout.add_worktree(code, folder)
            write_atomic(digest_file, _digest(folder))
    _refuse_other_code(run, folder)
    return folder


def _remove_leftovers(worktrees: Path) -> None:
    """Remove digest and lock files of worktrees that no longer exist."""
    for suffix in (".sha256", ".lock"):
        for path in worktrees.glob(f".*{suffix}"):
            with contextlib.suppress(OSError):  # another process removes them, too
                is_old = time.time() - path.stat().st_mtime > STALE_S  # no process is creating its worktree now
                if is_old and not (worktrees / path.name[1:].removesuffix(suffix)).exists() and not is_held(path):
                    path.unlink()


def finish(rundir: RunDir, folder: Path) -> int:
    """Train a prepared run with the code in ``folder``, in a child process; returns the exit code.

    The child gets the run as ``resume=RUN``, which every version of the program understands. Signals are forwarded to
    the child once: it has its own process group, so that the terminal's Ctrl-C does not reach it.
    """
    quoted = str(rundir.path).replace("\\", "\\\\").replace("'", "\\'")
    before = os.environ.get("PYTHONPATH")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(folder / "src"), before]))}
    proc: subprocess.Popen[bytes] | None = None
    signals: deque[int] = deque()

    def forward(*handler_args: Any) -> None:
        signals.extend(handler_args[:1])
        while proc and signals:
            with contextlib.suppress(ProcessLookupError):
                proc.send_signal(signals.popleft())

    with signals_to(forward):
        command = [sys.executable, "-P", "-m", "runner", f"resume='{quoted}'"]
        proc = subprocess.Popen(command, env=environment, process_group=0)
        forward()  # signals that came before the child process existed
        code = proc.wait()
    return code if code >= 0 else 1


def _is_intact(folder: Path, digest_file: Path) -> bool:
    """Whether a worktree is complete and was not edited."""
    return (folder / "src" / "runner").is_dir() and digest_file.exists() and digest_file.read_text() == _digest(folder)


def _digest(folder: Path) -> str:
    return provenance.digest_of_code(folder / "src" / "runner")


def _remove(folder: Path) -> None:
    checkout.remove_worktree(folder)
    if folder.exists():
        shutil.rmtree(folder)


def _refuse_other_code(run: Recorded, folder: Path) -> None:
    """Refuse a worktree whose digest is not the recorded digest of the code that ran, if one was recorded."""
    recorded = run.manifest.get("code_sha256")
    if not recorded or recorded == _digest(folder):
        return
    why = "files that git ignores were part of the code"
    if (run.manifest.get("git") or {}).get("redacted"):
        why = "secrets were removed from the recorded changes"
    problem = f"the commit and the recorded changes do not give the code that ran: {why}"
    raise ConfigError(Fault("--exact", problem, "leave --exact out to run with the current code"))
