"""Run a web server of another program on this machine (127.0.0.1) until Ctrl-C, and end all of its processes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from runner.errors import ConfigError, Fault, TrackingError
from runner.signals import signals_to

HOST, LAST_PORT = "127.0.0.1", 65535
PORTS_TRIED = 200
START_S = 120.0
"""Maximum time until the server answers: usually seconds, minutes on a busy machine with a cold disk."""
END_S = 5.0
"""Maximum time for the server's processes to end after a signal."""


@dataclass(frozen=True)
class Server:
    """A program to start."""

    name: str
    """In messages."""
    command: Sequence[str]
    environment: Mapping[str, str]
    """The whole environment: a password in it is not in the command, which all users can read."""
    port: int
    start_s: float = START_S
    explain: Callable[[str], str] = lambda _: ""
    """From the end of its output to a reason why it did not start; empty: unknown."""

    @property
    def address(self) -> str:
        return f"http://{HOST}:{self.port}"


def run(server: Server, folder: Path, show: Callable[[], object]) -> int:
    """Start the server in ``folder``, call ``show`` once it answers, and wait for Ctrl-C or a signal.

    Returns:
        the exit code: 0 after a signal, 1 if the server ended by itself.

    Raises:
        TrackingError: the server did not start.
    """
    print(f"starting {server.name} …", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="runner-") as logs, _signals() as signals:
        log = Path(logs, "server.log")
        proc = _start(server, folder, log)
        try:
            until = time.monotonic() + server.start_s
            while not (_answers(server.address) and _listens(proc, server.port)):
                if signals:
                    return 0
                if proc.poll() is not None or time.monotonic() > until:
                    raise TrackingError(Fault("", _why_not_started(server, proc, log), "see the server's output above"))
                time.sleep(0.1)
            show()
            print("press Ctrl-C to stop", file=sys.stderr, flush=True)
            while not signals and proc.poll() is None:
                time.sleep(0.2)
            if not signals:
                print(f"{server.name} ended:\n{_tail(log)}", file=sys.stderr)
            return 0 if signals else 1
        finally:
            _end(proc)


@contextlib.contextmanager
def port(chosen: int | None, first: int) -> Iterator[int]:
    """The chosen port, or the first free one from ``first`` on; while the block runs, nobody else gets it from here.

    Raises:
        ConfigError: the chosen port is in use.
    """
    if chosen:
        refuse_taken(chosen)
    number, claim = _next_free(chosen or first)
    with claim:
        if chosen and number != chosen:
            raise _taken(chosen, "is in use by another program")
        if number != first and not chosen:
            print(f"port {first} is in use; using {number}", file=sys.stderr)
        yield number


def refuse_taken(chosen: int) -> None:
    """Refuse a port that is in use.

    Raises:
        ConfigError: it is.
    """
    if problem := why_taken(chosen):
        raise _taken(chosen, problem)


def why_taken(number: int) -> str:
    """Why a port cannot be used; empty if it can."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, number))
        except PermissionError:
            return "is reserved for the system"
        except OSError:
            return "is in use by another program"
    return ""


def _taken(chosen: int, problem: str) -> ConfigError:
    number, claim = _next_free(chosen)
    claim.close()
    return ConfigError(Fault("--port", problem, f"--port {number} is free; or leave --port out", chosen))


def _next_free(first: int) -> tuple[int, IO[str]]:
    """The first free port from ``first`` on, and the file whose lock keeps it for this process until it is closed."""
    last = min(first + PORTS_TRIED, LAST_PORT + 1)
    for number in range(first, last):
        if not why_taken(number) and (claim := _claimed(number)):
            return number, claim
    raise ConfigError(Fault("--port", f"no port from {first} to {last - 1} is free", "choose a free one: --port N"))


def _claimed(number: int) -> IO[str] | None:
    """A locked file that keeps the port until the server listens, seconds later; None if another process has it."""
    folder = Path(tempfile.gettempdir(), f"runner-ports-{os.getuid()}")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        claim = (folder / str(number)).open("a")
    except OSError:  # no folder to write to: the port is not kept
        return open(os.devnull)
    try:
        fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        claim.close()
        return None
    return claim


def _start(server: Server, folder: Path, log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as output:
        return subprocess.Popen(
            list(server.command),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=dict(server.environment),
            cwd=folder,
            start_new_session=True,  # Ctrl-C reaches only this process, which then ends the server
        )


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except (OSError, ValueError):
        return False


def _listens(proc: subprocess.Popen[bytes], number: int) -> bool:
    """Whether it is this server that listens on the port: another program may have taken it meanwhile."""
    import psutil

    try:
        leader = psutil.Process(proc.pid)
        family: list[Any] = [leader, *leader.children(recursive=True)]
        name = "net_connections" if hasattr(leader, "net_connections") else "connections"  # its name before psutil 6
        connections = [each for member in family for each in getattr(member, name)("tcp")]
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:  # this system does not tell
        return True
    return any(each.status == psutil.CONN_LISTEN and each.laddr.port == number for each in connections)


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect the signals that ask this process to end while the block runs; they do not interrupt the block."""
    numbers: list[int] = []
    with signals_to(lambda number, _: numbers.append(number)):
        yield numbers


def _end(proc: subprocess.Popen[bytes]) -> None:
    """End the server and its child processes: SIGTERM first, then SIGKILL."""
    import psutil

    family: list[Any] = []
    with contextlib.suppress(psutil.Error):
        leader = psutil.Process(proc.pid)
        family = [leader, *leader.children(recursive=True)]
    for end in ("terminate", "kill"):
        for member in family:
            with contextlib.suppress(psutil.Error):
                getattr(member, end)()
        _, family = psutil.wait_procs(family, timeout=END_S)
        if not family:
            break
    proc.wait()


def _why_not_started(server: Server, proc: subprocess.Popen[bytes], log: Path) -> str:
    output = _tail(log)
    if reason := server.explain(output):
        return f"{reason}:\n{output}"
    ended = proc.returncode is not None
    problem = f"ended with code {proc.returncode}" if ended else f"did not answer within {server.start_s:.0f} s"
    return f"{server.name} {problem}:\n{output}"


def _tail(log: Path) -> str:
    return "\n".join(f"    {line}" for line in log.read_text(errors="replace").splitlines()[-8:])
