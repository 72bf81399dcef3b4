"""The verb ``ui``: serve MLflow's web UI for the runs on localhost, until Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import sys
import tempfile
import webbrowser
from collections.abc import Collection
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

from annotated_types import Ge, Le

from runner.cli import local_server
from runner.cli.args import Args, Option, Verb
from runner.cli.local_server import HOST, LAST_PORT
from runner.errors import ConfigError, Fault, TrackingError, suggest
from runner.report import mlflow_results, store_lookup
from runner.tracking import environment
from runner.tracking.mlflow import rest, store, views

FIRST_PORT = 5000

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
    if port:
        local_server.refuse_taken(port)
    uri = store_lookup.checked(named) if named else _embedded(args.outputs_dir)
    if store.is_server(uri):
        if port:
            raise ConfigError(Fault("--port", "has no effect on the running server of uri", "leave it out", port))
        _show(_page(uri, args["--experiment"]), args)
        return 0
    if args["--experiment"] and uri.startswith("sqlite:"):
        with contextlib.suppress(sqlite3.Error):  # MLflow itself reports a missing or outdated database
            _refuse_unknown(args["--experiment"], mlflow_results.opened(uri).experiments())
    with local_server.port(port, FIRST_PORT) as free:
        return _serve(uri, free, args)


def _refuse_unknown(name: str, experiments: Collection[str]) -> None:
    if name not in experiments:
        remedy = f"{suggest(name, experiments)} experiments: {', '.join(sorted(experiments)) or 'none'}".strip()
        raise ConfigError(Fault("--experiment", "no such experiment", remedy, name))


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
    """Run MLflow's server until Ctrl-C or a signal; all of its processes have ended afterwards."""
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
    server = local_server.Server("MLflow", command, environment, port, explain=_why_not_started)
    with tempfile.TemporaryDirectory(prefix="runner-") as folder:  # MLflow creates ./mlartifacts in its folder
        return local_server.run(server, Path(folder), lambda: _show(_page(server.address, args["--experiment"]), args))


def _why_not_started(output: str) -> str:
    is_old = "database schema" in output
    return "this database is of another version of MLflow and must be upgraded" if is_old else ""


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
