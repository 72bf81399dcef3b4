"""``tracking.webhook=URL``: a POST when a run or a sweep has ended, as JSON that Slack, too, understands.

The URL is a secret: the configuration of a run holds its scheme and host only, the rest is in the environment
(``RUNNER_WEBHOOK``), which the processes of the run inherit.
"""

from __future__ import annotations

import json
import math
import os
import re
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from runner.errors import first_line
from runner.secrets import HIDDEN, redact, redact_tree
from runner.terminal import duration
from runner.tracking import naming
from runner.tracking.metrics_log import BEFORE, LOSS
from runner.tracking.rundir import RunDir
from runner.tracking.state_file import State
from runner.tracking.sweepdir import SweepDir

VARIABLE = "RUNNER_WEBHOOK"
TIMEOUT_S = 10.0
MOST_REASONS = 5
"""Failed runs of a sweep that are named with their reasons."""


def hidden(url: str) -> str:
    """Scheme and host of the URL: what a configuration may hold of it. A text that is no URL stays as it is."""
    try:
        parts = urlsplit(url)
        is_url = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and not re.search(r"\s", url)
    except ValueError:
        return url
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}/{HIDDEN}" if is_url else url


def notify(webhook: str | None, message: Mapping[str, Any]) -> str:
    """Send the message to the webhook of a configuration, if any; returns the error message, empty on success."""
    if webhook is None:
        return ""
    url = os.environ.get(VARIABLE, "")
    if hidden(url) != webhook:
        return f"not sent: the URL of {webhook} is not in the environment variable {VARIABLE}"
    problems = [f"no answer within {TIMEOUT_S:g} s"]
    # A thread, because the timeout of urllib is that of each single read.
    thread = threading.Thread(target=_post, args=(url, message, problems), daemon=True)
    thread.start()
    thread.join(TIMEOUT_S)
    return f"not sent to {webhook}: {problems[-1]}" if problems[-1] else ""


def of_run(rundir: RunDir, state: State) -> dict[str, Any]:
    """The message about a run that has ended."""
    manifest = rundir.read_manifest()
    name, mlflow = naming.short_name(manifest) or rundir.path.name, manifest.get("mlflow") or {}
    metrics = {
        key: float(value)
        for key, value in state.summary.items()
        if "/" in key and isinstance(value, int | float) and math.isfinite(value)
    }
    text = f"run {name} {state.status}" + (f": {state.reason}" if state.reason else "")
    text += f", step {state.step}/{state.total_steps}" if state.total_steps else ""
    text += f", {LOSS} {metrics[LOSS]:.4f}" if LOSS in metrics else ""
    text += f" (before: {metrics[LOSS + BEFORE]:.4f})" if LOSS + BEFORE in metrics else ""
    text += f", {duration(state.seconds)}" if state.seconds else ""
    return {
        "text": text, "kind": "run", "run": name, "status": state.status, "reason": state.reason, "step": state.step,
        "total_steps": state.total_steps, "loss": metrics.get(LOSS), "metrics": metrics, "seconds": state.seconds,
        "folder": str(rundir.path), "host": state.host, "mlflow_run_id": mlflow.get("run_id"), "url": mlflow.get("url"),
    }  # fmt: skip


def of_sweep(sweep: SweepDir, status: str, states: Sequence[State]) -> dict[str, Any]:
    """The message about a sweep that has ended; ``status``: that of its parent run in MLflow."""
    manifest, counts = sweep.read(), dict(sorted(Counter(state.status for state in states).items()))
    name, mlflow = str(manifest.get("name") or sweep.path.name), manifest.get("mlflow") or {}
    labels = [str(job.get("label") or job["folder"]) for job in manifest.get("jobs", {}).values()]
    ends = dict(zip(labels, states, strict=False))  # a search may have added a run since
    values = {label: state.summary.get(LOSS) for label, state in ends.items()}
    losses = {label: float(v) for label, v in values.items() if isinstance(v, int | float) and math.isfinite(v)}
    best = min(losses, key=lambda label: losses[label], default=None)
    failed = {label: state.reason for label, state in ends.items() if state.status == "failed"}
    text = f"sweep {name} ended: " + ", ".join(f"{count} {each}" for each, count in counts.items())
    text += f"; lowest {LOSS} {losses[best]:.4f} ({best})" if best is not None else ""
    text += "".join(f"\n{label}: {reason}" for label, reason in list(failed.items())[:MOST_REASONS])
    return {
        "text": text, "kind": "sweep", "sweep": name, "status": status, "counts": counts, "best": best,
        "loss": losses[best] if best is not None else None, "failed": failed, "folder": str(sweep.path),
        "mlflow_run_id": mlflow.get("parent_run_id"), "url": mlflow.get("url"),
    }  # fmt: skip


def _post(url: str, message: Mapping[str, Any], problems: list[str]) -> None:
    """POST the message; appends the error message to ``problems``, empty on success."""
    from urllib import request  # imports ssl

    class NoRedirect(request.HTTPRedirectHandler):
        """A redirect would be followed by a GET, whose answer says nothing about the message."""

        def redirect_request(self, *_: Any) -> None:
            return None

    body = json.dumps(redact_tree(message), ensure_ascii=False).encode()
    try:
        post = request.Request(url, body, {"Content-Type": "application/json"})
        with request.build_opener(NoRedirect).open(post, timeout=TIMEOUT_S):
            problems.append("")
    except Exception as error:  # no route, no certificate, a refusal, no HTTP …
        if not isinstance(getattr(error, "reason", error), TimeoutError):
            problems.append(redact(first_line(error)))
