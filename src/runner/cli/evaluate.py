"""The verb ``evaluate``: measure a trained model, or its base, on any rows, and by the tasks of lm-eval."""

from __future__ import annotations

import re
import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from runner import terminal
from runner.cli import args, benchmarks, evaluate_data
from runner.config import schema
from runner.data import dataset
from runner.data.batches import Batches
from runner.errors import ConfigError, Fault
from runner.secrets import redact
from runner.tracking import metrics_log, provenance
from runner.tracking.mirror import behind
from runner.train import trained
from runner.train.trained import Trained

if TYPE_CHECKING:
    import torch

HELP = """python -m runner evaluate RUN [data=… data.key=…] [--base] [--name NAME] [--tasks TASK,…] [--limit N]

Measures what a run has trained with the metrics of its task, as training did; nothing is trained.

  python -m runner evaluate first                                       the rows that the run held out
  python -m runner evaluate first data.eval_rows=null                   all of them
  python -m runner evaluate first data=local data.path=rows.jsonl       all rows of other data
  python -m runner evaluate first data=local data.path=rows.jsonl data/format=alpaca data.eval_rows=500 --base
  python -m runner evaluate first --tasks arc_easy,my_tasks/faq.yaml    benchmarks of lm-eval

RUN is a run folder, a name, or the beginning (4 characters or more) of an MLflow run id.
  --base        the base model instead, as quantized as in the run
  --name NAME   what the metrics are called: eval_NAME/loss, of the base eval_NAME/base_loss; by default as the data is
                (held_out for the run's own rows, held_out_500 for another number of them, or the name of a task)
  --tasks …     tasks of lm-eval by name, or YAML files of your own; needs pip install 'runner[eval]'
  --limit N     so many rows of each task, to try it; it is called TASK_N then
  model.path=FOLDER   where the base model lies now, if not where it lay

The results go into evaluations.jsonl of the run folder, and into the run in MLflow."""

HELD_OUT = "held_out"


def main(argv: list[str]) -> int:
    """The verb; returns the exit code.

    Raises:
        ConfigError: no RUN, one without a model, an override of anything but data, no lm-eval, unknown tasks.
        DataError: rows that cannot be read, or do not fit.
    """
    words = args.read(argv, HELP, flags=("--base",), valued=("--name", "--tasks", "--limit"))
    if words is None:
        return 0
    run, overrides = args.trained_run(words, "evaluate", HELP.splitlines()[0])
    _refuse_without_effect(words, overrides)
    node = evaluate_data.node(run.cfg["data"], overrides)
    tasks = words.options["--tasks"].split(",") if words.has("--tasks") else []
    chosen = benchmarks.choose(tasks) if tasks else None
    trained.quiet()
    order = _Order(run, words.has("--base"), ["python", "-m", "runner", "evaluate", *argv])
    if chosen is not None:
        _measure_tasks(order, chosen, _limit(words))
    else:
        given = _Rows(node, evaluate_data.is_other(overrides), words.options.get("--name"))
        _record(order, *_measured(order, given))
    _tell_mlflow(run)
    return 0


@dataclass(frozen=True)
class _Order:
    """Which model is measured, and by which command."""

    run: Trained
    is_base: bool
    command: list[str]


@dataclass(frozen=True)
class _Rows:
    """Which rows it is measured on."""

    node: dict[str, Any]
    are_other: bool
    name: str | None


def _refuse_without_effect(words: args.Args, overrides: list[str]) -> None:
    faults = []
    name = words.options.get("--name")
    if words.has("--tasks"):
        if overrides:
            problem, remedy = "has no effect on tasks, which bring their own rows", "leave one of them out"
            faults.append(Fault(overrides[0].partition("=")[0], problem, remedy))
        if name:
            faults.append(Fault("--name", "has no effect: tasks have names", "leave it out", name))
    elif words.has("--limit"):
        faults.append(Fault("--limit", "is for --tasks", "use data.eval_rows=N", words.options["--limit"]))
    if name is not None and not re.fullmatch(r"[\w.-]{1,100}", name):
        faults.append(Fault("--name", "is no name for metrics", "use letters, digits, . - and _", name))
    if words.has("--limit"):
        words.number("--limit", 10, least=1)
    if faults:
        raise ConfigError(*faults)


def _limit(words: args.Args) -> int | None:
    return int(words.number("--limit", 1, least=1)) if words.has("--limit") else None


def _measure_tasks(order: _Order, chosen: benchmarks.Chosen, limit: int | None) -> None:
    """Measure and note the tasks, and the groups that they are in."""
    noted: dict[str, dict[str, Any]] = {}
    for name, (count, digest) in benchmarks.rows(chosen, limit).items():
        data = {"name": name, "digest": digest, "uri": f"the task {name}"}
        noted[name] = {"tasks": name, "limit": limit, "rows": count, "data": data}
        _refuse_name_of_other_rows(order.run, _limited(name, limit), noted[name])
    for name, metrics in benchmarks.measure(chosen, *_loaded(order), limit=limit).items():
        _record(order, _limited(name, limit), metrics, noted.get(name, {"tasks": name, "limit": limit}))


def _limited(name: str, limit: int | None) -> str:
    """What a task is called of which only so many rows are asked."""
    return f"{name}_{limit}" if limit else name


def _loaded(order: _Order) -> tuple[Any, Any]:
    """(the model, its tokenizer)"""
    from runner.train import inputs

    load = trained.load_base if order.is_base else trained.load
    return load(order.run, inputs.pick_device()), order.run.tokenizer


def _measured(order: _Order, given: _Rows) -> tuple[str, dict[str, float], dict[str, Any]]:
    """(name, metrics, what is noted of the rows), by the code that evaluates in training."""
    from runner.models.kernels import attention, lora_linear
    from runner.train import build, inputs, loop
    from runner.train.distributed import parallel, wrap
    from runner.train.distributed.ranks import ALONE

    run = order.run
    batches, noted, name = _batches(run, given)
    name = given.name or name
    _refuse_name_of_other_rows(run, name, noted)
    device = inputs.pick_device()
    model, autocast = _model(order, device)
    lora_linear.fuse(model)
    (batches,) = build.resolve_attention(run.result, model, autocast, batches)
    if given.node["packing"]:
        attention.check_isolation(model, autocast)
    build.resolve_lm_head(model, autocast, "none")
    in_place = wrap.wrap(parallel.none(), model, run.task, ALONE, device, autocast)
    began = time.monotonic()
    sums = loop.evaluation_sums(model, run.task, batches, in_place, before=_progress)
    noted["seconds"] = round(time.monotonic() - began, 3)
    return name, run.task.metrics(sums), noted


def _refuse_name_of_other_rows(run: Trained, name: str, noted: dict[str, Any]) -> None:
    """One name in MLflow and in ``compare`` means one set of rows."""
    option, remedy = "--name", "give these a name of their own: --name NAME"
    if "tasks" in noted:
        option, remedy = "--tasks", "give the task another name, in its YAML (task: NAME), or restore its rows"
    for earlier in metrics_log.read_evaluations(run.rundir):
        if earlier.get("name") == name and not _is_of_same_rows(earlier, noted):
            its_data = (earlier.get("data") or {}).get("uri") or f"the task {name}"
            problem = f"has been measured on other rows ({earlier.get('rows', 'some')} of {its_data})"
            raise ConfigError(Fault(option, problem, remedy, name))


def _is_of_same_rows(earlier: Mapping[str, Any], noted: Mapping[str, Any]) -> bool:
    """Whether an earlier result is of the rows that are about to be measured; of a group of tasks that is not known."""
    if ("tasks" in earlier) != ("tasks" in noted):
        return False
    digests = [(each.get("data") or {}).get("digest") for each in (earlier, noted)]
    return not all(digests) or (digests[0] == digests[1] and earlier.get("tokens") == noted.get("tokens"))


def _model(order: _Order, device: torch.device) -> tuple[Any, torch.dtype | None]:
    """The model that is measured, in the number formats that it was evaluated in while it was trained."""
    from runner.models.pretrained import keep_updates

    run = order.run
    source, autocast = keep_updates(run.result, device, full=not run.is_adapter)
    load = trained.load_base if order.is_base else trained.load
    return load(run, device, dtype=source.dtype), autocast


def _batches(run: Trained, given: _Rows) -> tuple[Batches, dict[str, Any], str]:
    """What is measured, what is noted of it, and what it is called."""
    from runner.config import bind
    from runner.config.schema import TrainSettings
    from runner.models import pretrained
    from runner.train import inputs

    cfg = {**run.cfg, "data": given.node, "parallel": {bind.TARGET: "runner.train.distributed.parallel.none"}}
    settings = TrainSettings(**cfg["train"])
    if not given.are_other:
        splits, _, batches = inputs.load_data(cfg, run.task, run.result, run.tokenizer, settings, 0)
        report = replace(splits.report, truncated=0)  # it counts the training rows as well
        same_rows = {**given.node, "packing": None} == {**run.cfg["data"], "packing": None}
        name = HELD_OUT if same_rows else f"{HELD_OUT}_{report.eval_rows}"
        return batches, _noted(splits.name, splits.digest, splits.uri, report), name
    settings_node, format_node, source_node = schema.split_data(given.node)
    data_settings = bind.bind(settings_node, "data", schema.DataSettings)()
    pretrained.check_max_length(run.result, data_settings.max_length)
    source = bind.bind(source_node, "data")()
    form = bind.bind(format_node, "data.format")
    rows, report = dataset.every_row(source, form, run.task, run.tokenizer, data_settings)
    _warn_of_trained_rows(run, source.digest, brings=source.eval is not None)
    batches = Batches(
        rows, packing=data_settings.packing, max_length=data_settings.max_length,
        rows_per_batch=settings.rows_at_a_time, accumulation=1, seed=cfg["seed"], shuffle=False,
        pad_id=run.tokenizer.pad_token_id,
    )  # fmt: skip
    return batches, _noted(source.name, source.digest, source.uri, report), source.name


def _noted(name: str, digest: str, uri: str, report: dataset.DataReport) -> dict[str, Any]:
    kept = {"rows": report.eval_rows, "tokens": report.eval_tokens, "trained_tokens": report.eval_trained_tokens}
    return {**kept, "truncated": report.truncated, "data": {"name": name, "digest": digest, "uri": uri}}


def _warn_of_trained_rows(run: Trained, digest: str, *, brings: bool) -> None:
    if not brings and (run.rundir.read_manifest().get("data") or {}).get("digest") == digest:
        print("warning: these are the rows that the run was trained on; without data.path it is measured on those that "
              "it held out", file=sys.stderr)  # fmt: skip


def _progress(done: int, count: int) -> None:
    if sys.stderr.isatty():
        print(f"\revaluating {done}/{count}", end="\n" if done == count else "", file=sys.stderr, flush=True)


def metric_name(name: str, metric: str, *, is_base: bool) -> str:
    """``eval_NAME/loss``, and of the base ``eval_NAME/base_loss``: MLflow shows them side by side."""
    plain = re.sub(r"[^\w.-]", "_", name).strip(".")
    return f"eval_{plain}/{'base_' if is_base else ''}{metric}"


def _record(order: _Order, name: str, metrics: dict[str, float], noted: dict[str, Any]) -> None:
    """Into the run folder, and onto the terminal."""
    rundir = order.run.rundir
    named_metrics = {metric_name(name, metric, is_base=order.is_base): value for metric, value in metrics.items()}
    record = {
        "time": time.time(), "step": rundir.read_state().step, "name": name, "is_base": order.is_base, **noted,
        "command": redact(shlex.join(order.command)), "versions": provenance.versions(), "metrics": named_metrics,
    }  # fmt: skip
    metrics_log.append_to(rundir.evaluations, record)
    for metric, value in named_metrics.items():
        print(f"{metric}  {value:.6g}")
    if "trained_tokens" in noted:
        what = f"{noted['rows']} rows, {noted['trained_tokens']} trained tokens"
        cut = f", {noted['truncated']} truncated at data.max_length" if noted["truncated"] else ""
        print(f"{what}{cut}", file=sys.stderr)


def _tell_mlflow(run: Trained) -> None:
    near = terminal.nearest(run.rundir.path)
    print(f"kept in {terminal.nearest(run.rundir.evaluations)}", file=sys.stderr)
    if not behind.is_wanted(run.rundir):
        return
    for problem in behind.tell([run.rundir.path]):
        print(f"MLflow has not got it ({problem}); bring it: python -m runner sync {near}", file=sys.stderr)
