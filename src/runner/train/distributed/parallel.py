"""Options of ``parallel``: one process, DDP or FSDP.

``auto`` is replaced before the run folder is written, so a worker reads ``none``, ``ddp`` or ``fsdp`` with a number of
processes. The number of processes changes the result and is therefore part of the run's signature.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from runner.config.bind import bind, bind_target, option
from runner.config.schema import Count
from runner.errors import ConfigError, Fault
from runner.models import lora
from runner.models.kernels import compat, compilation
from runner.models.quantization.quant import Quant

SHARDS = "2.6"
"""The first torch whose FSDP2 is used."""
SHARDS_BYTES = "2.12"
"""The torch whose FSDP shards parameters that are no floats (https://github.com/pytorch/pytorch/pull/178075)."""


@dataclass(frozen=True)
class Parallel:
    """Kind of parallelism and its settings."""

    kind: Literal["none", "ddp", "fsdp"]
    processes: int = 1
    find_unused_parameters: bool = False
    bucket_cap_mb: int = 25
    reshard_after_forward: bool = True
    param_dtype: Literal["bfloat16"] | None = None


def none() -> Parallel:
    """One process on one device."""
    return Parallel("none")


def auto() -> Parallel:
    """``ddp`` if the launcher starts several processes, else ``none``; replaced before the worker starts."""
    raise AssertionError("parallel=auto must be replaced before the run folder is written")


def ddp(*, processes: Count | None, find_unused_parameters: bool, bucket_cap_mb: Count) -> Parallel:
    """DDP: each process has the whole model and its part of the batch; gradients are averaged."""
    return Parallel("ddp", processes or 1, find_unused_parameters=find_unused_parameters, bucket_cap_mb=bucket_cap_mb)


def fsdp(
    *, processes: Count | None, reshard_after_forward: bool, param_dtype: Literal["bfloat16"] | None = None
) -> Parallel:
    """FSDP: weights, gradients and optimizer state are sharded over the processes (https://arxiv.org/abs/2304.11277).

    ``param_dtype``: gather float32 weights in bfloat16, and compute with these; the shards, their gradients and the
    optimizer stay in float32 (torch's MixedPrecisionPolicy).
    """
    return Parallel("fsdp", processes or 1, reshard_after_forward=reshard_after_forward, param_dtype=param_dtype)


def resolve(node: Mapping[str, Any], processes: int) -> dict[str, Any]:
    """Replace ``auto`` and fill in the number of processes, for a launcher that starts ``processes`` per run.

    Raises:
        ConfigError: the node and the launcher contradict each other.
    """
    if bind_target(node) is auto:
        node = option("parallel", "ddp" if processes > 1 else "none")
    kind = bind(node, "parallel")().kind
    if kind == "none":
        if processes > 1:
            problem = f"the launcher starts {processes} processes, and each would train the same model on the same data"
            raise ConfigError(Fault("parallel", problem, "use parallel=ddp or parallel=fsdp, or one process", kind))
        return dict(node)
    if processes == 1:
        count = node.get("processes") or 2
        remedy = f"add launcher=accelerate launcher.processes={count} (or launcher=slurm), or use parallel=none"
        raise ConfigError(Fault("parallel", "needs several processes, but this launcher starts one", remedy, kind))
    if node.get("processes") not in (None, processes):
        remedy = "remove this override: the launcher sets the number of processes"
        problem = f"the launcher starts {processes} processes"
        raise ConfigError(Fault("parallel.processes", problem, remedy, node["processes"]))
    return {**node, "processes": processes}


def check_combination(cfg: Mapping[str, Any]) -> Iterator[Fault]:
    """Faults of ``parallel`` in combination with other groups; works before ``resolve`` too."""
    if bind_target(cfg["parallel"]) is not fsdp:
        return
    yield from _quant_faults(bind(cfg["quant"], "quant")(), cfg["parallel"].get("param_dtype"))
    if cfg["parallel"].get("param_dtype") and cfg["model"].get("dtype") == "bfloat16":
        problem = "has no effect with model.dtype=bfloat16: the weights are gathered as they are stored"
        yield Fault("parallel.param_dtype", problem, "set it to null, or model.dtype=auto", "bfloat16")
    if cfg["model"].get("new_tokens") and bind_target(cfg["lora"]) is not lora.none:
        problem = "parallel=fsdp cannot shard the rows of new tokens (model.new_tokens), which an adapter trains alone"
        yield Fault("parallel", problem, "use parallel=ddp, or lora=none", "fsdp")
    if bind_target(cfg["compile"]) is compilation.whole:
        problem = "parallel=fsdp gathers weights layer by layer, but compile=whole makes one graph of all layers"
        yield Fault("parallel", problem, "use compile=regional", "fsdp")
    optim = bind_target(cfg["optim"])
    if not getattr(inspect.getmodule(optim), "shardable", lambda _: False)(cfg["optim"]):
        name = str(cfg["optim"].get("name") or optim.__name__)
        remedy = "use optim=adamw, or parallel=ddp"
        yield Fault("parallel", f"parallel=fsdp cannot shard the state of the optimizer {name}", remedy, "fsdp")


def _quant_faults(quant: Quant, param_dtype: str | None) -> Iterator[Fault]:
    stored = "" if quant.plain else f" with weights in {quant.name}"
    needed = SHARDS_BYTES if quant.shards else SHARDS
    if not quant.plain and not quant.shards:
        remedy = "use quant=4bit, or parallel=ddp (quantized weights are small)"
        yield Fault("parallel", f"parallel=fsdp does not shard weights in {quant.name}", remedy, "fsdp")
    elif not compat.at_least("torch", needed):
        problem = f"parallel=fsdp{stored} needs torch {needed}"
        yield Fault("parallel", problem, f"install torch >= {needed}, or use parallel=ddp", "fsdp")
    if stored and param_dtype:
        problem = f"has no effect{stored}: they are gathered as they are stored"
        yield Fault("parallel.param_dtype", problem, "set it to null", param_dtype)
