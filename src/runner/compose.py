"""Hydra's part: command line → composed configuration(s), with errors that say what to do."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from hydra._internal.callbacks import Callbacks
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, run_job, setup_globals
from hydra.errors import HydraException
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from runner.config import config_dir, to_plain, unknown_key
from runner.errors import ConfigError, Fault, suggest
from runner.secrets import redact, redact_tree

CONFIG_NAME = "config"


EFFECTIVE = ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir", "hydra.mode", "hydra.searchpath",
             "hydra.output_subdir", "hydra.callbacks")  # fmt: skip
"""The keys of Hydra's own that do something here."""


@dataclass
class Job:
    """One composed run: Hydra's own configuration, and ours as plain dicts."""

    hydra_config: DictConfig
    """As Hydra writes it into ``.hydra/``: without secrets."""
    cfg: dict[str, Any]
    is_of_sweep: bool

    @property
    def overrides(self) -> list[str]:
        return list(self.hydra_config.hydra.overrides.task)

    @property
    def is_folder_named(self) -> bool:
        """Whether the user said where a single run goes."""
        return any(override.startswith("hydra.run.dir=") for override in self.hydra_config.hydra.overrides.hydra)

    def folder(self) -> str:
        HydraConfig.instance().set_config(self.hydra_config)
        node = self.hydra_config.hydra
        path = os.path.join(node.sweep.dir, node.sweep.subdir) if self.is_of_sweep else node.run.dir
        return os.path.abspath(os.path.expanduser(path))

    def move_to(self, folder: str) -> None:
        """Give the run this folder, whatever it was composed with."""
        with _writable(self.hydra_config.hydra):
            self.hydra_config.hydra.run.dir = folder


def parse(argv: list[str]) -> argparse.Namespace:
    """Hydra's own command line."""
    return get_args_parser().parse_args(argv)


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
        yield hydra
    finally:
        GlobalHydra.instance().clear()


def jobs(hydra: Hydra, args: argparse.Namespace) -> list[Job]:
    """Compose the run of the command line, or every run of a sweep, in Hydra's order.

    Raises:
        ConfigError: an override that names nothing, with the nearest that exists.
    """
    if args.experimental_rerun:
        problem, remedy = "is not for this program", "python -m runner resume=RUN continues a run as it was configured"
        raise ConfigError(Fault("--experimental-rerun", problem, remedy, args.experimental_rerun))
    with told(hydra, args):
        if not args.multirun:
            composed = _compose(hydra, args, args.overrides, RunMode.RUN)
            if composed.hydra.mode != RunMode.MULTIRUN:
                return [_job(composed, is_of_sweep=False)]
        return [_job(composed, is_of_sweep=True) for composed in _sweep(hydra, args)]


def _sweep(hydra: Hydra, args: argparse.Namespace) -> Iterator[DictConfig]:
    parser = OverridesParser.create(config_loader=hydra.config_loader)
    (batch,) = BasicSweeper.split_arguments(parser.parse_overrides(args.overrides), max_batch_size=None)
    for number, overrides in enumerate(batch):
        composed = _compose(hydra, args, list(overrides), RunMode.MULTIRUN)
        with _writable(composed.hydra):
            composed.hydra.job.num, composed.hydra.job.id = number, f"runner_{number}"
        yield composed


def enter(hydra: Hydra, job: Job, function: Any) -> JobReturn:
    """Let Hydra make the folder, write ``.hydra/`` and call ``function`` inside its job environment."""
    callbacks = Callbacks(job.hydra_config)
    context = HydraContext(config_loader=hydra.config_loader, callbacks=callbacks)
    return run_job(
        hydra_context=context,
        task_function=function,
        config=job.hydra_config,
        job_dir_key="hydra.run.dir",
        job_subdir_key=None,
        configure_logging=False,
    )


@contextmanager
def told(hydra: Hydra, args: argparse.Namespace) -> Iterator[None]:
    """Turn Hydra's and OmegaConf's complaints into ours."""
    try:
        yield
    except (HydraException, OmegaConfBaseException, ValueError, AttributeError) as error:
        raise ConfigError(*_faults(hydra, args, error)) from error


@contextmanager
def _writable(node: DictConfig) -> Iterator[None]:
    with read_write(node), open_dict(node):
        yield


def _compose(hydra: Hydra, args: argparse.Namespace, overrides: list[str], mode: RunMode) -> DictConfig:
    return hydra.compose_config(
        config_name=args.config_name or CONFIG_NAME,
        overrides=overrides,
        run_mode=mode,
        with_log_configuration=False,
    )


def _job(composed: DictConfig, *, is_of_sweep: bool) -> Job:
    _refuse_without_effect(composed)
    ours = OmegaConf.masked_copy(composed, [str(key) for key in composed if key not in ("hydra", "experiment")])
    HydraConfig.instance().set_config(composed)
    cfg = to_plain(ours)
    with _writable(composed), _writable(composed.hydra):
        _redact(composed)
    return Job(composed, cfg, is_of_sweep)


def _refuse_without_effect(composed: DictConfig) -> None:
    faults = []
    for override in composed.hydra.overrides.hydra:
        key, _, value = str(override).lstrip("+~").partition("=")
        if not key.replace("/", ".").startswith(EFFECTIVE):
            remedy = f"leave it out; of Hydra's own keys these work: {', '.join(EFFECTIVE)}"
            faults.append(Fault(key, "has no effect here", remedy, value))
    if faults:
        raise ConfigError(*faults)


def _redact(node: Any) -> None:
    """Mask secrets in place, in whatever Hydra will write into ``.hydra/``."""
    for key in range(len(node)) if isinstance(node, ListConfig) else list(node):
        child = node._get_node(key)
        if isinstance(child, DictConfig | ListConfig):
            if not (child._is_none() or child._is_missing() or child._is_interpolation()):
                _redact(child)
        elif isinstance(child._value(), str):
            child._set_value(redact_tree({str(key): child._value()})[str(key)])


def _faults(hydra: Hydra, args: argparse.Namespace, error: Exception) -> list[Fault]:
    """Find every override that names no key or no option; where none does, pass Hydra's own words on."""
    faults = list(_override_faults(hydra, args))
    return faults or [Fault("", _plain_words(error), "python -m runner --help shows groups, options and examples")]


def _override_faults(hydra: Hydra, args: argparse.Namespace) -> Iterator[Fault]:
    try:
        parsed = OverridesParser.create(config_loader=hydra.config_loader).parse_overrides(args.overrides)
    except HydraException:
        yield from map(_syntax_fault, filter(lambda override: "=" not in override, args.overrides))
        return
    groups = {name for name in hydra.config_loader.list_groups("") if name != "hydra"}
    choices = [override for override in parsed if _is_choice(override.key_or_group, hydra)]
    wrong = {id(override): list(_choice_faults(hydra, override)) for override in choices}
    right = [override for override in choices if not wrong[id(override)] and not override.is_sweep_override()]
    known = _known_keys(hydra, args, [str(override.input_line) for override in right])
    for override in parsed:
        key = override.key_or_group
        if key.split(".")[0].split("/")[0] == "hydra" or override.is_add() or override.is_force_add():
            continue
        if id(override) in wrong:
            yield from wrong[id(override)]
        elif known and key not in known:
            yield _key_fault(key, _value_of(override), known, groups)


def _syntax_fault(override: str) -> Fault:
    return Fault(override, "is neither a verb nor an override", "write key=value, or see python -m runner --help")


def _value_of(override: Any) -> str:
    return str(override.input_line or "").partition("=")[2]


def _is_choice(key: str, hydra: Hydra) -> bool:
    parent, _, name = key.rpartition("/")
    return name in hydra.config_loader.list_groups(parent)


def _choice_faults(hydra: Hydra, override: Any) -> Iterator[Fault]:
    group, value = override.key_or_group, _value_of(override)
    options = [name for name in hydra.config_loader.get_group_options(group) if name != "base"]
    for chosen in value.split(",") if value not in ("", "null") and "(" not in value else []:
        if chosen.strip() not in options:
            allowed = f"{suggest(chosen, options)} options here: {', '.join(options)}".strip()
            yield Fault(group, "no such option", allowed, chosen)


def _known_keys(hydra: Hydra, args: argparse.Namespace, choices: list[str]) -> set[str]:
    """All keys that exist under the chosen options; empty where even the choices do not compose."""
    try:
        composed = _compose(hydra, args, choices, RunMode.RUN)
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
        fault = unknown_key(last, names, value)
        if "did you mean" not in fault.remedy and (same := [k for k in known if k.rpartition(".")[2] == last]):
            return Fault(key, "no such key", f"did you mean {' or '.join(sorted(same))}?", value)
        return fault.below(parent)
    return Fault(key, "no such key", f"{suggest(key, known)} groups: {', '.join(sorted(groups))}".strip(), value)


def _options_with(group: str, key: str) -> list[str]:
    """The options of a group whose YAML has the key."""
    files = sorted(config_dir().joinpath(group).glob("*.yaml")) if group else []
    having = [file.stem for file in files if re.search(rf"^{re.escape(key)}:", file.read_text(), re.MULTILINE)]
    return [f"{group}={name}" for name in having if name != "base"]


def _plain_words(error: Exception) -> str:
    text = re.sub(r"\s+", " ", str(error).strip())
    return redact(text)
