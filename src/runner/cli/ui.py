"""The verb ``ui``: serve MLflow's web UI for the runs on localhost, until Ctrl-C."""

from __future__ import annotations

import contextlib
import os
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
from typing import Annotated, Any
from urllib.parse import quote

from annotated_types import Ge, Le

from runner.cli.args import Args, Option, Verb
from runner.errors import ConfigError, Fault, TrackingError, suggest
from runner.report import mlflow_results, store_lookup
from runner.signals import signals_to
from runner.tracking import environment
from runner.tracking.mlflow import rest, store, views

HOST, FIRST_PORT, LAST_PORT = "127.0.0.1", 5000, 65535

VERB = Verb(
    "ui",
    """Opens MLflow's web UI with the runs, served on this machine only (127.0.0.1) until Ctrl-C.

  python -m runner ui                            the runs below outputs/
  python -m runner ui outputs_dir=/scratch/me    the runs of another folder
  python -m runner ui uri=https://mlflow.team    the address of the experiment's page on that server;
                                                 without uri the store of MLFLOW_TRACKING_URI, if it is set""",
    Option(
        "--port N", "listen on this port; default: 5000, or the next free port", Annotated[int, Ge(1), Le(LAST_PORT)]
    ),
    Option("--experiment NAME", "open the page of this experiment; default: `runner`, else the latest one"),
    Option("--no-browser", "only print the address, as on a machine without a display"),
    Option("uri=URI", "the MLflow store to show: a server or sqlite:////path/mlflow.db"),
)
PORTS_TRIED = 200
START_S = 120.0
"""Maximum time until the server answers: usually seconds, minutes on a busy machine with a cold disk."""
END_S = 5.0
"""Maximum time for the server's processes to end after a signal."""


def main(argv: list[str]) -> int:
    """The verb; returns the exit code: 0 after Ctrl-C, 1 if the server ended by itself.

    Raises:
        ConfigError: an unknown word, a port in use, or a folder without runs in MLflow.
        TrackingError: a store that does not answer.
    """
    args = VERB.read(argv)
    if args.words:
        raise ConfigError(*(Fault(word, "unexpected argument of ui", VERB.usage) for word in args.words))
    port, named = args["--port"], args["uri"] or environment.store_uri()
    if port and (problem := _why_taken(port)):
        raise ConfigError(Fault("--port", problem, f"--port {_next_free(port)} is free; or leave --port out", port))
    uri = store_lookup.checked(named) if named else _embedded(args.outputs_dir)
    if store.is_server(uri):
        if port:
            raise ConfigError(Fault("--port", "has no effect on the running server of uri", "leave it out", port))
        _show(_page(uri, args["--experiment"]), args)
        return 0
    if args["--experiment"] and uri.startswith("sqlite:"):
        with contextlib.suppress(sqlite3.Error):  # MLflow itself reports a missing or outdated database
            _refuse_unknown(args["--experiment"], mlflow_results.opened(uri).experiments())
    return _serve(uri, port or _free_port(), args)


def _refuse_unknown(name: str, experiments: Collection[str]) -> None:
    if name not in experiments:
        remedy = f"{suggest(name, experiments)} experiments: {', '.join(sorted(experiments)) or 'none'}".strip()
        raise ConfigError(Fault("--experiment", "no such experiment", remedy, name))


def _free_port() -> int:
    port = _next_free(FIRST_PORT)
    if port != FIRST_PORT:
        print(f"port {FIRST_PORT} is in use; using {port}", file=sys.stderr)
    return port


def _next_free(first: int) -> int:
    for port in range(first, min(first + PORTS_TRIED, LAST_PORT + 1)):
        if not _why_taken(port):
            return port
    raise ConfigError(Fault("--port", f"no port from {first} to {port} is free", "choose a free one: --port N"))


def _why_taken(port: int) -> str:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except PermissionError:
            return "is reserved for the system"
        except OSError:
            return "is in use by another program"
    return ""


def _embedded(outputs_dir: Path) -> str:
    """The URI of the embedded database in ``outputs_dir``."""
    database = outputs_dir.absolute() / "mlflow.db"
    if not database.exists():
        problem = f"no runs in MLflow yet: {outputs_dir} contains no mlflow.db"
        remedy = (
            "train a run (python -m runner), upload runs of tracking=offline (python -m runner sync), "
            "or choose another folder (outputs_dir=FOLDER) or a server (uri=URI)"
        )
        raise ConfigError(Fault("", problem, remedy))
    return f"sqlite:///{database}"


def _serve(uri: str, port: int, args: Args) -> int:
    """Run the server until Ctrl-C or a signal; all processes of the server have ended afterwards."""
    address = f"http://{HOST}:{port}"
    print("starting MLflow …", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="runner-") as folder, _signals() as signals:
        log = Path(folder, "server.log")
        proc = _start(uri, port, log)
        try:
            until = time.monotonic() + START_S
            while not _answers(address):
                if signals:
                    return 0
                if proc.poll() is not None or time.monotonic() > until:
                    raise TrackingError(Fault("", _why_not_started(proc, log), "see the server's output above"))
                time.sleep(0.1)
            _show(_page(address, args["--experiment"]), args)
            print("press Ctrl-C to stop", file=sys.stderr, flush=True)
            while not signals and proc.poll() is None:
                time.sleep(0.2)
            if not signals:
                print(f"MLflow's server ended:\n{_tail(log)}", file=sys.stderr)
            return 0 if signals else 1
        finally:
            _end(proc)


def _start(uri: str, port: int, log: Path) -> subprocess.Popen[bytes]:
    # The URI is passed in the environment: it may contain a password, and all users can read a command line.
    environment = {
        **os.environ,
        **{name: value for name, value in store.ENVIRONMENT.items() if name not in os.environ},
        "MLFLOW_BACKEND_STORE_URI": store.with_credentials(uri),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # saves ten processes of features that are not used here
        "MLFLOW_TRACKING_URI": "",
    }
    # No artifact options for `mlflow ui`: each run has its own artifact URI.
    command = [sys.executable, "-P", "-m", "mlflow", "ui", "--host", HOST, "--port", str(port), "--workers", "1"]
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            cwd=log.parent,  # MLflow creates ./mlartifacts in its working directory
            start_new_session=True,  # Ctrl-C reaches only this process, which then ends the server
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
        TrackingError: the server does not answer like an MLflow server.
    """
    address = address.rstrip("/")
    latest = {"max_results": 1000, "order_by": ["last_update_time DESC"]}
    try:
        answer = rest.ask(address, "experiments/search", latest, timeout_s=20)
        experiments = {each["name"]: each for each in answer.get("experiments", [])}
    except (OSError, ValueError, KeyError) as error:
        problem = f"{address} does not answer like an MLflow server: {error}"
        remedy = "check that the server is running and that the address is right"
        raise TrackingError(Fault("uri", problem, remedy)) from error
    own = [each for each in experiments if each != "Default"]
    experiment = name or ("runner" if "runner" in experiments else own[0] if own else "")
    if name:
        _refuse_unknown(name, experiments)
    if not experiment:
        return address
    # /runs: without it MLflow 3 opens the page of traces; without workflowType its mode for GenAI, without metrics.
    shown = experiments[experiment]
    has_view = views.TAG in [tag["key"] for tag in shown.get("tags", [])]
    view = f"&viewStateShareKey={views.KEY}" if has_view else ""
    return f"{address}/#/experiments/{quote(str(shown['experiment_id']))}/runs?workflowType=machine_learning{view}"


def _show(page: str, args: Args) -> None:
    print(f"MLflow   {page}", flush=True)
    has_display = sys.platform in ("darwin", "win32") or any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY")))
    if has_display and not args["--no-browser"]:
        with contextlib.suppress(webbrowser.Error):
            webbrowser.open(page)


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


def _why_not_started(proc: subprocess.Popen[bytes], log: Path) -> str:
    output = _tail(log)
    if "database schema" in output:
        return f"this database is of another version of MLflow and must be upgraded:\n{output}"
    ended = proc.returncode is not None
    problem = f"ended with code {proc.returncode}" if ended else f"did not answer within {START_S:.0f} s"
    return f"MLflow's server {problem}:\n{output}"


def _tail(log: Path) -> str:
    return "\n".join(f"    {line}" for line in log.read_text(errors="replace").splitlines()[-8:])
