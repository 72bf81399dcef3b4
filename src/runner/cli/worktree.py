"""The code of an earlier run, checked out into the user's cache: what ``rerun --exact`` runs."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
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
    """The folder that holds the very code of a run, made or found in the cache.

    Raises:
        ConfigError: there is no git, no such commit here, or what was recorded of the code does not make it again.
    """
    git, code = run.manifest.get("git") or {}, run.code
    checkout.refuse_unknown(code.sha if code else None)
    assert code
    if git.get("dirty") and not code.patch:
        problem = "its uncommitted changes were not recorded (dirty.diff is missing)"
        raise ConfigError(Fault("--exact", problem, "leave --exact out: it runs with the code that is here"))
    patch = hashlib.sha256(code.patch.encode("utf-8", "surrogateescape")).hexdigest()
    _tidy(cache_dir("worktrees"))
    folder = cache_dir("worktrees") / (code.sha[:16] + (f"-{patch[:8]}" if code.patch else ""))
    made_as = folder.with_name(f".{folder.name}.sha256")
    with locked(folder.with_name(f".{folder.name}.lock")):
        if not _is_intact(folder, made_as):
            _remove(folder)
            checkout.add_worktree(code, folder)
            write_atomic(made_as, _digest(folder))
    _refuse_other_code(run, folder)
    return folder


def _tidy(rooms: Path) -> None:
    """Remove what was noted beside worktrees that somebody has taken away since."""
    for suffix in (".sha256", ".lock"):
        for path in rooms.glob(f".*{suffix}"):
            with contextlib.suppress(OSError):  # another process tidies, too
                is_old = time.time() - path.stat().st_mtime > STALE_S  # nobody is about to make the folder beside it
                if is_old and not (rooms / path.name[1:].removesuffix(suffix)).exists() and not is_held(path):
                    path.unlink()


def take_up(rundir: RunDir, folder: Path) -> int:
    """Bring a prepared run to its end with the code in ``folder``; returns the exit code.

    The run is handed over as any version of the program takes one: ``resume=RUN``. What this process is told by
    signals it passes on, once: the other one has a group of its own, which the terminal's Ctrl-C does not reach.
    """
    quoted = str(rundir.path).replace("\\", "\\\\").replace("'", "\\'")
    before = os.environ.get("PYTHONPATH")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(folder / "src"), before]))}
    proc: subprocess.Popen[bytes] | None = None
    asked: deque[int] = deque()

    def pass_on(*said: Any) -> None:
        asked.extend(said[:1])
        while proc and asked:
            with contextlib.suppress(ProcessLookupError):
                proc.send_signal(asked.popleft())

    with signals_to(pass_on, signal.SIGHUP):
        command = [sys.executable, "-P", "-m", "runner", f"resume='{quoted}'"]
        proc = subprocess.Popen(command, env=environment, process_group=0)
        pass_on()  # what came before there was a process
        code = proc.wait()
    return code if code >= 0 else 1


def _is_intact(folder: Path, made_as: Path) -> bool:
    """Whether it is what was made: neither cut short nor edited."""
    return (folder / "src" / "runner").is_dir() and made_as.exists() and made_as.read_text() == _digest(folder)


def _digest(folder: Path) -> str:
    return provenance.digest_of_code(folder / "src" / "runner")


def _remove(folder: Path) -> None:
    checkout.remove_worktree(folder)
    if folder.exists():
        shutil.rmtree(folder)


def _refuse_other_code(run: Recorded, folder: Path) -> None:
    """The commit and the recorded changes must come to what ran, where the run says what that was."""
    ran = run.manifest.get("code_sha256")
    if not ran or ran == _digest(folder):
        return
    why = "files that git ignores were part of it"
    if (run.manifest.get("git") or {}).get("redacted"):
        why = "secrets were cut out of the uncommitted changes when they were recorded"
    problem = f"the commit and the recorded changes do not come to the code that ran: {why}"
    raise ConfigError(Fault("--exact", problem, "leave --exact out: it runs with the code that is here"))
