"""Which keys of a rerun may differ from the original run: where and how it runs, and where the same files are now."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from typing import Any

from runner.config import pinned_weights
from runner.config.bind import TARGET, config_dir, unknown_key
from runner.config.hydra_errors import no_option
from runner.errors import ConfigError, Fault
from runner.report.record import Recorded

WHERE = ("name", "outputs_dir", "hydra.run.dir")
GROUPS = ("launcher", "tracking")
PLACES = ("data.path", "data.eval_path", "data.format.function", "model.path", *pinned_weights.KEYS)
"""Keys with paths of files. That they are the same files is checked, or shows at the first evaluation."""


def refuse_changes(original: Recorded, overrides: list[str]) -> None:
    """Refuse keys that change what is computed, or that have no effect on a rerun.

    Raises:
        ConfigError: with all of them.
    """
    faults = []
    others = {key_of(word): word for word in overrides if not _is_where(key_of(word))}
    ignored = {key: word for key, word in others.items() if key in ("resume", "retry", "sweep")}
    others = {key: word for key, word in others.items() if key not in ignored}
    for key, word in ignored.items():
        problem = "has no effect on a rerun, which gets its own folder"
        faults.append(Fault(key, problem, "leave it out", word.partition("=")[2]))
    unknown = [fault for word in others.values() if (fault := _unknown(word, original.config, set(others)))]
    faults += unknown
    if others and not unknown:
        recorded = [str(word) for word in original.manifest.get("overrides") or []]
        kept = [word for word in recorded if key_of(word) not in {*others, "resume", "retry"}]
        problem = "would change what is computed; a rerun accepts only where and how it runs"
        remedy = f"start a new run: python -m runner {shlex.join([*kept, *others.values()])}"
        faults.append(Fault(" ".join(others.values()), problem, remedy))
    if faults:
        raise ConfigError(*faults)


def _unknown(word: str, config: dict[str, Any], keys: set[str]) -> Fault | None:
    """The fault of an override with an unknown key or option, else None. ``keys``: all overridden keys."""
    key, _, value = word.partition("=")
    groups = {path.name for path in config_dir().iterdir() if path.is_dir()}
    if word.startswith(("+", "~")) or (group_of(key) in keys and key not in groups) or group_of(key) == "hydra":
        return None  # a key of another option than the run's: that option checks its own keys
    if key in groups:
        options = sorted(path.stem for path in (config_dir() / key).glob("*.yaml") if path.stem != "base")
        return None if value in (*options, "null") else no_option(key, value, options)
    node: Any = config
    parts = key.split(".")
    for number, part in enumerate(parts):
        if not isinstance(node, dict) or part not in node:
            known = [name for name in node if name != TARGET] if isinstance(node, dict) else []
            names = [*known, *(sorted(groups) if not number else [])]
            return replace(unknown_key(part, names, value), key=key)
        node = node[part]
    return None


def key_of(word: str) -> str:
    """The key of an override."""
    return word.lstrip("+~").partition("=")[0]


def _is_where(key: str) -> bool:
    place = re.sub(r"^data\.(sources|evals)\.[^.]+\.", "data.", key)
    return place in (*WHERE, *GROUPS, *PLACES) or key.startswith(tuple(f"{group}." for group in GROUPS))


def group_of(word: str) -> str:
    """The group of an override: the first part of its key."""
    return key_of(word).partition(".")[0]
