"""Upload many runs to the embedded database with few commits.

A run that never started needs 16 commits by itself, and each waits for the disk. Here, ``RUNS`` runs need three: one
for their rows, then their files are copied, then one for what says that they are complete; so a process that is
killed leaves a run as it was, or without the mark that it is complete. The runs are not in step with other processes
for the time of one transaction only, and another writer waits for no longer (MLflow's own limit is 20 s).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator

from runner.errors import RunnerError
from runner.files import at_once
from runner.tracking.mlflow import store
from runner.tracking.mlflow.place import Seen
from runner.tracking.mlflow.run import MlflowRun
from runner.tracking.mlflow.transaction import transaction

RUNS, RECORD_BYTES = 20, 100_000
"""Most runs of a transaction, and most bytes of their metrics: about half a second of a core."""


def update(runs: Iterable[MlflowRun]) -> None:
    """Upload the runs as ``MlflowRun.update`` does; runs of other stores, and long runs, are left out.

    Whatever fails leaves its runs to ``MlflowRun.update``, which says why. The caller holds the upload locks.
    """
    for group in groups(runs):
        sent = {run: run.sent for run in group}
        try:
            failed = _update(group)
        except Exception:  # MLflow stores raise many exception types
            failed = group
        for run in failed:
            run.forget()
            run.sent = sent[run]


def groups(runs: Iterable[MlflowRun]) -> Iterator[list[MlflowRun]]:
    """The runs of a database in groups for one transaction each."""
    group: list[MlflowRun] = []
    weight = 0
    for run in sorted((run for run in runs if run.uri.startswith("sqlite:")), key=lambda run: run.uri):
        if (more := run.size()) > RECORD_BYTES:
            continue
        if group and (len(group) == RUNS or weight + more > RECORD_BYTES or run.uri != group[0].uri):
            yield group
            group, weight = [], 0
        group, weight = [*group, run], weight + more
    if group:
        yield group


def _update(group: list[MlflowRun]) -> list[MlflowRun]:
    """Returns the runs that failed; all of them if an exception is raised."""
    client = store.connect(group[0].uri)
    identities = [str(run.rundir.read_manifest().get("id")) for run in group]
    seen = Seen(unknown=set(identities) - store.known_identities(group[0].uri, identities))
    failed: list[MlflowRun] = []

    def send_files(run: MlflowRun) -> None:
        try:
            run.send_files()
        except Exception:  # such as a full disk: a problem of this run
            failed.append(run)

    with transaction(client):
        for run in group:
            try:
                run.send_rows(seen)
            except RunnerError:  # such as a run that was deleted in MLflow
                failed.append(run)
    sent = [run for run in group if run not in failed]
    at_once(functools.partial(send_files, run) for run in sent)
    with transaction(client):
        for run in sent:
            run.send_end(is_complete=run not in failed)
    return failed
