"""From a composed configuration to typed Python functions.

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
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from runner import PACKAGE
from runner.config import bounds, synonyms, user_code
from runner.config.schema import Free
from runner.errors import ConfigError, Fault, first_line, refuse, suggest

TARGET = "_target_"
NO_KEY = "no such key"


def config_dir() -> Path:
    """The folder of the config groups: beside the package in a wheel, at the top of a checkout."""
    packaged = PACKAGE / "conf"
    return packaged if packaged.is_dir() else PACKAGE.parents[1] / "conf"


def option(group: str, name: str) -> dict[str, Any]:
    """The content of the YAML file of ``group=name``; only for groups whose options extend no other file."""
    return dict(yaml.safe_load((config_dir() / group / f"{name}.yaml").read_text()))


def to_plain(node: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """The node as plain dicts and lists, interpolations resolved.

    Raises:
        ConfigError: an interpolation of a missing key, or a value that is still missing (``???``).
    """
    if not isinstance(node, DictConfig):
        return dict(node)
    try:
        missing = sorted(OmegaConf.missing_keys(node))
        refuse(Fault(key, "needs a value", f"give it one: {key}=…") for key in missing)
        plain = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = str(getattr(error, "full_key", "") or "")
        raise ConfigError(Fault(key, first_line(error), "correct the interpolation")) from error
    return typing.cast("dict[str, Any]", plain)


def is_final(plain: Any) -> bool:
    """Whether no value of a plain tree is an interpolation or still missing: resolved, it is the same."""
    if isinstance(plain, dict):
        return all(map(is_final, plain.values()))
    if isinstance(plain, list):
        return all(map(is_final, plain))
    return not isinstance(plain, str) or ("${" not in plain and plain != "???")


def copied(plain: Any) -> Any:
    """A copy of a plain tree; its values are shared."""
    if isinstance(plain, dict):
        return {key: copied(value) for key, value in plain.items()}
    return [copied(value) for value in plain] if isinstance(plain, list) else plain


def bind(node: Mapping[str, Any], key: str = "", target: Callable[..., Any] | None = None) -> functools.partial:
    """Check ``node`` against the signature of ``target`` (or of its ``_target_``) and bind its values.

    Raises:
        ConfigError: with *all* faults of the node, each key written from ``key`` down.
    """
    refuse(find_faults(node, key, target))
    function = target or _resolve(node, key)
    return functools.partial(function, **_values(node), **_places(function, node))


def find_faults(node: Mapping[str, Any], key: str = "", target: Callable[..., Any] | None = None) -> Iterator[Fault]:
    """Every fault of ``node``: unknown, missing and wrongly typed keys, then what its ``check_`` companion says."""
    try:
        function = target or _resolve(node, key)
    except ConfigError as error:
        yield from (fault.below(key) for fault in error.faults)
        return
    values = _values(node)
    faults = [_of_other_group(fault, key).below(key) for fault in _signature_faults(function, values)]
    yield from faults
    companion = _companion("check", function)
    if not faults and companion is not None:
        yield from (fault.below(key) for fault in companion(**values, **_places(companion, node)))


def _of_other_group(fault: Fault, group: str) -> Fault:
    """The fault of an unknown key; if only other groups have a key of this name, with these."""
    if not fault.problem.startswith(NO_KEY) or synonyms.hint(fault.key):
        return fault
    keys = keys_named(fault.key)
    if not keys or any(key.startswith(f"{group}.") for key in keys):
        return fault
    return replace(fault, problem=NO_KEY, remedy=f"did you mean {' or '.join(keys)}?")


def keys_named(name: str) -> list[str]:
    """The keys of this name in all groups: ``warmup_steps`` → ``schedule.warmup_steps``."""
    return list(_keys_by_name(config_dir()).get(name, []))


@functools.cache
def _keys_by_name(folder: Path) -> dict[str, list[str]]:
    """Name → its keys in all groups. Each file is read once in a process, however many keys are misspelt."""
    found: dict[str, set[str]] = {}
    for file in folder.rglob("*.yaml"):
        group = file.parent.relative_to(folder).parts
        for name in re.findall(r"^(\w+):", file.read_text(encoding="utf-8"), re.MULTILINE):
            found.setdefault(name, set()).add(".".join([*group, name]))
    return {name: sorted(keys) for name, keys in found.items()}


def bound_companion(prefix: str, node: Mapping[str, Any]) -> Callable[..., Any] | None:
    """The function ``<prefix>_<option>`` beside the option of a node, with the node's values; None if there is none."""
    companion = _companion(prefix, _resolve(node))
    return functools.partial(companion, **_values(node)) if companion else None


def _companion(prefix: str, function: Callable[..., Any]) -> Callable[..., Any] | None:
    return getattr(inspect.getmodule(function), f"{prefix}_{function.__name__}", None)


def keys_of(function: Callable[..., Any]) -> list[str]:
    """The YAML keys an option takes: its keyword-only parameters."""
    return [name for name, parameter in parameters(function).items() if parameter.kind is parameter.KEYWORD_ONLY]


def bind_target(node: Mapping[str, Any]) -> Callable[..., Any]:
    """The function that the node's ``_target_`` names."""
    return _resolve(node)


def _values(node: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of the option: those of the node that are not for ``bind`` itself."""
    return {name: value for name, value in node.items() if name not in (TARGET, user_code.PATHS)}


def _places(function: Callable[..., Any], node: Mapping[str, Any]) -> dict[str, Any]:
    """The paths of the user's code, as an argument of an option that calls a function of it."""
    return {user_code.PATHS: node.get(user_code.PATHS)} if user_code.PATHS in _signature(function).parameters else {}


_signature = functools.lru_cache(maxsize=512)(inspect.signature)


@functools.cache
def options(group: str = "") -> frozenset[str]:
    """The ``_target_`` of every option of a group (``data.format``): of this package nothing else may be one.

    Without a group, or with the name of none: of all groups.
    """
    folder = config_dir() / group.replace(".", "/")
    files = folder.glob("*.yaml") if group and folder.is_dir() else config_dir().rglob("*.yaml")
    texts = [path.read_text() for path in files]
    return frozenset(target for text in texts for target in re.findall(rf"^ *{TARGET}: (\S+)", text, re.MULTILINE))


def _resolve(node: Mapping[str, Any], group: str = "") -> Callable[..., Any]:
    """The function that a node names: an option of this package and group, or a function of the user's code.

    A library's class is neither: it would swallow a misspelt key where an option refuses it.
    """
    name = node.get(TARGET)
    if not isinstance(name, str) or "." not in name or name.partition(".")[0] == "runner":
        if name not in options(group):
            place = group if options(group) != options() else "runner"
            problem = f"is no option of {place}. {suggest(str(name), options(group))}".strip(" .")
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
    if not callable(function) or attribute.startswith("_"):
        names = [n for n, f in vars(module).items() if inspect.isfunction(f) and not n.startswith("_")]
        problem = f"no such function. {suggest(attribute, names)}".strip(" .")
        raise ConfigError(Fault(TARGET, problem, "correct the name", name))
    if paths and not user_code.from_user_code(function, paths):
        problem = f"'{attribute}' is imported into {module_name} from {getattr(function, '__module__', 'elsewhere')}"
        raise ConfigError(Fault(TARGET, problem, "wrap it in a function of your own, whose keys can be checked", name))
    return typing.cast("Callable[..., Any]", function)


def _signature_faults(function: Callable[..., Any], values: Mapping[str, Any]) -> Iterator[Fault]:
    declared = parameters(function)
    known = [name for name, p in declared.items() if p.kind is p.KEYWORD_ONLY and name != user_code.PATHS]
    takes_more = any(p.kind is p.VAR_KEYWORD for p in declared.values())
    for name, value in values.items():
        if name not in known and not takes_more:
            yield unknown_key(name, known, value)
            continue
        annotation = declared[name].annotation if name in known else Free
        if problem := bounds.mismatch(value, annotation):
            remedy = f"set {name} to {bounds.allowed(annotation)}"
            if name not in known:
                problem, remedy = "is no value", "set it to a text, a finite number, true, false or null, or a list"
            elif isinstance(value, str) and not value.strip():
                remedy = f"{remedy}, or leave it out (is a shell variable empty?)"
            elif value == "None" and bounds.fits(None, annotation):  # Python's word; YAML has another
                remedy = f"did you mean {name}=null?"
            yield Fault(name, problem, remedy, value)
    for name in known:
        if name not in values and declared[name].default is inspect.Parameter.empty:
            yield Fault(name, "is missing", f"give it a value: {bounds.allowed(declared[name].annotation)}")


def unknown_key(name: str, known: Iterable[str], value: object = ..., *, is_ours: bool = True) -> Fault:
    """The fault of an unknown key, with the most similar known one.

    ``is_ours``: also look up the names that other programs have for our keys; False for the options of a library.
    """
    known = sorted(set(known))
    if is_ours and (hint := synonyms.hint(name)):
        return Fault(name, NO_KEY, hint, value)
    return Fault(
        name, f"{NO_KEY}. {suggest(name, known)}".strip(" ."), f"keys here: {', '.join(known) or 'none'}", value
    )


@functools.lru_cache(maxsize=512)
def parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """The parameters of a function, with annotations in place of their texts for the keyword-only ones."""
    # Only the YAML keys' annotations are evaluated: those of run-time objects may name torch, which is not loaded.
    names = getattr(function, "__globals__", None) or vars(importlib.import_module(function.__module__))
    return {
        name: parameter.replace(annotation=_evaluated(parameter.annotation, names))
        if parameter.kind is parameter.KEYWORD_ONLY
        else parameter
        for name, parameter in _signature(function).parameters.items()
    }


def _evaluated(annotation: Any, names: dict[str, Any]) -> Any:
    if annotation is inspect.Parameter.empty:
        return Any
    return eval(annotation, names) if isinstance(annotation, str) else annotation


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
