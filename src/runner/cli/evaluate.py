"""The verb ``evaluate``: evaluate a trained model, or its base model, on any rows or on tasks of lm-eval."""

from __future__ import annotations

import contextlib
import re
import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from runner import terminal
from runner.cli import benchmarks, evaluate_data
from runner.cli.args import MODEL_PATH, RUN, Args, Option, Verb, trained_run
from runner.config import schema
from runner.data.batches import Batches
from runner.errors import ConfigError, Fault
from runner.secrets import redact
from runner.tracking import metrics_log, provenance
from runner.tracking.mirror import backlog
from runner.train import trained_model
from runner.train.trained_model import Trained

if TYPE_CHECKING:
    import torch

    from runner.models.dtypes import Precision
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
        batches, details, name = evaluate_data.batches(run, node, are_other=evaluate_data.is_other(overrides))
        name = args["--name"] or name
        _refuse_name_of_other_rows(run, name, details)
        metrics, seconds = _evaluated(order, batches)
        _record(order, name, metrics, {**details, "seconds": seconds})
    _upload(run)
    return 0


@dataclass(frozen=True)
class _Order:
    """Which model is evaluated, and the command line."""

    run: Trained
    is_base: bool
    command: list[str]


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
    from runner.train import devices

    details: dict[str, dict[str, Any]] = {}
    for name, (count, digest) in benchmarks.rows(chosen, limit).items():
        data = {"name": name, "digest": digest, "uri": f"the task {name}"}
        details[name] = {"tasks": name, "limit": limit, "rows": count, "data": data}
        _refuse_name_of_other_rows(order.run, _limited(name, limit), details[name])
    model = _loaded(order, devices.pick())
    for name, metrics in benchmarks.measure(chosen, model, order.run.tokenizer, limit=limit).items():
        _record(order, _limited(name, limit), metrics, details.get(name, {"tasks": name, "limit": limit}))


def _limited(name: str, limit: int | None) -> str:
    """The name of a task under ``--limit``: TASK_N."""
    return f"{name}_{limit}" if limit else name


def _loaded(order: _Order, device: torch.device, dtype: Precision | None = None) -> Any:
    """The model; ``dtype``: instead of the dtype of the run."""
    load = trained_model.load_base if order.is_base else trained_model.load
    return load(order.run, device, dtype=dtype)


def _evaluated(order: _Order, batches: Batches) -> tuple[dict[str, float], float]:
    """(metrics, seconds), computed with the evaluation code and the dtypes of training."""
    from runner.models.kernels import lora_linear
    from runner.models.pretrained import keep_updates
    from runner.train import build, devices, evaluation, step_batches
    from runner.train.distributed import parallel, wrap
    from runner.train.distributed.ranks import ALONE

    run, start, device = order.run, step_batches.none, devices.pick()
    source, autocast = keep_updates(run.result, device, full=not run.is_adapter)
    model = _loaded(order, device, source.dtype)
    lora_linear.fuse(model)
    plain, (batches,) = batches, build.resolve_attention(run.result, model, autocast, batches)
    batches = _with_teacher(run, model, plain, batches, autocast)
    build.resolve_lm_head(model, autocast, "none")
    wrapped = wrap.wrap(parallel.none(), model, run.options.task, ALONE, device, autocast)
    if run.options.task.reference is not None:
        start = _give_reference(run, batches, wrapped)
    computed = step_batches.StepBatches(
        run.options.task, model, run.tokenizer, wrapped, ALONE, start, step_batches.nowhere
    )
    began = time.monotonic()
    sums = evaluation.sums_of(computed, batches, before=terminal.progress("evaluating"))
    seconds = round(time.monotonic() - began, 3)
    named = evaluation.metrics_of(run.options.task, sums)
    return {metric.removeprefix("eval/"): value for metric, value in named.items()}, seconds


def _with_teacher(run: Trained, model: Any, plain: Batches, laid: Batches, autocast: torch.dtype | None) -> Batches:
    """Load the teacher, or add its tokens to the rows, if the task has one; the batches as both can compute them.

    ``plain`` and ``laid``: the batches as they are, and as the model can compute them.
    """
    from runner.train import teacher, teacher_cache
    from runner.train.distributed.ranks import ALONE

    of_run = teacher.of(run.options, run.base if run.is_adapter else run.options.model, run.tokenizer)
    if of_run is None:
        return laid
    if of_run.spec.top_k is not None:
        device = next(model.parameters()).device
        teacher_cache.compute_rows(
            of_run, [(laid, laid.order.packs_of_pass())], device, ALONE, terminal.progress("teacher")
        )
        return laid
    (both,) = teacher_cache.attach(model, of_run, [plain], autocast)
    return laid if both.by_document == laid.by_document else plain


def _give_reference(run: Trained, batches: Batches, wrapped: Wrapped) -> Start:
    """Give the rows the numbers of the model that training started from; return that model."""
    from runner.models.pretrained import keep_updates
    from runner.train import build, reference
    from runner.train.distributed.ranks import ALONE

    task = run.options.task
    assert task.reference is not None
    source, _ = keep_updates(run.base, wrapped.device, full=not run.is_adapter)
    model = build.initial_model(run.options, source, run.options.quant, wrapped.device, run.rundir.loftq)
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
        again = f"python -m runner sync {terminal.typed(near)}"
        print(f"not uploaded to MLflow ({problem}); upload it later: {again}", file=sys.stderr)
