"""Calls of MLflow's REST API 2.0 without ``import mlflow``, which takes longer than the call."""

from __future__ import annotations

import json
import os
import socket
import ssl
import urllib.error
import urllib.request
from base64 import b64encode
from typing import Any

from runner.errors import Fault, TrackingError
from runner.secrets import take_credentials

TIMEOUT_S = 60.0


def ask(uri: str, what: str, body: dict[str, Any] | None = None, timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
    """Answer of the server at ``uri`` to a GET of ``what`` (such as ``runs/search``), or to a POST of ``body``.

    Raises:
        TrackingError: the server answers with an HTTP error.
        OSError, ValueError: no answer, or no JSON object.
    """
    address, user, password = take_credentials(uri)
    headers = {"Content-Type": "application/json", **_authorization(user, password)}
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(f"{address.rstrip('/')}/api/2.0/mlflow/{what}", data, headers)
    try:
        with urllib.request.urlopen(request, timeout=timeout_s, context=_tls()) as answer:
            return dict(json.load(answer))
    except urllib.error.HTTPError as error:
        remedy = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" if error.code in (401, 403) else ""
        problem = f"HTTP error {error.code} {error.reason}: {error.read(300).decode(errors='replace')}"
        raise TrackingError(Fault("uri", problem, remedy, address)) from error


def silence(uri: str, timeout_s: float = 3.0) -> str:
    """Why the server does not answer, in a few words; empty if it answers."""
    try:
        ask(uri, "experiments/search", {"max_results": 1}, timeout_s)
    except TrackingError as error:
        return error.faults[0].problem.splitlines()[0][:80]
    except ValueError:
        return "it is not an MLflow server"
    except OSError as error:
        return reason_of(error) or str(error)
    return ""


def reason_of(error: BaseException) -> str:
    """The system's reason in a network error, such as ``Connection refused``; empty if it has none."""
    seen: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in seen:
        seen.append(following)
        if isinstance(following, TimeoutError):
            return "timed out"
        if isinstance(following, ConnectionError | socket.gaierror) and following.strerror:
            return str(following.strerror)
        causes = (getattr(following, "reason", None), *following.args, following.__cause__, following.__context__)
        following = next((each for each in causes if isinstance(each, BaseException) and each not in seen), None)
    return ""


def _authorization(user: str | None, password: str | None) -> dict[str, str]:
    """Credentials of the URI, else of the environment, in the same order as MLflow's own client."""
    if not user:
        user, password = (os.environ.get(f"MLFLOW_TRACKING_{name}") for name in ("USERNAME", "PASSWORD"))
        if not (user and password):
            token = os.environ.get("MLFLOW_TRACKING_TOKEN")
            return {"Authorization": f"Bearer {token}"} if token else {}
    credentials = f"{user}:{password or ''}".encode()
    return {"Authorization": f"Basic {b64encode(credentials).decode()}"}


def _tls() -> ssl.SSLContext:
    """TLS settings from the environment variables of MLflow's client."""
    context = ssl.create_default_context(cafile=os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH"))
    if os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() == "true":
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context
