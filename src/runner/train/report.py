"""What a run says of itself: the header before it, the summary after it, and the numbers both leave in the folder."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner import terminal
from runner.config import user_code
from runner.models.kernels import compilation
from runner.tracking import metrics_log
from runner.tracking.manifest import signature
from runner.tracking.mirror import spawn
from runner.tracking.rundir import RunDir
from runner.train.distributed import parallel

if TYPE_CHECKING:
    from torch import nn

    from runner.data.dataset import DataReport
    from runner.train.checkpoint import Progress
    from runner.train.inputs import Inputs
    from runner.train.loop import Parts

MANY_TRUNCATED = 0.1
"""Part of the rows above which the limit is worth a thought."""
NOTHING = "(nothing)"
"""What is shown of a model that ended its answer at once."""
log = logging.getLogger("runner")


def header(cfg: Mapping[str, Any], made: Inputs, parts: Parts, rundir: RunDir) -> None:
    """What is about to be trained, on what, for how long."""
    from runner.models import pretrained

    counts = pretrained.describe(parts.model)
    data, tokens = made.splits.report, made.batches.tokens_at(made.total_steps)
    terminal.header(
        {
            "run": f"{rundir.path}  (signature {signature(cfg)})",
            "model": f"{made.source.name}, {counts['total'] / 1e6:.1f} M parameters, "
            f"{counts['trainable'] / 1e6:.2f} M trained ({counts['trainable'] / counts['total']:.2%})",
            "device": f"{made.device}, weights in {weights_in(parts)}, attention {attention_of(parts)}"
            f"{_compiled(parts)}{_hint(cfg, parts)}{_processes(cfg, parts)}",
            "data": f"{cfg['data'].get('path') or made.splits.name}: {data.train_rows} rows to train on, "
            f"{data.eval_rows} held out, {parts.batches.efficiency:.0%} of each batch used"
            + (f", {truncated(cfg, data)}" if data.truncated else "")
            + (f", {data.dropped} dropped" if data.dropped else ""),
            "steps": f"{made.total_steps} of about {tokens // max(made.total_steps, 1)} tokens"
            f"{_of_batch(parts)}{made.cut}",
        }
    )


def truncated(cfg: Mapping[str, Any], data: DataReport) -> str:
    """How many rows lose their end, and what to do where they are many."""
    many = data.truncated > MANY_TRUNCATED * (data.train_rows + data.eval_rows)
    longest = f" (the longest has {data.longest} tokens)" if many else ""
    return f"{data.truncated} truncated at data.max_length={cfg['data']['max_length']}{longest}"


def _of_batch(parts: Parts) -> str:
    """Of several processes each has its own rows: what a step learns from is said where one may expect otherwise."""
    world, rows = parts.ranks.world, parts.batches.per_step
    return f" ({rows} rows, {rows // world} in each of {world} processes)" if world > 1 else ""


def _processes(cfg: Mapping[str, Any], parts: Parts) -> str:
    return f", {parts.ranks.world} processes ({parallel.kind_of(cfg['parallel'])})" if parts.ranks.world > 1 else ""


def _compiled(parts: Parts) -> str:
    """What compile=auto came to, where there was a choice: on a GPU."""
    if not parts.compile.settled or parts.spread.device.type != "cuda":
        return ""
    return f", not compiled: {parts.compile.reason}" if parts.compile.reason else ", each layer compiled"


def _hint(cfg: Mapping[str, Any], parts: Parts) -> str:
    """What would be faster on this device."""
    from runner.models.dtypes import faster_dtype

    used = next(parts.model.parameters()).dtype
    faster = faster_dtype(used, parts.spread.device) if cfg["model"]["dtype"] == "auto" else None
    return f" (model.dtype={faster} is faster here, and less precise)" if faster else ""


def attention_of(parts: Parts) -> str:
    """The implementation that the model attends with."""
    config: Any = parts.model.config
    return str(getattr(config, "_attn_implementation", None) or "its own").replace("_", " ")


def weights_in(parts: Parts) -> str:
    """How most of the base weights are stored: their dtype, or the quantization."""
    from collections import Counter

    sizes: Counter[str] = Counter()
    for parameter in parts.model.parameters():
        if not parameter.requires_grad or len(sizes) == 0:
            sizes[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
    return sizes.most_common(1)[0][0]


def manifest(cfg: Mapping[str, Any], made: Inputs, parts: Parts, rundir: RunDir) -> dict[str, Any]:
    """What only the worker knows: where model and data came from, and the machine it runs on."""
    data = {**data_identity(cfg, made), "name": made.splits.name, "report": asdict(made.splits.report)}
    model = {"name": made.source.name, "path": made.source.path, "revision": made.source.revision}
    found = {"data": data, "model": model, "hardware": _hardware(rundir, made)}
    settled = {"compile": parts.compile.settled} if parts.compile.settled else {}
    return {**found, "micro_batch_size": made.settings.rows_at_a_time, **settled}


def data_identity(cfg: Mapping[str, Any], made: Inputs) -> dict[str, Any]:
    """What must be the same in each attempt at a run; ``function`` is the hash of a custom format's source text."""
    from runner.data import formats

    form = cfg["data"].get("format") or {}
    function = form.get("function")
    text = formats.source_text(function, form.get(user_code.PATHS) or ()) if function else None
    return {
        "digest": made.splits.digest,
        "revision": made.splits.revision,
        "uri": made.splits.uri,
        "function": hashlib.sha256(text.encode()).hexdigest() if text is not None else None,
    }


def _hardware(rundir: RunDir, made: Inputs) -> dict[str, Any]:
    """The machine, as the submitter saw it, and the worker's device."""
    import torch

    known = dict(rundir.read_manifest().get("hardware", {}))
    name = torch.cuda.get_device_name(made.device) if made.device.type == "cuda" else known.get("cpu")
    return {**known, "device": str(made.device), "device_name": name, "threads": torch.get_num_threads()}


def summary(rundir: RunDir, parts: Parts, progress: Progress, seconds: float) -> dict[str, Any]:
    """The numbers at the end, read from the records: they are the same after a resume.

    ``seconds`` are those of all attempts, without the time between them.
    """
    evaluations = [record for record in metrics_log.read(rundir) if "eval/loss" in record]
    first, last = evaluations[0], evaluations[-1]
    return {
        "eval/loss before": first["eval/loss"],
        "eval/loss": last["eval/loss"],
        "eval/perplexity before": first.get("eval/perplexity"),
        "eval/perplexity": last.get("eval/perplexity"),
        "steps": progress.step,
        "train/tokens": progress.tokens,
        "trained tokens": progress.trained_tokens,
        "training seconds": seconds,
        **{k: v for k, v in parts.meter.rates().items() if k in ("train/tokens_per_second", "train/mfu")},
    }


def compiled(model: nn.Module, warm: int) -> dict[str, int]:
    """What came of compiling, told and counted; ``warm`` are the graphs that there were after the first step."""
    if not compilation.is_compiled(model):
        return {}
    breaks, later = compilation.graph_breaks(), compilation.graphs() - warm
    for reason in breaks:
        log.warning(f"graph break, {reason}")
    if later:
        remedy = "TORCH_LOGS=recompiles says why"
        log.warning(f"graphs compiled after the first step: {later}; {remedy}")
    return {"compile/graph_breaks": len(breaks), "compile/graphs_after_first_step": later}


def ending(rundir: RunDir, mirrored: spawn.MirrorResult | None, code: int) -> None:
    """The last words: what came out, where it lies, and what to do next; ``mirrored``: None where others see to it."""
    state = rundir.read_state()
    if state.status == "completed":
        terminal.table("", ["", ""], _summary_rows(state.summary))
        _show_samples(rundir)
        terminal.say(f"model    {rundir.model}")
    terminal.say(f"run      {rundir.path}  {state.status}" + (f": {state.reason}" if state.reason else ""))
    if mirrored and mirrored.url:
        terminal.say(f"MLflow   {mirrored.url}")
    if mirrored and mirrored.unsent:
        lacking = f"{mirrored.unsent} records ({mirrored.message})"
        terminal.say(f"MLflow has not got {lacking}; they are safe in the run folder.")
        terminal.say(f"bring them: python -m runner sync {rundir.path}")
    terminal.say(f"next     {_next_command(rundir, code if state.status != 'pruned' else 130)}")


def _summary_rows(numbers: Mapping[str, Any]) -> list[list[str]]:
    before, after = numbers["eval/loss before"], numbers["eval/loss"]
    change = f"  ({(after - before) / before:+.1%})" if before else ""
    rows = [
        ["held-out loss", f"{before:.4f} → {after:.4f}{change}"],
        ["perplexity", f"{numbers['eval/perplexity before']:.2f} → {numbers['eval/perplexity']:.2f}"],
        ["steps, tokens", f"{numbers['steps']}, {numbers['train/tokens']} ({numbers['trained tokens']} trained)"],
        ["time", terminal.duration(numbers["training seconds"])],
    ]
    if rate := numbers.get("train/tokens_per_second"):
        mfu = f"  ({numbers['train/mfu']:.0%} of peak FLOP/s)" if numbers.get("train/mfu") else ""
        rows.append(["speed", f"{rate:.0f} tokens/s{mfu}"])
    if peak := numbers.get("memory/peak_allocated_gib", numbers.get("memory/peak_rss_gib")):
        rows.append(["peak memory", f"{peak:.2f} GiB"])
    return rows


def _show_samples(rundir: RunDir) -> None:
    samples = json.loads(rundir.samples.read_text()) if rundir.samples.exists() else []
    said = [{key: str(text).strip() or NOTHING for key, text in sample.items()} for sample in samples]
    rows = [[_last_words(s["prompt"]), s["before"], s["after"], s["reference"]] for s in said]
    if rows:
        terminal.table("held-out prompts", ["prompt", "before", "after", "reference"], rows)


def _last_words(prompt: str, length: int = 160) -> str:
    """The end of a prompt without its markup: what was asked."""
    import re

    text = re.sub(r"<\|[^|>]*\|>\w*\n?", "\n", prompt).strip().splitlines()
    text = [line for line in text if line.strip() and line.strip() not in ("assistant", "user", "system")]
    last = text[-1] if text else prompt
    return last if len(last) <= length else f"… {last[-length:].partition(' ')[2]}"


def _next_command(rundir: RunDir, code: int) -> str:
    if code == 0:
        uri = rundir.read_manifest().get("mlflow", {}).get("uri", "")
        if not uri:
            return f"python -m runner sync {rundir.path}"
        is_usual = uri == f"sqlite:///{Path('outputs').absolute() / 'mlflow.db'}"
        return "python -m runner ui" if is_usual else f"python -m runner ui uri={uri}"
    if code in (75, 130):
        return f"python -m runner resume={rundir.path}"
    return f"see {rundir.log}; then python -m runner resume={rundir.path} retry=true"
