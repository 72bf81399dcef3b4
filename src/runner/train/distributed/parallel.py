"""How one model is spread over the processes of a run: not at all, whole on each, or in shards.

``auto`` is settled before anything is written: a worker finds ``none``, ``ddp`` or ``fsdp`` with its number of
processes, which is part of what is computed and so of the run's signature.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from runner.config.bind import TARGET, option
from runner.config.schema import Count
from runner.errors import ConfigError, Fault

SHARDABLE = (
    "adadelta", "adagrad", "adam", "adamax", "adamw", "asgd", "nadam", "radam", "rmsprop", "rprop", "sgd",
)  # fmt: skip
"""Optimizers of torch that treat each value by itself, so that a shard is trained as the whole would be."""


@dataclass(frozen=True)
class Parallel:
    """How a model is spread."""

    kind: Literal["none", "ddp", "fsdp"]
    processes: int = 1
    find_unused_parameters: bool = False
    bucket_cap_mb: int = 25
    reshard_after_forward: bool = True


def none() -> Parallel:
    """One process on one device."""
    return Parallel("none")


def auto() -> Parallel:
    """``ddp`` where the launcher starts several processes, else ``none``; settled before a worker sees it."""
    raise AssertionError("parallel=auto is settled before the run is written down")


def ddp(*, processes: Count | None, find_unused_parameters: bool, bucket_cap_mb: Count) -> Parallel:
    """The whole model in each process, each with its part of the batch; gradients are averaged between them."""
    return Parallel("ddp", processes or 1, find_unused_parameters=find_unused_parameters, bucket_cap_mb=bucket_cap_mb)


def fsdp(*, processes: Count | None, reshard_after_forward: bool) -> Parallel:
    """Weights, gradients and optimizer state in shards over the processes (https://arxiv.org/abs/2304.11277)."""
    return Parallel("fsdp", processes or 1, reshard_after_forward=reshard_after_forward)


def processes_of(node: Mapping[str, Any]) -> int:
    """How many processes train a run with this (settled) node."""
    return int(node.get("processes") or 1)


def resolve(node: Mapping[str, Any], processes: int) -> dict[str, Any]:
    """The node as it is written down, for a launcher that starts ``processes`` for each run.

    Raises:
        ConfigError: the two do not go together.
    """
    kind = kind_of(node)
    if kind == "auto":
        kind = "ddp" if processes > 1 else "none"
        node = option("parallel", kind)
    if kind == "none":
        if processes > 1:
            problem = f"the launcher starts {processes} processes, and each would train the same"
            raise ConfigError(Fault("parallel", problem, "use parallel=ddp or parallel=fsdp, or one process", kind))
        return dict(node)
    if processes == 1:
        wanted = node.get("processes") or 2
        remedy = f"add launcher=accelerate launcher.processes={wanted} (or launcher=slurm), or use parallel=none"
        raise ConfigError(Fault("parallel", "needs several processes, and this launcher starts one", remedy, kind))
    if node.get("processes") not in (None, processes):
        remedy = "leave it out: it follows from the launcher"
        problem = f"the launcher starts {processes} processes"
        raise ConfigError(Fault("parallel.processes", problem, remedy, node["processes"]))
    return {**node, "processes": processes}


def check_combination(cfg: Mapping[str, Any]) -> Iterator[Fault]:
    """Faults of ``parallel`` together with other groups, each of them right by itself; works before settling too."""
    if kind_of(cfg["parallel"]) != "fsdp":
        return
    if kind_of(cfg["quant"]) != "none":
        remedy = "use parallel=ddp (quantized weights are small), or quant=none"
        yield Fault("parallel", "quantized weights cannot be cut into shards", remedy, "fsdp")
    if kind_of(cfg["compile"]) == "whole":
        remedy = "use compile=regional: layer by layer, as they are gathered"
        yield Fault(
            "parallel", "shards are gathered layer by layer, and this makes one graph of all layers", remedy, "fsdp"
        )
    name = str(cfg["optim"].get("name") or kind_of(cfg["optim"])).lower()
    if name not in SHARDABLE:
        remedy = "use optim=adamw, or parallel=ddp"
        yield Fault("parallel", f"the state of {name} cannot be cut into shards", remedy, "fsdp")


def kind_of(node: Mapping[str, Any]) -> str:
    """The name of the option's function."""
    return str(node.get(TARGET, "")).rpartition(".")[2]
