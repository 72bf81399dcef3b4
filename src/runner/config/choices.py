"""Which option of each group a run has: ``quant=4bit``, where its configuration has ``quant._target_`` alone."""

from __future__ import annotations

import functools
import marshal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from runner.config import moved
from runner.config.bind import config_dir, flatten

TARGET = "._target_"
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def of_config(config: Mapping[str, Any], chosen: Mapping[str, str]) -> tuple[dict[str, str], frozenset[str]]:
    """``named`` of a configuration that is not flattened yet; what several runs have in common is computed once."""
    params: dict[str, str] = {}
    implied: set[str] = set()
    options = _by_group(tuple(chosen.items()))
    for group, value in config.items():
        try:
            # Version 2 has no references: equal values have equal bytes, and 1, 1.0, true and "1" have different ones.
            of_group = _of_group(marshal.dumps((group, value, options.get(group, ())), 2))
        except ValueError:  # a value of another type than those of JSON
            of_group = named(dict(flatten({group: value})), chosen)
        params.update(of_group[0])
        implied |= of_group[1]
    return params, frozenset(implied)


@functools.lru_cache(maxsize=1024)
def _of_group(packed: bytes) -> tuple[dict[str, str], frozenset[str]]:
    group, value, chosen = marshal.loads(packed)
    return named(dict(flatten({group: value})), dict(chosen))


@functools.lru_cache(maxsize=64)
def _by_group(chosen: tuple[tuple[str, str], ...]) -> dict[str, tuple[tuple[str, str], ...]]:
    """Group of the top level → the choices in it."""
    groups: dict[str, tuple[tuple[str, str], ...]] = {}
    for group, option in chosen:
        top = group.partition(".")[0]
        groups[top] = (*groups.get(top, ()), (group, option))
    return groups


def named(params: Mapping[str, str], chosen: Mapping[str, str]) -> tuple[dict[str, str], frozenset[str]]:
    """The parameters with the option's name (``quant: 4bit``) in place of its function (``quant._target_``).

    Args:
        params: the flattened configuration.
        chosen: group → option. A group that is missing here has the name of its function, unless one option alone
            has that function.

    Returns:
        the parameters, and the keys whose value is that of the option's YAML file.
    """
    names: dict[str, str] = {}
    implied: set[str] = set()
    for group in [key.removesuffix(TARGET) for key in params if key.endswith(TARGET)]:
        target = moved.target_today(params[f"{group}{TARGET}"])
        options = {name: keys for name, keys in _options(group) if keys.get("_target_") == target}
        names[group] = chosen.get(group) or (next(iter(options)) if len(options) == 1 else target.rpartition(".")[2])
        values = {f"{group}.{key}": value for key, value in options.get(names[group], {}).items() if key != "_target_"}
        implied |= {key for key, value in values.items() if params.get(key) == value or "${" in value}
    shown = {
        key.removesuffix(TARGET): names[key.removesuffix(TARGET)] if key.endswith(TARGET) else value
        for key, value in params.items()
        if key not in names
    }
    return shown, frozenset(implied)


def of_overrides(overrides: list[str]) -> dict[str, str]:
    """Group → option, from overrides that look like a choice, for runs of version 0.1.0; others do no harm."""
    parted = (override.lstrip("+").partition("=") for override in overrides)
    return {key.replace("/", "."): value for key, _, value in parted}


@functools.cache
def _options(group: str) -> list[tuple[str, dict[str, str]]]:
    folder = config_dir() / group.replace(".", "/")
    return [(path.stem, dict(_keys(path))) for path in sorted(folder.glob("*.yaml")) if path.stem != "base"]


def _keys(path: Path) -> Iterator[tuple[str, str]]:
    """The keys of an option on top of those it builds on, flattened."""
    content = yaml.load(path.read_text(), Loader=_LOADER) or {}
    for base in content.pop("defaults", []):
        if isinstance(base, str) and base != "_self_":
            yield from _keys(path.with_name(f"{base}.yaml"))
    yield from flatten(content)
