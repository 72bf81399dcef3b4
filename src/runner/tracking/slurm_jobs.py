"""The jobs of runs, asked of Slurm's queue during one look at them: by their ids, or by what their submitter left."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from runner.errors import RunnerError
from runner.tracking import lookup
from runner.tracking.sweepdir import slurm_room

if TYPE_CHECKING:
    from runner.tracking.slurm_client import Job


class Queue:
    """Slurm as it is during one look; where it does not answer that is said once, and it is not asked again."""

    def __init__(self) -> None:
        self._of_home: dict[Path, dict[str, str]] = {}

    def jobs(self, ids: Iterable[str]) -> dict[str, Job] | None:
        """What Slurm knows of the jobs with these ids, the empty one aside; None where it does not answer."""
        wanted = sorted({*ids} - {""})
        if not wanted:
            return {}
        if not self._answers:
            return None
        from runner.tracking import slurm_client

        try:
            return dict(slurm_client.jobs(wanted))
        except RunnerError as error:
            self._is_silent(str(error))
            return None

    def not_noted(self, home: Path) -> dict[str, str]:
        """Folder → job, of submissions below ``home`` that have no id yet, where Slurm has one."""
        if home not in self._of_home:
            self._of_home[home] = dict(self._found(home))
        return self._of_home[home]

    def _found(self, home: Path) -> Iterable[tuple[str, str]]:
        for file in slurm_room(home).glob("runner-*.json"):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # damaged, or gone
                submission = json.loads(file.read_text())
                if submission["job_id"] or submission["cluster"] != "slurm" or not self._answers:
                    continue
                from runner.tracking import slurm_client

                folders = submission["folders"]
                try:
                    found = slurm_client.named(submission["name"])
                except RunnerError as error:
                    self._is_silent(str(error))
                    return
                for id in found[:1]:
                    ids = [f"{id}_{number}" for number in range(len(folders))] if len(folders) > 1 else [id]
                    yield from zip(folders, ids, strict=True)

    @functools.cached_property
    def _answers(self) -> bool:
        from runner.tracking import slurm_client

        if said := slurm_client.silence():
            self._is_silent(said)
        return not said

    def _is_silent(self, why: str) -> None:
        """Say so, and ask no more: a controller that is there may still not answer squeue."""
        self._answers = False
        lookup.log.warning(f"Slurm does not answer, so what it would know is not shown: {why}")
