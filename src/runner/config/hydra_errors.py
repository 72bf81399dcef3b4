"""Translate errors of Hydra and OmegaConf: which override is wrong, why, and what may have been meant."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from hydra._internal.hydra import Hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from runner.config import data_nodes, synonyms
from runner.config.bind import NO_KEY, config_dir, unknown_key
from runner.errors import ConfigError, Fault, suggest
from runner.secrets import redact

CONFIG_NAME = "config"
HABITS = (
    (r"Cannot find primary config '(.+?)'", "--config-name {}", "no such configuration",
     "a preset is chosen with experiment=NAME; for a whole configuration add --config-dir FOLDER with FOLDER/{}.yaml"),
    (r"Could not delete from config\. '(.+?)' does not exist", "~{}", "a key cannot be removed", "set {}=null"),
    (r"Multiple values for ([\w/]+)\.", "+{}", "every run has such an option already", "write {0}=…, without +"),
    (r"Could not find 'hydra/sweeper/(.+?)'", "hydra/sweeper={}", "no such option",
     "searches are built in: -m search=tpe (random, asha) search.trials=20 'KEY=interval(1,9)'"),
)  # fmt: skip
"""(Hydra's message, the key, the problem, the remedy)."""


@contextmanager
def as_config_errors(hydra: Hydra, args: argparse.Namespace) -> Iterator[None]:
    """Turn errors of Hydra and OmegaConf in the block into a ConfigError."""
    try:
        yield
    except (HydraException, OmegaConfBaseException, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ConfigError(*_faults(hydra, args, error)) from error


def is_choice(key: str, hydra: Hydra) -> bool:
    """Whether the key of an override names a config group."""
    loader: Any = hydra.config_loader
    return bool(loader.repository.group_exists(key.lstrip("/"))) and not key.endswith("/")


def _faults(hydra: Hydra, args: argparse.Namespace, error: Exception) -> list[Fault]:
    """Every override that names no key or no option; if there is none, the message of Hydra."""
    faults = list(_override_faults(hydra, args))
    return faults or [_explained(_plain_words(error))]


def _explained(text: str) -> Fault:
    """The fault for a message of Hydra's, with what to write instead where it is a habit of Hydra's users."""
    for pattern, key, problem, remedy in HABITS:
        if match := re.search(pattern, text):
            return Fault(key.format(*match.groups()), problem, remedy.format(*match.groups()))
    return Fault("", text, "python -m runner --help shows groups, options and examples")


def _override_faults(hydra: Hydra, args: argparse.Namespace) -> Iterator[Fault]:
    parser = OverridesParser.create(config_loader=hydra.config_loader)
    if faults := [fault for override in args.overrides for fault in _syntax_faults(parser, override)]:
        yield from faults
        return
    parsed = parser.parse_overrides(args.overrides)
    groups = {name for name in hydra.config_loader.list_groups("") if name != "hydra"}
    choices = [override for override in parsed if is_choice(override.key_or_group, hydra)]
    wrong = {id(override): list(_choice_faults(hydra, override)) for override in choices}
    right = [override for override in choices if not wrong[id(override)] and not override.is_sweep_override()]
    swept = [override for override in choices if not wrong[id(override)] and override.is_sweep_override()]
    variants = _variants(hydra, args, [str(override.input_line) for override in right], swept)
    known = set().union(*(keys for _, keys in variants))
    for override in parsed:
        key = override.key_or_group
        if key.split(".")[0].split("/")[0] == "hydra" or override.is_add() or override.is_force_add():
            continue
        if data_nodes.is_open(key) and ".".join(key.split(".")[:2]) in known:
            continue
        if id(override) in wrong:
            yield from wrong[id(override)]
        elif known and data_nodes.is_open(key):
            remedy = "it is a key of data=mix" if key.startswith("data.") else "choose an option that has it"
            yield Fault(key, "no such key with this option", remedy, _value_of(override))
        elif known and key not in known:
            yield _key_fault(key, _value_of(override), known, groups)
        elif known:
            yield from _missing_in_some(key, _value_of(override), variants)


def _variants(
    hydra: Hydra, args: argparse.Namespace, fixed: list[str], swept: Sequence[Any]
) -> list[tuple[str, set[str]]]:
    """(choice, all keys with it) for each option of each swept group, with the first option of the other groups."""
    options = {override.key_or_group: list(override.sweep_string_iterator()) for override in swept}
    if not options:
        return [("", _known_keys(hydra, args, fixed))]
    firsts = {group: f"{group}={names[0]}" for group, names in options.items()}
    return [
        (f"{group}={name}", _known_keys(hydra, args, [*fixed, *{**firsts, group: f"{group}={name}"}.values()]))
        for group, names in options.items()
        for name in names
    ]


def _missing_in_some(key: str, value: str, variants: list[tuple[str, set[str]]]) -> Iterator[Fault]:
    """The fault of a key that only some of the swept options have."""
    groups = {choice.partition("=")[0].replace("/", ".") for choice, _ in variants}
    own = next((group for group in groups if key.startswith(f"{group}.")), "")
    without = [choice for choice, keys in variants if choice.startswith(own.replace(".", "/")) and key not in keys]
    if own and without:
        remedy = "sweep over these options without the key, and over the others by a second command"
        yield Fault(key, f"{NO_KEY} with {' and '.join(without)}", remedy, value)


def _syntax_faults(parser: OverridesParser, override: str) -> Iterator[Fault]:
    """The fault of an override that Hydra cannot read."""
    key, equals, value = override.partition("=")
    try:
        parser.parse_override(override)
    except HydraException as error:
        if not equals:
            remedy = "write key=value, or see python -m runner --help"
            yield Fault(override, "is neither a verb nor an override", remedy)
            return
        inside = value[1:-1].split(",") if value.startswith("[") and value.endswith("]") else []
        whole = f"[{','.join(map(repr, inside))}]" if inside else f"'{value}'"
        quoted = f'"{key}={whole}"' if not {"'", '"'} & set(value) else f"{key}='…'"
        yield Fault(key, f"cannot be read ({_plain_words(error)})", f"quote the value: {quoted}", value)


def _value_of(override: Any) -> str:
    return str(override.input_line or "").partition("=")[2]


def _choice_faults(hydra: Hydra, override: Any) -> Iterator[Fault]:
    group, value = override.key_or_group, _value_of(override)
    options = [name for name in hydra.config_loader.get_group_options(group) if name != "base"]
    for chosen in value.split(",") if value not in ("", "null") and "(" not in value else []:
        if chosen.strip() not in options:
            yield no_option(group, chosen.strip(), options)


def no_option(group: str, chosen: str, options: Sequence[str]) -> Fault:
    """The fault for an option that a group does not have, with what to write instead or the nearest that exists."""
    if hint := synonyms.option_hint(group, chosen, options):
        return Fault(group, "no such option", hint, chosen)
    problem = f"no such option. {suggest(chosen, options)}".strip(" .")
    return Fault(group, problem, f"options here: {', '.join(options)}", chosen)


def _known_keys(hydra: Hydra, args: argparse.Namespace, choices: list[str]) -> set[str]:
    """All keys of the configuration with these choices; empty if it cannot be composed."""
    try:
        composed = hydra.compose_config(args.config_name or CONFIG_NAME, choices, RunMode.RUN, False)
    except (HydraException, OmegaConfBaseException, ValueError):
        return set()
    ours = {key: value for key, value in OmegaConf.to_container(composed).items() if key != "hydra"}  # type: ignore
    return set(_flattened(ours))


def _flattened(node: dict[Any, Any], prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _flattened(value, f"{prefix}{key}.")


def _key_fault(key: str, value: str, known: set[str], groups: set[str]) -> Fault:
    parent, _, last = key.rpartition(".")
    beside = sorted(k for k in known if k.rpartition(".")[0] == parent)
    if beside:
        names = [k.rpartition(".")[2] for k in beside if not k.endswith("_target_")] + (
            [] if parent else sorted(groups)
        )
        if elsewhere := _options_with(parent, last):
            return Fault(key, "no such key with this option", f"it is a key of {' and '.join(elsewhere)}", value)
        if same := sorted(k for k in known if k.rpartition(".")[2] == last and not synonyms.hint(last)):
            return Fault(key, NO_KEY, f"did you mean {' or '.join(same)}?", value)
        return unknown_key(last, names, value).below(parent)
    if hint := synonyms.hint(last):
        return Fault(key, NO_KEY, hint, value)
    problem = f"{NO_KEY}. {suggest(key, known)}".strip(" .")
    return Fault(key, problem, f"groups: {', '.join(sorted(groups))}", value)


def _options_with(group: str, key: str) -> list[str]:
    """The options of a group whose YAML has the key."""
    files = sorted(config_dir().joinpath(group).glob("*.yaml")) if group else []
    having = [file.stem for file in files if re.search(rf"^{re.escape(key)}:", file.read_text(), re.MULTILINE)]
    return [f"{group}={name}" for name in having if name != "base"]


def _plain_words(error: Exception) -> str:
    text = re.sub(r"\s+", " ", str(error).strip())
    return redact(text)
