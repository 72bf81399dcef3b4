"""The verb ``ui``: MLflow's pages of the runs, on this machine's own address, until Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import webbrowser
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from runner.cli import args
from runner.errors import ConfigError, Fault, TrackingError, suggest
from runner.report import mlflow_results, record
from runner.signals import signals_to
from runner.tracking.mlflow import rest, store

HELP = """python -m runner ui [--port N] [--experiment NAME] [--no-browser] [uri=URI] [outputs_dir=FOLDER]

Shows the runs in MLflow's own pages, served on this machine alone (127.0.0.1) until Ctrl-C.

  python -m runner ui                            the runs below outputs/
  python -m runner ui outputs_dir=/scratch/me    those of another folder
  python -m runner ui uri=https://mlflow.team    the address of the experiment's page on that server

  --port N           listen there; without it on 5000, or on the next port that is free
  --experiment NAME  show its page; by default that of `runner`, or the only one there is
  --no-browser       only print the address; a machine without a display does no more anyway"""

HOST, FIRST_PORT, LAST_PORT = "127.0.0.1", 5000, 65535
PORTS_TRIED = 200
START_S = 120.0
"""How long a server may take until it answers: seconds, minutes on a busy machine with a cold disk."""
END_S = 5.0
"""How long its processes may take to leave."""


def main(argv: list[str]) -> int:
    """The verb; returns the exit code: 0 after Ctrl-C, which is how it ends; 1 where the server ended by itself.

    Raises:
        ConfigError: a word it does not know, a port that is taken, or a folder without runs in MLflow.
        TrackingError: a store that does not answer.
    """
    words = args.read(argv, HELP, flags=("--no-browser",), valued=("--port", "--experiment"))
    if words is None:
        return 0
    unknown, settings = args.settings(words.words, ("uri",))
    if unknown:
        raise ConfigError(*(Fault(word, "ui does not know this word", HELP.splitlines()[0]) for word in unknown))
    port = _asked_port(words)
    uri = record.checked(settings["uri"]) if "uri" in settings else _embedded(words.outputs_dir)
    if store.is_server(uri):
        if port is not None:
            raise ConfigError(Fault("--port", "has no effect: that server runs already", "leave it out", port))
        _show(_page(uri, words.options.get("--experiment")), words)
        return 0
    if "--experiment" in words.options and uri.startswith("sqlite:"):
        with contextlib.suppress(sqlite3.Error):  # of another version, or none: MLflow has the words for that
            _refuse_unknown(words.options["--experiment"], mlflow_results.opened(uri).experiments())
    return _serve(uri, port or _free_port(), words)


def _refuse_unknown(name: str, there: Collection[str]) -> None:
    if name not in there:
        remedy = f"{suggest(name, there)} those there are: {', '.join(sorted(there)) or 'none'}".strip()
        raise ConfigError(Fault("--experiment", "there is none of that name", remedy, name))


def _asked_port(words: args.Args) -> int | None:
    """The port that was asked for, if it can be had."""
    if "--port" not in words.options:
        return None
    text = words.options["--port"]
    if not text.isdecimal() or not 0 < int(text) <= LAST_PORT:
        raise ConfigError(Fault("--port", f"must be a whole number from 1 to {LAST_PORT}", "as in --port 5001", text))
    if problem := _why_taken(int(text)):
        remedy = f"--port {_next_free(int(text))} is free; or leave --port out"
        raise ConfigError(Fault("--port", problem, remedy, text))
    return int(text)


def _free_port() -> int:
    port = _next_free(FIRST_PORT)
    if port != FIRST_PORT:
        print(f"port {FIRST_PORT} is taken; the next that is free is {port}", file=sys.stderr)
    return port


def _next_free(first: int) -> int:
    for port in range(first, min(first + PORTS_TRIED, LAST_PORT + 1)):
        if not _why_taken(port):
            return port
    remedy = "name one that is free: --port N"
    raise ConfigError(Fault("--port", f"no port from {first} to {port} is free", remedy))


def _why_taken(port: int) -> str:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except PermissionError:
            return "is for the system's own programs"
        except OSError:
            return "is taken by another program"
    return ""


def _embedded(outputs_dir: Path) -> str:
    """The database below ``outputs_dir``."""
    database = outputs_dir.absolute() / "mlflow.db"
    if not database.exists():
        problem = f"there is nothing in MLflow yet: {outputs_dir} holds no mlflow.db"
        remedy = (
            "python -m runner trains a first run, python -m runner sync brings those of tracking=offline; "
            "outputs_dir=FOLDER names another folder, uri=URI a server"
        )
        raise ConfigError(Fault("", problem, remedy))
    return f"sqlite:///{database}"


def _serve(uri: str, port: int, words: args.Args) -> int:
    """Serve until somebody ends it; every process that was started for it is gone afterwards."""
    address = f"http://{HOST}:{port}"
    print("MLflow is starting …", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="runner-") as folder, _signals() as asked_to_end:
        log = Path(folder, "server.log")
        proc = _start(uri, port, log)
        try:
            until = time.monotonic() + START_S
            while not _answers(address):
                if asked_to_end:
                    return 0
                if proc.poll() is not None or time.monotonic() > until:
                    raise TrackingError(Fault("", _why_not_started(proc, log), "see what it says above, if anything"))
                time.sleep(0.1)
            _show(_page(address, words.options.get("--experiment")), words)
            print("Ctrl-C ends it", file=sys.stderr, flush=True)
            while not asked_to_end and proc.poll() is None:
                time.sleep(0.2)
            if not asked_to_end:
                print(f"MLflow's server has ended:\n{_tail(log)}", file=sys.stderr)
            return 0 if asked_to_end else 1
        finally:
            _end(proc)


def _start(uri: str, port: int, log: Path) -> subprocess.Popen[bytes]:
    # The URI goes through the environment: it may hold a password, and everybody can read a command line.
    environment = {
        **os.environ,
        **{name: value for name, value in store.ENVIRONMENT.items() if name not in os.environ},
        "MLFLOW_BACKEND_STORE_URI": store.with_credentials(uri),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # ten processes fewer, for features nobody uses here
        "MLFLOW_TRACKING_URI": "",
    }
    # What `mlflow ui` does without: a registry, and artifacts of its own. Each run says where its artifacts lie.
    command = [sys.executable, "-P", "-m", "mlflow", "ui", "--host", HOST, "--port", str(port), "--workers", "1"]
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            cwd=log.parent,  # it makes ./mlartifacts where it stands
            start_new_session=True,  # the terminal's Ctrl-C reaches this process alone, which ends the server
        )


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except (OSError, ValueError):
        return False


def _page(address: str, name: str | None) -> str:
    """The address of an experiment's page.

    Raises:
        ConfigError: there is no such experiment.
        TrackingError: the server does not say.
    """
    address = address.rstrip("/")
    latest = {"max_results": 1000, "order_by": ["last_update_time DESC"]}
    try:
        answer = rest.ask(address, "experiments/search", latest, timeout_s=20)
        found = {each["name"]: each["experiment_id"] for each in answer.get("experiments", [])}
    except (OSError, ValueError, KeyError) as error:
        problem = f"{address} does not answer as an MLflow server does: {error}"
        raise TrackingError(Fault("uri", problem, "does it run, and is the address right?")) from error
    own = [each for each in found if each != "Default"]
    wanted = name or ("runner" if "runner" in found else own[0] if own else "")
    if name:
        _refuse_unknown(name, found)
    # Its runs: without a page MLflow 3 opens what it has to say of traces.
    return f"{address}/#/experiments/{quote(str(found[wanted]))}/runs" if wanted else address


def _show(page: str, words: args.Args) -> None:
    print(f"MLflow   {page}", flush=True)
    has_display = sys.platform in ("darwin", "win32") or any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY")))
    if has_display and not words.has("--no-browser"):
        with contextlib.suppress(webbrowser.Error):
            webbrowser.open(page)


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """What this process was asked to end by while the block runs; nothing interrupts the block itself."""
    asked_to_end: list[int] = []
    with signals_to(lambda number, _: asked_to_end.append(number), signal.SIGHUP):
        yield asked_to_end


def _end(proc: subprocess.Popen[bytes]) -> None:
    """End the server and all its processes: one after the other, each by its own id."""
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


def _why_not_started(proc: subprocess.Popen[bytes], log: Path) -> str:
    said = _tail(log)
    if "database schema" in said:
        return f"this database was made by another version of MLflow, which has to bring it up to date:\n{said}"
    why = f"ended with code {proc.returncode}" if proc.returncode is not None else f"gives no answer in {START_S:.0f} s"
    return f"MLflow's server {why}:\n{said}"


def _tail(log: Path) -> str:
    return "\n".join(f"    {line}" for line in log.read_text(errors="replace").splitlines()[-8:])
