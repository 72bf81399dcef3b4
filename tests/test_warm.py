"""A process that is forked from the warm one is what one would be that is started anew."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import warm

THIS = Path(__file__)
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE, signal.SIGCHLD, signal.SIGUSR2)


def both(monkeypatch: pytest.MonkeyPatch, *words: str, **how: Any) -> list[subprocess.Popen[str]]:
    """The same process, warm and cold, after it has ended; its output is kept in ``args``."""
    found = []
    for is_warm in (True, False):
        monkeypatch.setattr(warm, "is_wanted", is_warm)
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            [sys.executable, str(THIS), *words], stdin=pipe, stdout=pipe, stderr=pipe, text=True, **how
        )
        assert isinstance(process, warm.Popen)
        assert process.is_warm is is_warm
        process.args = process.communicate("asked")
        found.append(process)
    return found


def test_it_sees_what_a_new_one_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("RUNNER_SEEN", "COLUMNS", "LINES"):  # of these readline tells the system, and not Python
        monkeypatch.setenv(name, "100")
    monkeypatch.delenv("PYTEST_CURRENT_TEST")
    ignored, umask = signal.signal(signal.SIGHUP, signal.SIG_IGN), os.umask(0o027)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
    try:
        warm_one, cold_one = both(monkeypatch, "look", "at this", cwd=tmp_path, start_new_session=True)
    finally:
        signal.signal(signal.SIGHUP, ignored)
        os.umask(umask)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    assert (warm_one.returncode, cold_one.returncode) == (0, 0), (warm_one.args, cold_one.args)
    seen, expected = (json.loads(process.args[0]) for process in (warm_one, cold_one))
    set_by_imports = seen["environment"].keys() - expected["environment"].keys()
    assert set_by_imports <= {"TORCHINDUCTOR_CACHE_DIR", "KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK"}
    for name in set_by_imports:
        del seen["environment"][name]
    assert seen == expected
    assert (seen["said"], seen["folder"], seen["leads"]) == ("asked", str(tmp_path), [True, True])
    assert (warm_one.args[1], cold_one.args[1]) == ("", "")


@pytest.mark.parametrize("how", ["exit", "say", "raise", "interrupt", "kill", "return"])
def test_it_ends_as_a_new_one_ends(monkeypatch: pytest.MonkeyPatch, how: str):
    warm_one, cold_one = both(monkeypatch, how)
    assert warm_one.returncode == cold_one.returncode
    (out, error), (expected_out, expected_error) = warm_one.args, cold_one.args
    assert out == expected_out
    assert error.splitlines()[-1:] == expected_error.splitlines()[-1:]


def look() -> None:
    os.umask(umask := os.umask(0))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    seen = {
        "words": [sys.argv, sys.orig_argv, sys.executable, __name__],
        "shown": Path("/proc/self/cmdline").read_text().strip("\0").split("\0"),
        "path": sys.path,
        "folder": os.getcwd(),
        "environment": {name: environment[name] for name in sorted(environment)},
        "umask": umask,
        "leads": [os.getsid(0) == os.getpid(), os.getpgid(0) == os.getpid()],
        "handlers": [str(signal.getsignal(number)) for number in SIGNALS],
        "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
        "streams": [[each.encoding, each.errors, each.line_buffering] for each in (sys.stdout, sys.stderr)],
        "said": sys.stdin.read(),
        "open": len(os.listdir("/proc/self/fd")),
    }
    print(json.dumps(seen))


def end(how: str) -> None:
    print("first")
    if how == "exit":
        sys.exit(75)
    if how == "say":
        sys.exit("it does not work")
    if how == "raise":
        raise ValueError("too deep a thought")
    if how in ("interrupt", "kill"):
        os.kill(os.getpid(), signal.SIGINT if how == "interrupt" else signal.SIGKILL)


if __name__ == "__main__":
    look() if sys.argv[1] == "look" else end(sys.argv[1])
