"""Which rows ``evaluate`` reads: the run's eval split, or other rows chosen by overrides of ``data``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from runner.config import check, compose, user_code
from runner.config.bind import TARGET
from runner.errors import ConfigError, Fault, first_line

KEPT = ("max_length", "packing", "overlong", "deduplicate")
"""Keys of ``data`` that keep the run's values unless they are overridden."""
WITHOUT_EFFECT = {
    "data.eval_fraction": "the other rows were used for training; choose other data with data.path",
    "data.train_rows": "nothing is trained",
}


def is_other(overrides: list[str]) -> bool:
    """Whether the overrides choose other rows than the run's eval split; then all of those rows are evaluated."""
    settings = {f"data.{key}" for key in (*KEPT, "eval_rows")}
    return any(_key(text) not in settings for text in overrides)


def node(frozen: Mapping[str, Any], overrides: list[str]) -> dict[str, Any]:
    """The run's node ``data`` with the overrides applied; for other rows ``eval_rows`` becomes null (all rows).

    Raises:
        ConfigError: an override of another key than ``data``, or an unknown key (suggests the nearest one).
    """
    if faults := list(_faults(overrides)):
        raise ConfigError(*faults)
    keys = {_key(text) for text in overrides}
    if "data" in keys:
        data = {**_composed(overrides), **{key: frozen[key] for key in KEPT if f"data.{key}" not in keys}}
    else:
        formats = [text for text in overrides if _key(text).startswith(("data/format", "data.format"))]
        choice = any(_key(text) == "data/format" for text in formats)
        data = {**frozen, **({"format": _composed(formats)["format"]} if choice else {})}
        _set(data, [text for text in overrides if not (choice and text in formats)])
        if not choice and "data.format.function" in keys:
            data["format"].pop(user_code.PATHS, None)
            user_code.settle({"data": data}, [Path.cwd()])
    if is_other(overrides) and "data.eval_rows" not in keys:
        data["eval_rows"] = None
    check.check_data(data)
    return data


def _faults(overrides: list[str]) -> Iterator[Fault]:
    for text in overrides:
        key, _, value = text.partition("=")
        plain = key.lstrip("+~")
        if "=" not in text:
            yield Fault(text, "is not an override", "write data.key=value; options begin with --")
        elif plain in WITHOUT_EFFECT:
            yield Fault(plain, f"has no effect here: {WITHOUT_EFFECT[plain]}", "leave it out", value)
        elif plain.replace("/", ".").split(".")[0] != "data":
            problem = "cannot be changed: the model is evaluated as it was trained"
            yield Fault(plain, problem, "only data=…, data/format=… and data.key=… can be changed", value)


def _composed(overrides: list[str]) -> dict[str, Any]:
    """The node ``data`` as Hydra composes it."""
    args = compose.parse(overrides)
    with compose.opened(args) as hydra:
        composer = compose.Composer(hydra, args)
        if composer.is_sweep():
            raise ConfigError(_one_value("evaluate"))
        job = composer.single()
        user_code.settle(job.cfg, job.code_folders)
        return dict(job.cfg["data"])


def _set(data: dict[str, Any], overrides: list[str]) -> None:
    """Set single keys of the node; values are parsed by Hydra."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    for text in overrides:
        try:
            parsed = OverridesParser.create().parse_override(text.lstrip("+"))
        except HydraException as error:
            problem = f"cannot be parsed: {first_line(error)}"
            raise ConfigError(Fault(_key(text), problem, "put it in quotes: 'data.path=\"a b\"'")) from error
        if parsed.is_sweep_override():
            raise ConfigError(_one_value(_key(text)))
        *above, last = _key(text).split(".")[1:] or [""]
        parent = data
        for name in above:
            parent[name] = dict(parent.get(name) or {})
            parent = parent[name]
        parent[last] = parsed.value()
    assert TARGET in data, "every option node has a _target_"


def _one_value(key: str) -> Fault:
    return Fault(key, "takes one value per key", "run evaluate once for each value")


def _key(text: str) -> str:
    return text.partition("=")[0].lstrip("+~")
