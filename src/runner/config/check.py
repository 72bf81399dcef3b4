"""Every fault of a composed configuration, found before anything is written, loaded or queued."""

from __future__ import annotations

import inspect
import marshal
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from runner.config import bind, combinations, condition, data_nodes, eval_metrics, schema, user_code
from runner.config.schema import RunSettings, TrainSettings, divisors
from runner.errors import Fault, refuse
from runner.secrets import find_secrets

OPTION_GROUPS = (
    "task", "model", "quant", "lora", "optim", "schedule", "compile", "parallel", "tracking", "launcher", "search",
)  # fmt: skip

LIMITS = ("max_steps", "num_train_epochs", "max_tokens")
"""The stopping criteria in ``train``; exactly one must be set."""


Known = dict[tuple[str, bytes], list[Fault]]
"""The faults of groups that are checked already, by name and content: jobs of a sweep share most of their groups."""


def faults_of(cfg: Mapping[str, Any], known: Known | None = None) -> list[Fault]:
    """All faults at once: of single values first, of combinations where the single values are right.

    ``known``: filled and used by calls for other jobs of the same command line.
    """
    return list(_group_faults(cfg, {} if known is None else known)) or list(_combination_faults(cfg))


def check_data(node: Mapping[str, Any]) -> None:
    """Check the node ``data`` alone."""
    refuse(_data_faults(node))


def faults_of_group(cfg: Mapping[str, Any], group: str) -> list[Fault]:
    """The faults of one group by itself."""
    return list(bind.find_faults(cfg[group], group))


def _group_faults(cfg: Mapping[str, Any], known_faults: Known) -> Iterator[Fault]:
    groups = {*OPTION_GROUPS, "train", "data"}
    top = {key: value for key, value in cfg.items() if key not in groups and key != user_code.PATHS}
    for fault in bind.find_faults(top, "", RunSettings):
        known = not fault.problem.startswith(bind.NO_KEY)
        yield fault if known else bind.unknown_key(fault.key, [*bind.keys_of(RunSettings), *groups], fault.value)
    for group in sorted(groups):
        node = cfg.get(group)
        if not isinstance(node, Mapping):
            remedy = f"choose an option with {group}=…, or set one of its keys with {group}.key=…"
            yield Fault(group, "must be a group of keys", remedy, node)
            continue
        yield from _faults_once(node, group, known_faults)


def _faults_once(node: Mapping[str, Any], group: str, known: Known) -> list[Fault]:
    try:
        content: Any = node
        key = group, marshal.dumps(content, 2)  # version 2 has no references: equal nodes have equal bytes
    except ValueError:  # a value of a type that no YAML has
        return list(_faults_of_group(node, group))
    if key not in known:
        known[key] = list(_faults_of_group(node, group))
    return known[key]


def _faults_of_group(node: Mapping[str, Any], group: str) -> Iterator[Fault]:
    if group == "train":
        yield from bind.find_faults(node, group, TrainSettings)
    elif group == "data":
        yield from _data_faults(node)
    else:
        yield from bind.find_faults(node, group)


def _data_faults(node: Mapping[str, Any]) -> Iterator[Fault]:
    """Faults of the node ``data`` itself, then of the data sets inside of it."""
    yield from _set_faults(node)
    if inside := list(data_nodes.faults(node)):
        yield from inside
        return
    for group in data_nodes.GROUPS:
        for name in data_nodes.named(node, group):
            for fault in _set_faults(data_nodes.each(node, group)[name]):
                yield replace(fault, key=f"data.{group}.{name}{fault.key.removeprefix('data')}")


def _set_faults(node: Mapping[str, Any]) -> Iterator[Fault]:
    settings, form, source = schema.split_data(dict(node))
    faults = list(bind.find_faults(settings, "data", schema.DataSettings))
    yield from faults
    if not faults and settings.get("where") is not None:
        yield from condition.faults(settings["where"], "data.where")
    if isinstance(name := node.get("format"), str):
        yield Fault("data.format", "is a group of keys", f"choose the format with data/format={name}", name)
    else:
        yield from bind.find_faults(form, "data.format")
    yield from schema.unlimited_stream(node, "eval_rows")
    known = {*bind.keys_of(schema.DataSettings), "format"}
    for fault in bind.find_faults(source, "data"):
        if not fault.problem.startswith(bind.NO_KEY):
            yield fault
            continue
        own = bind.keys_of(bind.bind_target(source))
        yield bind.unknown_key(fault.key.removeprefix("data."), [*known, *own], fault.value).below("data")


def _combination_faults(cfg: Mapping[str, Any]) -> Iterator[Fault]:
    for key in find_secrets(cfg):
        remedy = "put it into the environment (HF_TOKEN, MLFLOW_TRACKING_USERNAME and _PASSWORD): it is found there"
        yield Fault(key, "looks like a secret, and the configuration of a run is written down", remedy)
    for name, node in data_nodes.each(cfg["data"]).items():
        yield from schema.check_data(node, f"data.{data_nodes.SOURCES}.{name}" if name else "data")
    for module in dict.fromkeys(inspect.getmodule(bind.bind_target(cfg[group])) for group in OPTION_GROUPS):
        yield from getattr(module, "check_combination", lambda _: ())(cfg)
    train = cfg["train"]
    micro, rows = train["micro_batch_size"], train["per_device_batch_size"]
    if isinstance(micro, int) and rows % micro:
        remedy = f"use one of {', '.join(map(str, divisors(rows)))}, or auto"
        yield Fault("train.micro_batch_size", f"does not divide train.per_device_batch_size={rows}", remedy, micro)
    limits = [f"train.{key}" for key in LIMITS if train[key] is not None]
    if not limits:
        remedy = f"set one of {', '.join(f'train.{key}' for key in LIMITS)}"
        yield Fault("train", "no stopping criterion", remedy)
    if len(limits) > 1:
        remedy = f"keep one and set the others to null: {' '.join(f'{key}=null' for key in limits[:-1])}"
        yield Fault("train", f"has {len(limits)} stopping criteria, and can have one: {', '.join(limits)}", remedy)
    yield from eval_metrics.faults(cfg)
    yield from combinations.faults(cfg)
    task = bind.bind(cfg["task"], "task")()
    if task.compares and (dropout := cfg["lora"].get("lora_dropout")):
        which = "its own start or an earlier step, and dropout makes both differ at random"
        problem = f"task={task.name} compares the model with {which}"
        yield Fault("lora.lora_dropout", problem, "set it to 0", dropout)
    if cfg["data"]["packing"] and not task.packable:
        yield Fault("data.packing", f"task={task.name} cannot share a row between examples", "set it to false", True)
