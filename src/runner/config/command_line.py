"""Hydra's command line: parse it, and open Hydra with the config groups of this package and of the user."""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import yaml
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.utils import setup_globals

from runner.config import code_files, synonyms
from runner.config.bind import config_dir, keys_named
from runner.config.hydra_errors import is_choice
from runner.config.overrides import unreadable
from runner.errors import ConfigError, Fault, refuse, suggest


def parse(argv: list[str]) -> argparse.Namespace:
    """Hydra's own command line.

    Raises:
        ConfigError: a flag of Hydra's that means something else here, an unknown one, or an override that cannot be
            read.
    """

    def on_error(message: str) -> NoReturn:
        words = message.removeprefix("unrecognized arguments: ").split()
        if message.startswith("unrecognized arguments: "):
            refuse(_dashed(word, parser) for word in words if word.startswith("--") and word[2:3].isalpha())
        remedy = synonyms.PRESET if message.startswith("ambiguous option: --config ") else "--help shows the flags"
        raise ConfigError(Fault("", f"the command line cannot be read: {message}", remedy))

    parser = get_args_parser()
    parser.error = on_error  # type: ignore[method-assign]
    args = parser.parse_intermixed_args(argv)  # flags may follow overrides, too
    refuse(unreadable(args.overrides))
    for flag, given in (("--package", args.package), ("--resolve", args.resolve)):
        if given and not args.cfg:
            raise ConfigError(Fault(flag, "has no effect without --cfg", "add --cfg job, or leave it out"))
    if args.experimental_rerun:
        problem, remedy = "is not for this program", "rerun RUN trains a run again as it was, resume=RUN continues it"
        raise ConfigError(Fault("--experimental-rerun", problem, remedy, args.experimental_rerun))
    return args


def _dashed(word: str, parser: argparse.ArgumentParser) -> Fault:
    """The fault of a key that is written as an option of other programs: ``--learning_rate 1e-4``."""
    flag, has_value, value = word.partition("=")
    name = flag.removeprefix("--").replace("-", "_")
    keys = sorted(keys_named(name), key=lambda key: key.count("."))
    keys = keys[:1] if keys[:1] == [name] else keys
    own = f"write {' or '.join(f'{key}=…' for key in keys)}, without dashes" if keys else ""
    flags = suggest(flag, parser._option_string_actions)
    remedy = own or synonyms.hint(name) or flags or "keys are written without dashes: key=value"
    return Fault(flag, "no such flag", remedy, value if has_value else ...)


@contextmanager
def opened(args: argparse.Namespace) -> Iterator[Hydra]:
    """Hydra with our groups, and those of ``--config-dir`` before them."""
    search_path = create_config_search_path(str(config_dir()))
    for extra in (args.config_path, args.config_dir):
        if extra:
            folder = os.path.abspath(extra)
            if not os.path.isdir(folder):
                raise ConfigError(Fault("--config-dir", "no such folder", "name a folder of config groups", extra))
            search_path.prepend(provider="command-line", path=f"file://{folder}")
    setup_globals()
    hydra = Hydra.create_main_hydra2(task_name="runner", config_search_path=search_path)
    try:
        with _own_options(hydra, args.overrides):
            yield hydra
    finally:
        GlobalHydra.instance().clear()


@contextmanager
def _own_options(hydra: Hydra, overrides: Sequence[str]) -> Iterator[None]:
    """While the block runs, ``group=name`` chooses a function of ``code=…`` if no YAML file has that name."""
    texts = dict(text.partition("=")[::2] for text in overrides)
    if code_files.KEY not in texts:
        yield
        return
    value: Any = []
    with suppress(yaml.YAMLError):  # the parser of overrides reports it
        value = yaml.safe_load(texts.pop(code_files.KEY)) or []
    entries = value if isinstance(value, list) else str(value).split(",")
    functions = code_files.options(map(str, entries))
    store = ConfigStore.instance()
    before = copy.deepcopy(store.repo)
    for group, names in texts.items():
        if is_choice(group, hydra):
            for name in names.split(","):
                if name in functions and name not in hydra.config_loader.get_group_options(group):
                    store.store(group=group, name=name, node=functions[name], provider="code")
    try:
        yield
    finally:
        store.repo = before
