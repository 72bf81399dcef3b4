"""The data sets inside of ``data``: the sources of a mixture (``data.sources``) and further ones to evaluate on
(``data.evals``). Each is written in short, and completed to a node like ``data`` itself:

    code: {path: code.jsonl, format: alpaca, weight: 0.3}
    → code: {_target_: runner.data.sources.local, path: code.jsonl, …, format: {_target_: …}, weight: 0.3}
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from runner.config import bind, bounds, schema
from runner.config.bind import TARGET, config_dir
from runner.config.schema import NotNegative
from runner.errors import ConfigError, Fault, refuse, suggest

SOURCES, EVALS = GROUPS = "sources", "evals"
OWN = {
    SOURCES: ("eval_fraction", "eval_rows", "train_rows", "where", "order_by", "system_prompt"),
    EVALS: ("eval_rows", "where", "system_prompt"),
}
"""The keys of ``DataSettings`` that each data set may have of its own."""
WEIGHT = "weight"
NAME = re.compile(r"[A-Za-z_][\w-]{0,60}")
MISSING = "???"
_KIND, _DEFAULT_KIND = "source", "local"


OPEN = (f"data.{SOURCES}", f"data.{EVALS}", "model.rope_scaling", "tracking.tags")
"""Mappings whose keys are not in the YAML: ``data.sources.code.path`` needs no ``+``."""


def is_open(key: str) -> bool:
    """Whether a key is below one of ``OPEN``."""
    return key.startswith(tuple(f"{each}." for each in OPEN))


def named(data: Mapping[str, Any], group: str) -> dict[str, dict[str, Any]]:
    """The data sets of one kind, by name."""
    nodes = data.get(group)
    return {str(name): node for name, node in nodes.items()} if isinstance(nodes, Mapping) else {}


def held_out_names(data: Mapping[str, Any]) -> list[str]:
    """The names of the sets whose metrics a run logs: ``eval/NAME/loss`` …"""
    return [name for group in GROUPS for name in named(data, group)]


def completed(data: Any) -> Any:
    """The node ``data`` with each of its data sets completed; those that are complete stay as they are.

    Raises:
        ConfigError: a source or format that is no option.
    """
    if not isinstance(data, Mapping):
        return data
    faults: list[Fault] = []
    nodes: dict[str, Any] = dict(data)
    for group in GROUPS:
        for name, node in named(data, group).items():
            try:
                nodes[group] = {**nodes[group], name: _completed(node, data.get("format"))}
            except ConfigError as error:
                faults += [fault.below(f"data.{group}.{name}") for fault in error.faults]
    refuse(faults)
    return nodes


def _completed(node: Any, form: Any) -> Any:
    if not isinstance(node, Mapping) or TARGET in node:
        return node
    given = dict(node)
    option, own_form = _option(given.pop(_KIND, _DEFAULT_KIND))
    return {**option, **given, "format": _format(given.get("format"), own_form or form)}


def _option(kind: Any) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """(node of an option of ``data`` without the keys of ``DataSettings``, its format if its rows have only that)."""
    names = sorted(path.stem for path in (config_dir() / "data").glob("*.yaml") if path.stem not in ("base", "mix"))
    if kind not in names:
        problem = f"no such option. {suggest(str(kind), names)}".strip(" .")
        raise ConfigError(Fault(_KIND, problem, f"options here: {', '.join(names)}", kind))
    content = yaml.safe_load((config_dir() / "data" / f"{kind}.yaml").read_text())
    defaults = content.pop("defaults")
    settings = bind.keys_of(schema.DataSettings)
    option = {key: value for key, value in content.items() if key not in settings and value != MISSING}
    has_any_format = "path" in content
    form = next(entry["format"] for entry in defaults if isinstance(entry, Mapping))
    return option, None if has_any_format else bind.option("data/format", form)


def _format(given: Any, form: Any) -> Any:
    """The node of a format: an option by its name, or single keys of it; ``form``: what holds without them."""
    if given is None or (isinstance(given, Mapping) and TARGET in given):
        return form if given is None else given
    keys = {} if isinstance(given, str) else dict(given)
    name = given if isinstance(given, str) else keys.pop("name", "custom" if "function" in keys else None)
    if name is None:
        return {**form, **keys}
    names = sorted(path.stem for path in (config_dir() / "data" / "format").glob("*.yaml"))
    if name not in names:
        problem = f"no such option. {suggest(str(name), names)}".strip(" .")
        raise ConfigError(Fault("format", problem, f"options here: {', '.join(names)}", name))
    option = bind.option("data/format", name)
    return {**{key: value for key, value in option.items() if value != MISSING}, **keys}


def each(data: Mapping[str, Any], group: str = SOURCES) -> dict[str, dict[str, Any]]:
    """The data sets of one kind, each as a node of its own, with the settings of ``data``, by name.

    Data that are no mixture are one source without a name.
    """
    settings, _, source = schema.split_data(data)
    if group == SOURCES and SOURCES not in source:
        return {"": {**data}}
    return {
        name: {**settings, **{key: value for key, value in node.items() if (group, key) != (SOURCES, WEIGHT)}}
        for name, node in named(data, group).items()
        if isinstance(node, Mapping)
    }


def faults(data: Mapping[str, Any]) -> Iterator[Fault]:
    """Names and weights that cannot be, and keys that hold for all data sets together."""
    names = [*named(data, SOURCES), *named(data, EVALS)]
    for group in GROUPS:
        if not isinstance(data.get(group, {}), Mapping):
            yield Fault(
                f"data.{group}", "must be a group of names", f"name a file: data.{group}.NAME.path=FILE", data[group]
            )
        for name, node in named(data, group).items():
            key = f"data.{group}.{name}"
            if not NAME.fullmatch(name):
                yield Fault(key, "is no name", "use letters, digits, - and _, as in data.sources.my_code.path=…")
            if names.count(name) > 1:
                yield Fault(key, f"the name is used in data.{SOURCES} and in data.{EVALS}", "give it another name")
            if not isinstance(node, Mapping):
                yield Fault(key, "must be a group of keys", f"name its file: {key}.path=FILE", node)
                continue
            if SOURCES in node:
                yield Fault(f"{key}.{SOURCES}", "a mixture cannot hold another", f"list its files in data.{SOURCES}")
            shared = [each for each in bind.keys_of(schema.DataSettings) if each in node and each not in OWN[group]]
            for word in shared:
                yield Fault(f"{key}.{word}", "holds for all data together", f"set data.{word}", node[word])
            if group == SOURCES:
                yield from _weight_faults(f"{key}.{WEIGHT}", node.get(WEIGHT))


def _weight_faults(key: str, weight: Any) -> Iterator[Fault]:
    if weight is not None and (problem := bounds.mismatch(weight, NotNegative)):
        yield Fault(key, problem, "set it to a share of the trained tokens such as 0.3, or to null: by size", weight)
