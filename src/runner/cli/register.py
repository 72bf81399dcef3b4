"""The verb ``register``: add a trained model to MLflow's model registry, ready to be loaded and served."""

from __future__ import annotations

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
from runner.cli.args import MODEL_PATH, RUN, Option, Verb, trained_run
from runner.errors import ConfigError, Fault, RunnerError, TrackingError
from runner.report import model_card
from runner.secrets import take_credentials
from runner.tracking.mlflow import pyfunc_model, registry, store, upload
from runner.train import merge, trained_model
from runner.train.trained_model import Trained

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

VERB = Verb(
    "register RUN NAME",
    f"""Registers the model of a run in the MLflow store of that run: a new version of NAME. It is the whole model in
full precision, and answers texts with its chat template. A reward model or a classifier gives scores instead.

  python -m runner register first support-bot --alias champion
  mlflow.pyfunc.load_model("models:/support-bot@champion").predict(["Hello!"])
  mlflow models serve -m models:/support-bot@champion --env-manager local

{RUN}.""",
    Option("--alias ALIAS", "set this alias to the new version"),
    MODEL_PATH,
)

ALIAS = re.compile(r"(?!latest$|v\d+$)[\w-]{1,255}", re.IGNORECASE)


def main(argv: list[str]) -> int:
    """The verb; returns the exit code.

    Raises:
        ConfigError: no RUN or NAME, a run without a model, or a name that MLflow does not accept.
        TrackingError: a run that is not in MLflow, or a name that another program's model has.
    """
    args = VERB.read(argv)
    run, rest = trained_run(VERB, args)
    alias = args["--alias"]
    if run.reads_images:
        problem = "the model of this run reads images, and a registered model is asked by texts alone"
        raise ConfigError(Fault("register", problem, "export it, and serve it with transformers or vLLM"))
    if faults := list(_faults(rest, alias)):
        raise ConfigError(*faults)
    (name,) = rest
    location = _locate(run)
    try:
        mlflow_run = location.client.get_run(location.run_id)
        exists = registry.has_ours(location.client, name)
        version = _register(run, location, mlflow_run, name, exists=exists)
        if alias:
            location.client.set_registered_model_alias(name, alias, version)
    except RunnerError:
        raise
    except Exception as error:  # MLflow raises many types
        near = terminal.typed(terminal.nearest(run.rundir.path))
        remedy = f"check that the store still has the run: python -m runner sync {near}"
        raise TrackingError(Fault("", store.explained(error, location.uri), remedy)) from error
    _record(run, name, version, alias)
    _print_usage(location, name, version, alias, takes_pairs=_takes_pairs(run))
    return 0


@dataclass(frozen=True)
class _Location:
    """Where the run is in MLflow."""

    client: MlflowClient
    uri: str
    run_id: str


def _faults(rest: list[str], alias: str | None) -> Iterator[Fault]:
    if len(rest) != 1:
        yield from VERB.misused(f"takes one name, not {len(rest)}" if rest else "needs a name for the model").faults
    elif not rest[0].strip() or re.search(r"[/:]|^\.+$", rest[0]) or len(rest[0]) > 250:
        yield Fault("NAME", "is not a valid model name", "use up to 250 characters, without / and :", rest[0])
    if alias is not None and not ALIAS.fullmatch(alias):
        remedy = "use letters, digits, - and _; MLflow reserves latest and v1, v2, …"
        yield Fault("--alias", "is not a valid alias", remedy, alias)


def _locate(run: Trained) -> _Location:
    tracked, near = run.rundir.read_manifest().get("mlflow") or {}, terminal.nearest(run.rundir.path)
    if not tracked.get("run_id"):
        remedy = f"upload it: python -m runner sync {terminal.typed(near)}"
        raise TrackingError(Fault("", f"the run {near} is not in MLflow", remedy))
    uri = str(tracked["uri"])
    database = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:") and not database.is_file():
        remedy = f"restore it, or create it again: python -m runner sync {terminal.typed(near)}"
        raise TrackingError(Fault("", f"the MLflow database of the run is missing: {database}", remedy))
    try:
        return _Location(store.connect(uri), uri, str(tracked["run_id"]))
    except Exception as error:
        problem = store.explained(error, uri)
        raise TrackingError(Fault("", problem, "check that the server is running; nothing was registered")) from error


def _register(run: Trained, location: _Location, mlflow_run: Run, name: str, *, exists: bool) -> str:
    """Write the model to a temporary folder, upload it, then register it; returns the version."""
    client = location.client
    trained_model.quiet()
    with tempfile.TemporaryDirectory(dir=run.rundir.path, prefix=".register-") as aside:
        folder = Path(aside, "model")
        folder.mkdir()
        check = merge.write(run, folder, None)
        terminal.print_line(f"check    {check.notes()['check']}")
        base = str((run.rundir.read_manifest().get("model") or {}).get("path", ""))
        card = model_card.text(
            run.rundir, ("model",), base, check.notes(), is_chat=run.is_chat, head=run.options.task.head
        )
        (folder / "README.md").write_text(card)
        source, model_id = _upload(run, location, mlflow_run, name, folder, Path(aside, "mlflow"))
    is_new_name = False
    try:
        if not exists:
            registry.create_model(client, name)
            is_new_name = True
        by_id = {"model_id": model_id} if model_id else {}
        tags = {
            "runner.signature": str(run.rundir.read_manifest().get("signature")),
            "runner.folder": str(run.rundir.path),
        }
        described = {"description": model_card.description(card), **by_id}
        return registry.create_version(client, name, source, location.run_id, tags, **described)
    except BaseException:
        if is_new_name:
            client.delete_registered_model(name)
        raise


def _upload(
    run: Trained, location: _Location, mlflow_run: Run, name: str, folder: Path, packed: Path
) -> tuple[str, str | None]:
    """Upload the model; returns (its URI, its id). The id is None before MLflow 3."""
    client = location.client
    if not hasattr(client, "create_logged_model"):
        _pack(run, folder, packed, mlflow_run, None)
        client.log_artifacts(location.run_id, str(packed), f"registered/{name}")
        return f"{mlflow_run.info.artifact_uri}/registered/{name}", None
    from mlflow.entities import LoggedModelOutput

    experiment = mlflow_run.info.experiment_id
    logged = registry.create_logged_model(client, experiment, upload.plain(name), location.run_id)
    try:
        _pack(run, folder, packed, mlflow_run, logged.model_id)
        client.log_model_artifacts(logged.model_id, str(packed))
        client.finalize_logged_model(logged.model_id, "READY")
        client.log_outputs(location.run_id, [LoggedModelOutput(logged.model_id, run.rundir.read_state().model_step)])
    except BaseException:
        client.delete_logged_model(logged.model_id)
        raise
    return f"models:/{logged.model_id}", logged.model_id


def _pack(run: Trained, folder: Path, packed: Path, mlflow_run: Run, model_id: str | None) -> None:
    """Write the model in MLflow's folder layout to ``packed``, and remove ``folder``."""
    import mlflow
    from mlflow.models import Model, ModelSignature

    head = run.options.task.head
    signed = pyfunc_model.signature(head.outputs if head else (), takes_pairs=_takes_pairs(run))
    ids: dict[str, Any] = {"run_id": mlflow_run.info.run_id, **({"model_id": model_id} if model_id else {})}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about missing type hints; the signature is given here
        mlflow.pyfunc.save_model(
            path=str(packed),
            python_model=str(pyfunc_model.SERVED),
            artifacts={"model": str(folder)},
            model_config={"is_chat": run.is_chat, "problem": head.problem if head else None},
            signature=ModelSignature.from_dict(signed),
            pip_requirements=pyfunc_model.requirements(),
            mlflow_model=Model(**ids),
            metadata={"runner.signature": run.rundir.read_manifest().get("signature")},
        )
    shutil.rmtree(folder)  # it was copied: keep one copy on disk during the upload


def _record(run: Trained, name: str, version: str, alias: str | None) -> None:
    before = run.rundir.read_manifest().get("registered") or []
    run.rundir.update_manifest(registered=[*before, {"name": name, "version": version, "alias": alias}])


def _takes_pairs(run: Trained) -> bool:
    """Whether the model scores answers: its input has the columns ``prompt`` and ``answer``."""
    return run.options.task.head is not None and run.options.task.unit == 2


def _print_usage(location: _Location, name: str, version: str, alias: str | None, *, takes_pairs: bool) -> None:
    model = f"models:/{name}@{alias}" if alias else f"models:/{name}/{version}"
    uri = take_credentials(location.uri)[0]
    terminal.print_line(f"version  {version} of {name}" + (f", alias {alias}" if alias else ""))
    pair = 'pandas.DataFrame({"prompt": ["Hello!"], "answer": ["Hi!"]})'
    libraries, given = ("mlflow, pandas", pair) if takes_pairs else ("mlflow", '["Hello!"]')
    code = f"import {libraries}; print(mlflow.pyfunc.load_model({json.dumps(model)}).predict({given}))"
    environment = f"MLFLOW_TRACKING_URI={shlex.quote(uri)}"
    terminal.print_line(f"load     {environment} python -c {shlex.quote(code)}")
    terminal.print_line(f"serve    {environment} mlflow models serve -m {shlex.quote(model)} --env-manager local")
