"""From YAML to typed Python: composing is Hydra's, everything that follows is here.

An *option* is a plain function (or a keyword-only dataclass) named by ``_target_``. Its positional parameters are
run-time objects; its keyword-only parameters are the YAML keys. ``bind`` checks a node against that signature and
returns a ``functools.partial`` which waits for the run-time objects.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import annotated_types
import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from runner import PACKAGE
from runner.config import user_code
from runner.errors import ConfigError, Fault, suggest

TARGET = "_target_"

REFUSED_KEYS = {
    "device_map": "device_map=auto is for inference only: training places the whole model on its own device; "
    "leave the key out",
    "load_in_4bit": "choose the quantization with quant=4bit",
    "load_in_8bit": "choose the quantization with quant=8bit",
    "lr": "did you mean optim.learning_rate?",
    "batch_size": "did you mean train.per_device_batch_size?",
    "gradient_checkpointing": "choose train.memory=min (computes layers again) or train.memory=balanced (less of them)",
    "outlier_threshold": "it went: 8-bit weights are multiplied in the dtype of the activations; leave the key out",
    "activation_checkpointing": "choose train.memory=min or train.memory=balanced",
    "epochs": "did you mean train.num_train_epochs (with train.max_steps=null)?",
}
"""Keys that people bring from elsewhere, with what to use here."""


def config_dir() -> Path:
    """The folder of the config groups: beside the package in a wheel, at the top of a checkout."""
    packaged = PACKAGE / "conf"
    return packaged if packaged.is_dir() else PACKAGE.parents[1] / "conf"


def option(group: str, name: str) -> dict[str, Any]:
    """The node that ``group=name`` chooses, where nothing builds on another."""
    return dict(yaml.safe_load((config_dir() / group / f"{name}.yaml").read_text()))


def to_plain(node: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """The node as plain dicts and lists, interpolations resolved.

    Raises:
        ConfigError: an interpolation that leads nowhere, or a value still missing (``???``).
    """
    if not isinstance(node, DictConfig):
        return dict(node)
    try:
        missing = sorted(OmegaConf.missing_keys(node))
        if missing:
            raise ConfigError(*(Fault(key, "needs a value", f"give it one: {key}=…") for key in missing))
        plain = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = str(getattr(error, "full_key", "") or "")
        raise ConfigError(Fault(key, str(error).splitlines()[0], "correct the interpolation")) from error
    return typing.cast("dict[str, Any]", plain)


def bind(node: Mapping[str, Any], key: str = "", target: Callable[..., Any] | None = None) -> functools.partial:
    """Check ``node`` against the signature of ``target`` (or of its ``_target_``) and bind its values.

    Raises:
        ConfigError: with *all* faults of the node, each key written from ``key`` down.
    """
    faults = list(find_faults(node, key, target))
    if faults:
        raise ConfigError(*faults)
    function = target or _resolve(node)
    return functools.partial(function, **_values(node), **_places(function, node))


def find_faults(node: Mapping[str, Any], key: str = "", target: Callable[..., Any] | None = None) -> Iterator[Fault]:
    """Every fault of ``node``: unknown, missing and wrongly typed keys, then what its ``check_`` companion says."""
    try:
        function = target or _resolve(node)
    except ConfigError as error:
        yield from (fault.below(key) for fault in error.faults)
        return
    values = _values(node)
    faults = [fault.below(key) for fault in _signature_faults(function, values)]
    yield from faults
    companion = getattr(inspect.getmodule(function), f"check_{function.__name__}", None)
    if not faults and companion is not None:
        yield from (fault.below(key) for fault in companion(**values, **_places(companion, node)))


def keys_of(function: Callable[..., Any]) -> list[str]:
    """The YAML keys an option takes: its keyword-only parameters."""
    return [name for name, parameter in _parameters(function).items() if parameter.kind is parameter.KEYWORD_ONLY]


def bind_target(node: Mapping[str, Any]) -> Callable[..., Any]:
    """The function that the node's ``_target_`` names."""
    return _resolve(node)


def _values(node: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of the option: those of the node that are not for ``bind`` itself."""
    return {name: value for name, value in node.items() if name not in (TARGET, user_code.PATHS)}


def _places(function: Callable[..., Any], node: Mapping[str, Any]) -> dict[str, Any]:
    """Where the user's code is, for an option that calls a function of it."""
    return (
        {user_code.PATHS: node.get(user_code.PATHS)}
        if user_code.PATHS in inspect.signature(function).parameters
        else {}
    )


@functools.cache
def options() -> frozenset[str]:
    """The ``_target_`` of every option in conf/: of this package nothing else may be one."""
    texts = (path.read_text() for path in config_dir().rglob("*.yaml"))
    return frozenset(target for text in texts for target in re.findall(rf"^ *{TARGET}: (\S+)", text, re.MULTILINE))


def _resolve(node: Mapping[str, Any]) -> Callable[..., Any]:
    """The function that a node names: an option of this package, or a function of the user's code.

    A library's class is neither: it would swallow a misspelt key where an option refuses it.
    """
    name = node.get(TARGET)
    if not isinstance(name, str) or "." not in name or name.partition(".")[0] == "runner":
        if name not in options():
            problem = f"is no option of runner. {suggest(str(name), options())}".strip()
            raise ConfigError(Fault(TARGET, problem, "name an option, or a function of your own code", name))
    elif not node.get(user_code.PATHS):
        problem = (
            f"'{name.partition('.')[0]}' is not part of your code, and only options and your own code may be named"
        )
        remedy = "add its file or package (code=FILE.py), or wrap the call in a function of your own"
        raise ConfigError(Fault(TARGET, problem, remedy, name))
    module_name, _, attribute = name.rpartition(".")
    is_ours = name.partition(".")[0] == "runner"
    paths = [] if is_ours else [Path(path) for path in node[user_code.PATHS]]
    try:
        module = user_code.load(module_name, paths) if paths else importlib.import_module(module_name)
    except ConfigError as error:
        raise ConfigError(*(replace(fault, key=fault.key or TARGET, value=name) for fault in error.faults)) from error
    function = getattr(module, attribute, None)
    names = [n for n, f in vars(module).items() if inspect.isfunction(f) and not n.startswith("_")]
    if not callable(function) or attribute.startswith("_"):
        problem = f"no such function. {suggest(attribute, names)}".strip()
        raise ConfigError(Fault(TARGET, problem, "correct the name", name))
    if paths and not user_code.from_user_code(function, paths):
        problem = f"'{attribute}' is imported into {module_name} from {getattr(function, '__module__', 'elsewhere')}"
        raise ConfigError(Fault(TARGET, problem, "wrap it in a function of your own, whose keys can be checked", name))
    return typing.cast("Callable[..., Any]", function)


def _signature_faults(function: Callable[..., Any], values: Mapping[str, Any]) -> Iterator[Fault]:
    parameters = _parameters(function)
    known = [name for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY and name != user_code.PATHS]
    takes_more = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name, value in values.items():
        if name not in known:
            if not takes_more:
                yield unknown_key(name, known, value)
            continue
        problem = mismatch(value, parameters[name].annotation)
        if problem:
            annotation = parameters[name].annotation
            remedy = f"set {name} to {_allowed(annotation)}"
            if value == "None" and _fits(None, annotation):  # Python's word; YAML has another
                remedy = f"did you mean {name}=null?"
            yield Fault(name, problem, remedy, value)
    for name in known:
        if name not in values and parameters[name].default is inspect.Parameter.empty:
            allowed = _allowed(parameters[name].annotation)
            yield Fault(name, "is missing", f"give it a value: {allowed}")


def unknown_key(name: str, known: Iterable[str], value: object = ...) -> Fault:
    """The fault for a key nobody reads, with the nearest that exists."""
    known = sorted(set(known))
    if name in REFUSED_KEYS:
        return Fault(name, "is not a key here", REFUSED_KEYS[name], value)
    listed = ", ".join(known) or "none"
    return Fault(name, "no such key", f"{suggest(name, known)} keys here: {listed}".strip(), value)


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    # Only the YAML keys' annotations are evaluated: those of run-time objects may name torch, which is not loaded.
    names = getattr(function, "__globals__", None) or vars(importlib.import_module(function.__module__))
    return {
        name: parameter.replace(annotation=_evaluated(parameter.annotation, names))
        if parameter.kind is parameter.KEYWORD_ONLY
        else parameter
        for name, parameter in inspect.signature(function).parameters.items()
    }


def _evaluated(annotation: Any, names: dict[str, Any]) -> Any:
    if annotation is inspect.Parameter.empty:
        return Any
    return eval(annotation, names) if isinstance(annotation, str) else annotation


def mismatch(value: object, annotation: Any) -> str:
    """Why ``value`` does not fit ``annotation``; an empty string where it does."""
    if _fits(value, annotation):
        return ""
    if isinstance(value, str) and (near := suggest(value, _literals(annotation))):
        return f"{near} allowed: {_allowed(annotation)}"
    return f"must be {_allowed(annotation)}"


def _fits(value: object, annotation: Any) -> bool:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any or isinstance(annotation, typing.TypeVar):
        return True
    if origin is typing.Annotated:
        return _fits(value, arguments[0]) and all(_within(value, bound) for bound in arguments[1:])
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, choice) for choice in arguments)
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in arguments)
    if origin in (list, tuple) or annotation in (list, tuple):
        inner = arguments[0] if arguments else Any
        return isinstance(value, list | tuple) and all(_fits(item, inner) for item in value)
    if origin is not None and issubclass(origin, Mapping):
        inner = arguments[1] if arguments else Any
        return isinstance(value, Mapping) and all(_fits(item, inner) for item in value.values())
    if annotation is float:
        # Neither .inf nor .nan, nor a whole number that no float can hold.
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if annotation is None or annotation is type(None):
        return value is None
    return not inspect.isclass(annotation) or isinstance(value, annotation)


def _within(value: Any, bound: object) -> bool:
    if value is None:
        return True
    match bound:
        case annotated_types.Gt(gt=limit):
            return bool(value > limit)
        case annotated_types.Ge(ge=limit):
            return bool(value >= limit)
        case annotated_types.Lt(lt=limit):
            return bool(value < limit)
        case annotated_types.Le(le=limit):
            return bool(value <= limit)
    return True


def _literals(annotation: Any) -> list[str]:
    if typing.get_origin(annotation) is Literal:
        return [choice for choice in typing.get_args(annotation) if isinstance(choice, str)]
    return [word for part in typing.get_args(annotation) for word in _literals(part)]


def _allowed(annotation: Any) -> str:
    """The annotation in the words of someone who writes YAML: ``one of nf4, fp4``, ``a whole number >= 1``."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        bounds = " and ".join(filter(None, map(_bound_text, arguments[1:])))
        return f"{_allowed(arguments[0])} {bounds}".strip()
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_allowed(choice) for choice in arguments)
    if origin is Literal:
        return "one of " + ", ".join(_yaml(choice) for choice in arguments)
    if origin in (list, tuple) or annotation in (list, tuple):
        return "a list" + (f" of {_allowed(arguments[0])}" if arguments else "")
    if origin is not None and inspect.isclass(origin) and issubclass(origin, Mapping):
        return "a mapping"
    names = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a text", type(None): "null"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _bound_text(bound: object) -> str:
    match bound:
        case annotated_types.Gt(gt=limit):
            return f"> {limit}"
        case annotated_types.Ge(ge=limit):
            return f">= {limit}"
        case annotated_types.Lt(lt=limit):
            return f"< {limit}"
        case annotated_types.Le(le=limit):
            return f"<= {limit}"
    return ""


def _yaml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)


def flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """``{"lora": {"r": 8}}`` → ``("lora.r", "8")``; values as they are written in YAML."""
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            if key == user_code.PATHS:
                continue
            yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        # An empty text gets quotes: MLflow's server takes no empty value.
        yield prefix, tree if isinstance(tree, str) and tree else json.dumps(tree, ensure_ascii=False, default=str)
