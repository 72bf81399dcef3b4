"""One composed run, and what Hydra writes of it into ``.hydra/``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf._utils import OmegaConfDumper

from runner.config import shared_yaml
from runner.secrets import redact_tree


@dataclass
class Job:
    """One composed run as plain dicts: our configuration, and what Hydra writes of itself into ``.hydra/``."""

    cfg: dict[str, Any]
    """The resolved configuration; the launcher and all later steps read only this one."""
    unresolved: dict[str, Any]
    hydra: dict[str, Any]
    """``unresolved`` and ``hydra`` may contain secrets; ``write_hydra`` leaves them out."""
    overrides: list[str]
    """Overrides of our keys, in the order of the command line."""
    folder: str
    """Where Hydra's configuration puts a single run; of a sweep's job its own folder, or "" where we choose it."""
    sweep_dir: str
    code_folders: list[Path] = field(default_factory=list)
    """Folders searched for the user's own code: the current one, and ``--config-dir`` and its parent."""
    continues: Path | None = None
    """The folder of the completed run whose last checkpoint this run begins with."""
    notes: dict[str, Any] = field(default_factory=dict)
    """More entries of its manifest."""

    @property
    def choices(self) -> dict[str, str]:
        """Group of ours → the option chosen: ``{"quant": "4bit", "data.format": "messages", …}``."""
        chosen = self.hydra["runtime"]["choices"]
        return {group.replace("/", "."): name for group, name in chosen.items() if name and not _is_of_hydra(group)}

    @property
    def is_folder_named(self) -> bool:
        """Whether the user chose the folder of a single run."""
        return any(override.startswith("hydra.run.dir=") for override in self.hydra["overrides"]["hydra"])


def write_hydra(job: Job, folder: Path) -> None:
    """Write ``.hydra/`` as Hydra does, into the folder ``hydra.output_subdir``."""
    if job.hydra["output_subdir"] is None:
        return
    into = folder / job.hydra["output_subdir"]
    into.mkdir(parents=True, exist_ok=True)
    job.hydra["runtime"]["output_dir"] = str(folder)
    trees = {"config": job.unresolved, "hydra": {"hydra": job.hydra}, "overrides": job.overrides}
    for name, tree in trees.items():
        (into / f"{name}.yaml").write_text(_yaml(redact_tree(tree)))


def _yaml(tree: Any) -> str:
    """As OmegaConf writes it, by a faster writer."""
    if isinstance(tree, Mapping):
        return shared_yaml.dump(tree, _Dumper)
    return str(yaml.dump(tree, Dumper=_Dumper, default_flow_style=False, allow_unicode=True, sort_keys=False))


class _Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]
    """Quotes the texts that would be read back as numbers or booleans."""


_Dumper.add_representer(str, OmegaConfDumper.str_representer)


def _is_of_hydra(group: str) -> bool:
    return group.partition("/")[0] == "hydra"
