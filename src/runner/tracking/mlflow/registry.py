"""MLflow's model registry: registered models, their versions, and the logged models behind the versions.

A server may do what it was asked although its answer is lost, and MLflow's client then asks a second time. So what is
created has a tag of its own, by which it is searched afterwards: one is kept, and the others are deleted.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from runner.errors import Fault, TrackingError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

OURS, REQUEST = "runner", "runner.request"
"""Tags of registered models that this program created, and of what one call of this program created."""
T = TypeVar("T")


def has_ours(client: MlflowClient, name: str) -> bool:
    """Whether this program has registered a model of that name.

    Raises:
        TrackingError: another program has.
    """
    from mlflow.exceptions import MlflowException

    try:
        model = client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise
    if OURS not in model.tags:
        problem = "is the name of a registered model that this program did not create"
        remedy = f"use another name, or allow new versions: set the tag {OURS} of that model in MLflow, to any value"
        raise TrackingError(Fault("NAME", problem, remedy, name))
    return True


def create_model(client: MlflowClient, name: str) -> None:
    """Create a registered model of this name, without versions."""
    try:
        client.create_registered_model(name, tags={OURS: "true"})
    except Exception:  # a lost answer; or the second request, which finds the model of the first
        if not has_ours(client, name):
            raise


def create_version(
    client: MlflowClient, name: str, source: str, run_id: str, tags: dict[str, str], **options: str
) -> str:
    """Create a version of a registered model; returns its number."""
    request = uuid.uuid4().hex

    def created() -> list[str]:
        versions = client.search_model_versions(f"run_id = '{run_id}'")
        ours = [each for each in versions if each.name == name and each.tags.get(REQUEST) == request]
        return sorted((str(each.version) for each in ours), key=int)

    return _once(
        lambda: client.create_model_version(name, source, run_id, tags={**tags, REQUEST: request}, **options),
        created,
        lambda version: client.delete_model_version(name, version),
    )


def create_logged_model(client: MlflowClient, experiment: str, name: str, run_id: str) -> LoggedModel:
    """Create a logged model of a run, without files (MLflow 3)."""
    request = uuid.uuid4().hex
    return _once(
        lambda: client.create_logged_model(experiment, name, run_id, {REQUEST: request}, model_type="runner"),
        lambda: list(client.search_logged_models([experiment], f"tags.`{REQUEST}` = '{request}'")),
        lambda model: client.delete_logged_model(model.model_id),
    )


def _once(create: Callable[[], Any], created: Callable[[], Sequence[T]], delete: Callable[[T], Any]) -> T:
    """Call ``create``, and delete what it has ``created`` besides the first; returns the first."""
    try:
        create()
    except Exception:
        if not created():
            raise
    first, *others = created()
    for other in others:
        delete(other)
    return first
