"""What a trained model is measured on: the rows its run held out, or others, named by overrides of ``data``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from runner.config import check, compose, user_code
from runner.config.bind import TARGET
from runner.errors import ConfigError, Fault

KEPT = ("max_length", "packing", "overlong", "deduplicate")
"""Keys of ``data`` that stay as the run had them, unless they are given."""
WITHOUT_EFFECT = {
    "data.eval_fraction": "rows that the run has not held out it was trained on; name others with data.path",
    "data.train_rows": "nothing is trained",
}


def is_other(overrides: list[str]) -> bool:
    """Whether these overrides name other rows than the run's own: all of them are measured, then."""
    settings = {f"data.{key}" for key in (*KEPT, "eval_rows")}
    return any(_key(text) not in settings for text in overrides)


def node(frozen: Mapping[str, Any], overrides: list[str]) -> dict[str, Any]:
    """The node ``data`` with the overrides on top of that of the run; of other rows all are taken (``eval_rows`` null).

    Raises:
        ConfigError: an override of anything else, or one that names nothing, with the nearest that exists.
    """
    if faults := list(_faults(overrides)):
        raise ConfigError(*faults)
    given = {_key(text) for text in overrides}
    if "data" in given:
        made = {**_composed(overrides), **{key: frozen[key] for key in KEPT if f"data.{key}" not in given}}
    else:
        formats = [text for text in overrides if _key(text).startswith(("data/format", "data.format"))]
        choice = any(_key(text) == "data/format" for text in formats)
        made = {**frozen, **({"format": _composed(formats)["format"]} if choice else {})}
        _set(made, [text for text in overrides if not (choice and text in formats)])
        if not choice and "data.format.function" in given:
            made["format"].pop(user_code.PATHS, None)
            user_code.settle({"data": made}, [Path.cwd()])
    if is_other(overrides) and "data.eval_rows" not in given:
        made["eval_rows"] = None
    check.check_data(made)
    return made


def _faults(overrides: list[str]) -> Iterator[Fault]:
    for text in overrides:
        key, _, value = text.partition("=")
        plain = key.lstrip("+~")
        if "=" not in text:
            yield Fault(text, "is no override", "write data.key=value; options begin with --")
        elif plain in WITHOUT_EFFECT:
            yield Fault(plain, f"has no effect here: {WITHOUT_EFFECT[plain]}", "leave it out", value)
        elif plain.replace("/", ".").split(".")[0] != "data":
            problem = "cannot be changed: the model is measured as it was trained"
            yield Fault(plain, problem, "only data=…, data/format=… and data.key=… can", value)


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


def _set(made: dict[str, Any], overrides: list[str]) -> None:
    """Set single values, read as Hydra reads them."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    for text in overrides:
        try:
            parsed = OverridesParser.create().parse_override(text.lstrip("+"))
        except HydraException as error:
            problem = f"cannot be read: {str(error).splitlines()[0]}"
            raise ConfigError(Fault(_key(text), problem, "put it in quotes: 'data.path=\"a b\"'")) from error
        if parsed.is_sweep_override():
            raise ConfigError(_one_value(_key(text)))
        *above, last = _key(text).split(".")[1:] or [""]
        place = made
        for name in above:
            place[name] = dict(place.get(name) or {})
            place = place[name]
        place[last] = parsed.value()
    assert TARGET in made, "a node of the run names its option"


def _one_value(key: str) -> Fault:
    return Fault(key, "takes one value of each key", "evaluate once for each")


def _key(text: str) -> str:
    return text.partition("=")[0].lstrip("+~")
