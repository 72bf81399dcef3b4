"""Which option of a group a frozen configuration has: ``quant=4bit``, where ``quant._target_`` is all that is there."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml

from runner.config import moved
from runner.config.bind import config_dir, flatten

TARGET = "._target_"
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

Node = tuple[tuple[str, str], ...]
"""The keys of a group with their values, flattened."""


def named(params: Mapping[str, str], given: Mapping[str, str] | None = None) -> tuple[dict[str, str], frozenset[str]]:
    """The parameters with the option's name (``quant: 4bit``) in place of its function (``quant._target_``).

    Args:
        params: the flattened configuration.
        given: group → option as the command line had it, which settles what cannot be told apart.

    Returns:
        the parameters, and those of their keys whose value is what the option's YAML says.
    """
    groups = [key.removesuffix(TARGET) for key in params if key.endswith(TARGET)]
    nodes: dict[str, dict[str, str]] = {group: {} for group in groups}
    for key, value in params.items():
        group = _home(key, nodes)
        if group:
            nodes[group][key.removeprefix(f"{group}.")] = moved.target_today(value) if key.endswith(TARGET) else value
    options = {
        group: _option(group, tuple(node.items()), (given or {}).get(group, "")) for group, node in nodes.items()
    }
    found = {
        key.removesuffix(TARGET): options[key.removesuffix(TARGET)][0] if key.endswith(TARGET) else value
        for key, value in params.items()
    }
    return found, frozenset(f"{group}.{key}" for group, (_, alike) in options.items() for key in alike)


def given_by(overrides: list[str]) -> dict[str, str]:
    """Group → option, of the overrides that look like a choice; those that are none do no harm."""
    parted = (override.lstrip("+").partition("=") for override in overrides)
    return {key.replace("/", "."): value for key, _, value in parted}


def _home(key: str, groups: Mapping[str, object]) -> str:
    """The innermost group that a key lies in; empty where it lies in none."""
    while "." in key:
        key = key.rpartition(".")[0]
        if key in groups:
            return key
    return ""


@functools.lru_cache(4096)
def _option(group: str, node: Node, given: str) -> tuple[str, frozenset[str]]:
    """The option that a node is made of, and its keys that stand as they do there; else its function's name."""
    there = dict(node)
    function = there["_target_"].rpartition(".")[2]
    options = {name: keys for name, keys in _options(group) if keys.get("_target_") == there["_target_"]}
    if not options:
        return function, frozenset()
    alike = {
        name: [key for key, value in keys.items() if there.get(key) == value or "${" in value]
        for name, keys in options.items()
    }
    if given in alike:
        return given, frozenset(alike[given])
    # Of options that fit equally well it is the one whose first keys do: they are what makes it (quant.kind).
    fit = {name: (len(keys), [key in keys for key in options[name]]) for name, keys in alike.items()}
    best = [name for name in fit if fit[name] == max(fit.values())]
    if len(best) == 1:
        return best[0], frozenset(alike[best[0]])
    return function, frozenset.intersection(*(frozenset(alike[name]) for name in best))


@functools.cache
def _options(group: str) -> list[tuple[str, dict[str, str]]]:
    folder = config_dir() / group.replace(".", "/")
    return [(path.stem, dict(_keys(path))) for path in sorted(folder.glob("*.yaml")) if path.stem != "base"]


def _keys(path: Path) -> Iterator[tuple[str, str]]:
    """The keys of an option on top of those it builds on, flattened."""
    found = yaml.load(path.read_text(), Loader=_LOADER) or {}
    for base in found.pop("defaults", []):
        if isinstance(base, str) and base != "_self_":
            yield from _keys(path.with_name(f"{base}.yaml"))
    yield from flatten(found)
