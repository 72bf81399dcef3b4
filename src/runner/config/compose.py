"""Compose the configuration of each job of a command line, each job once.

Hydra composes every job of a sweep twice, at 0.2 s each. The slow part is the defaults list, and values come after it:
so it is built once for each distinct choice of groups, and the values are applied to a copy by Hydra's own function.
The copy is unpickled, which takes an eighth of the time of ``deepcopy``.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import os
import pickle
import re
from collections.abc import Iterable, Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

from hydra._internal.config_loader_impl import ConfigLoaderImpl, get_overrides_dirname
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from runner import imports
from runner.config import data_nodes, overrides, user_code
from runner.config.bind import copied, is_final, to_plain
from runner.config.hydra_errors import CONFIG_NAME, as_config_errors, is_choice
from runner.config.job import Job
from runner.errors import ConfigError, Fault, refuse
from runner.files import user_path

ONE_A_SWEEP = ("outputs_dir", "sweep", "resume", "retry", "search")
"""Keys of the whole sweep: its folder, and how an earlier sweep is continued."""


class _Base(NamedTuple):
    """What the jobs with the same options of all groups have in common."""

    pickled: bytes
    plain: dict[str, Any]
    """The same, not resolved."""


class Composer:
    """Composes the jobs of one command line."""

    def __init__(self, hydra: Hydra, args: argparse.Namespace) -> None:
        self.hydra, self.args = hydra, args
        self.parser = OverridesParser.create(config_loader=hydra.config_loader)
        self._bases: dict[tuple[RunMode, tuple[str, ...]], _Base] = {}
        self._options_of = functools.cache(hydra.config_loader.get_group_options)  # copies all of Hydra's sources
        self._parsed = functools.cache(self.parser.parse_override)
        self._choices: dict[str, bool] = {}
        self._sweep_dir: str | None = None
        own = [Path(extra).resolve() for extra in (args.config_path, args.config_dir) if extra]
        self._code_folders = [Path.cwd(), *own, *(folder.parent for folder in own)]

    def is_sweep(self) -> bool:
        """Whether the command line starts several runs: by ``-m``, or by ``hydra.mode``."""
        if self.args.multirun:
            return True
        with as_config_errors(self.hydra, self.args):
            return bool(self._composed(self.args.overrides, RunMode.RUN).hydra.mode == RunMode.MULTIRUN)

    def single(self) -> Job:
        """The one run of the command line.

        Raises:
            ConfigError: an override that names nothing, with the nearest that exists.
        """
        with as_config_errors(self.hydra, self.args):
            return self._job(self.args.overrides, RunMode.RUN, 0)

    def master(self) -> DictConfig:
        """The configuration that all jobs share: swept keys have their default, swept groups their first option."""
        with as_config_errors(self.hydra, self.args):
            composed = self._composed([*self.fixed, *self._first_choices()], RunMode.MULTIRUN)
            self._number(composed, 0)  # a path may contain it
            refuse(overrides.wrong_paths(composed))
        return composed

    def _first_choices(self) -> Iterator[str]:
        """The first option of each swept group: other options may not have the keys that the command line sets."""
        for override in map(self.parser.parse_override, self.swept):
            if is_choice(override.key_or_group, self.hydra) and isinstance(override.value(), ChoiceSweep):
                yield f"{override.key_or_group}={next(override.sweep_string_iterator())}"

    def chosen(self, group: str) -> dict[str, Any]:
        """The option of a group that all jobs of a sweep share, as a plain dict."""
        composed = self.master()
        with read_write(composed), open_dict(composed):
            return dict(to_plain(composed[group]))

    def grid(self, arguments: Sequence[str]) -> list[list[str]]:
        """The overrides of each job, every combination of the swept values, in Hydra's order."""
        endless = [text for text in self.swept if isinstance(self.parser.parse_override(text).value(), IntervalSweep)]
        problem, remedy = "is a range without steps", "search=random, tpe or asha draw from it; or write range(…)"
        refuse(Fault(_key(text), problem, remedy, text.partition("=")[2]) for text in endless)
        refuse(overrides.wrong_counts(self.parser.parse_overrides(self.swept)))
        with as_config_errors(self.hydra, self.args):
            (batch,) = BasicSweeper.split_arguments(self.parser.parse_overrides(list(arguments)), None)
        return [list(each) for each in batch]

    def value_of(self, text: str) -> Any:
        """The value that an override gives, as Hydra reads it.

        Raises:
            ConfigError: it is no override, or has several values.
        """
        with as_config_errors(self.hydra, self.args):
            override = self.parser.parse_override(text)
        if override.is_sweep_override():
            raise ConfigError(
                Fault(override.key_or_group, "has several values", "give it one", overrides.value_text(override))
            )
        return override.value()

    @functools.cached_property
    def sweep_name(self) -> str:
        """The name of a sweep without ``sweep=NAME``: the keys that have several values, joined."""
        return named_by(self.parser.parse_override(text).key_or_group for text in self.swept) or "single"

    def refuse_swept(self) -> None:
        """Refuse several values for a key of which a sweep has one."""
        with as_config_errors(self.hydra, self.args):
            parsed = [each for each in self.parser.parse_overrides(self.args.overrides) if each.is_sweep_override()]
        problem, remedy = "cannot be swept: it is the whole sweep's", "give it one value"
        refuse(
            Fault(each.key_or_group, problem, remedy, overrides.value_text(each))
            for each in parsed
            if each.key_or_group in ONE_A_SWEEP or each.is_hydra_override()
        )

    def label(self, given: Sequence[str]) -> str:
        """The overrides that differ between the jobs of a sweep: those that the command line does not fix."""
        fixed = {_key(text) for text in self.fixed} - {
            _key(text) for text in self.args.overrides if text not in self.fixed
        }
        return ",".join(text for text in given if _key(text) not in fixed)

    @functools.cached_property
    def swept(self) -> list[str]:
        """The overrides of the command line that have several values."""
        with as_config_errors(self.hydra, self.args):
            swept = [text for text in self.args.overrides if self.parser.parse_override(text).is_sweep_override()]
        refuse(overrides.repeated(swept, self.args.overrides))
        return swept

    @functools.cached_property
    def fixed(self) -> list[str]:
        """The overrides of the command line that have one value."""
        return [text for text in self.args.overrides if text not in self.swept]

    def jobs(self, batch: Sequence[Sequence[str]], first: int = 0) -> list[Job]:
        """One job for each list of overrides; ``first`` is the number of the first one."""
        with as_config_errors(self.hydra, self.args), imports.seldom_collected():
            jobs = [self._job(list(each), RunMode.MULTIRUN, number) for number, each in enumerate(batch, first)]
        self._refuse_differing(jobs)
        return jobs

    def _refuse_differing(self, jobs: Sequence[Job]) -> None:
        """Refuse a swept preset that sets for its own jobs what is the whole sweep's."""
        shared: Any = OmegaConf.to_container(self.master(), resolve=False, enum_to_str=True)
        faults: dict[str, Fault] = {}
        remedy = "give it on the command line, for all jobs, or leave it out of what is swept"
        for job in jobs:
            same = {key: (job.unresolved[key], shared[key]) for key in ONE_A_SWEEP}
            same |= {f"{key} ": (job.cfg[key], jobs[0].cfg[key]) for key in ONE_A_SWEEP}
            same["hydra.sweep.dir"] = job.hydra["sweep"]["dir"], shared["hydra"]["sweep"]["dir"]
            for key in (key.strip() for key, (own, common) in same.items() if own != common):
                problem = f"is the whole sweep's, but the job {self.label(job.overrides)} sets its own"
                faults.setdefault(key, Fault(key, problem, remedy))
        refuse(faults.values())

    def _job(self, given: list[str], mode: RunMode, number: int) -> Job:
        composed = self._composed(given, mode)
        if mode == RunMode.MULTIRUN:
            self._number(composed, number)
        refuse(overrides.wrong_paths(composed, overrides.OF_JOB if mode == RunMode.MULTIRUN else overrides.PATHS))
        plain = self._unresolved(composed, given, mode)
        node = plain.pop("hydra")
        folder, sweep_dir = self._folders(composed, mode)
        own = [str(key) for key in composed if key not in ("hydra", "experiment")]
        cfg = (
            copied({key: plain[key] for key in own})
            if is_final(plain)
            else to_plain(OmegaConf.masked_copy(composed, own))
        )
        cfg["data"] = data_nodes.completed(cfg["data"])
        user_code.refuse_given(cfg)
        return Job(cfg, plain, node, node["overrides"]["task"], folder, sweep_dir, self._code_folders)

    def _number(self, composed: DictConfig, number: int) -> None:
        """Set the number and the id of a job of a sweep, as Hydra does, and the name of its sweep."""
        with read_write(composed.hydra), open_dict(composed.hydra):
            composed.hydra.job.num, composed.hydra.job.id = number, f"runner_{number}"
            composed.sweep = self.sweep_name if composed.sweep is None else composed.sweep

    def _folders(self, composed: DictConfig, mode: RunMode) -> tuple[str, str]:
        """The job's own folder ("" where we choose it) and that of its sweep, which all jobs of a command share."""
        node = composed.hydra
        user_path(composed.outputs_dir, "outputs_dir")  # the other folders are in it: a fault names its key
        if mode == RunMode.RUN:
            return _absolute(node.run.dir, "hydra.run.dir"), ""
        self._sweep_dir = self._sweep_dir or _absolute(node.sweep.dir, "hydra.sweep.dir")  # once: ${now:…} moves on
        return (os.path.join(self._sweep_dir, node.sweep.subdir) if node.sweep.subdir else ""), self._sweep_dir

    def _unresolved(self, composed: DictConfig, given: list[str], mode: RunMode) -> dict[str, Any]:
        """The configuration as plain dicts, not resolved; what no override changes is copied from its base."""
        parsed = [self._parsed(text) for text in given]
        base = self._bases[mode, self._choices_in(parsed)].plain
        paths = [[*re.split(r"[.\[]", override.key_or_group), ""] for override in parsed]
        changed = {"sweep", *(path[0] for path in paths)} - {"hydra"}
        of_hydra = {"job", "overrides", *(path[1] for path in paths if path[0] == "hydra")}
        plain = _plain(composed, {**base, "hydra": None}, changed)
        return {**plain, "hydra": _plain(composed.hydra, base["hydra"], of_hydra)}

    def _composed(self, given: list[str], mode: RunMode) -> DictConfig:
        parsed = [self._parsed(text) for text in given]
        groups = [override for override in parsed if self._is_choice(override.key_or_group)]
        refuse(overrides.without_effect(parsed))
        refuse(overrides.wrong_choices(groups, self._options_of))
        base = mode, self._choices_in(parsed)
        if base not in self._bases:
            made = self.hydra.compose_config(
                self.args.config_name or CONFIG_NAME, list(base[1]), mode, with_log_configuration=False
            )
            plain: Any = OmegaConf.to_container(made, resolve=False, enum_to_str=True)
            self._bases[base] = _Base(pickle.dumps(made), plain)
        composed: DictConfig = pickle.loads(self._bases[base].pickled)
        values = [override for override in parsed if not self._changes_defaults(override)]
        lines = [(override.is_hydra_override(), str(override.input_line)) for override in parsed]
        for key in data_nodes.OPEN:
            if isinstance(node := OmegaConf.select(composed, key), DictConfig):
                OmegaConf.set_struct(node, False)  # the names below it are the user's
        with read_write(composed.hydra):
            ConfigLoaderImpl._apply_overrides_to_config(values, composed)
            composed.hydra.overrides.hydra = [line for is_hydra, line in lines if is_hydra]
            composed.hydra.overrides.task = [line for is_hydra, line in lines if not is_hydra]
            form = composed.hydra.job.config.override_dirname
            composed.hydra.job.override_dirname = get_overrides_dirname(
                [override for override in parsed if not override.is_hydra_override()],
                form.exclude_keys, form.item_sep, form.kv_sep,
            )  # fmt: skip
        current: Any = HydraConfig.instance()
        current.cfg = composed  # for what interpolates ${hydra:…}
        return composed

    def _choices_in(self, parsed: Sequence[Override]) -> tuple[str, ...]:
        return tuple(str(override.input_line) for override in parsed if self._changes_defaults(override))

    def _changes_defaults(self, override: Override) -> bool:
        """Whether the override is used for the defaults list: it chooses an option, or sets the search path."""
        key = override.key_or_group
        return key == "hydra.searchpath" or (self._is_choice(key) and not isinstance(override.value(), dict))

    def _is_choice(self, key: str) -> bool:
        if key not in self._choices:
            self._choices[key] = is_choice(key, self.hydra)
        return self._choices[key]


def named_by(keys: Iterable[str]) -> str:
    """The name of a sweep over these keys. Different keys give different names, even when cut to 120 characters."""
    name = "+".join(sorted({key.replace("/", ".") for key in keys}))
    return name if len(name) <= 120 else f"{name[:111]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _plain(node: DictConfig, base: dict[str, Any], changed: set[str]) -> dict[str, Any]:
    """The node as a plain dict, not resolved: the values of ``changed`` keys as they are, the others as in ``base``."""
    return {
        str(key): _plain_value(value) if key in changed or key not in base else copied(base[str(key)])
        for key, value in node.items_ex(resolve=False)
    }


def _plain_value(value: Any) -> Any:
    if OmegaConf.is_config(value):
        return OmegaConf.to_container(value, resolve=False, enum_to_str=True)
    return value.name if isinstance(value, Enum) else value


def _key(text: str) -> str:
    return text.partition("=")[0]


def _absolute(path: str, key: str) -> str:
    return os.path.abspath(user_path(path, key))
