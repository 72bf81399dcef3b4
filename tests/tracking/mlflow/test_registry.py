"""The model registry of a real server, also when its answers are lost."""

from __future__ import annotations

import pytest
from fixtures import versions
from fixtures.lost_answers import Cutting
from fixtures.mirrored_runs import Server

from runner.errors import TrackingError
from runner.tracking.mlflow import registry, store


@pytest.mark.parametrize("times", [0, 1, 2])
@versions.mlflow_3
def test_a_lost_answer_doubles_neither_versions_nor_models(server: Server, times: int) -> None:
    """The server does what it is asked, but its answer is lost; MLflow's client asks a second time by itself."""
    paths = "/registered-models/create", "/model-versions/create", "/mlflow/logged-models"
    proxy = Cutting(server.running(), *paths, times=times)
    client, direct = store.connect(proxy.uri), store.connect(server.uri)
    run, name = direct.create_run("0").info, f"bot-{times}"  # the server is shared
    assert not registry.has_ours(client, name)
    registry.create_model(client, name)
    assert registry.has_ours(client, name)
    logged = registry.create_logged_model(client, "0", name, run.run_id)
    source, by_id = f"models:/{logged.model_id}", {"model_id": logged.model_id}
    first = registry.create_version(client, name, source, run.run_id, {"own": "tag"}, description="# bot", **by_id)
    second = registry.create_version(client, name, source, run.run_id, {}, **by_id)
    assert proxy.cut == 3 * times
    versions = {str(each.version): each for each in direct.search_model_versions(f"name = '{name}'")}
    assert versions.keys() == {first, second}
    assert (versions[first].description, versions[first].tags["own"]) == ("# bot", "tag")
    models = [each for each in direct.search_logged_models(["0"]) if each.source_run_id == run.run_id]
    assert [each.model_id for each in models] == [logged.model_id]


def test_models_of_others_are_left_alone(server: Server) -> None:
    client = store.connect(server.running().uri)
    client.create_registered_model("theirs")
    with pytest.raises(TrackingError, match="did not create"):
        registry.create_model(client, "theirs")
