"""Several calls of MLflow's client are one transaction."""

# ruff: noqa: F401, F811 - fixtures are imported, then asked for by name

from __future__ import annotations

from pathlib import Path

import pytest
from fixtures.mirrored_runs import commits_of, outputs

from runner.tracking.mlflow import store
from runner.tracking.mlflow.transaction import transaction


def test_all_calls_are_committed_at_the_end_or_none(outputs: Path) -> None:
    client = store.connect(f"sqlite:///{outputs}/mlflow.db")
    experiment = client.create_experiment("many")

    def rows() -> list[list[object]]:
        return store.read_sqlite(outputs / "mlflow.db", ["SELECT run_uuid FROM runs"])[0]

    with commits_of(client) as commits, transaction(client):
        ids = [client.create_run(experiment).info.run_id for _ in range(3)]
        client.set_tag(ids[0], "a", "1")
        client.log_metric(ids[0], "loss", 1.0, step=1)
        client.delete_tag(ids[0], "a")
        assert client.get_run(ids[0]).data.metrics == {"loss": 1.0}, "a later call sees what an earlier one wrote"
        assert "a" not in client.get_run(ids[0]).data.tags
        assert rows() == [], "other processes read on, and see what was committed before"
    assert (len(rows()), len(commits)) == (3, 1)

    def create_and_ask_for(run_id: str) -> None:
        with transaction(client):
            client.create_run(experiment)
            client.get_run(run_id)

    with pytest.raises(Exception, match="not found"):
        create_and_ask_for("0" * 32)
    assert len(rows()) == 3, "nothing is written if the block fails"
    client.create_run(experiment)
    assert len(rows()) == 4, "afterwards each call is a transaction again"
