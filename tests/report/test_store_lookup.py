"""A run of an MLflow database, named by its name or the beginning of its id."""

# ruff: noqa: F401, F811 - fixtures are imported, then asked for by name

from __future__ import annotations

from pathlib import Path

import pytest
from fixtures.mirrored_runs import outputs

from runner.errors import ConfigError, TrackingError
from runner.report import store_lookup
from runner.tracking.mlflow import store


def test_a_name_and_the_beginning_of_an_id_name_a_run(outputs: Path) -> None:
    uri = f"sqlite:///{outputs}/mlflow.db"
    client = store.connect(uri)
    assert "the store has no runs" in refusal("first", uri)
    first, *same = [client.create_run("0", run_name=name, tags={"a": name}).info for name in ("first", "two", "two")]
    assert store_lookup.run_id_of("first", uri) == store_lookup.run_id_of(first.run_id[:8], uri) == first.run_id
    assert store_lookup._only(*store_lookup._heads("first", uri), "first", uri).run_id == first.run_id, "by the client"
    assert store_lookup.tags_of_database(first.run_id, uri)["a"] == "first"
    assert "did you mean 'first'?" in refusal("frst", uri)
    several = refusal("two", uri)
    assert "'two' is ambiguous: it matches 2 or more runs" in several
    assert all(each.run_id in several for each in same)
    client.delete_run(first.run_id)
    assert "there is no run 'first'" in refusal("first", uri)


def refusal(word: str, uri: str) -> str:
    with pytest.raises(ConfigError) as error:
        store_lookup.run_id_of(word, uri)
    return str(error.value)


def test_the_store_is_checked_before_it_is_asked(tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match="there is no such database"):
        store_lookup.checked(f"sqlite:///{tmp_path}/mlflow.db")
    with pytest.raises(ConfigError, match="did you mean 'http'"):
        store_lookup.checked("htp://host")
    with pytest.raises(TrackingError, match="is this an MLflow database"), store_lookup.tracking_errors("sqlite:///x"):
        raise ValueError("no such table: runs")
    assert store_lookup.may_be_id("0123abcd")
    assert not store_lookup.may_be_id("first")
    assert not store_lookup.may_be_id("0"), "too short"
