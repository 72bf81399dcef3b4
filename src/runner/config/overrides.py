"""Faults of overrides: unreadable, not one option for each group, or keys of Hydra's without an effect."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Literal

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from runner.config import bounds
from runner.config.schema import Inside, Name, Text
from runner.errors import Fault, is_control

EFFECTIVE = ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir", "hydra.mode", "hydra.searchpath",
             "hydra.output_subdir")  # fmt: skip
"""The keys of Hydra's own that do something here."""

BY_US = ("hydra/launcher", "hydra/job_logging", "hydra/hydra_logging")
"""Groups of Hydra's own of which only our option works."""

SWEEPER = "hydra/sweeper"
PATHS = {
    "run.dir": Text, "sweep.dir": Text, "sweep.subdir": Inside | Literal[""], "output_subdir": Name | None,
}  # fmt: skip
"""Keys below ``hydra`` that are paths."""
OF_JOB = ("sweep.subdir", "output_subdir")
"""Those that the jobs of a sweep may have of their own."""

PRESETS = "experiment"
"""The group of which a run may have several options, or none."""

MOST_DIGITS, DEEPEST = 400, 40
MOST_JOBS = 10_000
"""Runs of a grid; more are more likely a wrong range."""


def unreadable(overrides: Iterable[str]) -> Iterator[Fault]:
    """Faults of overrides that Hydra's parser cannot read, or that no file can hold."""
    for text in overrides:
        key, _, value = text.partition("=")
        if problem := _unreadable(text):
            yield Fault(key, problem, "correct the value", value)


def _unreadable(text: str) -> str:
    if text.lstrip("+~").startswith("="):
        return "has no key before ="
    if any(is_control(c) and c not in "\n\t" for c in text):
        return "contains control characters, or bytes that are not UTF-8"
    if re.search(rf"[\d_]{{{MOST_DIGITS + 1},}}", text):
        return f"contains a number of more than {MOST_DIGITS} digits"
    depth = deepest = 0
    for c in text:
        depth += (c in "([{") - (c in ")]}")
        deepest = max(deepest, depth)
    return f"is nested more than {DEEPEST} levels deep" if deepest > DEEPEST else ""


def repeated(swept: Iterable[str], overrides: Sequence[str]) -> Iterator[Fault]:
    """Faults of swept keys that the command line sets twice: only the last would count."""
    keys = [text.partition("=")[0].lstrip("+") for text in overrides]
    for key, _, value in (text.partition("=") for text in swept):
        if keys.count(key.lstrip("+")) > 1:
            yield Fault(key, "is set twice", "give all its values once", value)


def wrong_counts(swept: Iterable[Override]) -> Iterator[Fault]:
    """Faults of swept keys without a value, or of a grid with more runs than anybody waits for."""
    counts = [(each, len(list(islice(each.sweep_string_iterator(), MOST_JOBS + 1)))) for each in swept]
    remedy = "give it values; glob(…) finds options of a group, range(…) ends before its second number"
    yield from (
        Fault(each.key_or_group, "has no values", remedy, value_text(each)) for each, count in counts if not count
    )
    if math.prod(count for _, count in counts) > MOST_JOBS:
        remedy = "name fewer values, or let search=random draw from them"
        yield Fault("-m", f"the swept keys have more than {MOST_JOBS:,} combinations", remedy)


def value_text(override: Override) -> str:
    """The value as it was written."""
    return str(override.input_line or "").partition("=")[2]


def wrong_choices(choices: Iterable[Override], options_of: Callable[[str], list[str]]) -> Iterator[Fault]:
    """Faults of overrides of groups that choose no option, or several at once."""
    for override in choices:
        group, value = override.key_or_group, override.value()
        if group == "hydra":
            yield Fault(group, "cannot be set as a whole", f"set one of {', '.join(EFFECTIVE)}", str(value))
        is_null = value is None and not override.is_delete()
        is_other = group.partition("/")[0] == "hydra" or (group == PRESETS and not is_null)
        if is_other and not isinstance(value, list) and value != "":
            continue
        remedy = f"choose one option with {group}=…: {', '.join(name for name in options_of(group) if name != 'base')}"
        if override.is_delete():
            yield Fault(f"~{group}", "cannot be removed: every run has an option of this group", remedy)
        elif isinstance(value, list) and not (group == PRESETS and all(isinstance(name, str) for name in value)):
            yield Fault(group, "must be the name of one option, not a list", remedy, str(override.get_value_string()))
        elif value is None or value == "":
            remedy += ", or leave it out" if group == PRESETS else ""
            yield Fault(group, "must be the name of one option", remedy, str(override.get_value_string()))


def without_effect(parsed: Sequence[Override]) -> Iterator[Fault]:
    """Faults of keys of Hydra's own that change nothing here."""
    has_sweeper = any(override.key_or_group == SWEEPER for override in parsed)
    for override in filter(Override.is_hydra_override, parsed):
        key, value = override.key_or_group, value_text(override)
        if key in BY_US:
            remedy = "choose how jobs are started with launcher=local, launcher=accelerate or launcher=slurm"
            remedy = remedy if key == "hydra/launcher" else "leave it out: a run writes train.log"
            yield Fault(key, "has no other option here", remedy, value)
        elif key.startswith("hydra.sweeper") and not has_sweeper:
            remedy = "write the keys and their values themselves: -m lora.r=4,8, or search.space={…} for a search"
            yield Fault(key, "has no effect here", remedy, value)
        elif not key.replace("/", ".").startswith((*EFFECTIVE, "hydra.sweeper")):
            remedy = f"leave it out; of Hydra's own keys these work: {', '.join(EFFECTIVE)}"
            yield Fault(key, "has no effect here", remedy, value)


def wrong_paths(composed: DictConfig, keys: Iterable[str] = tuple(PATHS)) -> Iterator[Fault]:
    """Faults of paths below ``hydra`` that are empty or leave their folder."""
    for key in keys:
        path: Any = OmegaConf.select(composed.hydra, key)
        if problem := bounds.mismatch(path, PATHS[key]):
            yield Fault(f"hydra.{key}", problem, "name a folder, or leave it out", path)


def sweeper_of(composed: DictConfig) -> str:
    """The option of ``hydra/sweeper``."""
    return str(composed.hydra.runtime.choices.get(SWEEPER))
