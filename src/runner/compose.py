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
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from runner.config import config_dir, to_plain, unknown_key
from runner.errors import ConfigError, Fault, suggest
from runner.secrets import redact

CONFIG_NAME = "config"


@dataclass
class Job:
    """One composed run: Hydra's own configuration, and ours as plain dicts."""

    hydra_config: DictConfig
    cfg: dict[str, Any]
    folder_key: str
    """Where Hydra's configuration names the run's folder."""
    subfolder_key: str | None = None

    @property
    def overrides(self) -> list[str]:
        return list(self.hydra_config.hydra.overrides.task)

    def folder(self) -> str:
        HydraConfig.instance().set_config(self.hydra_config)
        base = str(OmegaConf.select(self.hydra_config, self.folder_key))
        below = str(OmegaConf.select(self.hydra_config, self.subfolder_key)) if self.subfolder_key else ""
        return os.path.abspath(os.path.join(base, below))

    def move_to(self, folder: str) -> None:
        """Give a single run another folder than the one it was composed with."""
        with _writable(self.hydra_config.hydra.run):
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


def single(hydra: Hydra, args: argparse.Namespace) -> Job:
    """Compose one run.

    Raises:
        ConfigError: an override that names nothing, with the nearest that exists.
    """
    with told(hydra, args):
        composed = _compose(hydra, args, args.overrides, RunMode.RUN)
    return _job(composed, "hydra.run.dir")


def sweep(hydra: Hydra, args: argparse.Namespace) -> list[Job]:
    """Compose every run of a ``-m`` command, in Hydra's order."""
    with told(hydra, args):
        parser = OverridesParser.create(config_loader=hydra.config_loader)
        (batch,) = BasicSweeper.split_arguments(parser.parse_overrides(args.overrides), max_batch_size=None)
        jobs = []
        for number, overrides in enumerate(batch):
            composed = _compose(hydra, args, list(overrides), RunMode.MULTIRUN)
            with _writable(composed.hydra.job):
                composed.hydra.job.num, composed.hydra.job.id = number, f"runner_{number}"
            jobs.append(_job(composed, "hydra.sweep.dir", "hydra.sweep.subdir"))
    return jobs


def enter(hydra: Hydra, job: Job, function: Any) -> JobReturn:
    """Let Hydra make the folder, write ``.hydra/`` and call ``function`` inside its job environment."""
    callbacks = Callbacks(job.hydra_config)
    context = HydraContext(config_loader=hydra.config_loader, callbacks=callbacks)
    return run_job(
        hydra_context=context,
        task_function=function,
        config=job.hydra_config,
        job_dir_key=job.folder_key,
        job_subdir_key=job.subfolder_key,
        configure_logging=False,
    )


@contextmanager
def told(hydra: Hydra, args: argparse.Namespace) -> Iterator[None]:
    """Turn Hydra's and OmegaConf's complaints into ours."""
    try:
        yield
    except (HydraException, OmegaConfBaseException, ValueError) as error:
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


def _job(composed: DictConfig, folder_key: str, subfolder_key: str | None = None) -> Job:
    ours = OmegaConf.masked_copy(composed, [key for key in composed if key not in ("hydra", "experiment")])
    HydraConfig.instance().set_config(composed)
    cfg = to_plain(ours)
    with _writable(composed.hydra.overrides):  # what Hydra writes into .hydra/ shows no secrets either
        composed.hydra.overrides.task = [redact(str(override)) for override in list(composed.hydra.overrides.task)]
    return Job(composed, cfg, folder_key, subfolder_key)


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
        fault = unknown_key(last, names, value)
        if "did you mean" not in fault.remedy and (same := [k for k in known if k.rpartition(".")[2] == last]):
            return Fault(key, "no such key", f"did you mean {' or '.join(sorted(same))}?", value)
        return fault.below(parent)
    return Fault(key, "no such key", f"{suggest(key, known)} groups: {', '.join(sorted(groups))}".strip(), value)


def _plain_words(error: Exception) -> str:
    text = re.sub(r"\s+", " ", str(error).strip())
    return redact(text)
