"""What a worker records of its run: entries of manifest.json, and the final numbers in state.json."""

from __future__ import annotations

import logging
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from runner.models.kernels import compilation
from runner.tracking import metrics_log
from runner.tracking.rundir import RunDir

if TYPE_CHECKING:
    from torch import nn

    from runner.data.dataset import Splits
    from runner.train.checkpoint import Progress
    from runner.train.inputs import Inputs
    from runner.train.parts import Parts

log = logging.getLogger("runner")


def manifest(inputs: Inputs, parts: Parts, rundir: RunDir) -> dict[str, Any]:
    """Entries of manifest.json written by the worker: data, model, hardware, micro-batch size, compile."""
    data = {**data_identity(inputs), "name": inputs.splits.name, "report": asdict(inputs.splits.report)}
    for group, sets in (("sources", inputs.splits.sources), ("evals", inputs.splits.evals)):
        if sets:
            data[group] = {name: {**data[group][name], "report": asdict(each.report)} for name, each in sets.items()}
    model = {key: getattr(inputs.source, key) for key in ("name", "path", "revision", "origin")}
    choice = {"compile": parts.compile.settled} if parts.compile.settled else {}
    return {
        "data": data,
        "model": model,
        "hardware": _hardware(rundir, inputs),
        "micro_batch_size": inputs.settings.rows_at_a_time,
        **({"settled": dict(inputs.splits.settled)} if inputs.splits.settled else {}),
        **({"teacher": inputs.teacher.record} if inputs.teacher is not None else {}),
        **choice,
    }


def data_identity(inputs: Inputs) -> dict[str, Any]:
    """Data fields that must be equal in all attempts of a run; ``function``: hash of a custom format's source code."""
    sets = {"sources": inputs.splits.sources, "evals": inputs.splits.evals}
    inside = {group: {name: _origin(each) for name, each in of.items()} for group, of in sets.items() if of}
    return {**_origin(inputs.splits), "function": inputs.options.function_sha256, **inside}


def _origin(splits: Splits) -> dict[str, Any]:
    return {"digest": splits.digest, "revision": splits.revision, "uri": splits.uri, "name": splits.name}


def _hardware(rundir: RunDir, inputs: Inputs) -> dict[str, Any]:
    """Hardware recorded by the submitter, plus the worker's device."""
    import torch

    from runner.models.kernels import cpu_products

    submitted = dict(rundir.read_manifest().get("hardware", {}))
    name = torch.cuda.get_device_name(inputs.device) if inputs.device.type == "cuda" else submitted.get("cpu")
    products = {"products": cpu_products.library()} if inputs.device.type == "cpu" else {}
    facts = {"device": str(inputs.device), "device_name": name, "threads": torch.get_num_threads(), **products}
    return {**submitted, **facts}


def warn_of_products(rundir: RunDir) -> None:
    """Warn if the run began with another library for its products: it is no longer the run that nothing stopped."""
    from runner.models.kernels import cpu_products

    then, now = (rundir.read_manifest().get("hardware") or {}).get("products"), cpu_products.library()
    if then and then != now:
        log.warning(
            f"large float32 products are computed by {now}, and the run began with {then}: the last digits differ from "
            "those of a run that was not stopped (oneDNN computes them on AMD's processors with AVX-512 if runner is "
            "imported before torch and LRU_CACHE_CAPACITY is not set)"
        )


def numbers(rundir: RunDir, parts: Parts, progress: Progress, seconds: float) -> dict[str, Any]:
    """The final numbers of a run, read from metrics.jsonl, so that they do not depend on resumes.

    ``seconds``: training time of all attempts.
    """
    evaluations = {record["step"]: record for record in metrics_log.read(rundir) if "eval/loss" in record}
    best, kept = parts.selection.metric, progress.best_step or progress.step
    first, last = evaluations.get(0, {}), evaluations.get(kept, {})
    named = [f"{part.name}/loss" for part, _ in parts.evaluation.by_part() if part.name]
    shown = [*parts.task.summary, *parts.answering.questions.functions.names, *named]
    names = dict.fromkeys(["eval/loss", *(f"eval/{name}" for name in shown), *([best] if best else [])])
    return {
        **{f"{name} before": first[name] for name in names if name in first},
        **{name: last[name] for name in names if name in last},
        "reason": progress.ended,
        "steps": progress.step,
        **({"best step": kept, "best metric": best} if progress.best_step else {}),
        **({"average": parts.average.name} if parts.average.name else {}),
        "train/tokens": progress.tokens,
        "trained tokens": progress.trained_tokens,
        "training seconds": seconds,
        **{k: v for k, v in parts.meter.rates().items() if k in ("train/tokens_per_second", "train/mfu")},
    }


def compiled(model: nn.Module, warm: int) -> dict[str, int]:
    """Count and log graph breaks and recompilations; ``warm`` is the number of graphs after the first step."""
    if not compilation.is_compiled(model):
        return {}
    breaks, later = compilation.graph_breaks(), compilation.graphs() - warm
    for reason in breaks:
        log.warning(f"graph break: {reason}")
    if later:
        log.warning(f"graphs compiled after the first step: {later}; for the reasons set TORCH_LOGS=recompiles")
    return {"compile/graph_breaks": len(breaks), "compile/graphs_after_first_step": later}
