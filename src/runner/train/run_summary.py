"""Terminal output of a run: header before training, summary after it."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner import terminal
from runner.config import schema
from runner.config.bind import bind
from runner.tracking import environment, metrics_log, origin
from runner.tracking.manifest import read_config
from runner.tracking.mirror import spawn
from runner.tracking.mlflow import rest, store
from runner.tracking.rundir import RunDir
from runner.tracking.state_file import State
from runner.tracking.trackers import Tracking, store_uri

if TYPE_CHECKING:
    from runner.data.dataset import Splits
    from runner.data.tokenization import DataReport
    from runner.train.checkpoint import Progress
    from runner.train.inputs import Inputs
    from runner.train.options import Options
    from runner.train.parts import Parts

AVERAGED = "the averages of the weights are evaluated and saved ({})"
NOTHING = "(nothing)"
"""Shown for an empty answer of the model."""
log = logging.getLogger("runner")


def header(inputs: Inputs, parts: Parts, rundir: RunDir) -> None:
    """Print model, device, data and steps before training."""
    from runner.models import parameters

    counts = parameters.describe(parts.model)
    data, tokens = inputs.splits.report, inputs.batches.tokens_at(inputs.total_steps)
    answers = inputs.batches.answers
    full, about = f"batches {parts.batches.efficiency:.0%} full", "about"
    if answers is None and (share := parts.batches.computed_share) < 1:
        full += f", {share:.0%} of the tokens are computed: a prompt only once for its answers"
    if answers is not None and answers.of_prompts:
        full, about = f"{answers.per_row} answers to each of at most {answers.most_tokens} tokens", "at most"
    mlflow = _mlflow(rundir)
    terminal.header(
        {
            "run": f"{rundir.path}  (signature {rundir.read_manifest()['signature']})",
            "model": f"{inputs.source.name}{inputs.source.changes}, {counts['total'] / 1e6:.1f} M parameters, "
            f"{counts['trainable'] / 1e6:.2f} M trained ({counts['trainable'] / counts['total']:.2%})"
            + (f", {counts['about_experts']}" if counts["about_experts"] else ""),
            "device": f"{inputs.device}, weights in {counts['stored']}, attention {attention_of(parts)}"
            f"{_compiled(parts)}{_hint(inputs, parts)}{_processes(inputs, parts)}",
            "data": f"{inputs.options.data_path or inputs.splits.name}: {data.train_rows} training rows, "
            f"{data.eval_rows} held out, {full}"
            + (f", {too_long(inputs.options, data)}" if data.truncated or data.dropped else "")
            + "".join(f"\n{line}" for line in of_parts(inputs)),
            **({"teacher": inputs.teacher.text} if inputs.teacher is not None else {}),
            **({"start": f"continues {chain}"} if (chain := origin.chain(rundir.read_manifest())) else {}),
            "steps": f"{inputs.total_steps} of {about} {tokens // max(inputs.total_steps, 1)} tokens"
            f"{_of_batch(parts)}{inputs.cut}",
            **({"average": AVERAGED.format(average)} if (average := inputs.options.average) else {}),
            **({"MLflow": mlflow} if mlflow else {}),
        }
    )
    for few in few_held_out(inputs.splits):
        log.warning(f"{few}\n    → raise data.eval_fraction, add rows, or name rows to evaluate on (data.eval_path)")


def of_parts(inputs: Inputs) -> Iterator[str]:
    """A line for each source of a mixture, and one for each further set to evaluate on."""
    splits = inputs.splits
    repeats = inputs.batches.order.repeats(inputs.total_steps) if splits.sources else {}
    for name, source in splits.sources.items():
        report, weight = source.report, splits.weights[name]
        count = repeats.get(name, repeats.get("", 0.0))
        rows = f"{report.train_rows} rows, {report.train_trained_tokens} trained tokens, {count:.2f} times in this run"
        share = f"{weight:.1%} of the trained tokens: {rows}" if weight else "not trained (weight 0)"
        yield f"{name}: {share}; {report.eval_rows} held out"
    for name, held_out in splits.evals.items():
        yield f"eval/{name}: {held_out.report.eval_rows} rows of {held_out.name}"


def few_held_out(splits: Splits) -> list[str]:
    """A warning for each set of held-out rows that is too small to decide."""
    sets = {"": splits, **splits.sources, **splits.evals}
    texts = {name: schema.few_held_out(each.report.eval_rows) for name, each in sets.items()}
    return [f"{name}: {text}" if name else text for name, text in texts.items() if text]


def too_long(options: Options, data: DataReport) -> str:
    """How many rows are truncated or dropped, and which ``data.max_length`` would change that."""
    limit, longest, most = options.data.max_length, data.longest, data.longest_of_95_percent
    named = {"truncated": data.truncated, "dropped": data.dropped}
    counts = ", ".join(f"{count} {word}" for word, count in named.items() if count)
    if data.dropped_with_images:
        counts += f" ({data.dropped_with_images} with images, which are never cut)"
    five = f", at most 5 % at {most}" if limit < most < longest else ""
    return f"{counts} at data.max_length={limit} (none at {longest}{five})"


def _mlflow(rundir: RunDir) -> str:
    """Store and experiment, the variables they come from, and whether the server answers; empty with offline."""
    cfg = read_config(rundir)
    tracking: Tracking = bind(cfg["tracking"], "tracking")()
    if tracking.kind == "offline":
        return ""
    uri, names = store_uri(tracking, cfg["outputs_dir"]), " and ".join(environment.sources(cfg["tracking"]))
    text = f"{uri}, experiment {tracking.experiment}" + f" (from {names})" * bool(names)
    if store.is_server(uri) and (reason := rest.silence(uri)):
        text += f"; does not answer ({reason}): upload later with python -m runner sync {terminal.typed(rundir.path)}"
    return text


def _of_batch(parts: Parts) -> str:
    """Rows per step and per process; empty for a single process."""
    world, rows = parts.ranks.world, parts.batches.order.per_step
    return f" ({rows} rows, {rows // world} in each of {world} processes)" if world > 1 else ""


def _processes(inputs: Inputs, parts: Parts) -> str:
    world = parts.ranks.world
    return f", {world} processes ({inputs.options.parallel.kind})" if world > 1 else ""


def _compiled(parts: Parts) -> str:
    """The result of compile=auto; empty on a CPU, where it has no effect."""
    if not parts.compile.settled or parts.wrapped.device.type != "cuda":
        return ""
    return f", not compiled: {parts.compile.reason}" if parts.compile.reason else ", each layer compiled"


def _hint(inputs: Inputs, parts: Parts) -> str:
    """What multiplies faster on this device, if anything."""
    from runner.models.dtypes import faster_dtype
    from runner.train import devices

    if inputs.source.dtype == "float32" and devices.has_tf32(parts.wrapped.device):
        return (
            ", multiplied in TF32" if inputs.settings.tf32 else " (train.tf32=true multiplies faster, less precisely)"
        )

    used = next(parts.model.parameters()).dtype
    faster = faster_dtype(used, parts.wrapped.device) if inputs.source.dtype == "auto" else None
    return f" (model.dtype={faster} is faster on this device, but less precise)" if faster else ""


def attention_of(parts: Parts) -> str:
    """The attention implementation of the model."""
    config: Any = parts.model.config
    used = str(getattr(config, "_attn_implementation", None) or "its own").replace("_", " ")
    has_no_sdpa = used == "eager" and not getattr(parts.model, "_supports_sdpa", True)
    return f"{used} (this model has no sdpa)" if has_no_sdpa else used


def ending(rundir: RunDir, mirrored: spawn.MirrorResult | None, code: int) -> None:
    """Print the result, its paths and the next command; ``mirrored``: None if another process uploads to MLflow."""
    state = rundir.read_state()
    if state.status == "completed":
        if problem := metrics_log.lost_of(state, metrics_log.read(rundir), read_config(rundir)):
            log.warning(f"{problem}; the results that need them are not shown")
        terminal.table("", ["", ""], _summary_rows(state))
        report = (rundir.read_manifest().get("data") or {}).get("report") or {}
        if few := schema.few_held_out(report.get("eval_rows")):
            terminal.print_line(f"note     {few}")
        _show_samples(rundir)
        terminal.print_line(f"model    {rundir.model}")
    terminal.print_line(f"run      {rundir.path}  {state.status}" + (f": {state.reason}" if state.reason else ""))
    if mirrored and mirrored.url:
        terminal.print_line(f"MLflow   {mirrored.url}")
    upload = f"python -m runner sync {terminal.typed(rundir.path)}"
    following = _next_command(rundir, code, state.status)
    if mirrored and mirrored.unsent:
        terminal.print_line(f"not uploaded to MLflow: {mirrored.unsent} records ({mirrored.message})")
        if upload != following:
            terminal.print_line(f"upload   {upload}")
    for line in spawn.lacking(mirrored, rundir.path) if mirrored else []:
        terminal.print_line(line)
    terminal.print_line(f"next     {following}")


def _summary_rows(state: State) -> list[list[str]]:
    numbers, parts = state.summary, "time of each part" + ", this attempt" * (state.attempt > 1)
    rows = [
        *[[label, _change(numbers, name)] for label, name in _shown(numbers)],
        ["steps, tokens", f"{numbers['steps']}, {numbers['train/tokens']} ({numbers['trained tokens']} trained)"],
        *(
            [["model", f"of step {step}, the best by {numbers['best metric']}"]]
            if (step := numbers.get("best step"))
            else []
        ),
        *([["average", AVERAGED.format(numbers["average"])]] if numbers.get("average") else []),
        ["time", f"{terminal.duration(numbers['training seconds'])} without loading"],
        [parts, ", ".join(f"{part} {_seconds(s)}" for part, s in numbers["part seconds"].items())],
    ]
    if rate := numbers.get("train/tokens_per_second"):
        mfu = f"  ({numbers['train/mfu']:.0%} of peak FLOP/s)" if numbers.get("train/mfu") else ""
        rows.append(["speed", f"{rate:.0f} tokens/s{mfu}"])
    if peak := numbers.get("memory/peak_allocated_gib", numbers.get("memory/peak_rss_gib")):
        rows.append(["peak memory", f"{peak:.2f} GiB"])
    return rows


def _shown(numbers: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(label, name) of the metrics that the summary shows before and after training, the loss first."""
    names = dict.fromkeys(key.removesuffix(" before") for key in numbers if key.startswith("eval/"))
    return [("held-out loss", "eval/loss"), *((name[5:], name) for name in names if name != "eval/loss")]


def _change(numbers: Mapping[str, Any], name: str) -> str:
    """``5.5582 → 5.1886  (-6.6%)``; a value whose record is lost is not shown."""
    before, after = (numbers.get(key) for key in (f"{name} before", name))
    form = ".2f" if name == "eval/perplexity" else ".4f"
    texts = [f"{value:{form}}" if isinstance(value, int | float) else "unknown" for value in (before, after)]
    change = f"  ({(after - before) / before:+.1%})" if name == "eval/loss" and before and after is not None else ""
    return f"{texts[0]} → {texts[1]}{change}" + "  (its record is lost)" * ("unknown" in texts)


def samples(rundir: RunDir) -> list[dict[str, str]] | None:
    """The contents of samples.json; None if it is missing or damaged."""
    try:
        content = json.loads(rundir.samples.read_text())
        return [{key: str(text) for key, text in sample.items()} for sample in content]
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def warn_of_losses(rundir: RunDir, inputs: Inputs, progress: Progress) -> None:
    """Report what a resumed run has lost: records up to its checkpoint, or all of its checkpoints."""
    records, train = metrics_log.read(rundir), asdict(inputs.settings)
    if problem := metrics_log.lost(records, train, progress.step, inputs.total_steps, evaluated=progress.evaluated):
        log.warning(f"{problem}; the results that need them are not shown")
    if not progress.step and (reached := rundir.read_state().step):
        log.warning(f"no checkpoint in {rundir.checkpoints}: the run had reached step {reached} and starts again at 0")


def _seconds(seconds: float) -> str:
    return terminal.duration(seconds) if seconds >= 10 else f"{seconds:.1f} s"


def _show_samples(rundir: RunDir) -> None:
    kept = samples(rundir) or []
    shown = [{key: text.strip() or NOTHING for key, text in sample.items()} for sample in kept]
    columns = [key for key in ("before", "after") if any(key in sample for sample in kept)]
    columns += ["reference"] * any(sample.get("reference") for sample in kept)
    rows = [[_last_line(sample["prompt"]), *(sample.get(key, "") for key in columns)] for sample in shown]
    if rows:
        terminal.table("held-out prompts", ["prompt", *columns], rows)


def _last_line(prompt: str, length: int = 160) -> str:
    """The last line of a prompt without chat markup, at most ``length`` characters."""
    import re

    text = re.sub(r"<\|[^|>]*\|>\w*\n?", "\n", prompt).strip().splitlines()
    text = [line for line in text if line.strip() and line.strip() not in ("assistant", "user", "system")]
    last = text[-1] if text else prompt
    return last if len(last) <= length else f"… {last[-length:].partition(' ')[2]}"


def _next_command(rundir: RunDir, code: int, status: str) -> str:
    if code == 0 and status != "pruned":
        uri = rundir.read_manifest().get("mlflow", {}).get("uri", "")
        if not uri:
            return f"python -m runner sync {terminal.typed(rundir.path)}"
        is_default = uri == f"sqlite:///{Path('outputs').absolute() / 'mlflow.db'}"
        return "python -m runner ui" if is_default else f"python -m runner ui {terminal.typed(uri, 'uri')}"
    again = f"python -m runner {terminal.typed(rundir.path, 'resume')}"
    return again if code in (0, 75, 130) else f"see {rundir.log}; then {again} retry=true"
