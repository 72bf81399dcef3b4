"""The verb ``register``: a trained model as a version of a name in MLflow's registry, ready to be loaded and served."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shlex
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner import terminal
from runner.cli import args
from runner.errors import ConfigError, Fault, RunnerError, TrackingError
from runner.report import model_card
from runner.secrets import take_credentials
from runner.tracking.mlflow import store, upload
from runner.tracking.mlflow.run import explained
from runner.train import merge, trained
from runner.train.trained import Trained

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

HELP = """python -m runner register RUN NAME [--alias ALIAS]

Puts what a run has trained into the model registry of the MLflow store that the run is in: a new version of NAME, the
whole model in full precision, which answers texts by its chat template.

  python -m runner register first support-bot --alias champion
  mlflow.pyfunc.load_model("models:/support-bot@champion").predict(["Hello!"])
  mlflow models serve -m models:/support-bot@champion --env-manager local

RUN is a run folder, a name, or the beginning (4 characters or more) of an MLflow run id.
  --alias ALIAS       points to this version from now on
  model.path=FOLDER   where the base model lies now, if not where it lay"""

OURS = "runner"
"""The tag of a registered model that this program has made."""
PINNED = ("torch", "transformers", "tokenizers", "safetensors", "accelerate", "jinja2")
ALIAS = re.compile(r"(?!latest$|v\d+$)[\w-]{1,255}", re.IGNORECASE)


def main(argv: list[str]) -> int:
    """The verb; returns the exit code.

    Raises:
        ConfigError: no RUN or NAME, a run without a model, or a name that MLflow does not take.
        TrackingError: a run that is not in MLflow, or a name that somebody else's model has.
    """
    words = args.read(argv, HELP, valued=("--alias",))
    if words is None:
        return 0
    run, rest = args.trained_run(words, "register", HELP.splitlines()[0])
    alias = words.options.get("--alias")
    if faults := list(_faults(rest, alias)):
        raise ConfigError(*faults)
    (name,) = rest
    place = _place(run)
    try:
        there = place.client.get_run(place.run_id)
        exists = _refuse_foreign(place.client, name)
        version = _register(run, place, there, name, exists=exists)
        if alias:
            place.client.set_registered_model_alias(name, alias, version)
    except RunnerError:
        raise
    except Exception as error:  # a store fails in a hundred ways
        remedy = f"is it the store that the run is in? python -m runner sync {terminal.nearest(run.rundir.path)} tells"
        raise TrackingError(Fault("", explained(error, place.uri), remedy)) from error
    _note(run, name, version, alias)
    _tell(place, name, version, alias)
    return 0


@dataclass(frozen=True)
class _Place:
    """Where the run is in MLflow."""

    client: MlflowClient
    uri: str
    run_id: str


def _faults(rest: list[str], alias: str | None) -> Iterator[Fault]:
    if len(rest) != 1:
        problem = "needs a name for the model" if not rest else f"takes one name, and {len(rest)} are given"
        yield Fault("register", problem, HELP.splitlines()[0])
    elif not rest[0].strip() or re.search(r"[/:]|^\.+$", rest[0]) or len(rest[0]) > 250:
        yield Fault("NAME", "is no name for a model", "use up to 250 characters, none of them / or :", rest[0])
    if alias is not None and not ALIAS.fullmatch(alias):
        remedy = "use letters, digits, - and _; not latest, nor v1, v2 …, which MLflow keeps for itself"
        yield Fault("--alias", "is no name for an alias", remedy, alias)


def _place(run: Trained) -> _Place:
    noted, near = run.rundir.read_manifest().get("mlflow") or {}, terminal.nearest(run.rundir.path)
    if not noted.get("run_id"):
        remedy = f"bring it there: python -m runner sync {near}"
        raise TrackingError(Fault("", f"the run {near} is not in MLflow", remedy))
    uri = str(noted["uri"])
    database = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:") and not database.is_file():
        remedy = f"put it back, or make it anew: python -m runner sync {near}"
        raise TrackingError(Fault("", f"the MLflow database of the run is gone: {database}", remedy))
    try:
        return _Place(store.connect(uri), uri, str(noted["run_id"]))
    except Exception as error:
        problem = explained(error, uri)
        raise TrackingError(Fault("", problem, "is the server up? Nothing was registered")) from error


def _refuse_foreign(client: MlflowClient, name: str) -> bool:
    """Whether the name is there already, as one of ours."""
    from mlflow.exceptions import MlflowException

    try:
        found = client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise
    if OURS not in found.tags:
        problem = "is taken by a model that this program has not made"
        remedy = (
            f"use another name; or, to put versions of ours beside those, set its tag {OURS} (to anything) in MLflow"
        )
        raise TrackingError(Fault("NAME", problem, remedy, name))
    return True


def _register(run: Trained, place: _Place, there: Run, name: str, *, exists: bool) -> str:
    """Make the model aside, bring it into the store, and register it last; returns the version."""
    client = place.client
    trained.quiet()
    with tempfile.TemporaryDirectory(dir=run.rundir.path, prefix=".register-") as aside:
        folder = Path(aside, "model")
        folder.mkdir()
        check = merge.write(run, folder, None)
        terminal.say(f"check    {check.notes()['check']}")
        base = str((run.rundir.read_manifest().get("model") or {}).get("path", ""))
        (folder / "README.md").write_text(model_card.text(run.rundir, ("model",), base, check.notes()))
        source, model_id = _bring(run, place, there, name, folder, Path(aside, "mlflow"))
    made_name = False
    try:
        if not exists:
            client.create_registered_model(name, tags={OURS: "true"})
            made_name = True
        more = {"model_id": model_id} if model_id else {}
        notes = {
            "runner.signature": str(run.rundir.read_manifest().get("signature")),
            "runner.folder": str(run.rundir.path),
        }
        return str(client.create_model_version(name, source, place.run_id, tags=notes, **more).version)
    except BaseException:
        if made_name:
            client.delete_registered_model(name)
        raise


def _bring(run: Trained, place: _Place, there: Run, name: str, folder: Path, packed: Path) -> tuple[str, str | None]:
    """Upload the model; returns its URI and, from MLflow 3 on, its id."""
    client = place.client
    if not hasattr(client, "create_logged_model"):
        _pack(run, folder, packed, there, None)
        client.log_artifacts(place.run_id, str(packed), f"registered/{name}")
        return f"{there.info.artifact_uri}/registered/{name}", None
    from mlflow.entities import LoggedModelOutput

    logged = client.create_logged_model(there.info.experiment_id, upload.plain(name), place.run_id, model_type="runner")
    try:
        _pack(run, folder, packed, there, logged.model_id)
        client.log_model_artifacts(logged.model_id, str(packed))
        client.finalize_logged_model(logged.model_id, "READY")
        client.log_outputs(place.run_id, [LoggedModelOutput(logged.model_id, run.rundir.read_state().step)])
    except BaseException:
        client.delete_logged_model(logged.model_id)
        raise
    return f"models:/{logged.model_id}", logged.model_id


def _pack(run: Trained, folder: Path, packed: Path, there: Run, model_id: str | None) -> None:
    """Write MLflow's own layout around the model; the model is moved, not copied a second time, where that can be."""
    import mlflow
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    params = [
        ParamSpec("max_new_tokens", DataType.long, 256),
        ParamSpec("temperature", DataType.double, 0.0),
        ParamSpec("system", DataType.string, ""),
    ]
    text = Schema([ColSpec(DataType.string)])
    made: dict[str, Any] = {"run_id": there.info.run_id, **({"model_id": model_id} if model_id else {})}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of annotations, from which it would infer the signature that is given here
        mlflow.pyfunc.save_model(
            path=str(packed),
            python_model=str(Path(__file__).with_name("served.py")),
            artifacts={"model": str(folder)},
            model_config={"is_chat": run.task.name != "pretrain"},
            signature=ModelSignature(text, text, ParamSchema(params)),
            pip_requirements=requirements(),
            mlflow_model=Model(**made),
            metadata={"runner.signature": run.rundir.read_manifest().get("signature")},
        )
    shutil.rmtree(folder)  # it was copied: two of them need not lie here while they are brought


def requirements() -> list[str]:
    """What has to be installed where the model is served, as it is here."""
    found = [f"{package}=={_version(package)}" for package in PINNED if _version(package)]
    return [f"mlflow=={_version('mlflow')}", *found]


def _version(package: str) -> str:
    """Without the local part (+cu128): package indexes do not have it."""
    try:
        return importlib.metadata.version(package).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return ""


def _note(run: Trained, name: str, version: str, alias: str | None) -> None:
    before = run.rundir.read_manifest().get("registered") or []
    run.rundir.update_manifest(registered=[*before, {"name": name, "version": version, "alias": alias}])


def _tell(place: _Place, name: str, version: str, alias: str | None) -> None:
    model = f"models:/{name}@{alias}" if alias else f"models:/{name}/{version}"
    uri = take_credentials(place.uri)[0]
    terminal.say(f"version  {version} of {name}" + (f", alias {alias}" if alias else ""))
    code = f'import mlflow; print(mlflow.pyfunc.load_model({json.dumps(model)}).predict(["Hello!"]))'
    there = f"MLFLOW_TRACKING_URI={shlex.quote(uri)}"
    terminal.say(f"load     {there} python -c {shlex.quote(code)}")
    terminal.say(f"serve    {there} mlflow models serve -m {shlex.quote(model)} --env-manager local")
