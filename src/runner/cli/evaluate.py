"""The verb ``evaluate``: evaluate a trained model, or its base model, on any rows or on tasks of lm-eval."""

from __future__ import annotations

import contextlib
import re
import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from runner import terminal
from runner.cli import benchmarks, evaluate_data
from runner.cli.args import MODEL_PATH, RUN, Args, Option, Verb, trained_run
from runner.config import schema
from runner.data import tokenization
from runner.data.batches import Batches
from runner.data.encoding import Recipe
from runner.errors import ConfigError, Fault
from runner.secrets import redact
from runner.tracking import metrics_log, provenance
from runner.tracking.mirror import backlog
from runner.train import trained_model
from runner.train.run_summary import too_long
from runner.train.trained_model import Trained

if TYPE_CHECKING:
    import torch

    from runner.train.distributed.wrap import Wrapped
    from runner.train.step_batches import Start

VERB = Verb(
    "evaluate RUN [data=… data.key=…]",
    f"""Evaluates the model of a run with the metrics of its task, as during training. Nothing is trained.

  python -m runner evaluate first                                       the eval split of the run
  python -m runner evaluate first data.eval_rows=null                   the whole eval split
  python -m runner evaluate first data=local data.path=rows.jsonl       all rows of other data
  python -m runner evaluate first data=local data.path=rows.jsonl data/format=alpaca data.eval_rows=500 --base
  python -m runner evaluate first --tasks arc_easy,my_tasks/faq.yaml    benchmarks of lm-eval

{RUN}.
The results are written to evaluations.jsonl in the run folder, and to the run in MLflow.""",
    Option("--base", "the base model instead, quantized as in the run"),
    Option(
        "--name NAME",
        "name of the metrics: eval_NAME/loss, for the base model eval_NAME/base_loss. Default: that of the data "
        "(held_out for the run's eval split, held_out_500 for another number of its rows) or of the task",
    ),
    Option("--tasks TASK,…", "tasks of lm-eval by name, or your own YAML files; needs pip install 'runner[eval]'"),
    Option("--limit N", "only N rows of each task, for a quick test; the metrics are named TASK_N", schema.Count),
    MODEL_PATH,
)

HELD_OUT = "held_out"


def main(argv: list[str]) -> int:
    """The verb; returns the exit code.

    Raises:
        ConfigError: no RUN, a run without a model, an override of another key than data, no lm-eval, unknown tasks.
        DataError: rows that cannot be read or are too long.
    """
    args = VERB.read(argv)
    run, overrides = trained_run(VERB, args)
    _refuse_without_effect(args, overrides)
    node = evaluate_data.node(run.cfg["data"], overrides)
    if args["--tasks"] and run.scores:
        problem = "tasks of lm-eval need a model that generates text, and this one gives scores"
        raise ConfigError(Fault("--tasks", problem, "leave it out: the held-out rows are evaluated"))
    chosen = benchmarks.choose(args["--tasks"].split(",")) if args["--tasks"] else None
    trained_model.quiet()
    order = _Order(run, bool(args["--base"]), ["python", "-m", "runner", "evaluate", *argv])
    if chosen is not None:
        _evaluate_tasks(order, chosen, args["--limit"])
    else:
        rows = _Rows(node, evaluate_data.is_other(overrides), args["--name"])
        _record(order, *_evaluated(order, rows))
    _upload(run)
    return 0


@dataclass(frozen=True)
class _Order:
    """Which model is evaluated, and the command line."""

    run: Trained
    is_base: bool
    command: list[str]


@dataclass(frozen=True)
class _Rows:
    """Which rows the model is evaluated on."""

    node: dict[str, Any]
    are_other: bool
    """Other rows than the run's eval split."""
    name: str | None


def _refuse_without_effect(args: Args, overrides: list[str]) -> None:
    faults, name = [], args["--name"]
    if args["--tasks"]:
        if overrides:
            problem, remedy = "has no effect on tasks, which have their own rows", "leave one of them out"
            faults.append(Fault(overrides[0].partition("=")[0], problem, remedy))
        if name:
            faults.append(Fault("--name", "has no effect on tasks, which have names", "leave it out", name))
    elif args["--limit"]:
        faults.append(Fault("--limit", "has no effect without --tasks", "use data.eval_rows=N", args["--limit"]))
    if name is not None and not re.fullmatch(r"[\w.-]{1,100}", name):
        faults.append(Fault("--name", "is not a valid metric name", "use letters, digits, . - and _", name))
    if faults:
        raise ConfigError(*faults)


def _evaluate_tasks(order: _Order, chosen: benchmarks.Chosen, limit: int | None) -> None:
    """Evaluate the tasks and their groups, and record the results."""
    details: dict[str, dict[str, Any]] = {}
    for name, (count, digest) in benchmarks.rows(chosen, limit).items():
        data = {"name": name, "digest": digest, "uri": f"the task {name}"}
        details[name] = {"tasks": name, "limit": limit, "rows": count, "data": data}
        _refuse_name_of_other_rows(order.run, _limited(name, limit), details[name])
    for name, metrics in benchmarks.measure(chosen, *_loaded(order), limit=limit).items():
        _record(order, _limited(name, limit), metrics, details.get(name, {"tasks": name, "limit": limit}))


def _limited(name: str, limit: int | None) -> str:
    """The name of a task under ``--limit``: TASK_N."""
    return f"{name}_{limit}" if limit else name


def _loaded(order: _Order) -> tuple[Any, Any]:
    """(model, tokenizer)"""
    from runner.train import devices

    load = trained_model.load_base if order.is_base else trained_model.load
    return load(order.run, devices.pick()), order.run.tokenizer


def _evaluated(order: _Order, rows: _Rows) -> tuple[str, dict[str, float], dict[str, Any]]:
    """(name, metrics, details of the rows), computed with the evaluation code of training."""
    from runner.models.kernels import lora_linear
    from runner.train import build, devices, evaluation, step_batches
    from runner.train.distributed import parallel, wrap
    from runner.train.distributed.ranks import ALONE

    run, start = order.run, step_batches.none
    batches, details, name = _batches(run, rows)
    name = rows.name or name
    _refuse_name_of_other_rows(run, name, details)
    device = devices.pick()
    model, autocast = _model(order, device)
    lora_linear.fuse(model)
    plain, (batches,) = batches, build.resolve_attention(run.result, model, autocast, batches)
    batches = _taught(run, model, plain, batches, autocast)
    build.resolve_lm_head(model, autocast, "none")
    wrapped = wrap.wrap(parallel.none(), model, run.options.task, ALONE, device, autocast)
    if run.options.task.reference is not None:
        start = _give_reference(run, batches, wrapped)
    computed = step_batches.StepBatches(
        run.options.task, model, run.tokenizer, wrapped, ALONE, start, step_batches.nowhere
    )
    began = time.monotonic()
    sums = evaluation.sums_of(computed, batches, before=terminal.progress("evaluating"))
    details["seconds"] = round(time.monotonic() - began, 3)
    named = evaluation.metrics_of(run.options.task, sums)
    return name, {metric.removeprefix("eval/"): value for metric, value in named.items()}, details


def _taught(run: Trained, model: Any, plain: Batches, laid: Batches, autocast: torch.dtype | None) -> Batches:
    """Let the model, or the rows, know its teacher, if its task has one; the batches as both can compute them.

    ``plain`` and ``laid``: as they are, and as the model can compute them.
    """
    from runner.train import taught, teacher
    from runner.train.distributed.ranks import ALONE

    found = teacher.of(run.options, run.base if run.is_adapter else run.options.model, run.tokenizer)
    if found is None:
        return laid
    if found.spec.top_k is not None:
        device = next(model.parameters()).device
        taught.give_rows(found, [(laid, laid.order.packs_of_pass())], device, ALONE, terminal.progress("teacher"))
        return laid
    (both,) = taught.attach(model, found, [plain], autocast)
    return laid if both.by_document == laid.by_document else plain


def _give_reference(run: Trained, batches: Batches, wrapped: Wrapped) -> Start:
    """Give the rows the numbers of the model that training started from; return that model."""
    from runner.models.pretrained import keep_updates
    from runner.train import build, reference
    from runner.train.distributed.ranks import ALONE

    task = run.options.task
    assert task.reference is not None
    source, _ = keep_updates(run.base, wrapped.device, full=not run.is_adapter)
    model = build.initial_model(run.options, source, wrapped.device)
    build.resolve_attention(source, model, wrapped.autocast, batches)
    build.resolve_lm_head(model, wrapped.autocast, "none")
    start = reference.Start(model, task.reference, wrapped, ALONE, run.options.start)
    reference.give(batches, batches.pass_packs, start, terminal.progress("reference"))
    return lambda: contextlib.nullcontext(model.eval())


def _refuse_name_of_other_rows(run: Trained, name: str, details: dict[str, Any]) -> None:
    """Refuse a name that was used for other rows: in MLflow and ``compare``, one name means one set of rows."""
    option, remedy = "--name", "give these rows another name: --name NAME"
    if "tasks" in details:
        option, remedy = "--tasks", "change the task's name in its YAML (task: NAME), or restore its rows"
    for earlier in metrics_log.read_evaluations(run.rundir):
        if earlier.get("name") == name and not _has_same_rows(earlier, details):
            its_data = (earlier.get("data") or {}).get("uri") or f"the task {name}"
            problem = f"was used before for other rows ({earlier.get('rows', 'some')} of {its_data})"
            raise ConfigError(Fault(option, problem, remedy, name))


def _has_same_rows(earlier: Mapping[str, Any], details: Mapping[str, Any]) -> bool:
    """Whether an earlier result is of the same rows. Assumed for groups of tasks, which have no digest."""
    if ("tasks" in earlier) != ("tasks" in details):
        return False
    digests = [(each.get("data") or {}).get("digest") for each in (earlier, details)]
    return not all(digests) or (digests[0] == digests[1] and earlier.get("tokens") == details.get("tokens"))


def _model(order: _Order, device: torch.device) -> tuple[Any, torch.dtype | None]:
    """(model, autocast dtype), in the same dtypes as its evaluation during training."""
    from runner.models.pretrained import keep_updates

    run = order.run
    source, autocast = keep_updates(run.result, device, full=not run.is_adapter)
    load = trained_model.load_base if order.is_base else trained_model.load
    return load(run, device, dtype=source.dtype), autocast


def _batches(run: Trained, chosen: _Rows) -> tuple[Batches, dict[str, Any], str]:
    """(batches to evaluate, details of their rows for the record, default name of the metrics)."""
    from runner.models import architecture
    from runner.train import inputs
    from runner.train.options import Options

    options = Options({**run.cfg, "data": chosen.node})
    if not chosen.are_other:
        splits, _, batches = inputs.load_data(options, run.result, run.tokenizer)
        report = replace(splits.report, truncated=0)  # the count includes training rows
        same_rows = {**chosen.node, "packing": None} == {**run.cfg["data"], "packing": None}
        name = HELD_OUT if same_rows else f"{HELD_OUT}_{report.eval_rows}"
        return batches, _details(splits.name, splits.digest, splits.uri, report), name
    data, (given, *others) = options.data, options.sources.values()
    if others:
        problem, remedy = "evaluates on one data set", "name it: data=local data.path=FILE"
        raise ConfigError(Fault("data", problem, remedy, "mix"))
    source = given.source()
    architecture.check_max_length(run.result, data.max_length)
    recipe = Recipe(given.format, options.task, run.tokenizer, given.settings)
    tokenised = tokenization.every_row(source, recipe)
    rows, report = tokenised.eval, tokenised.report
    if report.truncated or report.dropped:
        print(f"warning: {too_long(options, report)}", file=sys.stderr)
    if source.eval is None:
        _warn_of_trained_rows(run, source.digest)
    batches = Batches(
        rows, packing=data.packing, max_length=data.max_length,
        rows_per_batch=options.train.rows_at_a_time, accumulation=1, seed=options.seed, shuffle=False,
        pad_id=run.tokenizer.pad_token_id,
    )  # fmt: skip
    return batches, _details(source.name, source.digest, source.uri, report), source.name


def _details(name: str, digest: str, uri: str, report: tokenization.DataReport) -> dict[str, Any]:
    counts = {"rows": report.eval_rows, "tokens": report.eval_tokens, "trained_tokens": report.eval_trained_tokens}
    return {**counts, "truncated": report.truncated, "data": {"name": name, "digest": digest, "uri": uri}}


def _warn_of_trained_rows(run: Trained, digest: str) -> None:
    if (run.rundir.read_manifest().get("data") or {}).get("digest") == digest:
        problem = "warning: the run was trained on these rows; leave data.path out to evaluate on its eval split"
        print(problem, file=sys.stderr)


def metric_name(name: str, metric: str, *, is_base: bool) -> str:
    """``eval_NAME/loss``, for the base model ``eval_NAME/base_loss``: MLflow shows them side by side."""
    plain = re.sub(r"[^\w.-]", "_", name).strip(".")
    return f"eval_{plain}/{'base_' if is_base else ''}{metric}"


def _record(order: _Order, name: str, metrics: dict[str, float], details: dict[str, Any]) -> None:
    """Write the result to the run folder and print it."""
    rundir = order.run.rundir
    named_metrics = {metric_name(name, metric, is_base=order.is_base): value for metric, value in metrics.items()}
    record = {
        "time": time.time(), "step": rundir.read_state().model_step, "name": name, "is_base": order.is_base, **details,
        "command": redact(shlex.join(order.command)), "versions": provenance.versions(), "metrics": named_metrics,
    }  # fmt: skip
    metrics_log.append_to(rundir.evaluations, record)
    for metric, value in named_metrics.items():
        print(f"{metric}  {value:.6g}")
    if "trained_tokens" in details:
        print(f"{details['rows']} rows, {details['trained_tokens']} trained tokens", file=sys.stderr)


def _upload(run: Trained) -> None:
    near = terminal.nearest(run.rundir.path)
    print(f"written to {terminal.nearest(run.rundir.evaluations)}", file=sys.stderr)
    if not backlog.is_wanted(run.rundir):
        return
    for problem in backlog.upload([run.rundir.path]):
        print(f"not uploaded to MLflow ({problem}); upload it later: python -m runner sync {near}", file=sys.stderr)
