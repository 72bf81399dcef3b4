"""The files of a run that are sent to MLflow once its params, tags and metrics are there."""

from __future__ import annotations

import inspect
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run


@dataclass
class Outbox:
    """Files, folders and texts; each is sent once, with its contents at that time."""

    paths: dict[Path, None] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    """Path below the artifacts of the run → contents."""

    def add(self, *paths: Path) -> None:
        """Those of the files and folders that exist, for the top folder of the run's artifacts."""
        self.paths.update(dict.fromkeys(path for path in paths if path.exists()))

    def send(self, client: MlflowClient, run: Run) -> None:
        """Send everything, and empty the outbox; after an exception everything is still in it."""
        if not (self.paths or self.texts):
            return
        artifacts = _artifacts(client, run)
        for path in self.paths:
            if path.is_dir():
                artifacts.log_artifacts(str(path), path.name)
            else:
                artifacts.log_artifact(str(path))
        with tempfile.TemporaryDirectory() as folder:
            for name, text in self.texts.items():
                file = Path(folder, Path(name).name)
                file.write_text(text, encoding="utf-8")
                artifacts.log_artifact(str(file), str(Path(name).parent) if "/" in name else None)
        self.paths.clear()
        self.texts.clear()


def _artifacts(client: MlflowClient, run: Run) -> Any:
    """Where the artifacts of the run are. MLflow's client would ask for the run once more to find this out."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    is_new = "tracking_uri" in inspect.signature(get_artifact_repository).parameters  # added in MLflow 3
    more = {"tracking_uri": client.tracking_uri} if is_new else {}
    return get_artifact_repository(run.info.artifact_uri, **more)
